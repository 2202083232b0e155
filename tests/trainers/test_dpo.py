"""DPO on pairs of solutions and of steps: what is laid out and trained, the losses, and that they are TRL's where TRL is right."""

from __future__ import annotations

import itertools
import json
import math
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from stepladder.basics import UserError
from stepladder.config import build
from stepladder.data_gen.store import write_rows
from stepladder.models.step_format import StepFormat
from stepladder.trainers import losses
from stepladder.trainers.common import start_model
from stepladder.trainers.dpo import (
    REFERENCE,
    DPOArguments,
    DPOTrainer,
    Reference,
    collate,
    collate_forked,
    forking_saves,
    pair_example,
)
from stepladder.trainers.examples import Examples
from stepladder.trainers.forward import answer_logprobs, fork_logprobs, fork_mask, in_pieces
from stepladder.trainers.sft import dialogue_example


def arguments(**values: Any) -> DPOArguments:
    return build(DPOArguments, {"model": "m", "rows": "r", "output_dir": "o", "use_cpu": True, **values})


# --- losses against slow references -----------------------------------------------------------------------------------


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x))


def draw(seed: int, count: int = 9) -> torch.Tensor:
    return 3 * torch.randn(count, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def numerical_gradient(function: Any, x: torch.Tensor) -> torch.Tensor:
    steps = 1e-6 * torch.eye(len(x), dtype=torch.float64)
    return torch.stack([(function(x + d).sum() - function(x - d).sum()) / 2e-6 for d in steps])


def test_the_preference_loss_and_its_gradient():
    chosen, rejected, eps = draw(0), draw(1), torch.linspace(0, 0.5, 9, dtype=torch.float64)
    want = [
        -(1 - e) * log_sigmoid(0.3 * (c - r)) - e * log_sigmoid(-0.3 * (c - r))
        for c, r, e in zip(chosen.tolist(), rejected.tolist(), eps.tolist(), strict=True)
    ]
    found = losses.preference_loss(chosen.requires_grad_(), rejected, 0.3, eps)
    assert found.tolist() == pytest.approx(want, rel=1e-12)
    found.sum().backward()
    by_hand = numerical_gradient(lambda c: losses.preference_loss(c, rejected, 0.3, eps), chosen.detach())
    torch.testing.assert_close(chosen.grad, by_hand, rtol=1e-6, atol=1e-8)
    plain = losses.preference_loss(chosen, rejected, 0.3)
    torch.testing.assert_close(plain, losses.preference_loss(chosen, rejected, 0.3, torch.zeros_like(eps)))
    # Swapping a pair changes its loss by exactly the scaled gap.
    torch.testing.assert_close(losses.preference_loss(rejected, chosen, 0.3) - plain, 0.3 * (chosen - rejected))
    assert torch.isfinite(losses.preference_loss(torch.tensor([-1e4, 1e4]), torch.zeros(2), 1.0)).all()


def test_the_smoothed_loss_has_its_minimum_where_the_counts_say():
    """sigmoid(beta h) = 1 - eps: a pair that was 4 to 1 is not pushed beyond odds of 4 to 1."""
    eps = losses.visit_smoothing(4, 1)
    h = torch.linspace(-5, 5, 100_001, dtype=torch.float64)
    best = h[losses.preference_loss(h, torch.zeros_like(h), 1.0, torch.full_like(h, eps)).argmin()]
    assert best.item() == pytest.approx(math.log(4), abs=1e-3)


@pytest.mark.parametrize(
    ("chosen", "rejected", "want"), [(4, 1, 0.2), (3, 0, 0.0), (0, 0, 0.0), (0, 1, 0.5), (1, 9, 0.5), (9, 9, 0.5)]
)
def test_smoothing_from_visits(chosen, rejected, want):
    assert losses.visit_smoothing(chosen, rejected) == pytest.approx(want)


def test_the_ipo_loss_and_its_gradient():
    chosen, rejected = draw(2), draw(3)
    lengths = torch.arange(1, 10, dtype=torch.float64), torch.arange(9, 0, -1, dtype=torch.float64)
    want = [
        (c / n - r / m - 1 / (2 * 0.25)) ** 2
        for c, r, n, m in zip(*(x.tolist() for x in (chosen, rejected, *lengths)), strict=True)
    ]
    found = losses.ipo_loss(chosen.requires_grad_(), rejected, 0.25, *lengths)
    assert found.tolist() == pytest.approx(want, rel=1e-12)
    found.sum().backward()
    by_hand = numerical_gradient(lambda c: losses.ipo_loss(c, rejected, 0.25, *lengths), chosen.detach())
    torch.testing.assert_close(chosen.grad, by_hand, rtol=1e-5, atol=1e-7)


# --- what is laid out and trained -------------------------------------------------------------------------------------


def sides(tokenizer: Any, row: Any, **over: Any) -> list[str]:
    """The trained text of the chosen and the rejected side."""
    item, what = pair_example(row, tokenizer, StepFormat.for_policy(tokenizer, "\n"), arguments(**over))
    assert what == "kept"
    batch = collate([item], tokenizer.pad_token_id)
    found = []
    for ids, labels in zip(batch["input_ids"][0].tolist(), batch["labels"][0].tolist(), strict=True):
        assert all(label in (-100, i) for i, label in zip(ids, labels, strict=True))
        found.append(tokenizer.decode([label for label in labels if label != -100]))
    return found


def test_an_intermediate_step_ends_with_its_separator_and_not_with_eos(lab_words, rows):
    row = rows.pair(3, ["3 + 5 = 8"], ["8 * 2 = 3"], ["8 * 2 = 4", "4 - 1 = 3"])
    assert sides(lab_words, row) == ["8 * 2 = 3 \n", "8 * 2 = 4 \n 4 - 1 = 3 \n"]
    mixed = rows.pair(3, ["3 + 5 = 8"], ["Answer: 8"], ["8 * 2 = 4"], chosen_finished=True)
    assert sides(lab_words, mixed) == ["Answer: 8 <eos>", "8 * 2 = 4 \n"]


def test_a_finished_solution_is_laid_out_as_in_fine_tuning(lab_words, rows):
    from stepladder.data_gen.solutions import to_dialogue

    step_format, steps = StepFormat.for_policy(lab_words, "\n"), ("3 + 5 = 8", "Answer: 8")
    row = rows.pair(3, [], steps, ["Answer: 3"])
    item, _ = pair_example(row, lab_words, step_format, arguments())
    tuned, _ = dialogue_example(to_dialogue("p", row.prompt, steps, "\n", row.source), lab_words, step_format, 99)
    assert item["input_ids"][0] == tuned["input_ids"]
    assert item["input_ids"][0][item["start"] :] == [label for label in tuned["labels"] if label != -100]


def test_separators_are_appended_as_ids_in_vocabularies_that_merge_them(merging_tokenizer, rows):
    """ "4\\n" is one token: joined text would lose the separator's id and move the border of the prefix."""
    step_format = StepFormat.for_policy(merging_tokenizer, "\n")
    row = rows.pair(0, ["So it is 4"], ["then 4"], ["the 4"])
    item, _ = pair_example(row, merging_tokenizer, step_format, arguments())
    prefix = step_format.encode(merging_tokenizer, row.prompt, row.prefix).ids
    for ids, step in zip(item["input_ids"], ("then 4", "the 4"), strict=True):
        assert tuple(ids) == prefix + tuple(merging_tokenizer(step)["input_ids"]) + step_format.separator_ids
    joined = merging_tokenizer("".join(f"{s}\n" for s in (row.prompt, *row.prefix)))["input_ids"]
    assert list(prefix) != joined


def test_what_is_left_out_is_counted(lab_words, rows, settings, train, capsys):
    row = lambda n, **fields: rows.pair(n, ["3 + 5 = 8"], ["8 * 2 = 3"], ["8 * 2 = 4"], **fields)
    pairs = [
        row(0, n_chosen=8, n_rejected=2),
        row(1, reward_chosen=0.6, reward_rejected=0.4),
        row(2, n_chosen=3, n_rejected=3),
        rows.pair(3, [], ["3 + 5 = 8"] * 20, ["Answer: 8"], n_rejected=0),
        rows.pair(4, [], ["Answer: 8"], ["Answer:  8"], n_rejected=0),
        rows.pair(5, ["3 + 5 = 8"], [], ["Answer: 8"], n_rejected=0),
    ]
    train("dpo", settings("dpo", pairs, margin=0.25, max_length=60, visit_smoothing=True, max_steps=1))
    told = (
        "1 kept, 1 below the margin, 1 whose counts leave it open which side is better, 1 too long, 1 alike on both sides, "
        "1 without a step on one side"
    )
    assert told in capsys.readouterr().out
    with pytest.raises(UserError, match="no row can be trained on"):
        train("dpo", settings("dpo", pairs[1:2], margin=0.25))


# --- the loss of a batch ----------------------------------------------------------------------------------------------


@pytest.fixture
def trainer(tmp_path: Any, lab_words: Any, tiny_policy: Any) -> Any:
    def make(items: list[dict[str, Any]], **settings: Any) -> DPOTrainer:
        return DPOTrainer(
            model=tiny_policy(lab_words, width=16, layers=1, heads=2),
            args=arguments(output_dir=str(tmp_path / "ours"), disable_tqdm=True, **settings),
            train_dataset=Examples(items),
            data_collator=lambda items: collate(items, 0),
        )

    return make


def logprob_by_hand(model: Any, ids: list[int], start: int) -> float:
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids])).logits[0].double()
    return sum(torch.log_softmax(logits[t - 1], 0)[ids[t]].item() for t in range(start, len(ids)))


