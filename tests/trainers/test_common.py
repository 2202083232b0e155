"""What all trainers share: the normalisation of the loss, batches of like lengths, checkpoints, the final folder."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from stepladder.basics import UserError
from stepladder.data_gen.store import write_rows
from stepladder.models.reward import RewardModel
from stepladder.models.step_format import StepFormat
from stepladder.trainers.common import WHOLE, ReadsForward, _drop_old_checkpoints, newest_whole_checkpoint
from stepladder.trainers.examples import LikeLengths, pad_batch, pick_rows


def weights_of(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "model.safetensors")


# --- the loss is divided by what it is a mean of ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "over"),
    [
        ("prm", {"labels": "soft"}),
        ("orm", {"token_level": True}),
        ("sft", {"reduction": "token"}),
        ("sft", {"reduction": "sequence"}),
    ],
)
def test_8_by_1_equals_1_by_8(rows, settings, train, tmp_path, kind, over):
    """Rows of one to six steps have other numbers of labels and tokens, so a loss divided per micro-batch would differ."""
    results = []
    for size, accumulation in ((8, 1), (1, 8), (2, 4)):
        values = settings(
            kind, rows.some(kind, 20), per_device_train_batch_size=size, gradient_accumulation_steps=accumulation,
            max_steps=6, learning_rate=0.003, output_dir=str(tmp_path / f"{size}"), **over,
        )  # fmt: skip
        result = train(kind, values)
        results.append(([line["loss"] for line in result.lines if "loss" in line], weights_of(result.out)))
    losses, weights = results[0]
    assert len(losses) == 6  # twice through the rows, each epoch with a short last batch
    assert len(set(losses)) == 6
    for other_losses, other_weights in results[1:]:
        differences = [a - b for a, b in zip(losses, other_losses, strict=True)]
        assert max(map(abs, differences)) < 1e-5
        assert abs(sum(differences)) / 6 < 3e-6  # rounding goes both ways, a wrong divisor only one
        for name, weight in weights.items():
            torch.testing.assert_close(other_weights[name], weight, rtol=1e-3, atol=1e-4)


def test_the_evaluation_loss_does_not_depend_on_the_batch(rows, settings, train, tmp_path):
    write_rows(tmp_path / "held_out", rows.some("prm", 11, seed=5))
    found = []
    for size in (1, 4, 11):
        values = settings(
            "prm",
            labels="soft",
            after_first_zero=True,
            max_steps=2,
            eval_rows=str(tmp_path / "held_out"),
            per_device_eval_batch_size=size,
        )
        result = train("prm", values)
        found.append(result.metrics["eval_loss"])
        assert any(line.get("eval_loss") == found[-1] for line in result.lines)
    assert found == pytest.approx([found[0]] * 3, rel=1e-6)

    # By hand: the mean over labels, from the scores that the finished model gives.
    held_out = rows.some("prm", 11, seed=5)
    scores = RewardModel.load(str(result.out), device="cpu").score([(row.prompt, row.steps) for row in held_out])
    p = torch.tensor([score for one in scores for score in one])
    y = torch.tensor([count / 10 for row in held_out for count in row.n_correct[1:]])
    assert found[0] == pytest.approx(torch.nn.functional.binary_cross_entropy(p, y).item(), rel=1e-4)


def test_the_same_seed_gives_the_same_weights_and_another_one_others(settings, train, tmp_path):
    runs = [
        weights_of(train("prm", settings("prm", seed=seed, output_dir=str(tmp_path / str(n)))).out)
        for n, seed in enumerate((1, 1, 2))
    ]
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])
    assert not torch.equal(runs[0]["score.weight"], runs[2]["score.weight"])


# --- batches of like lengths ------------------------------------------------------------------------------------------


def some_lengths(count: int) -> list[int]:
    return torch.randint(5, 200, (count,), generator=torch.Generator().manual_seed(0)).tolist()


def padding(lengths: list[int], order: list[int], batch: int) -> float:
    """The share of a padded epoch that is padding."""
    batches = [[lengths[i] for i in order[s : s + batch]] for s in range(0, len(order), batch)]
    return 1 - sum(lengths) / sum(max(b) * len(b) for b in batches)


@pytest.mark.parametrize("group", [True, False])
@pytest.mark.parametrize(("count", "batch"), [(1000, 8), (1003, 8), (5, 8), (8, 8), (1, 4)])
def test_each_epoch_is_a_permutation_that_its_seed_and_number_decide(count, batch, group):
    lengths = some_lengths(count)
    order = lambda seed, epoch: list(epoch_of(LikeLengths(lengths, batch, seed, group=group), epoch))
    for epoch in range(3):
        assert sorted(order(0, epoch)) == list(range(count))
        assert order(0, epoch) == order(0, epoch)
    if count > 100:
        assert len({tuple(order(seed, epoch)) for seed in (0, 1) for epoch in range(3)}) == 6
    assert len(LikeLengths(lengths, batch, 0)) == count


def epoch_of(sampler: LikeLengths, epoch: int) -> LikeLengths:
    sampler.set_epoch(epoch)
    return sampler


def test_drawing_from_the_global_generator_changes_nothing():
    sampler = LikeLengths(some_lengths(100), 8, 0)
    torch.manual_seed(1)
    first = list(sampler)
    state = torch.random.get_rng_state()
    torch.manual_seed(2)
    torch.randn(7)
    assert list(sampler) == first
    torch.manual_seed(1)
    list(sampler)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_like_lengths_are_together():
    lengths = some_lengths(1000)
    grouped = list(LikeLengths(lengths, 8, 0))
    random = list(LikeLengths(lengths, 8, 0, group=False))
    assert padding(lengths, random, 8) > 0.35
    assert padding(lengths, grouped, 8) < 0.05
    # Not from short to long: the mean length of a batch says nothing about when it comes.
    means = torch.tensor([[lengths[i] for i in grouped[s : s + 8]] for s in range(0, 1000, 8)]).float().mean(1)
    time = torch.arange(len(means)).float()
    assert abs(torch.corrcoef(torch.stack([means, time]))[0, 1]) < 0.25


def test_a_window_of_one_step_leaves_steps_random_and_makes_micro_batches_alike():
    lengths = some_lengths(4000)

    def spread(order: list[int]) -> float:
        """How much the mean length of an optimiser step of 16 varies."""
        return (
            torch.tensor([[lengths[i] for i in order[s : s + 16]] for s in range(0, 4000, 16)])
            .float()
            .mean(1)
            .std()
            .item()
        )

    window, alike, random = (
        list(LikeLengths(lengths, 16, 0, **how))
        for how in ({}, {"pool": 1}, {"group": False})  # type: ignore[arg-type]
    )
    assert spread(window) > 3 * spread(random)
    assert spread(alike) == pytest.approx(spread(random), rel=0.1)
    # Four micro-batches of four: far less is padding, and a step holds the same rows however it is cut.
    assert padding(lengths, alike, 4) < 0.5 * padding(lengths, random, 4)
    steps = lambda order: {frozenset(order[s : s + 16]) for s in range(0, 4000, 16)}
    assert steps(alike) == steps(random)


def test_a_short_batch_comes_last():
    lengths = some_lengths(403)
    order = list(LikeLengths(lengths, 8, 3, pool=10))
    batches = [order[s : s + 8] for s in range(0, 403, 8)]
    assert [len(b) for b in batches] == [8] * 50 + [3]
    assert padding(lengths, order, 8) < 0.15


def test_rows_are_drawn_with_the_seed_and_keep_their_order():
    rows = list(range(50))
    assert pick_rows(rows, 0, 1) == rows
    assert pick_rows(rows, 80, 1) == rows
    drawn = pick_rows(rows, 10, 1)
    assert drawn == sorted(set(drawn))
    assert len(drawn) == 10
    assert drawn == pick_rows(rows, 10, 1) != pick_rows(rows, 10, 2)


def test_pad_batch_pads_each_field_with_its_own_value():
    items = [{"input_ids": [5, 6, 7], "labels": [1, 2, 3]}, {"input_ids": [8], "labels": [4]}]
    batch = pad_batch(items, {"input_ids": 0, "labels": -100})
    assert {name: value.tolist() for name, value in batch.items()} == {
        "input_ids": [[5, 6, 7], [8, 0, 0]],
        "labels": [[1, 2, 3], [4, -100, -100]],
        "attention_mask": [[1, 1, 1], [1, 0, 0]],
    }


# --- checkpoints ------------------------------------------------------------------------------------------------------


def checkpoints(folder: Path, **whole: bool) -> None:
    for name, marked in whole.items():
        (folder / name.replace("_", "-")).mkdir(parents=True)
        (folder / name.replace("_", "-") / "model.safetensors").write_text("x")
        if marked:
            (folder / name.replace("_", "-") / WHOLE).write_text("{}")


def test_the_newest_whole_checkpoint(tmp_path):
    assert newest_whole_checkpoint(str(tmp_path / "nothing")) is None
    checkpoints(tmp_path, checkpoint_9=True, checkpoint_100=True, checkpoint_200=False, checkpoint_old=True)
    assert newest_whole_checkpoint(str(tmp_path)) == str(tmp_path / "checkpoint-100")


def test_what_is_being_deleted_is_no_longer_whole(tmp_path, monkeypatch):
    """A kill inside the deletion of a checkpoint must not leave one that looks whole."""
    checkpoints(tmp_path, checkpoint_5=True, checkpoint_10=True, checkpoint_15=True)
    monkeypatch.setattr("shutil.rmtree", lambda *_, **__: None)  # killed before anything is gone
    _drop_old_checkpoints(str(tmp_path), 1, None)
    assert [p.name for p in tmp_path.glob("checkpoint-*") if (p / WHOLE).exists()] == ["checkpoint-15"]


@pytest.mark.parametrize(
    ("limit", "best", "left"),
    [(1, None, {15}), (2, None, {10, 15}), (1, "checkpoint-5", {5, 15}), (None, None, {5, 10, 15})],
)
def test_old_checkpoints_are_dropped(tmp_path, limit, best, left):
    checkpoints(tmp_path, checkpoint_5=True, checkpoint_10=True, checkpoint_15=True)
    _drop_old_checkpoints(str(tmp_path), limit, best)
    assert {int(p.name.split("-")[1]) for p in tmp_path.glob("checkpoint-*")} == left


def test_a_checkpoint_is_whole_before_an_older_one_goes(settings, train, monkeypatch):
    """At every moment of a training there is a whole checkpoint, once there was one."""
    import shutil

    seen = []
    delete = shutil.rmtree

    def watched(path: Any, **options: Any) -> None:
        if "checkpoint-" in str(path):
            seen.append((Path(path).name, newest_whole_checkpoint(str(Path(path).parent))))
        delete(path, **options)

    monkeypatch.setattr("shutil.rmtree", watched)
    out = train("prm", settings("prm", max_steps=4, save_strategy="steps", save_steps=1)).out
    assert [(old, Path(str(whole)).name) for old, whole in seen] == [
        (f"checkpoint-{n}", f"checkpoint-{n + 1}") for n in (1, 2, 3)
    ]
    assert [p.name for p in out.glob("checkpoint-*")] == ["checkpoint-4"]


# --- the final folder -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["prm", "orm", "sft"])
def test_the_final_folder_is_a_plain_checkpoint(settings, train, kind):
    from transformers import AutoModelForCausalLM, AutoModelForTokenClassification, AutoTokenizer

    out = train(kind, settings(kind, save_strategy="steps", save_steps=2)).out
    names = {path.name for path in out.iterdir() if path.is_file()}
    assert {"model.safetensors", "config.json", "tokenizer.json", "step_format.json", "metrics.jsonl"} <= names
    assert not [name for name in names if name.endswith((".bin", ".pt", ".pth", ".pkl"))]  # no pickles
    auto = AutoModelForCausalLM if kind == "sft" else AutoModelForTokenClassification
    model, loading = auto.from_pretrained(out, output_loading_info=True)
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    assert all(torch.equal(v, weights_of(out)[k]) for k, v in model.state_dict().items() if k in weights_of(out))
    assert len(AutoTokenizer.from_pretrained(out)) == model.config.vocab_size
    assert StepFormat.load(out).head == {"prm": "two_class", "orm": "scalar", "sft": "none"}[kind]


def test_metrics_are_one_line_a_logged_step(settings, train):
    result = train("prm", settings("prm", max_steps=5, logging_steps=2))
    assert [line["step"] for line in result.lines if "loss" in line] == [2, 4]
    for line in result.lines:
        if "loss" in line:
            assert {"epoch", "loss", "grad_norm", "learning_rate", "accuracy", "target_mean"} <= set(line)
            assert 0 <= line["accuracy"] <= 1
    assert result.lines[-1]["train_loss"] == result.metrics["train_loss"]


def test_a_finished_training_is_not_done_again(settings, train):
    values = settings("prm", save_strategy="steps", save_steps=2)
    first = train("prm", values)
    before = weights_of(first.out)
    again = train("prm", values)
    assert [line for line in again.lines if "loss" in line] == [line for line in first.lines if "loss" in line]
    assert all(torch.equal(before[name], weight) for name, weight in weights_of(again.out).items())


# --- rows that are laid out for another model -------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["prm", "orm", "sft"])
def test_rows_laid_out_for_another_model_are_refused(settings, train, kind):
    values = settings(kind, max_steps=1)
    path = Path(values["rows"], "step_format.json")
    record = json.loads(Path(values["model"], "step_format.json").read_text())
    path.write_text(json.dumps(record))
    train(kind, values)  # the same layout
    path.write_text(json.dumps({**record, "prompt_template": "Q: {prompt}"}))
    message = r"_rows: the step format of the data has prompt_template 'Q: \{prompt\}', the model's has '\{prompt\}'"
    with pytest.raises(UserError, match=message):
        train(kind, values)
    # Rows are text: their file alone may train another kind of model.
    train(kind, {**values, "rows": str(Path(values["rows"], "rows.parquet"))})


def test_held_out_rows_are_checked_too_and_labels_are_no_layout(settings, train, rows, tmp_path):
    values = settings("prm", max_steps=1)
    write_rows(tmp_path / "held_out", rows.some("prm", 3))
    values["eval_rows"] = str(tmp_path / "held_out")
    own = StepFormat.load(values["model"])
    own.for_reward("scalar", "human").save(tmp_path / "held_out")  # head and label kind lay nothing out
    train("prm", values)
    record = json.loads((tmp_path / "held_out" / "step_format.json").read_text())
    (tmp_path / "held_out" / "step_format.json").write_text(json.dumps({**record, "separator_ids": [5]}))
    with pytest.raises(UserError, match=r"held_out: the step format of the data has separator_ids \(5,\)"):
        train("prm", values)


@pytest.mark.skipif(torch.accelerator.is_available(), reason="there it is the accelerator's to say")
def test_bf16_is_taken_on_a_cpu(settings, train) -> None:
    values = settings("prm", bf16=True, max_steps=1)
    del values["use_cpu"]
    assert len(train("prm", values).lines) > 0


# --- the end of a process among others --------------------------------------------------------------------------------

_ABORTS_AT_ITS_END = """
import atexit, os, sys
import torch.distributed as dist
from pathlib import Path
from stepladder.trainers.arguments import StepladderArguments
from stepladder.trainers.common import run_trainer

