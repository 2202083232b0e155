"""Ranking models: where two sides are compared, what is lost, and that what is trained is what is read."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest
import torch

from stepladder.basics import UserError
from stepladder.config import build
from stepladder.models.reward import RewardModel
from stepladder.models.step_format import StepFormat
from stepladder.trainers.examples import Examples
from stepladder.trainers.joint import with_score_head
from stepladder.trainers.ranking import RankingArguments, RankingTrainer, collate, ranking_example

# In the lab's vocabulary the prompt has 5 tokens and a step 5 and its separator: steps end at 10, 16, 22, 28 ...
PREFIX, GOOD, BAD = ["3 + 5 = 8"], ["8 + 1 = 9", "9 + 2 = 11", "11 + 1 = 12"], ["8 + 1 = 7", "7 + 2 = 9"]


@pytest.fixture
def example(tmp_path: Any, lab_words: Any, rows: Any) -> Any:
    def make(chosen=GOOD, rejected=BAD, prefix=PREFIX, rewards=(0.75, 0.25), **settings: Any) -> Any:
        args = RankingArguments(model="m", rows="r", output_dir=str(tmp_path), use_cpu=True, **settings)
        counts: Counter[str] = Counter()
        row = rows.pair(3, prefix, chosen, rejected, rewards)
        return ranking_example(row, lab_words, StepFormat.for_policy(lab_words, "\n"), args, counts), dict(counts)

    return make


def test_paths_are_compared_from_where_they_part_to_the_end_of_the_shorter(example, lab_words):
    found, counts = example()
    assert (found["chosen_ends"], found["rejected_ends"], found["target"]) == ([16, 22], [16, 22], 1.0)
    assert counts == {"comparisons": 2, "rows": 1}
    separator = lab_words("\n")["input_ids"][0]
    for ids, ends in (("input_ids", "chosen_ends"), ("rejected_ids", "rejected_ends")):
        assert [found[ids][end] for end in found[ends]] == [separator] * 2
        assert len(found[ids]) == found[ends][-1] + 1


def test_steps_alone_and_soft_targets(example):
    found, _ = example(compare="step", target="soft")
    assert (found["chosen_ends"], found["rejected_ends"], found["target"]) == ([16], [16], 0.75)


def test_what_two_sides_share_is_not_compared(example):
    """Pairs of whole solutions have an empty prefix, and may begin alike."""
    found, _ = example(prefix=[], chosen=[*PREFIX, *GOOD], rejected=[*PREFIX, *BAD])
    assert found == example()[0]
    assert example(chosen=GOOD, rejected=GOOD[:2]) == (None, {"rows dropped: the two never part": 1})
    assert example(chosen=GOOD, rejected=[]) == (None, {"rows dropped: the two never part": 1})


@pytest.mark.parametrize(("max_length", "kept"), [(23, 2), (22, 1), (17, 1), (16, 0)])
def test_truncation_drops_comparisons_and_counts_them(example, max_length, kept):
    found, counts = example(max_length=max_length)
    assert counts.get("comparisons cut by max_length", 0) == 2 - kept
    assert (found is None) == (kept == 0)
    assert counts.get("rows dropped: every comparison cut", 0) == (kept == 0)


def test_sides_of_other_lengths_share_a_batch(example):
    one, _ = example(chosen=["8 + 1 = 9"], rejected=BAD)
    two, _ = example()
    batch = collate([one, two], 0)
    assert batch["input_ids"].shape == (2, 2, 23)
    assert batch["attention_mask"].sum(2).tolist() == [[17, 17], [23, 23]]
    assert batch["compare_mask"].tolist() == [[True, False], [True, True]]
    assert batch["ends"].tolist() == [[[16, 0], [16, 0]], [[16, 22], [16, 22]]]


def test_the_language_model_learns_chosen_sides_that_are_worth_it(example, lab_words):
    found, _ = example(lambda_lm=1.0)  # a step of a path that goes on: its end is not the solution's
    assert len(found["labels"]) == len(found["input_ids"]) == 23
    assert found["labels"] == [-100] * 5 + found["input_ids"][5:]
    whole, _ = example(prefix=[], chosen=GOOD, rejected=["8 + 1 = 7", *GOOD], lambda_lm=1.0)
    assert whole["labels"] == [-100] * 5 + whole["input_ids"][5:-1] + [lab_words.eos_token_id]
    lucky, _ = example(rewards=(0.5, 0.0), lambda_lm=1.0)
    assert set(lucky["labels"]) == {-100}
    batch = collate([found, example(chosen=GOOD[:1], lambda_lm=1.0)[0]], 0)
    assert batch["labels"].shape == (2, 23)
    assert batch["labels"][1, 17:].tolist() == [-100] * 6


def test_the_language_model_loss_is_added_to_the_ranking(rows, settings, lab_words, tiny_policy):
    """By hand, over two micro-batches of unequal size: a mean over pairs and a mean over the tokens of chosen sides."""
    made = rows.some("ranking", 3)
    args = build(RankingArguments, settings("ranking", made, lambda_lm=0.3))
    step_format = StepFormat.for_policy(lab_words, "\n")
    items = [ranking_example(row, lab_words, step_format, args, Counter()) for row in made]
    model = with_score_head(tiny_policy(lab_words)).train(False)
    trainer = RankingTrainer(model=model, args=args, train_dataset=Examples(items))
    batches = [collate(items[:2], 0), collate(items[2:], 0)]
    counts = trainer._get_num_items_in_batch(batches, torch.device("cpu"))
    found = sum(trainer.compute_loss(model, batch, num_items_in_batch=counts).item() for batch in batches)

    ranked, nats = [], []
    for item in items:
        outputs = [model(input_ids=torch.tensor([item[name]])) for name in ("input_ids", "rejected_ids")]
        r = [
            out.scores[0, ends, 0]
            for out, ends in zip(outputs, (item["chosen_ends"], item["rejected_ends"]), strict=True)
        ]
        ranked.append(sum(math.log(1 + math.exp(b - a)) for a, b in zip(r[0].tolist(), r[1].tolist(), strict=True)))
        says = outputs[0].logits[0].log_softmax(-1)
        nats += [-says[i - 1, label].item() for i, label in enumerate(item["labels"]) if label != -100]
    assert found == pytest.approx(sum(ranked) / len(ranked) + 0.3 * sum(nats) / len(nats), rel=1e-4)


def test_soft_targets_need_shares(example):
    with pytest.raises(UserError, match=r"row p3: target: soft takes shares in \[0, 1\], found rewards 4 and -1"):
        example(target="soft", rewards=(4.0, -1.0))


def test_the_loss_is_that_of_the_scores_that_are_read(rows, settings, lab_words, tiny_scorer):
    """Step by step from RewardModel's own scores, with pairs of unequal length in one batch."""
    model = tiny_scorer(lab_words)
    step_format = StepFormat.for_policy(lab_words, "\n").for_reward("scalar", "ranking")
    pairs = [
        rows.pair(1, PREFIX, GOOD, BAD, (0.75, 0.25)),
        rows.pair(2, [], ["1 + 1 = 2"], GOOD, (1.0, 0.5)),
        rows.pair(4, PREFIX * 2, BAD[:1], GOOD, (0.5, 0.25)),
    ]
    reward = RewardModel(model, lab_words, step_format)
    for target in ("preferred", "soft"):
        for compare in ("path", "step"):
            args = build(RankingArguments, settings("ranking", pairs, target=target, compare=compare))
            items = [ranking_example(p, lab_words, step_format, args, Counter()) for p in pairs]
            trainer = RankingTrainer(model=model, args=args, train_dataset=Examples(items))
            found = trainer.compute_loss(model, collate(items, 0)).item()
            want = 0.0
            for pair in pairs:
                sides = reward.score([(pair.prompt, (*pair.prefix, *side)) for side in (pair.chosen, pair.rejected)])
                logits = [[math.log(s / (1 - s)) for s in side[len(pair.prefix) :]] for side in sides]
                y = (1 + pair.reward_chosen - pair.reward_rejected) / 2 if target == "soft" else 1.0
                for a, b in list(zip(*logits, strict=False))[: None if compare == "path" else 1]:
                    p = 1 / (1 + math.exp(b - a))
                    want -= y * math.log(p) + (1 - y) * math.log(1 - p)
            assert found == pytest.approx(want / 3, rel=1e-4)