def items_of(rows: Any, tokenizer: Any, count: int = 8, **over: Any) -> list[dict[str, Any]]:
    step_format = StepFormat.for_policy(tokenizer, "\n")
    made = [pair_example(row, tokenizer, step_format, arguments(**over))[0] for row in rows.some("dpo", count)]
    return [item for item in made if item is not None]


@pytest.mark.parametrize("make", [collate, collate_forked])
@pytest.mark.parametrize("over", [{}, {"visit_smoothing": True}, {"loss": "ipo"}, {"sft_weight": 0.5}])
def test_the_loss_of_a_batch_by_hand(trainer, rows, lab_words, over, make):
    items = items_of(rows, lab_words, **over)
    for item, reference in zip(items, draw(7, 2 * len(items)).reshape(-1, 2).tolist(), strict=True):
        item["reference"] = [10 * value - 60 for value in reference]
    made = trainer(items, **over)
    found = made.compute_loss(made.model, make(items, 0)).item()
    want = 0.0
    for item in items:
        # Each side alone, without padding; sums over its tokens, nothing of prompt and prefix.
        c, r = (logprob_by_hand(made.model, ids, item["start"]) for ids in item["input_ids"])
        n, m = (len(ids) - item["start"] for ids in item["input_ids"])
        h = (c - item["reference"][0]), (r - item["reference"][1])
        if over.get("loss") == "ipo":
            want += (h[0] / n - h[1] / m - 5) ** 2
        else:
            e = item["smoothing"]
            want += -(1 - e) * log_sigmoid(0.1 * (h[0] - h[1])) - e * log_sigmoid(-0.1 * (h[0] - h[1]))
        want -= over.get("sft_weight", 0.0) * c / n
    assert found == pytest.approx(want / len(items), rel=1e-5)
    if "visit_smoothing" in over:
        assert len({item["smoothing"] for item in items}) > 3


