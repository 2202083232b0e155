"""Step scores: all steps in one forward, incremental or from scratch, in any batch, in any precision."""

from __future__ import annotations

import dataclasses
import math
import random
from typing import Any

import pytest
import torch

from stepladder.basics import UserError
from stepladder.models.ledger import Ledger
from stepladder.models.prefix_cache import PrefixCache
from stepladder.models.reward import RewardModel, aggregate
from stepladder.models.step_format import StepFormat


def format_of(tokenizer: Any, head: str, positive_class: int = 1) -> StepFormat:
    made = StepFormat.for_policy(tokenizer, "\n").for_reward(head, "hard")
    return dataclasses.replace(made, positive_class=positive_class) if head == "two_class" else made


def solutions_of(count: int, seed: int = 0, longest: int = 8) -> list[tuple[str, list[str]]]:
    rng = random.Random(seed)
    made = []
    for _ in range(count):
        prompt = f"Start {rng.randrange(13)} " + "; + 5 " * rng.randint(0, 5)
        steps = [
            f"{rng.randrange(13)} + {rng.randrange(13)} = {rng.randrange(13)}" for _ in range(rng.randint(0, longest))
        ]
        made.append((prompt, steps))
    return made


def slow_scores(
    model: Any, tokenizer: Any, head: str, positive_class: int, prompt: str, steps: list[str]
) -> list[float]:
    """Each prefix in a forward of its own, read at its last token; the first one is the root."""
    ids = list(tokenizer(prompt)["input_ids"])
    scores = []
    for step in [None, *steps]:
        if step is not None:
            ids += tokenizer(step)["input_ids"] + tokenizer("\n")["input_ids"]
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids])).logits[0, -1].tolist()
        if head == "scalar":
            scores.append(1 / (1 + math.exp(-logits[0])))
        else:
            scores.append(1 / (1 + math.exp(logits[1 - positive_class] - logits[positive_class])))
    return scores


def close(found: list[list[float]], want: list[list[float]], tolerance: float = 1e-5) -> bool:
    assert [len(one) for one in found] == [len(one) for one in want]
    return all(abs(a - b) < tolerance for x, y in zip(found, want, strict=True) for a, b in zip(x, y, strict=True))


HEADS = [("scalar", 1), ("two_class", 1), ("two_class", 0)]


@pytest.mark.parametrize(("head", "positive_class"), HEADS)
def test_one_forward_equals_scoring_each_prefix_alone(lab_words, tiny_scorer, head, positive_class):
    model = tiny_scorer(lab_words, labels=1 if head == "scalar" else 2)
    reward = RewardModel(model, lab_words, format_of(lab_words, head, positive_class))
    solutions = solutions_of(12)
    assert any(not steps for _, steps in solutions)
    want = [slow_scores(model, lab_words, head, positive_class, p, s) for p, s in solutions]
    assert max(map(max, want)) - min(map(min, want)) > 0.2  # the model tells prefixes apart
    assert close(reward.score_with_root(solutions), want)
    assert close(reward.score(solutions), [one[1:] for one in want])


def test_the_two_classes_add_up_to_one(lab_words, tiny_scorer):
    model, solutions = tiny_scorer(lab_words, labels=2), solutions_of(5)
    good, bad = (RewardModel(model, lab_words, format_of(lab_words, "two_class", c)).score(solutions) for c in (1, 0))
    assert close(good, [[1 - b for b in one] for one in bad])


def test_batch_composition_and_padding_change_nothing(lab_words, tiny_scorer):
    model = tiny_scorer(lab_words)
    solutions = solutions_of(20)
    make = lambda **options: RewardModel(model, lab_words, format_of(lab_words, "scalar"), **options)
    together = make().score(solutions)
    assert close(together, [make().score([one])[0] for one in solutions])
    assert close(together, make(batch_tokens=100).score(solutions))
    assert close(together, make(batch_tokens=1).score(solutions))
    backwards = make().score(solutions[::-1])
    assert close(together, backwards[::-1])
    assert close(together + together, make().score(solutions + solutions))

    # The same batch padded on the left by hand.
    step_format = format_of(lab_words, "scalar")
    encoded = [step_format.encode(lab_words, p, s) for p, s in solutions]
    width = max(len(e.ids) for e in encoded)
    ids, mask = torch.zeros(len(encoded), width, dtype=torch.long), torch.zeros(len(encoded), width, dtype=torch.long)
    for row, one in enumerate(encoded):
        ids[row, width - len(one.ids) :] = torch.tensor(one.ids)
        mask[row, width - len(one.ids) :] = 1
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0)).logits
    padded = [
        [torch.sigmoid(logits[row, width - len(one.ids) + end, 0]).item() for end in one.step_ends]
        for row, one in enumerate(encoded)
    ]
    assert close(together, padded)