class Backend:
    def __del__(self, abort=os.abort):
        abort()  # as C++ threads do that nothing joined

held = Backend()
atexit.register(lambda: Path(said).write_text("the tracker has finished"))

def train(args):
    if "{group}":
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    print("trained", args.output_dir)

said = sys.argv.pop()
run_trainer(StepladderArguments, train, "test")
"""


@pytest.mark.parametrize(("group", "status"), [("yes", 0), ("", -signal.SIGABRT)])
def test_a_backend_that_aborts_at_the_end_fails_no_training(group: str, status: int, tmp_path: Path) -> None:
    """A process that trained among others ends well whatever its backend's threads do; the second case shows what they do."""
    ended = subprocess.run(
        [sys.executable, "-c", _ABORTS_AT_ITS_END.replace("{group}", group), "--output_dir", "out", tmp_path / "said"],
        capture_output=True,
        text=True,
    )
    assert ended.returncode == status, ended.stderr
    if group:
        assert ended.stdout.endswith("trained out\n")  # transformers says first that W&B is offline, where it is
    assert (tmp_path / "said").read_text() == "the tracker has finished"


# --- padding masks ------------------------------------------------------------------------------------------------------


class Reads(torch.nn.Module):
    """A model whose output at a token depends on the mean of all up to it, or of the whole sequence."""

    def __init__(self, forward: bool, attention: str = "sdpa") -> None:
        super().__init__()
        self.embedding, self.forward_only = torch.nn.Embedding(40, 4), forward
        self.config = SimpleNamespace(_attn_implementation=attention)
        self.config.get_text_config = lambda: SimpleNamespace(vocab_size=40)

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> Any:
        seen = self.embedding(input_ids)
        if self.forward_only:
            logits = seen.cumsum(1) / torch.arange(1, seen.shape[1] + 1)[:, None]
        else:
            logits = seen + seen.mean(1, keepdim=True)
        return SimpleNamespace(logits=logits)