def test_logits_are_computed_where_something_is_trained_and_nowhere_else(trainer, rows, lab_words):
    items = items_of(rows, lab_words)
    made = trainer(items)
    batch, shapes = collate(items, 0), []
    handle = made.model.lm_head.register_forward_hook(lambda _m, _i, out: shapes.append(out.shape[1]))
    some, tokens = made.logprobs(made.model, batch)
    made.pick = False
    everywhere, _ = made.logprobs(made.model, batch)
    handle.remove()
    torch.testing.assert_close(some, everywhere)
    trained = (batch["labels"][:, :, 1:] != -100).flatten(0, 1).any(0).sum().item()
    assert shapes == [trained, batch["input_ids"].shape[2]]
    assert shapes[0] < shapes[1]
    assert tokens.tolist() == [[len(ids) - item["start"] for ids in item["input_ids"]] for item in items]


# --- prefixes that are read once ----------------------------------------------------------------------------------------


PAIRS = [  # ids of both sides, tokens that they share: prefixes and sides of all lengths, one prefix of a single token
    ([[1, 5, 6, 7, 8, 9], [1, 5, 6, 7, 4]], 4),
    ([[1, 9], [1, 8, 8, 8, 7]], 1),
    ([[1, 5, 6, 7, 8, 9, 3, 3, 3, 2, 4, 4], [1, 5, 6, 7, 8, 9, 3, 3, 3, 5]], 9),
    ([[1, 4, 4, 2], [1, 4, 4, 3]], 3),
]


