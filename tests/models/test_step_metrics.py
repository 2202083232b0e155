"""AUROC, first-error F1 and calibration against slow references and hand-made examples."""

from __future__ import annotations

import math
import random

import pytest

from stepladder.models.step_metrics import (
    auroc,
    binary_f1,
    correlation,
    expected_calibration_error,
    first_error_f1,
    lowest_is_last,
    matthews,
    predicted_first_error,
    prm_score,
    reliability,
)


def slow_auroc(scores, positive):
    pairs = [
        1.0 if a > b else 0.5 if a == b else 0.0
        for a, is_positive in zip(scores, positive, strict=True) if is_positive
        for b, other in zip(scores, positive, strict=True) if not other
    ]  # fmt: skip
    return sum(pairs) / len(pairs)


@pytest.mark.parametrize("levels", [2, 5, 1000])
def test_auroc_is_the_share_of_ordered_pairs(levels):
    rng = random.Random(levels)
    for _ in range(30):
        n = rng.randint(2, 40)
        positive = [True, False] + [rng.random() < 0.3 for _ in range(n - 2)]
        scores = [rng.randrange(levels) / levels for _ in range(n)]
        assert auroc(scores, positive) == pytest.approx(slow_auroc(scores, positive))


def test_auroc_at_its_ends():
    assert auroc([0.1, 0.2, 0.8, 0.9], [False, False, True, True]) == 1.0
    assert auroc([0.9, 0.8, 0.2, 0.1], [False, False, True, True]) == 0.0
    assert auroc([0.5, 0.5, 0.5], [False, True, True]) == 0.5
    assert math.isnan(auroc([0.1, 0.2], [True, True]))
    assert math.isnan(auroc([0.1, 0.2], [False, False]))
    assert math.isnan(auroc([], []))


def test_the_first_error_is_the_first_step_under_the_threshold():
    assert predicted_first_error([0.9, 0.4, 0.1]) == 1
    assert predicted_first_error([0.9, 0.5]) == -1  # not under the threshold
    assert predicted_first_error([0.9, 0.4], threshold=0.3) == -1
    assert predicted_first_error([0.2]) == 0
    assert predicted_first_error([]) == -1


def test_first_error_f1_by_hand():
    label = [-1, -1, -1, -1, 0, 2, 2, 5]
    predicted = [-1, -1, 3, -1, 0, 2, -1, 4]
    # 3 of 4 sound ones and 2 of 4 flawed ones: F1 = 2 * .5 * .75 / 1.25 = .6
    want = {"f1": pytest.approx(0.6), "accuracy_error": 0.5, "accuracy_correct": 0.75}
    assert first_error_f1(predicted, label) == want


@pytest.mark.parametrize(
    ("predicted", "label", "f1"),
    [
        ([-1, -1, -1], [-1, 0, 1], 0.0),  # finding no error anywhere is worth nothing
        ([0, 0, 0], [-1, 0, 0], 0.0),  # and so is finding one everywhere
        ([-1, 0, 1], [-1, 0, 1], 1.0),
        ([1, 0], [-1, 1], 0.0),
        ([-1, -1], [-1, -1], 0.0),  # an empty group has accuracy 0
        ([1], [1], 0.0),
        ([], [], 0.0),
    ],
)
def test_first_error_f1_at_its_corners(predicted, label, f1):
    assert first_error_f1(predicted, label)["f1"] == f1


def test_a_higher_threshold_never_raises_the_accuracy_on_sound_solutions():
    rng = random.Random(0)
    scores = [[rng.random() for _ in range(5)] for _ in range(50)]
    label = [rng.choice([-1, 0, 3]) for _ in range(50)]
    found = [
        first_error_f1([predicted_first_error(s, t / 20) for s in scores], label)["accuracy_correct"] for t in range(21)
    ]
    assert found == sorted(found, reverse=True)
    assert found[0] == 1.0


def test_lists_must_agree():
    with pytest.raises(ValueError, match="argument 2"):
        first_error_f1([1, 2], [1])


