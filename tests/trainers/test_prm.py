"""Process reward models: where labels sit, what truncation costs, and that the position trained is the position read."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from typing import Any

import pytest
import torch

from stepladder.basics import UserError
from stepladder.models.reward import RewardModel
from stepladder.models.step_format import StepFormat
from stepladder.trainers.prm import PRMArguments, label_kind, prm_example
from stepladder.trainers.reward import collate

# In the lab's vocabulary the prompt has 5 tokens and a step 5 and its separator: steps end at 10, 16, 22 ...
STEPS = ["3 + 5 = 8", "8 + 1 = 9", "9 + 2 = 11"]
ENDS = [10, 16, 22]


@pytest.fixture
def example(tmp_path: Any, lab_words: Any, rows: Any) -> Any:
    """(correct, rollouts, settings) -> the example of a row of three steps, and what was counted."""

    def make(correct: list[int], rollouts: Any = 10, **settings: Any) -> tuple[Any, dict[str, int]]:
        args = PRMArguments(model="m", rows="r", output_dir=str(tmp_path), use_cpu=True, **settings)
        counts: Counter[str] = Counter()
        row = rows.labels(3, STEPS, correct, rollouts)
        return prm_example(row, lab_words, StepFormat.for_policy(lab_words, "\n"), args, counts), dict(counts)

    return make


def targets_of(example: dict[str, Any]) -> dict[int, float]:
    return {p: t for p, (t, m) in enumerate(zip(example["target"], example["target_mask"], strict=True)) if m}


@pytest.mark.parametrize(
    ("settings", "want"),
    [
        ({"labels": "hard"}, [1.0, 1.0, 0.0]),
        ({"labels": "soft"}, [0.9, 0.1, 0.0]),
        ({"labels": "threshold"}, [1.0, 1.0, 0.0]),
        ({"labels": "td"}, [0.9, 0.1, 0.0]),  # what falls is looked ahead to by nobody
        ({"labels": "threshold", "threshold": 0.1, "after_first_zero": True}, [1.0, 0.0, 0.0]),  # greater, not equal
        ({"labels": "threshold", "threshold": 0.5, "after_first_zero": True}, [1.0, 0.0, 0.0]),
    ],
)
def test_labels_sit_on_the_separator_of_their_step(example, lab_words, settings, want):
    found, counts = example([9, 1, 0], **settings)
    assert targets_of(found) == dict(zip(ENDS, want, strict=True))
    separator = lab_words("\n")["input_ids"]
    assert [found["input_ids"][end] for end in ENDS] == separator * 3
    assert found["input_ids"].count(separator[0]) == 3
    assert counts == {"labels": 3, "rows": 1}


@pytest.mark.parametrize(
    ("correct", "settings", "learnt"),
    [
        ([9, 1, 0], {}, 2),
        ([9, 0, 3], {"after_first_zero": True}, 1),  # what follows an error is not right, whatever it leads to
        ([9, 4, 8], {"labels": "soft"}, 1),  # more likely wrong than right
        ([0, 0, 0], {}, 0),
        ([9, 9, 9], {"root": True}, 3),
    ],
)
def test_the_language_model_learns_the_steps_before_the_first_wrong_one(example, lab_words, correct, settings, learnt):
    found, _ = example(correct, lambda_lm=1.0, **settings)
    ids = found["input_ids"]
    assert len(found["labels"]) == len(ids)
    trained = {i: label for i, label in enumerate(found["labels"]) if label != -100}
    start = 5
    last = ENDS[learnt - 1] if learnt else start - 1
    assert list(trained) == list(range(start, last + 1))
    if learnt == 3:  # a policy ends where the reward model has one more separator
        assert trained.pop(last) == lab_words.eos_token_id
    assert all(ids[i] == label for i, label in trained.items())


def test_a_step_without_a_label_is_not_learnt_as_right(example):
    found, _ = example([9, 0, 0], rollouts=[10, 0, 0], lambda_lm=1.0)
    assert [i for i, label in enumerate(found["labels"]) if label != -100] == list(range(5, ENDS[0] + 1))


def test_a_soft_label_stays_soft_in_the_batch(example):
    found, _ = example([9, 1, 0], labels="soft")
    batch = collate([found], pad_id=0)
    assert batch["target"].dtype == torch.float32
    torch.testing.assert_close(batch["target"][0, ENDS], torch.tensor([0.9, 0.1, 0.0]))


def test_early_steps_look_ahead_under_td(example, rows, lab_words, tmp_path):
    correct = [2, 6, 0]
    found, _ = example(correct, labels="td")
    assert list(targets_of(found).values()) == [pytest.approx(0.2 + 0.5 * (0.6 - 0.2)), 0.6, 0.0]
    row = dataclasses.replace(rows.labels(3, STEPS, correct, 10), n_correct=(5, *correct), n_rollouts=(10,) * 4)
    args = PRMArguments(model="m", rows="r", output_dir=str(tmp_path), use_cpu=True, labels="td", root=True)
    rooted = prm_example(row, lab_words, StepFormat.for_policy(lab_words, "\n"), args, Counter())
    assert list(targets_of(rooted).values()) == [0.5, *targets_of(found).values()]  # the empty prefix is no step
    assert label_kind([row], "td") == "soft"  # what such scores mean
    cut, _ = example([2, 0, 4], labels="td")
    assert list(targets_of(cut).values()) == [0.2, 0.2]  # as with shares, no target behind the first zero


def test_an_unknown_step_has_no_label(example):
    found, counts = example([9, 0, 4], [10, 0, 10], labels="soft")
    assert targets_of(found) == {10: 0.9, 22: 0.4}
    assert counts == {"labels": 2, "rows": 1}


@pytest.mark.parametrize(("after", "want"), [(True, [1.0, 0.0, 1.0]), (False, [1.0, 0.0])])
def test_steps_after_the_first_zero(example, after, want):
    found, _ = example([3, 0, 2], after_first_zero=after)
    assert list(targets_of(found).values()) == want
    assert len(found["input_ids"]) == ENDS[len(want) - 1] + 1


@pytest.mark.parametrize(
    ("max_length", "kept"), [(23, 3), (22, 2), (17, 2), (16, 1), (12, 1), (11, 1), (10, 0), (3, 0)]
)
def test_truncation_drops_whole_steps_and_counts_them(example, max_length, kept):
    found, counts = example([9, 1, 0], labels="soft", max_length=max_length)
    if not kept:
        assert found is None
        assert counts == {"labels": 0, "labels cut by max_length": 3, "rows dropped: every label cut": 1}
        return
    assert targets_of(found) == dict(zip(ENDS[:kept], [0.9, 0.1, 0.0], strict=False))
    assert len(found["input_ids"]) == ENDS[kept - 1] + 1 <= max_length
    assert counts.get("labels cut by max_length", 0) == 3 - kept
    assert counts["labels"] == kept


def test_a_row_without_a_label_is_dropped_and_counted(example):
    assert example([0, 0, 0], 0) == (None, {"labels": 0, "rows dropped: no label": 1})


def test_padding_is_on_the_right_and_masked(example):
    long, _ = example([9, 1, 0], labels="soft")
    short, _ = example([7, 0, 0], [10, 0, 0], labels="soft")
    batch = collate([short, long], pad_id=0)
    assert batch["input_ids"].shape == (2, 23)
    assert batch["input_ids"][0, :11].tolist() == short["input_ids"]
    assert (batch["input_ids"][0, 11:] == 0).all()
    assert batch["attention_mask"].tolist() == [[1] * 11 + [0] * 12, [1] * 23]
    assert batch["target_mask"].dtype == torch.bool
    assert [row.nonzero().flatten().tolist() for row in batch["target_mask"]] == [ENDS[:1], ENDS]


def test_what_the_scores_mean_is_written_down(rows):
    human = [rows.labels(n, STEPS, [1, 1, 0], 1, label_source="human") for n in range(2)]
    sampled = [rows.labels(3, STEPS, [1, 1, 0])]
    assert label_kind(human, "soft") == "human"
    assert label_kind(sampled, "soft") == "soft"
    assert label_kind(human + sampled, "hard") == "hard"


# --- the position trained is the position read ------------------------------------------------------------------------


@pytest.mark.parametrize(("head", "loss"), [("two_class", "bce"), ("scalar", "bce"), ("scalar", "mse")])
def test_an_overfitted_model_reads_back_its_targets(rows, settings, train, head, loss):
    """A shift by one anywhere would train the token before the separator and read another one."""
    training = [
        rows.labels(0, ["1 + 1 = 2", "2 + 1 = 3", "3 + 1 = 4"], [9, 2, 6]),
        rows.labels(1, ["4 + 4 = 8", "8 + 4 = 12"], [3, 8]),
        rows.labels(2, ["7 + 5 = 12"], [5]),
        rows.labels(3, ["9 + 1 = 10", "10 + 1 = 11", "11 + 1 = 12", "12 + 1 = 0"], [10, 7, 1, 0]),
    ]
    values = settings(
        "prm", training, labels="soft", head=head, loss=loss, max_steps=250, learning_rate=0.03, logging_steps=50
    )
    out = train("prm", values).out
    reward = RewardModel.load(str(out), device="cpu")
    assert (reward.step_format.head, reward.step_format.label_kind) == (head, "soft")
    found = reward.score([(row.prompt, row.steps) for row in training])
    for row, scores in zip(training, found, strict=True):
        assert scores == pytest.approx([c / 10 for c in row.n_correct[1:]], abs=0.06)

    # The loss of the trainer's own batch, by hand from the scores that the reward model reads.
    if loss == "bce" and head == "two_class":
        trainer_loss = trained_loss(reward, training, values)
        scores = [score for one in found for score in one]
        shares = [count / 10 for row in training for count in row.n_correct[1:]]
        by_hand = [-(y * math.log(p) + (1 - y) * math.log(1 - p)) for p, y in zip(scores, shares, strict=True)]
        assert trainer_loss == pytest.approx(sum(by_hand) / len(by_hand), rel=1e-4)


@pytest.mark.parametrize(
    ("labels", "after", "advised"),
    [
        ("hard", False, "min"),
        ("soft", False, "min"),
        ("td", False, "min"),
        ("soft", True, "last"),
        ("hard", True, "last"),
    ],
)
def test_a_model_that_saw_nothing_behind_an_error_is_read_at_its_worst_step(settings, train, labels, after, advised):
    out = train("prm", settings("prm", max_steps=1, labels=labels, after_first_zero=after)).out
    assert StepFormat.load(out).aggregation == advised


def trained_loss(reward: RewardModel, training: list[Any], values: dict[str, Any]) -> float:
    from stepladder.config import build
    from stepladder.trainers.examples import Examples
    from stepladder.trainers.reward import RewardTrainer

    args = build(PRMArguments, values)
    items = [prm_example(row, reward.tokenizer, reward.step_format, args, Counter()) for row in training]
    trainer = RewardTrainer(model=reward.model, args=args, train_dataset=Examples(items))
    trainer.positive_class = reward.step_format.positive_class
    return trainer.compute_loss(reward.model, collate(items, 0)).item()


@pytest.mark.parametrize("positive", [0, 1])
def test_the_loss_trains_the_positive_class(rows, settings, lab_words, tiny_scorer, positive):
    """With one step labelled 1, a gradient step raises the positive class's score that RewardModel reads."""
    from stepladder.config import build
    from stepladder.trainers.examples import Examples
    from stepladder.trainers.reward import RewardTrainer

    model = tiny_scorer(lab_words, labels=2)
    step_format = dataclasses.replace(
        StepFormat.for_policy(lab_words, "\n").for_reward("two_class", "hard"), positive_class=positive
    )
    row = rows.labels(0, STEPS, [1, 1, 1], 1)
    args = build(PRMArguments, settings("prm", [row]))
    item = prm_example(row, lab_words, step_format, args, Counter())
    trainer = RewardTrainer(model=model, args=args, train_dataset=Examples([item]))
    trainer.positive_class = positive
    score = lambda: min(RewardModel(model, lab_words, step_format).score([(row.prompt, row.steps)])[0])
    before = score()
    trainer.compute_loss(model, collate([item], 0)).backward()
    with torch.no_grad():
        for weight in model.parameters():
            weight -= 0.05 * weight.grad
    assert score() > before