def both_ways(model: Any, pairs: list[Any]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    items = [{"input_ids": ids, "start": start, "smoothing": 0.0} for ids, start in pairs]
    twice = collate(items, 0)
    flat = {name: twice[name].flatten(0, 1) for name in ("input_ids", "labels", "attention_mask")}
    values, tokens = answer_logprobs(model, flat, pick=True)
    return [(values.view(-1, 2), tokens.view(-1, 2)), fork_logprobs(model, collate_forked(items, 0), pick=True)]


def test_a_prefix_read_once_gives_the_same_log_probabilities_and_gradients(lab_words, tiny_policy):
    model = tiny_policy(lab_words).double()
    gradients = []
    for values, tokens in both_ways(model, PAIRS):
        assert tokens.tolist() == [[2, 1], [1, 4], [3, 1], [1, 1]]
        weights = torch.arange(1.0, 9.0, dtype=torch.float64).view(4, 2)
        (weights * values).sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
        model.zero_grad()
    (twice, _), (once, _) = both_ways(model, PAIRS)
    torch.testing.assert_close(once, twice, rtol=1e-6, atol=1e-6)  # sums over tokens are in float32
    for found, want in zip(*gradients, strict=True):
        torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-5)


def test_no_side_sees_the_other_and_no_row_another(lab_words, tiny_policy):
    model = tiny_policy(lab_words)
    _, (before, _) = both_ways(model, PAIRS)
    changed = [([PAIRS[0][0][0], [1, 5, 6, 7, 9, 9, 9]], 4), *PAIRS[1:]]
    _, (after, _) = both_ways(model, changed)
    torch.testing.assert_close(after[0, 0], before[0, 0])
    torch.testing.assert_close(after[1:], before[1:])
    assert abs(after[0, 1] - before[0, 1]) > 0.1


def test_fewer_tokens_are_read_and_logits_computed_at_the_answers_alone(lab_words, tiny_policy):
    model, shapes = tiny_policy(lab_words), []
    items = [{"input_ids": ids, "start": start, "smoothing": 0.0} for ids, start in PAIRS]
    batch = collate_forked(items, 0)
    handle = model.lm_head.register_forward_hook(lambda _m, _i, out: shapes.append(out.shape[1]))
    fork_logprobs(model, batch, pick=True)
    handle.remove()
    assert batch["input_ids"].shape == (4, 9 + 3 + 4)  # longest prefix, longest first side, longest second
    assert shapes == [3 + 4 + 1]  # the last token of the prefix predicts the first of both
    assert batch["attention_mask"].sum() == sum(start + sum(len(i) - start for i in ids) for ids, start in PAIRS)