def test_batches_hold_no_more_than_the_tokens_allowed(lab_words, tiny_scorer):
    model = tiny_scorer(lab_words)
    reward = RewardModel(model, lab_words, format_of(lab_words, "scalar"), batch_tokens=150)
    shapes: list[Any] = []
    hook = model.register_forward_pre_hook(lambda _, __, kw: shapes.append(kw["input_ids"].shape), with_kwargs=True)
    reward.score(solutions_of(30))
    hook.remove()
    assert all(rows == 1 or rows * columns <= 150 for rows, columns in shapes)
    assert len(shapes) < 20


@pytest.mark.parametrize(("head", "positive_class"), HEADS)
def test_incremental_equals_from_scratch_and_encodes_each_token_once(lab_words, tiny_scorer, head, positive_class):
    model = tiny_scorer(lab_words, labels=1 if head == "scalar" else 2)
    step_format = format_of(lab_words, head, positive_class)
    cached = RewardModel(model, lab_words, step_format, cache=PrefixCache())
    plain = RewardModel(model, lab_words, step_format)
    solutions = [(p, s) for p, s in solutions_of(8, longest=10) if s]
    columns = []
    hook = model.register_forward_pre_hook(lambda _, __, kw: columns.append(kw["input_ids"].shape[1]), with_kwargs=True)
    for length in range(1, 11):
        grown = [(p, s[:length]) for p, s in solutions]
        columns.clear()
        found = cached.score_with_root(grown)
        if length > 1:
            assert max(columns, default=0) <= 6  # no more than the new step of six tokens
        assert close(found, plain.score_with_root(grown))
    hook.remove()
    # Linear: what was encoded is the whole text once. From scratch it is the sum over all prefixes.
    whole = [step_format.encode(lab_words, p, s).ids for p, s in solutions]
    assert cached.ledger.reward_tokens == sum(map(len, whole))
    prefixes = [len(step_format.encode(lab_words, p, s[:n]).ids) for p, s in solutions for n in range(1, 11)]
    assert plain.ledger.reward_tokens == sum(prefixes)
    assert cached.ledger.flops == 2 * cached.parameters * cached.ledger.reward_tokens
    # What is known already costs nothing.
    before = cached.ledger.reward_tokens
    assert close(cached.score(solutions), plain.score(solutions))
    assert cached.ledger.reward_tokens == before


def test_branches_of_a_tree_share_their_stem(lab_words, tiny_scorer):
    model = tiny_scorer(lab_words)
    step_format = format_of(lab_words, "scalar")
    cached = RewardModel(model, lab_words, step_format, cache=PrefixCache())
    plain = RewardModel(model, lab_words, step_format)
    prompt, stem = "Start 3 ; + 5", ["3 + 5 = 8"]
    cached.score([(prompt, stem)])
    before = cached.ledger.reward_tokens
    branches = [(prompt, [*stem, f"8 + 1 = {n}"]) for n in range(6)]
    branches += [(prompt, [*stem, "8 + 1 = 9", "9 + 1 = 10"]), (prompt, []), ("Start 4 ; + 5", stem)]
    assert close(cached.score_with_root(branches), plain.score_with_root(branches))
    # The empty solution lies within the stem, and costs nothing more.
    new = 6 * 6 + 12 + len(step_format.encode(lab_words, "Start 4 ; + 5", stem).ids)
    assert cached.ledger.reward_tokens - before == new


def test_equal_ids_with_other_steps_are_scored_where_their_own_steps_end(lab_words, tiny_scorer):
    """A step that holds a separator, or a prompt that ends in what another one has as a step, gives the same ids."""
    model = tiny_scorer(lab_words)
    step_format = format_of(lab_words, "scalar")
    plain = RewardModel(model, lab_words, step_format)
    solutions = [
        ("Start 3", ["3 + 5 = 8", "8 + 1 = 9"]),
        ("Start 3", ["3 + 5 = 8 \n 8 + 1 = 9"]),
        ("Start 3 3 + 5 = 8 \n", ["8 + 1 = 9"]),
        ("Start 3", ["3 + 5 = 8 \n 8 + 1 = 9", "Answer: 9"]),
        ("Start 3 3 + 5 = 8 \n 8 + 1 = 9 \n", []),
    ]
    encoded = {step_format.encode(lab_words, p, s).ids for p, s in solutions}
    assert len(encoded) == 2
    want = [plain.score_with_root([one])[0] for one in solutions]
    for order in (solutions, solutions[::-1]):
        cached = RewardModel(model, lab_words, step_format, cache=PrefixCache())
        found = [cached.score_with_root([one])[0] for one in order]
        assert close(found, want if order is solutions else want[::-1])