def test_training_counts_what_it_lost(rows, settings, train, capsys):
    training = [
        rows.labels(0, STEPS, [9, 1, 0]),
        rows.labels(1, STEPS, [0, 0, 0], 0),
        rows.labels(2, STEPS, [5, 5, 5], prompt="Start 1 " + "; + 5 " * 20),
    ]
    values = settings("prm", training, max_length=20, max_steps=2)
    result = train("prm", values)
    counted = capsys.readouterr().out
    assert (
        "2 labels, 4 labels cut by max_length, 1 rows, 1 rows dropped: no label, 1 rows dropped: every label cut"
        in counted
    )
    assert math.isfinite(result.metrics["train_loss"])


def test_labels_that_are_all_cut_stop_the_training_before_it_begins(rows, settings, train):
    values = settings("prm", [rows.labels(0, STEPS, [9, 1, 0])], max_length=10)
    with pytest.raises(
        UserError, match=r"no row can be trained on \(0 labels, 3 labels cut by max_length, 1 rows dropped"
    ):
        train("prm", values)


def test_max_rows_draws_the_same_rows_for_a_seed(rows, settings, train, capsys):
    values = settings("prm", rows.some("prm", 16), max_rows=5, max_steps=1)
    values["eval_rows"] = values["rows"]
    train("prm", values)
    told = [line for line in capsys.readouterr().out.splitlines() if " labels" in line]
    assert len(told) == 2
    assert told[0] == told[1]
    assert "5 rows" in told[0]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"labels": "soft label"}, "labels must be one of hard, soft, threshold, td, found 'soft label'"),
        ({"threshold": 1.0}, r"threshold must lie in \[0, 1\), found 1.0"),
        ({"head": "two-class"}, "head must be one of two_class, scalar, found 'two-class'"),
        ({"loss": "hinge"}, "loss must be one of bce, mse, found 'hinge'"),
        ({"max_length": 1}, "max_length must be 2 or more, found 1"),
        ({"lora_r": -1}, "lora_r must be 0 or more, found -1"),
        ({"model": ""}, "model is missing: the checkpoint to start from"),
        ({"rows": ""}, "rows is missing: rows to train on"),
        ({"output_dir": ""}, "output_dir is missing"),
        ({"lables": "soft"}, "unknown key 'lables'; did you mean labels?"),
        ({"max_rows": "many"}, "max_rows must be a whole number, found 'many'"),
    ],
)
def test_settings_that_cannot_be(settings, train, wrong, message):
    with pytest.raises(UserError, match=message):
        train("prm", settings("prm", **wrong))


def test_the_root_is_trained_at_the_last_prompt_token_and_read_there(rows, settings, train, lab_words, tmp_path):
    """PAV's root: four prompts with four values of the empty prefix, each read back by score_with_root."""
    shares = [1, 4, 6, 9]
    training = [
        dataclasses.replace(rows.labels(n, ["1 + 1 = 2"], [5]), n_correct=(share, 5), n_rollouts=(10, 10))
        for n, share in enumerate(shares)
    ]
    values = settings("prm", training, labels="soft", root=True, max_steps=200, learning_rate=0.03, logging_steps=100)
    reward = RewardModel.load(str(train("prm", values).out), device="cpu")
    found = reward.score_with_root([(row.prompt, row.steps) for row in training])
    assert [one[0] for one in found] == pytest.approx([share / 10 for share in shares], abs=0.06)
    assert [one[1] for one in found] == pytest.approx([0.5] * 4, abs=0.06)

    args = PRMArguments(model="m", rows="r", output_dir=str(tmp_path), use_cpu=True, labels="soft", root=True)
    item = prm_example(training[1], lab_words, StepFormat.for_policy(lab_words, "\n"), args, Counter())
    assert targets_of(item) == {4: 0.4, 10: 0.5}