@pytest.mark.parametrize(("overhead", "number"), [(0, 4), (6, 3), (11, 2), (1000, 1)])
def test_pieces_of_a_batch_are_the_batch_with_less_padding(lab_words, tiny_policy, overhead, number):
    """The same log-probabilities and gradients from several forwards, whose padding is the least of all cuts of their order."""
    model = tiny_policy(lab_words).double()
    batch = collate_forked([{"input_ids": ids, "start": start, "smoothing": 0.1} for ids, start in PAIRS], 0)
    pieces = in_pieces(batch, overhead)
    assert len(pieces) == number
    rows = [row for piece, _ in pieces for row in piece]
    assert sorted(rows) == [0, 1, 2, 3]
    assert sum(int(cut["attention_mask"].sum()) for _, cut in pieces) == int(batch["attention_mask"].sum())
    lengths = [(start, *(len(one) - start for one in ids)) for ids, start in PAIRS]
    cost = lambda cut: sum(len(one) * sum(max(lengths[r][k] for r in one) for k in range(3)) + overhead for one in cut)
    every_cut = []
    for ends in range(8):  # bit i: a piece ends behind the i-th row
        marks = [0, *(i + 1 for i in range(3) if ends >> i & 1), 4]
        every_cut.append([rows[a:b] for a, b in itertools.pairwise(marks)])
    assert sum(cut["input_ids"].numel() + overhead for _, cut in pieces) == min(map(cost, every_cut))
    weights = torch.arange(1.0, 9.0, dtype=torch.float64).view(4, 2)
    whole, counts = fork_logprobs(model, batch, pick=True)
    (weights * whole).sum().backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    parts = [fork_logprobs(model, cut, pick=True) for _, cut in pieces]
    found = torch.cat([values for values, _ in parts])
    torch.testing.assert_close(found, whole[rows], rtol=1e-6, atol=1e-6)
    assert torch.cat([tokens for _, tokens in parts]).tolist() == counts[rows].tolist()
    (weights[rows] * found).sum().backward()
    for weight, want in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(weight.grad, want, rtol=1e-5, atol=1e-5)


def test_a_trainer_cuts_batches_of_wide_models_and_not_of_narrow_ones(trainer, rows, lab_words, monkeypatch):
    items = items_of(rows, lab_words)
    made, batch = trainer(items), collate_forked(items, 0)
    read = []
    handle = made.model.register_forward_pre_hook(
        lambda _m, _i, given: read.append(given["input_ids"].numel()), with_kwargs=True
    )
    with torch.no_grad():
        narrow, tokens = made.logprobs(made.model, batch)
        assert read == [batch["input_ids"].numel()]
        monkeypatch.setattr("stepladder.trainers.dpo.FORWARD_WORK", 0.0)
        monkeypatch.setattr("stepladder.trainers.dpo.FORWARD_TOKENS", 1)
        wide, same = made.logprobs(made.model, batch)
    handle.remove()
    assert len(read) > 2
    assert int(batch["attention_mask"].sum()) <= sum(read[1:]) < read[0]
    torch.testing.assert_close(wide, narrow)
    assert same.tolist() == tokens.tolist()


def test_masks_by_enumeration():
    batch = collate_forked([{"input_ids": ids, "start": start, "smoothing": 0.0} for ids, start in PAIRS], 0)
    mask = fork_mask(batch["attention_mask"], batch["branch"])[:, 0]
    for row in range(4):
        for i in range(16):
            for j in range(16):
                bi, bj = batch["branch"][row, i].item(), batch["branch"][row, j].item()
                sees = j <= i and bj in (0, bi) and bool(batch["attention_mask"][row, j])
                assert mask[row, i, j].item() == (sees or i == j)


@pytest.mark.parametrize(
    ("start", "sides", "width", "saves"),
    [(100, 20, 64, True), (10, 200, 64, False), (10, 40, 4096, True), (50, 60, 16, True), (50, 61, 16, False)],
)
def test_sharing_pays_for_long_prefixes_and_short_sides(start, sides, width, saves):
    """At the border: 6 * 16 * 50 + 50^2 = 7300 against 2 * 60^2 = 7200 and 2 * 61^2 = 7442."""
    assert forking_saves([{"input_ids": [[0] * (start + sides)] * 2, "start": start}], width) is saves


@pytest.mark.parametrize("told", [None, True])
def test_a_model_that_cannot_share_reads_prefixes_twice_or_says_so(told, settings, train, rows, monkeypatch, capsys):
    from transformers import LlamaForCausalLM

    forward = LlamaForCausalLM.forward

    def refusing(self: Any, *args: Any, attention_mask: Any = None, **options: Any) -> Any:
        if attention_mask is not None and attention_mask.dim() == 4:
            attention_mask = None  # as a model that makes its own mask of everything would
        return forward(self, *args, attention_mask=attention_mask, **options)

    monkeypatch.setattr(LlamaForCausalLM, "forward", refusing)
    values = settings("dpo", rows.some("dpo", 12), max_steps=1, **({"share_prefix": told} if told else {}))
    if told:
        with pytest.raises(UserError, match="share_prefix: this model cannot read a prefix once"):
            train("dpo", values)
        return
    monkeypatch.setattr("stepladder.trainers.dpo.forking_saves", lambda *_: True)
    train("dpo", values)
    assert "whose prefixes are read twice: log-probabilities of a token differ" in capsys.readouterr().out


