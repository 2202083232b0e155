"""A score head trained beside the language-model head: both losses by hand, and both checkpoints plain."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from stepladder.basics import UserError
from stepladder.config import build
from stepladder.data_gen.rows import Tree
from stepladder.models.engine import Request, Sampling, StopReason
from stepladder.models.loading import load_engine
from stepladder.models.reward import RewardModel
from stepladder.models.step_format import StepFormat
from stepladder.trainers import losses
from stepladder.trainers.examples import Examples
from stepladder.trainers.joint import JointTrainer, collate, language_labels, with_score_head
from stepladder.trainers.orm import ORMArguments, orm_example
from stepladder.trainers.value import ValueArguments, value_example

STEPS = ["3 + 5 = 8", "8 + 1 = 9"]  # the prompt has 5 tokens; the steps end at 10 and 16


def format_of(lab_words: Any) -> StepFormat:
    return StepFormat.for_policy(lab_words, "\n")


# --- labels --------------------------------------------------------------------------------------------------------------


def test_language_labels_end_the_solution_where_a_policy_ends_it(lab_words):
    encoded = format_of(lab_words).encode(lab_words, "Start 3 ; + 5", STEPS)
    labels = language_labels(encoded, 1, lab_words.eos_token_id)
    # The ids that train are those of the reply and its end as fine-tuning lays them out: no separator behind the last step.
    reply = lab_words("\n".join(STEPS))["input_ids"]
    assert [label for label in labels if label != -100] == [*reply, lab_words.eos_token_id]
    assert labels[:5] == [-100] * 5
    assert len(labels) == len(encoded.ids) == 17
    assert labels[16] == lab_words.eos_token_id
    assert encoded.ids[16] == lab_words("\n")["input_ids"][0]


def test_the_rest_of_a_long_separator_is_masked(merging_tokenizer):
    step_format = StepFormat.for_policy(merging_tokenizer, " ## ")
    assert len(step_format.separator_ids) == 4
    encoded = step_format.encode(merging_tokenizer, "the 4", ["So it is 4", "then"])
    labels = language_labels(encoded, 4, merging_tokenizer.eos_token_id)
    assert labels[-4:] == [merging_tokenizer.eos_token_id, -100, -100, -100]
    assert labels[encoded.prompt_length : -4] == list(encoded.ids[encoded.prompt_length : -4])


def value_of(row: Tree, lab_words: Any, tmp_path: Path, **settings: Any) -> tuple[Any, dict[str, int]]:
    args = ValueArguments(model="m", rows="r", output_dir=str(tmp_path), use_cpu=True, **settings)
    counts: Counter[str] = Counter()
    return value_example(row, lab_words, format_of(lab_words), args, counts), dict(counts)


def test_values_sit_on_separators_and_on_the_last_prompt_token(rows, lab_words, tmp_path):
    row = rows.path(3, STEPS, [0.25, -0.5, 1.0], "right")
    found, counts = value_of(row, lab_words, tmp_path)
    at = lambda item: {p: t for p, (t, m) in enumerate(zip(item["target"], item["target_mask"], strict=True)) if m}
    assert at(found) == {4: 0.25, 10: -0.5, 16: 1.0}
    assert counts == {"labels": 3, "rows": 1, "right solutions": 1}
    assert found["labels"][16] == lab_words.eos_token_id
    assert at(value_of(row, lab_words, tmp_path, root=False)[0]) == {10: -0.5, 16: 1.0}
    # A right solution is learnt whole, also where its last steps were not judged.
    found, _ = value_of(rows.path(3, STEPS, [0.25, -0.5, None], "right"), lab_words, tmp_path)
    assert at(found) == {4: 0.25, 10: -0.5}
    assert {len(found[k]) for k in ("input_ids", "target", "target_mask", "labels")} == {17}


def test_the_policy_does_not_learn_wrong_solutions(rows, lab_words, tmp_path):
    for outcome in ("wrong", "unparseable"):
        found, counts = value_of(rows.path(3, STEPS, [0.0, -0.5, -1.0], outcome), lab_words, tmp_path)
        assert set(found["labels"]) == {-100}
        assert counts["right solutions"] == 0
    args = ORMArguments(model="m", rows="r", output_dir=str(tmp_path), use_cpu=True, lambda_lm=1.0)
    for outcome in ("wrong", "right"):
        item = orm_example(rows.solution(3, STEPS, outcome), lab_words, format_of(lab_words), args, Counter())
        assert (set(item["labels"]) == {-100}) == (outcome == "wrong")
        assert len(item["labels"]) == len(item["input_ids"])
    plain = ORMArguments(model="m", rows="r", output_dir=str(tmp_path), use_cpu=True)
    assert "labels" not in orm_example(
        rows.solution(3, STEPS, "right"), lab_words, format_of(lab_words), plain, Counter()
    )


def test_what_does_not_fit_is_dropped_whole_and_branches_are_refused(rows, lab_words, tmp_path):
    row = rows.path(3, STEPS, [0.25, -0.5, 1.0], "right")
    assert value_of(row, lab_words, tmp_path, max_length=16) == (None, {"rows dropped: too long": 1})
    assert value_of(row, lab_words, tmp_path, max_length=17)[0] is not None
    nodes = (*row.nodes, row.nodes[1])
    branched = Tree(row.problem_id, row.prompt, row.gold, nodes, row.source)
    with pytest.raises(UserError, match=r"its tree has branches; data\.value_paths makes rows of one path each"):
        value_of(branched, lab_words, tmp_path)


# --- both losses -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def joint(lab_words: Any, tiny_policy: Any) -> Any:
    torch.manual_seed(0)
    model = with_score_head(tiny_policy(lab_words))
    with torch.no_grad():
        model.score.weight.normal_(0.0, 0.5)
    return model


def test_the_loss_is_the_sum_of_two_means(joint, rows, lab_words, settings):
    """By hand, over two micro-batches: values over labelled positions, cross-entropy over tokens of right solutions."""
    made = [
        rows.path(3, STEPS, [0.25, -0.5, 1.0], "right"), rows.path(4, STEPS[:1], [0.1, -1.0], "wrong"),
        rows.path(5, STEPS * 2, [0.3, None, 0.4, 0.5, 1.0], "right"),
    ]  # fmt: skip
    args = build(ValueArguments, settings("value", made, beta=0.3))
    items = [value_example(row, lab_words, format_of(lab_words), args, Counter()) for row in made]
    trainer = JointTrainer(model=joint, args=args, train_dataset=Examples(items))
    trainer.score_loss, trainer.score_weight, trainer.lm_weight = losses.value_mse, 0.3, 1.0
    batches = [collate(items[:2], 0), collate(items[2:], 0)]
    counts = trainer._get_num_items_in_batch(batches, torch.device("cpu"))
    found = sum(trainer.compute_loss(joint, batch, num_items_in_batch=counts).item() for batch in batches)

    squares, nats = [], []
    for row, item in zip(made, items, strict=True):
        ids = torch.tensor([item["input_ids"]])
        with torch.no_grad():
            output = joint(input_ids=ids)
        for position, value in zip([4, 10, 16, 22, 28], [n.value for n in row.nodes], strict=False):
            if value is not None:
                squares.append((math.tanh(output.scores[0, position, 0].item() / 2) - value) ** 2)
        if row.nodes[-1].outcome == "right":
            targets = [*item["input_ids"][5:-1], lab_words.eos_token_id]
            logp = output.logits[0].log_softmax(-1)
            nats += [-logp[4 + k, token].item() for k, token in enumerate(targets)]
    assert len(squares) == 9
    want = 0.3 * sum(squares) / len(squares) + sum(nats) / len(nats)
    assert counts.tolist() == [len(squares), len(nats)]
    assert found == pytest.approx(want, rel=1e-5)


def test_a_batch_of_wrong_solutions_has_no_language_term_and_is_no_nan(joint, rows, lab_words, settings):
    made = [rows.path(4, STEPS, [0.1, 0.2, -1.0], "wrong")]
    args = build(ValueArguments, settings("value", made))
    items = [value_example(row, lab_words, format_of(lab_words), args, Counter()) for row in made]
    trainer = JointTrainer(model=joint, args=args, train_dataset=Examples(items))
    trainer.score_loss, trainer.score_weight, trainer.lm_weight = losses.value_mse, 1.0, 1.0
    loss = trainer.compute_loss(joint, collate(items, 0))
    loss.backward()
    assert loss.isfinite()
    assert (joint.lm_head.weight.grad is None) or (joint.lm_head.weight.grad == 0).all()
    assert joint.score.weight.grad.abs().max() > 0


# --- checkpoints -----------------------------------------------------------------------------------------------------------


def test_a_value_model_reads_back_its_targets_and_its_policy_writes_what_it_learnt(rows, settings, train, lab_words):
    made = [
        rows.path(1, ["1 + 5 = 6", "6 + 1 = 7"], [0.5, 0.2, 1.0], "right"),
        rows.path(2, ["2 + 5 = 7", "7 + 1 = 8"], [-0.4, -0.8, -1.0], "wrong"),
        rows.path(3, ["3 + 5 = 8"], [0.0, 0.9], "right"),
    ]
    values = settings("value", made, beta=1.0, max_steps=250, learning_rate=0.03, logging_steps=50)
    out = train("value", values).out
    reward = RewardModel.load(str(out / "value"), device="cpu")
    assert (reward.step_format.head, reward.step_format.label_kind) == ("scalar", "value")
    for row in made:
        [scores] = reward.score_with_root([(row.prompt, [n.step for n in row.nodes[1:]])])
        assert [2 * s - 1 for s in scores] == pytest.approx([n.value for n in row.nodes], abs=0.12)
    # The policy's folder: sampled greedily, a right solution comes back with its end.
    assert StepFormat.load(out).head == "none"
    engine = load_engine(str(out), device="cpu")
    for row in (made[0], made[2]):
        prefix = tuple(lab_words(row.prompt)["input_ids"])
        [[sample]] = engine.generate([Request(prefix, (0,))], Sampling(40, temperature=0))
        assert sample.stop is StopReason.EOS
        assert lab_words.decode(sample.ids[:-1]) == lab_words.decode(
            lab_words("\n".join(n.step for n in row.nodes[1:]))["input_ids"]
        )


@pytest.mark.parametrize(
    ("kind", "over"),
    [
        ("value", {}),
        ("orm", {"lambda_lm": 1.0}),
        ("prm", {"lambda_lm": 1.0}),
        ("ranking", {"lambda_lm": 1.0}),
        ("value", {"lora_r": 4}),
    ],
)
def test_the_folders_are_plain_checkpoints(settings, train, kind, over):
    from transformers import AutoModelForCausalLM, AutoModelForTokenClassification

    out = train(kind, settings(kind, max_steps=3, **over)).out
    assert not (out / "joint").exists()
    assert not list(out.rglob("training_args.bin"))
    scores = out / "value" if kind == "value" else out
    folders = [(AutoModelForTokenClassification, scores), *([(AutoModelForCausalLM, out)] if kind == "value" else [])]
    weights = []
    for auto, folder in folders:
        model, loading = auto.from_pretrained(folder, output_loading_info=True)
        assert not loading["missing_keys"]
        assert not loading["unexpected_keys"]
        weights.append(model.state_dict())
    if kind == "value":
        shared = set(weights[0]) & set(weights[1])
        assert shared == {name for name in weights[0] if not name.startswith("score.")}
        assert all(torch.equal(weights[0][name], weights[1][name]) for name in shared)


def test_the_scores_of_the_checkpoint_are_those_of_the_joint_model(joint, lab_words, tmp_path):
    """One head read from the same hidden states by either class."""
    from transformers import AutoModelForTokenClassification

    from stepladder.models.loading import load_model

    joint.save_pretrained(tmp_path)
    plain = load_model(
        AutoModelForTokenClassification, str(tmp_path), settings={"num_labels": 1, "classifier_dropout": 0.0}
    )
    ids = torch.tensor([lab_words("Start 3 ; + 5 \n 3 + 5 = 8 \n")["input_ids"]])
    with torch.no_grad():
        torch.testing.assert_close(plain.train(False)(input_ids=ids).logits, joint(input_ids=ids).scores)


def test_the_language_model_loss_is_an_addition_to_the_orm(rows, settings, train, tmp_path):
    """An overfitted ORM with it still reads back the outcomes."""
    training = [rows.solution(n, ["1 + 1 = 2", f"2 + {n} = {2 + n}"], "right" if n % 2 else "wrong") for n in range(4)]
    values = settings("orm", training, lambda_lm=0.5, max_steps=150, learning_rate=0.03, logging_steps=50)
    result = train("orm", values)
    reward = RewardModel.load(str(result.out), device="cpu")
    assert (reward.step_format.head, reward.step_format.label_kind) == ("scalar", "outcome")
    found = [one[-1] for one in reward.score([(row.prompt, row.steps) for row in training])]
    assert [score > 0.5 for score in found] == [False, True, False, True]
    logged = [line for line in result.lines if "lm_loss" in line]
    assert logged[-1]["lm_loss"] < logged[0]["lm_loss"]
    assert logged[-1]["loss"] == pytest.approx(logged[-1]["score_loss"] + 0.5 * logged[-1]["lm_loss"], rel=0.05)


@pytest.mark.parametrize("head", ["two_class", "scalar"])
def test_the_score_loss_is_that_of_a_prm_alone(head, rows, lab_words, tiny_policy, settings, tmp_path):
    """One model of both heads against its token-classification checkpoint: without language-model weight, the same loss."""
    from transformers import AutoModelForTokenClassification

    from stepladder.models.loading import load_model
    from stepladder.trainers import reward
    from stepladder.trainers.prm import PRMArguments, prm_example

    classes = {"two_class": 2, "scalar": 1}[head]
    model = with_score_head(tiny_policy(lab_words), classes).train(False)
    model.save_pretrained(tmp_path / "joint")
    labels = {"num_labels": classes, "classifier_dropout": 0.0}
    plain = load_model(AutoModelForTokenClassification, str(tmp_path / "joint"), settings=labels).train(False)

    made = rows.some("prm", 6)
    args = build(PRMArguments, settings("prm", made, head=head, lambda_lm=1.0))
    step_format = format_of(lab_words).for_reward(head, "hard")
    items = [prm_example(row, lab_words, step_format, args, Counter()) for row in made]
    both = JointTrainer(model=model, args=args, train_dataset=Examples(items))
    both.score_loss, both.score_weight, both.lm_weight = losses.step_bce, 1.0, 0.0
    alone = reward.RewardTrainer(model=plain, args=args, train_dataset=Examples(items))
    both.positive_class = alone.positive_class = step_format.positive_class
    loss = both.compute_loss(model, collate(items, 0)).item()
    assert loss == pytest.approx(alone.compute_loss(plain, reward.collate(items, 0)).item(), rel=1e-5)
    both.lm_weight = 1.0
    assert both.compute_loss(model, collate(items, 0)).item() > loss + 1.0


def test_training_a_value_model_resumes_to_the_same_weights(settings, train, tmp_path):
    whole = settings("value", max_steps=4, save_strategy="steps", save_steps=2, save_total_limit=None)
    first = train("value", whole).out
    import shutil

    again = tmp_path / "again"
    shutil.copytree(first / "checkpoint-2", again / "checkpoint-2")
    second = train("value", {**whole, "output_dir": str(again)}).out
    for part in (".", "value"):
        assert (first / part / "model.safetensors").read_bytes() == (second / part / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("kind", "wrong", "message"),
    [
        ("value", {"beta": -1.0}, "beta must be 0 or more, found -1.0"),
        ("orm", {"lambda_lm": -1.0}, "lambda_lm must be 0 or more"),
        ("prm", {"lambda_lm": -1.0}, "lambda_lm must be 0 or more"),
    ],
)
def test_settings_that_cannot_be(settings, train, kind, wrong, message):
    with pytest.raises(UserError, match=message):
        train(kind, settings(kind, **wrong))