def test_calibration_by_hand():
    # Two bins: [0, .5) holds .1, .3 with outcomes 0, 1: |.2 - .5| = .3; [.5, 1] holds .6, 1.0, .8 with 1, 1, 0:
    # |.8 - .6667| = .1333. Weighted: (2 * .3 + 3 * .1333) / 5 = .2
    scores, outcomes = [0.1, 0.6, 0.3, 1.0, 0.8], [0, 1, 1, 1, 0]
    assert expected_calibration_error(scores, outcomes, bins=2) == pytest.approx(0.2)
    # One bin is the gap of the means; outcomes may be shares.
    assert expected_calibration_error([0.2, 0.4], [0.5, 0.75], bins=1) == pytest.approx(0.325)
    assert expected_calibration_error([0.0, 1.0], [0.0, 1.0]) == 0.0
    assert math.isnan(expected_calibration_error([], []))


def test_calibration_does_not_depend_on_the_order():
    rng = random.Random(1)
    pairs = [(rng.random(), rng.random() < 0.5) for _ in range(100)]
    found = expected_calibration_error(*zip(*pairs, strict=True))
    rng.shuffle(pairs)
    assert expected_calibration_error(*zip(*pairs, strict=True)) == pytest.approx(found)


def test_a_verdict_that_could_not_be_read_is_wrong_on_either_side():
    assert first_error_f1([None, -1], [-1, -1])["accuracy_correct"] == 0.5
    assert first_error_f1([None, 2], [1, 2])["accuracy_error"] == 0.5


def test_binary_f1_and_matthews_against_counting():
    rng = random.Random(3)
    for _ in range(40):
        n = rng.randint(1, 12)
        said, true = [rng.random() < 0.6 for _ in range(n)], [rng.random() < 0.5 for _ in range(n)]
        count = lambda a, b, said=said, true=true: sum(s == a and t == b for s, t in zip(said, true, strict=True))
        tp, tn, fp, fn = count(True, True), count(False, False), count(True, False), count(False, True)
        precision, recall = tp / (tp + fp) if tp + fp else 0.0, tp / (tp + fn) if tp + fn else 0.0
        f1 = 2 * precision * recall / (precision + recall) if precision + recall else 0.0
        assert binary_f1(said, true) == pytest.approx(f1)
        below = math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
        assert matthews(said, true) == pytest.approx((tp * tn - fp * fn) / below if below else 0.0)
    assert matthews([True, False], [True, False]) == 1.0
    assert matthews([False, True], [True, False]) == -1.0
    assert math.isnan(matthews([], []))
    assert math.isnan(binary_f1([], []))


def test_prm_score_by_hand():
    # Right steps: 2 of 3 said right, one wrong one said right: F1 = 4/6. Wrong steps: 1 of 2 found, one false alarm: 2/4.
    found = prm_score([True, True, False, True, False], [True, True, True, False, False])
    assert found == {"f1": pytest.approx(2 / 3), "negative_f1": 0.5, "prm_score": pytest.approx((2 / 3 + 0.5) / 2)}


def test_correlation():
    assert correlation([1, 2, 3], [2, 4, 6]) == pytest.approx(1.0)
    assert correlation([1, 2, 3], [3, 2, 1]) == pytest.approx(-1.0)
    # Deviations (-1, 0, 1) and (-4/3, 5/3, -1/3): 1 / sqrt(2 * 14/3)
    assert correlation([0, 1, 2], [0, 3, 1]) == pytest.approx(1 / math.sqrt(28 / 3))
    assert math.isnan(correlation([1, 1], [0, 1]))
    assert math.isnan(correlation([1], [1]))
    with pytest.raises(ValueError, match="cannot be paired"):
        correlation([1, 2], [1])


def test_the_bins_of_the_reliability_add_up_to_the_calibration_error():
    rng = random.Random(2)
    scores, outcomes = [rng.random() for _ in range(200)] + [1.0, 0.0], [rng.random() for _ in range(202)]
    bins = reliability(scores, outcomes)
    assert sum(n for *_, n in bins) == 202
    gap = sum(abs(s - y) * n for s, y, n in bins) / 202
    assert gap == pytest.approx(expected_calibration_error(scores, outcomes))
    assert reliability([], []) == []


def test_the_lowest_score_is_the_last_only_if_it_is_alone():
    assert lowest_is_last([0.5, 0.4])
    assert not lowest_is_last([0.4, 0.4])
    assert not lowest_is_last([0.3, 0.4])
    assert not lowest_is_last([0.1])
    assert not lowest_is_last([])