def test_the_loss_is_that_of_trl_on_whole_solutions(tmp_path, trainer, rows, lab_words, tiny_policy):
    """Three steps through TRL's DPO trainer: equal losses, so equal references and gradients. Text is handed to TRL as text."""
    from datasets import Dataset
    from trl import DPOConfig
    from trl import DPOTrainer as TRLTrainer

    pairs = [row for row in rows.some("dpo", 40) if not row.prefix][:8]
    assert len(pairs) == 8
    step_format = StepFormat.for_policy(lab_words, "\n")
    items = [pair_example(row, lab_words, step_format, arguments())[0] for row in pairs]
    schedule = {
        "per_device_train_batch_size": 8, "max_steps": 3, "logging_steps": 1, "learning_rate": 0.01, "seed": 1,
        "lr_scheduler_type": "constant", "save_strategy": "no", "beta": 0.3,
    }  # fmt: skip
    ours = trainer(items, **schedule)
    ours.add_callback(Reference(ours, {"train": ours.train_dataset}, "m"))
    ours.train()
    text = lambda steps: " " + " \n ".join(steps) + " "
    theirs = TRLTrainer(
        model=tiny_policy(lab_words, width=16, layers=1, heads=2),
        ref_model=tiny_policy(lab_words, width=16, layers=1, heads=2),
        args=DPOConfig(
            output_dir=str(tmp_path / "theirs"), bf16=False, gradient_checkpointing=False, use_cpu=True, report_to="none",
            disable_tqdm=True, max_length=None, **schedule,
        ),
        train_dataset=Dataset.from_list(
            [{"prompt": row.prompt, "chosen": text(row.chosen), "rejected": text(row.rejected)} for row in pairs]
        ),
        processing_class=lab_words,
    )  # fmt: skip
    theirs_ids = [row["prompt_ids"] + row["chosen_ids"] for row in theirs.train_dataset]
    assert theirs_ids == [item["input_ids"][0] for item in items]
    theirs.train()
    found = [[log["loss"] for log in t.state.log_history if "loss" in log] for t in (ours, theirs)]
    assert found[0][0] == pytest.approx(math.log(2), rel=1e-5)
    assert len(found[0]) == 3
    assert found[0] == pytest.approx(found[1], rel=1e-5)
    assert found[0][2] < found[0][0] - 0.02
    for mine, their in zip(ours.model.parameters(), theirs.model.parameters(), strict=True):
        torch.testing.assert_close(mine, their, rtol=1e-3, atol=2e-5)


# --- the reference ----------------------------------------------------------------------------------------------------


def test_the_reference_is_computed_once_and_is_the_start(settings, train, rows, policy_folder, lab_words, tmp_path):
    from transformers import AutoModelForCausalLM

    write_rows(tmp_path / "held_out", rows.some("dpo", 5, seed=4))
    values = settings("dpo", eval_rows=str(tmp_path / "held_out"), save_strategy="steps", save_steps=2)
    out = train("dpo", values).out
    kept = json.loads((out / REFERENCE).read_text())
    model = AutoModelForCausalLM.from_pretrained(policy_folder)
    for name, some in (("train", rows.some("dpo", 16)), ("eval", rows.some("dpo", 5, seed=4))):
        step_format = StepFormat.load(policy_folder)
        items = [pair_example(row, lab_words, step_format, arguments())[0] for row in some]
        assert len(kept[name]) == len(items)
        for values_, item in zip(kept[name], items, strict=True):
            by_hand = [logprob_by_hand(model, ids, item["start"]) for ids in item["input_ids"]]
            assert values_ == pytest.approx(by_hand, abs=1e-4)
    # A model that has moved cannot give it any more.
    (out / REFERENCE).unlink()
    with pytest.raises(UserError, match="checkpoint 4 has moved away from its start"):
        train("dpo", values)