@pytest.mark.parametrize(
    ("model", "masked"), [(Reads(True), False), (Reads(False), True), (Reads(True, "flash_attention_2"), True)]
)
def test_masks_go_where_a_model_only_reads_forward(model: Reads, masked: bool) -> None:
    trainer = SimpleNamespace(
        model=model, model_wrapped=model, masked=True, accelerator=SimpleNamespace(unwrap_model=lambda one: one),
        compute_loss_context_manager=contextlib.nullcontext,
    )  # fmt: skip
    model.train()
    ReadsForward(trainer).on_train_begin(SimpleNamespace(device="cpu"), None, None)
    assert trainer.masked is masked
    assert model.training


def test_a_head_of_zeros_shows_nothing_of_how_a_model_reads() -> None:
    model = Reads(False)
    torch.nn.init.zeros_(model.embedding.weight)
    trainer = SimpleNamespace(
        model=model, model_wrapped=model, masked=True, accelerator=SimpleNamespace(unwrap_model=lambda one: one),
        compute_loss_context_manager=contextlib.nullcontext,
    )  # fmt: skip
    ReadsForward(trainer).on_train_begin(SimpleNamespace(device="cpu"), None, None)
    assert trainer.masked


@pytest.mark.parametrize("kind", ["prm", "ranking", "value", "sft"])
def test_without_a_mask_of_padding_the_training_is_the_same(kind, settings, train, tmp_path, monkeypatch):
    """The same losses and weights, and attention gets no mask of pairs of tokens."""
    import transformers.integrations.sdpa_attention as sdpa

    attend, masks = torch.nn.functional.scaled_dot_product_attention, []

    def watched(*args: Any, attn_mask: Any = None, **given: Any) -> torch.Tensor:
        masks.append(attn_mask is not None)
        return attend(*args, attn_mask=attn_mask, **given)

    monkeypatch.setattr(sdpa.torch.nn.functional, "scaled_dot_product_attention", watched)
    values = settings(kind, max_steps=2, like_lengths=False)
    without = train(kind, {**values, "output_dir": str(tmp_path / "without")})
    assert masks
    assert not any(masks)
    masks.clear()
    monkeypatch.setattr(ReadsForward, "on_train_begin", lambda *args, **given: None)
    masked = train(kind, {**values, "output_dir": str(tmp_path / "masked")})
    assert any(masks)
    losses = [[line["loss"] for line in run.lines if "loss" in line] for run in (without, masked)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)
    ours, theirs = weights_of(without.out), weights_of(masked.out)
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], atol=1e-5, rtol=0)