def test_steps_beyond_the_context_take_the_last_score_that_could_be_read(lab_words, tiny_scorer):
    model = tiny_scorer(lab_words, context=20)
    step_format = format_of(lab_words, "scalar")
    steps = ["1 + 2 = 3"] * 5  # 6 tokens each with the separator; the prompt has 2: ends at 7, 13, 19, 25, 31
    for cache in (None, PrefixCache()):
        reward = RewardModel(model, lab_words, step_format, cache=cache)
        [scores] = reward.score([("Start 1", steps)])
        [fitting] = RewardModel(model, lab_words, step_format).score([("Start 1", steps[:3])])
        assert close([scores], [[*fitting, fitting[-1], fitting[-1]]])
        assert reward.cut_steps == 2
        assert close([scores], reward.score([("Start 1", steps)]))  # asked again, now from the cache
        # No step fits, and not even the prompt.
        [scores] = reward.score([("Start " + "1 " * 17, steps)])
        assert len(set(scores)) == 1
        before = reward.cut_steps
        assert reward.score_with_root([("Start " + "1 " * 30, steps[:2])]) == [[0.0, 0.0, 0.0]]
        assert reward.cut_steps - before == 2
        assert reward.score([("Start " + "1 " * 30, [])]) == [[]]
    # What does not fit changes nothing for its neighbours.
    together = RewardModel(model, lab_words, step_format).score([("Start 1", steps), ("Start 1", steps[:2])])
    assert close(together[1:], [fitting[:2]])


def test_exact_zeros_of_half_precision_do_not_move_scores(lab_words, tiny_scorer):
    """Scores are read at the positions of the step ends, never by looking for what is not zero."""
    model = tiny_scorer(lab_words, labels=1)
    with torch.no_grad():
        model.score.weight.mul_(400.0)
    model = model.to(torch.float16)
    reward = RewardModel(model, lab_words, format_of(lab_words, "scalar"))
    solutions = solutions_of(30)
    found = reward.score_with_root(solutions)
    assert [len(one) for one in found] == [1 + len(s) for _, s in solutions]
    flat = [score for one in found for score in one]
    assert flat.count(0.0) > 5
    assert flat.count(1.0) > 5
    step_format = reward.step_format
    for (prompt, steps), scores in zip(solutions, found, strict=True):
        encoded = step_format.encode(lab_words, prompt, steps)
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([encoded.ids])).logits[0, :, 0].float()
        want = [torch.sigmoid(logits[end]).item() for end in (encoded.root, *encoded.step_ends)]
        # Where rounding of half precision does not decide, zeros and ones stand where they belong.
        for score, exact, end in zip(scores, want, (encoded.root, *encoded.step_ends), strict=True):
            if abs(logits[end]) > 20:
                assert abs(score - exact) < 1e-3


def test_no_solutions_no_forward(lab_words, tiny_scorer):
    reward = RewardModel(tiny_scorer(lab_words), lab_words, format_of(lab_words, "scalar"))
    assert reward.score([]) == []
    assert reward.ledger == Ledger(seconds=reward.ledger.seconds)


@pytest.mark.parametrize(
    ("scores", "how", "want"),
    [
        ([0.9, 0.2, 0.5], "last", 0.5),
        ([0.9, 0.2, 0.5], "min", 0.2),
        ([0.9, 0.2, 0.5], "prod", 0.09),
        ([0.9, 0.2, 0.4], "mean", 0.5),
        ([0.3], "prod", 0.3),
        ([0.0, 1.0], "min", 0.0),
        *[([], how, 0.0) for how in ("last", "min", "prod", "mean")],
    ],
)
def test_aggregate(scores, how, want):
    assert aggregate(scores, how) == pytest.approx(want)


def test_aggregate_of_an_unknown_kind():
    with pytest.raises(ValueError, match="must be last, min, prod or mean, found 'max'"):
        aggregate([0.5], "max")


@pytest.mark.parametrize(
    ("head", "labels", "message"),
    [
        ("none", 1, "it is a policy and not a reward model"),
        ("scalar", 2, "a scalar head, the model has 2 labels"),
        ("two_class", 1, "a two_class head, the model has 1 labels"),
    ],
)
def test_a_head_that_disagrees_with_its_step_format_is_refused(lab_words, tiny_scorer, head, labels, message):
    step_format = StepFormat.for_policy(lab_words, "\n") if head == "none" else format_of(lab_words, head)
    with pytest.raises(UserError, match=message):
        RewardModel(tiny_scorer(lab_words, labels=labels), lab_words, step_format, name="x")


def test_saved_and_loaded_models_score_alike(tmp_path, lab_words, tiny_scorer):
    model = tiny_scorer(lab_words, labels=2)
    reward = RewardModel(model, lab_words, format_of(lab_words, "two_class", 0))
    reward.save(tmp_path)
    solutions = solutions_of(6)
    again = RewardModel.load(str(tmp_path), device="cpu", keep_prefixes=True)
    assert again.step_format == reward.step_format
    assert close(again.score_with_root(solutions), reward.score_with_root(solutions))
    # The checkpoint is one that transformers reads by itself.
    from transformers import AutoModelForTokenClassification

    assert AutoModelForTokenClassification.from_pretrained(tmp_path).config.num_labels == 2