def test_the_reference_of_lora_is_the_base_with_adapters_off(settings, train, tmp_path, monkeypatch):
    def moved(*args: Any, **options: Any) -> Any:
        model = start_model(*args, **options)
        for name, weight in model.named_parameters():
            if "lora_B" in name:  # zero at the start of a training, where adapters on and off are the same
                torch.nn.init.normal_(weight, std=0.3)
        return model

    plain = train("dpo", settings("dpo", output_dir=str(tmp_path / "plain"), max_steps=1)).out
    monkeypatch.setattr("stepladder.trainers.dpo.start_model", moved)
    lora = train("dpo", settings("dpo", output_dir=str(tmp_path / "lora"), lora_r=4, max_steps=2))
    kept = [json.loads((out / REFERENCE).read_text())["train"] for out in (plain, lora.out)]
    assert [v for pair in kept[0] for v in pair] == pytest.approx([v for pair in kept[1] for v in pair], abs=1e-4)
    assert abs(lora.lines[0]["chosen_drift"]) > 0.1  # the adapters are on where it is trained


def test_training_prefers_the_chosen_side_and_says_what_became_of_it(settings, train, rows):
    pairs = [
        rows.pair(n, ["3 + 5 = 8"], ["8 * 2 = 3"], ["8 * 2 = 4"]) for n in range(8)
    ]  # eight prompts, one preference
    result = train("dpo", settings("dpo", pairs, max_steps=30, beta=0.5, learning_rate=0.01))
    first, last = result.lines[0], [line for line in result.lines if "loss" in line][-1]
    assert first["loss"] == pytest.approx(math.log(2), rel=1e-5)
    assert (first["chosen_drift"], first["reward_margin"]) == pytest.approx((0, 0), abs=1e-4)
    assert last["accuracy"] == 1.0
    assert last["reward_margin"] == pytest.approx(0.5 * (last["chosen_drift"] - last["rejected_drift"]), rel=1e-4)
    assert last["reward_margin"] > 1
    assert last["chosen_drift"] == pytest.approx(last["chosen_logprob"] - first["chosen_logprob"], abs=1e-3)


def test_8_by_1_equals_1_by_8(settings, train, rows, tmp_path):
    found = []
    for size, accumulation in ((8, 1), (1, 8)):
        values = settings(
            "dpo", rows.some("dpo", 20), per_device_train_batch_size=size, gradient_accumulation_steps=accumulation,
            max_steps=5, learning_rate=0.003, output_dir=str(tmp_path / f"{size}"),
        )  # fmt: skip
        result = train("dpo", values)
        found.append(
            ([line["loss"] for line in result.lines if "loss" in line], load_file(result.out / "model.safetensors"))
        )
    differences = [a - b for a, b in zip(found[0][0], found[1][0], strict=True)]
    assert max(map(abs, differences)) < 1e-5
    assert abs(sum(differences)) / 5 < 3e-6
    for name, weight in found[0][1].items():
        torch.testing.assert_close(found[1][1][name], weight, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"loss": "hinge"}, "loss must be one of sigmoid, ipo, found 'hinge'"),
        ({"beta": 0.0}, "beta must be greater than 0"),
        ({"label_smoothing": 0.5}, r"label_smoothing must lie in \[0, 0.5\)"),
        ({"label_smoothing": 0.1, "visit_smoothing": True}, "not both"),
        ({"loss": "ipo", "visit_smoothing": True}, "belongs to the sigmoid loss"),
        ({"margin": -1.0}, "must be 0 or more"),
    ],
)
def test_settings_that_cannot_be(wrong, message):
    with pytest.raises(UserError, match=message):
        arguments(**wrong)


def test_an_example_knows_the_length_of_its_longer_side(rows, lab_words):
    data = Examples(items_of(rows, lab_words))
    assert isinstance(data, Examples)
    assert data.lengths == [max(map(len, item["input_ids"])) for item in data.items]