def test_training_ranks_every_compared_step(rows, settings, train):
    pairs = [
        rows.pair(n, PREFIX, [f"8 + {n} = {8 + n}", "1 + 1 = 2"], [f"8 + {n} = {n}", "1 + 1 = 2"]) for n in range(1, 5)
    ]
    result = train("ranking", settings("ranking", pairs, max_steps=40, learning_rate=0.03))
    reward = RewardModel.load(str(result.out), device="cpu")
    assert (reward.step_format.head, reward.step_format.label_kind) == ("scalar", "ranking")
    for pair in pairs:
        good, bad = reward.score([(pair.prompt, (*pair.prefix, *side)) for side in (pair.chosen, pair.rejected)])
        assert good[0] == pytest.approx(bad[0], abs=1e-5)  # the shared prefix
        assert all(g > b for g, b in zip(good[1:], bad[1:], strict=True))
    assert result.lines[-2]["accuracy"] == 1.0
    assert result.lines[-2]["gap"] > 1


def test_high_scores_of_a_ranking_do_not_tie(lab_words, tiny_scorer):
    model = tiny_scorer(lab_words)
    with torch.no_grad():
        model.score.weight.mul_(0.01)
        model.score.bias.fill_(25.0)
    step_format = StepFormat.for_policy(lab_words, "\n").for_reward("scalar", "ranking")
    scores = RewardModel(model, lab_words, step_format).score([("Start 1 ; + 5", GOOD)])[0]
    assert len(set(scores)) == 3
    assert max(scores) < 1


@pytest.mark.parametrize("size", [1, 3, 8])
def test_the_loss_does_not_depend_on_the_batch(rows, settings, train, size):
    values = settings("ranking", max_steps=1, per_device_eval_batch_size=size)
    values["eval_rows"] = values["rows"]
    alone = train("ranking", values).metrics["eval_loss"]
    values["per_device_eval_batch_size"] = 16
    assert train("ranking", {**values, "output_dir": values["output_dir"] + "2"}).metrics["eval_loss"] == pytest.approx(
        alone, rel=1e-5
    )


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"compare": "token"}, "compare must be one of path, step, found 'token'"),
        ({"target": "hard"}, "target must be one of preferred, soft, found 'hard'"),
        ({"aggregation": "sum"}, "aggregation must be one of nothing, last, min, prod, mean, found 'sum'"),
        ({"model": ""}, "model is missing"),
        ({"lambda_lm": -0.1}, "lambda_lm must be 0 or more, found -0.1"),
    ],
)
def test_settings_that_cannot_be(settings, train, wrong, message):
    with pytest.raises(UserError, match=message):
        train("ranking", settings("ranking", **wrong))
