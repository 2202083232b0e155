"""Supervised fine-tuning: which tokens are trained and with what weight, and that the loss is TRL's where both have one."""

from __future__ import annotations

import copy
import dataclasses
import math
import random
from typing import Any

import pytest
import torch

from stepladder.basics import UserError
from stepladder.config import build
from stepladder.data_gen.rows import Message
from stepladder.data_gen.store import write_rows
from stepladder.models.step_format import StepFormat
from stepladder.trainers.examples import Examples
from stepladder.trainers.sft import SFTArguments, SFTTrainer, collate, dialogue_example, pack

CHATML = (
    "{% for m in messages %}<start>{{ m.role }}\n{{ m.content }}<eos>\n{% endfor %}"
    "{% if add_generation_prompt %}<start>assistant\n{% endif %}"
)
STRIPPING = CHATML.replace("{{ m.content }}", "{{ m.content | trim }}")
# The header of a turn ends before the space in front of the text, which the policy therefore has to write itself.
SPACED = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
REWRITING = CHATML.replace("{{ m.content }}", "{{ m.content | upper }}")


@pytest.fixture
def chat_words(merging_tokenizer: Any) -> Any:
    """A byte-level tokenizer with a ChatML template."""
    tokenizer = copy.deepcopy(merging_tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<start>"]})
    tokenizer.chat_template = CHATML
    return tokenizer


@pytest.fixture
def example(rows: Any) -> Any:
    """(tokenizer, messages ...) -> the example and what happened to the row."""

    def make(tokenizer: Any, *messages: Message, max_length: int = 500, **fields: Any) -> tuple[Any, str]:
        step_format = StepFormat.for_policy(tokenizer, "\n", **fields)
        return dialogue_example(rows.dialogue(0, *messages), tokenizer, step_format, max_length)

    return make


def trained(tokenizer: Any, example: dict[str, Any]) -> str:
    """The text that the labels spell."""
    for token, label, weight in zip(example["input_ids"], example["labels"], example["token_weight"], strict=True):
        assert label in (-100, token)
        assert (weight == 0) == (label == -100)
    return tokenizer.decode([label for label in example["labels"] if label != -100])


USER, REPLY = Message("user", "So it is 4"), Message("assistant", "the 4\nthen.\n", train=True)


# --- one question and one reply ---------------------------------------------------------------------------------------


def test_a_reply_and_its_end_are_trained_and_the_prompt_is_not(lab_words, example):
    found, what = example(
        lab_words, Message("user", "Start 3 ; + 5"), Message("assistant", "3 + 5 = 8\nAnswer: 8", True)
    )
    assert what == "kept"
    ids = lab_words("Start 3 ; + 5")["input_ids"]
    reply = [*lab_words("3 + 5 = 8")["input_ids"], *lab_words("\n")["input_ids"], *lab_words("Answer: 8")["input_ids"]]
    assert found["input_ids"] == [*ids, *reply, lab_words.eos_token_id]
    assert found["labels"] == [-100] * len(ids) + [*reply, lab_words.eos_token_id]
    assert found["token_weight"] == [0.0] * len(ids) + [1.0] * (len(reply) + 1)


def test_a_reply_follows_the_prompt_as_the_generator_lays_it_out(chat_words, example):
    fields = {"chat": True, "system": "the", "prompt_template": "Q: {prompt}"}
    found, _ = example(chat_words, USER, REPLY, **fields)
    prompt = StepFormat.for_policy(chat_words, "\n", **fields).encode_prompt(chat_words, USER.content)
    assert found["input_ids"][: len(prompt)] == list(prompt)
    assert chat_words.decode(prompt) == "<start>system\nthe<eos>\n<start>user\nQ: So it is 4<eos>\n<start>assistant\n"
    assert trained(chat_words, found) == REPLY.content + "<eos>"


@pytest.mark.parametrize(
    ("spans", "want"), [([(0, 2)], "+ 5 = 8<eos>"), ([(4, 5)], "3 + = 8<eos>"), ([(0, 9)], "<eos>")]
)
def test_masked_spans_do_not_train(lab_words, example, spans, want):
    reply = Message("assistant", "3 + 5 = 8", train=True, mask_spans=tuple(spans))
    found, _ = example(lab_words, Message("user", "Start 3"), reply)
    assert trained(lab_words, found).replace(" <eos>", "<eos>") == want


def test_a_token_that_reaches_into_a_masked_span_does_not_train(chat_words, example):
    """ "4\\n" is one token: masking its newline masks the 4 as well, never the other way round."""
    reply = Message("assistant", "the 4\nthen", train=True, mask_spans=((5, 6),))
    found, _ = example(chat_words, USER, reply)
    assert trained(chat_words, found) == "the then<eos>"


def test_weights_of_a_turn_are_weights_of_its_tokens(lab_words, example):
    found, _ = example(lab_words, Message("user", "Start 3"), Message("assistant", "3 + 5", True, weight=0.25))
    assert found["token_weight"] == [0.0, 0.0, 0.25, 0.25, 0.25, 0.25]


def test_rows_that_are_too_long_or_train_nothing_are_told(lab_words, example):
    user, reply = Message("user", "Start 3"), Message("assistant", "3 + 5", True)  # 2 + 3 + 1 tokens
    assert example(lab_words, user, reply, max_length=6)[1] == "kept"
    assert example(lab_words, user, reply, max_length=5) == (None, "too long")
    assert example(lab_words, user, Message("assistant", "3 + 5")) == (None, "without a trained token")


# --- dialogues through the chat template ------------------------------------------------------------------------------


def dialogue(*content: str, train: tuple[bool, ...]) -> list[Message]:
    roles = ["user", "assistant"] * len(content)
    return [Message(r, c, t) for r, c, t in zip(roles, content, train, strict=False)]


@pytest.mark.parametrize(
    ("train", "want"),
    [
        ((False, False, False, True), "the 4\nthen.\n<eos>"),
        ((False, True, False, False), "So it is 3<eos>"),
        ((False, True, False, True), "So it is 3<eos>the 4\nthen.\n<eos>"),
    ],
)
def test_only_trained_turns_and_their_ends_are_trained(chat_words, example, train, want):
    found, _ = example(chat_words, *dialogue("it?", "So it is 3", "again", "the 4\nthen.\n", train=train), chat=True)
    assert trained(chat_words, found) == want
    assert chat_words.decode(found["input_ids"]).startswith("<start>user\nit?<eos>\n<start>assistant\nSo it is 3<eos>")


def test_one_turn_reads_alike_in_both_layouts(chat_words, example):
    """A system turn sends a row through the template; all ids but the template's last newline are those of the generator."""
    plain, _ = example(chat_words, USER, REPLY, chat=True, system="the")
    through, _ = example(chat_words, Message("system", "the"), USER, REPLY, chat=True)
    assert through["input_ids"][:-1] == plain["input_ids"]
    assert through["labels"][:-1] == plain["labels"]
    assert through["labels"][-1] == -100


@pytest.mark.parametrize(
    ("template", "content", "want"),
    [
        (CHATML, "So it is 4\n", "So it is 4\n<eos>"),  # a reply that ends with a separator must learn to stop too
        (CHATML, "  So it", "  So it<eos>"),
        (STRIPPING, "\n So it is 4 \n", "So it is 4<eos>"),
        (SPACED, "So it is 4", " So it is 4<eos>"),
        (SPACED, "4\n", " 4\n<eos>"),
        (CHATML, "", "<eos>"),
    ],
)
def test_templates_that_strip_or_space(chat_words, example, template, content, want):
    chat_words.chat_template = template
    found, _ = example(
        chat_words, *dialogue("it?", "So", "again", content, train=(False, False, False, True)), chat=True
    )
    assert trained(chat_words, found) == want


@pytest.mark.parametrize("template", [CHATML, STRIPPING, SPACED])
def test_spans_count_characters_of_the_turn_as_written(chat_words, example, template):
    chat_words.chat_template = template
    turns = dialogue("it?", "So", "again", "  xyz 7", train=(False, False, False, True))
    turns[-1] = Message("assistant", turns[-1].content, True, mask_spans=((2, 4),))  # "xy"
    found, _ = example(chat_words, *turns, chat=True)
    assert trained(chat_words, found).strip() == "z 7<eos>"


def test_turns_have_weights_of_their_own(chat_words, example):
    turns = [USER, Message("assistant", "3", True, weight=0.5), USER, Message("assistant", "4", True, weight=2.0)]
    found, _ = example(chat_words, *turns, chat=True)
    assert [w for w in found["token_weight"] if w] == [0.5, 0.5, 2.0, 2.0]  # each with its end of turn


def test_the_step_format_adds_its_system_turn_and_prompt_template(chat_words, example):
    turns = dialogue("it?", "So", "again", "4", train=(False, False, False, True))
    found, _ = example(chat_words, *turns, chat=True, system="the", prompt_template="Q: {prompt}")
    text = chat_words.decode(found["input_ids"])
    assert text.startswith("<start>system\nthe<eos>\n<start>user\nQ: it?<eos>\n")
    assert "<start>user\nagain<eos>" in text
    assert trained(chat_words, found) == "4<eos>"


def test_a_template_that_rewrites_a_turn_is_refused(chat_words, example):
    chat_words.chat_template = REWRITING
    with pytest.raises(UserError, match="row p0: the chat template does not keep turn 3 as written"):
        example(chat_words, *dialogue("it?", "So", "again", "then", train=(False, False, False, True)), chat=True)


def test_a_dialogue_without_a_template_is_refused(lab_words, example):
    with pytest.raises(
        UserError, match="row p0: a dialogue of 4 turns needs a chat template, and the tokenizer has none"
    ):
        example(lab_words, *dialogue("3", "4", "5", "6", train=(False, False, False, True)))


# --- the loss ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def trainer(tmp_path: Any, lab_words: Any, tiny_policy: Any) -> Any:
    def make(reduction: str, items: list[dict[str, Any]], **settings: Any) -> SFTTrainer:
        values = {
            "model": "m",
            "rows": "r",
            "output_dir": str(tmp_path / "ours"),
            "reduction": reduction,
            "use_cpu": True,
        }
        return SFTTrainer(
            model=tiny_policy(lab_words, width=16, layers=1, heads=2),
            args=build(SFTArguments, {**values, "disable_tqdm": True, **settings}),
            train_dataset=Examples(items),
            data_collator=lambda items: collate(items, 0),
        )

    return make


@pytest.fixture
def items(rows: Any, lab_words: Any) -> list[dict[str, Any]]:
    step_format = StepFormat.for_policy(lab_words, "\n")
    return [dialogue_example(row, lab_words, step_format, 500)[0] for row in rows.some("sft", 8)]


@pytest.mark.parametrize("reduction", ["sequence", "token"])
def test_the_loss_of_a_batch_by_hand(trainer, items, reduction):
    weight = [0.5, 2.0, 1.0, 0.0, 1.0, 1.0, 1.0, 1.0]
    for item, w in zip(items, weight, strict=True):
        item["token_weight"] = [w * u for u in item["token_weight"]]
    made = trainer(reduction, items)
    found = made.compute_loss(made.model, collate(items, 0)).item()

    sums, lengths = [], []
    for item, w in zip(items, weight, strict=True):  # each sequence alone, without padding
        with torch.no_grad():
            logits = made.model(input_ids=torch.tensor([item["input_ids"]])).logits[0].double()
        nats = [
            -torch.log_softmax(logits[t - 1], 0)[label].item()
            for t, label in enumerate(item["labels"])
            if label != -100
        ]
        sums.append(w * sum(nats))
        lengths.append(len(nats))
    assert len(set(lengths)) > 3
    if reduction == "sequence":
        want = sum(s / n for s, n in zip(sums, lengths, strict=True)) / len(sums)
    else:
        want = sum(sums) / sum(lengths)
    assert found == pytest.approx(want, rel=1e-5)


def test_a_batch_without_a_trained_token_costs_nothing(trainer, items):
    made = trainer("token", items)
    batch = collate(items, 0)
    batch["labels"] = torch.full_like(batch["labels"], -100)
    assert made.compute_loss(made.model, batch).item() == 0.0


def test_the_loss_is_that_of_trl(tmp_path, trainer, items, lab_words, tiny_policy):
    """The same batches through TRL's SFT trainer: equal losses at each of three steps, so equal gradients too."""
    from datasets import Dataset
    from trl import SFTConfig
    from trl import SFTTrainer as TRLTrainer

    schedule = {
        "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "max_steps": 3, "logging_steps": 1,
        "learning_rate": 0.01, "lr_scheduler_type": "constant", "save_strategy": "no",
    }  # fmt: skip
    ours = trainer("token", items, **schedule)
    ours.train()
    theirs = TRLTrainer(
        model=tiny_policy(lab_words, width=16, layers=1, heads=2),
        args=SFTConfig(
            output_dir=str(tmp_path / "theirs"), bf16=False, gradient_checkpointing=False, use_cpu=True, report_to="none",
            disable_tqdm=True, **schedule,
        ),
        train_dataset=Dataset.from_list([{"input_ids": i["input_ids"], "labels": i["labels"]} for i in items]),
        processing_class=lab_words,
    )  # fmt: skip
    theirs.train()
    losses = [[log["loss"] for log in t.state.log_history if "loss" in log] for t in (ours, theirs)]
    assert len(losses[0]) == 3
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert losses[0][2] < losses[0][0] - 0.05
    for ours_weight, their_weight in zip(ours.model.parameters(), theirs.model.parameters(), strict=True):
        torch.testing.assert_close(ours_weight, their_weight, rtol=1e-3, atol=1e-5)


# --- packing ----------------------------------------------------------------------------------------------------------


def weighted_items(rows: Any, tokenizer: Any, count: int = 12) -> list[dict[str, Any]]:
    """Examples with weights of rows and of turns and with masked spans."""
    step_format, made = StepFormat.for_policy(tokenizer, "\n"), []
    for number, row in enumerate(rows.some("sft", count)):
        user, reply = row.messages
        reply = dataclasses.replace(reply, weight=0.5 + number % 3, mask_spans=((2, 3),) if number % 2 else ())
        row = dataclasses.replace(row, messages=(user, reply), weight=(0.0, 1.0, 2.5)[number % 3])
        made.append(dialogue_example(row, tokenizer, step_format, 500)[0])
    return made


@pytest.mark.parametrize("reduction", ["sequence", "token"])
def test_packs_have_the_loss_and_the_gradient_of_their_examples(trainer, rows, lab_words, reduction):
    items = weighted_items(rows, lab_words)
    assert {item["weight"] for item in items} == {0.0, 1.0, 2.5}
    longest = max(len(item["input_ids"]) for item in items)
    packs = pack(items, 2 * longest, reduction)
    assert len(packs) < 8
    single, packed = trainer(reduction, items), trainer(reduction, packs, packing=True)
    found = []
    for made, some in ((single, items), (packed, packs)):
        loss = made.compute_loss(made.model, collate(some, 0))
        loss.backward()
        found.append((loss.item(), [weight.grad for weight in made.model.parameters()]))
    assert found[0][0] == pytest.approx(found[1][0], abs=1e-5, rel=1e-6)
    for a, b in zip(found[0][1], found[1][1], strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_packs_hold_every_example_once_and_no_more_than_fits():
    rng = random.Random(0)
    lengths = [rng.randint(2, 40) for _ in range(300)]
    items = [
        {"input_ids": [n] * k, "labels": [n] * k, "token_weight": [1.0] * k, "weight": 1.0}
        for n, k in enumerate(lengths)
    ]
    packs = pack(items, 40, "token")
    assert sorted(i for one in packs for i in dict.fromkeys(one["input_ids"])) == list(range(300))
    assert max(len(one["input_ids"]) for one in packs) <= 40
    assert len(packs) <= math.ceil(sum(lengths) / 40 * 1.02)
    for one in packs:
        assert one["examples"] == len(set(one["input_ids"])) == one["position_ids"].count(0)
        begin = [i for i, position in enumerate(one["position_ids"]) if position == 0]
        assert all(one["labels"][i] == -100 for i in begin)
        assert one["labels"].count(-100) == len(begin)
    assert packs == pack(items, 40, "token")


def test_a_training_on_packs_equals_one_on_single_examples(rows, settings, train, tmp_path, capsys):
    """All rows in each step, so that the steps are the same: equal losses over four steps, and equal evaluations."""
    write_rows(tmp_path / "held_out", rows.some("sft", 7, seed=9))
    found = []
    for packing in (False, True):
        values = settings(
            "sft", per_device_train_batch_size=16, packing=packing, max_length=120, output_dir=str(tmp_path / f"{packing}"),
            eval_rows=str(tmp_path / "held_out"), per_device_eval_batch_size=2,
        )  # fmt: skip
        found.append(train("sft", values))
    losses = [[line["loss"] for line in one.lines if "loss" in line] for one in found]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    assert len(losses[0]) == 4
    assert found[0].metrics["eval_loss"] == pytest.approx(found[1].metrics["eval_loss"], rel=1e-5)
    assert "packing: 16 dialogues in " in capsys.readouterr().out


def test_a_model_that_lets_packed_dialogues_see_each_other_is_refused(settings, train, monkeypatch):
    from transformers import LlamaForCausalLM

    forward = LlamaForCausalLM.forward

    def mixing(self: Any, *args: Any, position_ids: Any = None, **options: Any) -> Any:
        return forward(self, *args, position_ids=torch.arange(position_ids.shape[1])[None], **options)

    monkeypatch.setattr(LlamaForCausalLM, "forward", mixing)
    with pytest.raises(UserError, match="LlamaForCausalLM does not keep packed dialogues apart"):
        train("sft", settings("sft", packing=True))


# --- the whole training -----------------------------------------------------------------------------------------------


def test_training_counts_rows_and_learns_to_stop(rows, settings, train, capsys):
    from stepladder.models.engine import Request, Sampling, StopReason
    from stepladder.models.loading import load_engine

    question = Message("user", "Start 3 ; + 5")
    training = [
        rows.dialogue(0, question, Message("assistant", "3 + 5 = 8\n", True)),
        rows.dialogue(1, question, Message("assistant", "3 + 5 = 8\n" * 9, True)),
        rows.dialogue(2, question, Message("assistant", "3 + 5 = 8")),
    ]
    result = train("sft", settings("sft", training, max_length=20, max_steps=40, learning_rate=0.03))
    assert "1 kept, 1 too long, 1 without a trained token" in capsys.readouterr().out
    engine = load_engine(str(result.out), device="cpu")
    step_format = StepFormat.load(result.out)
    request = Request(step_format.encode_prompt(engine.tokenizer, question.content), seeds=(0,))
    [[sample]] = engine.generate([request], Sampling(temperature=0.0, max_new_tokens=20))
    assert engine.tokenizer.decode(sample.ids, skip_special_tokens=True).strip() == "3 + 5 = 8"
    assert sample.stop == StopReason.EOS


def test_a_new_lab_model_is_made_from_its_sizes(rows, settings, train):
    values = settings("sft", lab_model={"width": 16, "layers": 1, "heads": 2, "largest_number": 12}, max_steps=1)
    del values["model"]
    out = train("sft", values).out
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(out)
    assert (model.config.hidden_size, model.config.num_hidden_layers) == (16, 1)
    values["lab_model"] = {"width": 16}
    with pytest.raises(UserError, match="lab_model needs largest_number"):
        train("sft", values)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"reduction": "mean"}, "reduction must be one of sequence, token, found 'mean'"),
        ({"model": ""}, "model is missing: the checkpoint to start from"),
        ({"rows": ""}, "rows is missing: rows to train on"),
        ({"lab_model": {"width": "wide"}}, "lab_model.width must be a whole number"),
    ],
)
def test_settings_that_cannot_be(settings, train, wrong, message):
    with pytest.raises(UserError, match=message):
        train("sft", settings("sft", **wrong))


def test_a_reward_model_is_not_fine_tuned_as_a_policy(settings, train):
    values = settings("prm", max_steps=1)
    out = train("prm", values).out
    with pytest.raises(
        UserError, match="its step format says head: two_class, so it is a reward model and not a policy"
    ):
        train("sft", settings("sft", model=str(out)))


def test_the_token_accuracy_that_is_logged(trainer, items):
    made = trainer("token", items)
    batch = collate(items, 0)
    _, metrics = made.loss_sum(made.model, batch)
    with torch.no_grad():
        best = made.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.argmax(-1)
    right = [
        best[b, t - 1].item() == label
        for b, row in enumerate(batch["labels"].tolist())
        for t, label in enumerate(row)
        if label != -100
    ]
    assert metrics["token_accuracy"] == pytest.approx(sum(right) / len(right))
    assert not math.isnan(metrics["token_accuracy"])
