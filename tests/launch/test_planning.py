"""The formulas of `stepladder plan` beside tensors that were counted one by one on small models."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoModelForCausalLM,
    AutoModelForTokenClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForTokenClassification,
    Qwen2Config,
    Qwen3Config,
)

from stepladder.basics import UserError
from stepladder.launch import planning
from stepladder.launch.planning import LANGUAGE, Layout, Training
from stepladder.models.engine import Request, Sampling
from stepladder.models.transformers_engine import TransformersEngine
from stepladder.trainers import losses
from stepladder.trainers.actor_critic import ActorCritic
from stepladder.trainers.forward import trained_logits

CONFIGS = Path(planning.__file__).parent / "accelerate"
SIZES = {
    "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 6, "vocab_size": 300, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "attention_dropout": 0.0,
}  # fmt: skip
PRECISIONS = {"float32": ("float32", "no"), "bfloat16": ("bfloat16", "no"), "mixed": ("float32", "bf16")}


class Live(TorchDispatchMode):
    """Counts the bytes of all tensor memory that is made while it is on and not given back: now, and at most so far."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.now = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in self.sizes:
                storage = tensor.untyped_storage()
                self.sizes[storage._cdata] = storage.nbytes()
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._gone, storage._cdata)
        return out

    def _gone(self, key: int) -> None:
        self.now -= self.sizes.pop(key, 0)


def counted(
    *,
    labels: int,
    dtype: str,
    precision: str,
    lora: int = 0,
    checkpointing: bool = False,
    accumulation: int = 1,
    rows: int = 4,
    length: int = 64,
    answer: int = 64,
    **sizes: int,
) -> dict[str, float]:
    """Bytes of tensors of two optimiser steps, counted: what stands between them and the peak of the second."""
    config = LlamaConfig(**{**SIZES, **sizes}, tie_word_embeddings=True, num_labels=labels or 2, classifier_dropout=0.0)
    torch.manual_seed(0)
    with Live() as live:
        model: Any = (LlamaForTokenClassification if labels else LlamaForCausalLM)(config).to(getattr(torch, dtype))
        model.train()
        if lora:
            from peft import LoraConfig, get_peft_model

            kind = "TOKEN_CLS" if labels else "CAUSAL_LM"
            exclude = ["score"] if labels else None
            model = get_peft_model(
                model, LoraConfig(r=lora, target_modules="all-linear", exclude_modules=exclude, task_type=kind)
            )
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
        found: dict[str, float] = {}
        for _ in range(2):
            gc.collect()
            live.peak = live.now
            found = {"standing": live.now}
            for _ in range(accumulation):
                ids = torch.randint(0, config.vocab_size, (rows, length))
                batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
                batch["attention_mask"][0, -3:] = 0
                with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision != "no"):
                    if labels:
                        logits = model(**batch, use_cache=False).logits
                        loss = logits.float().square().sum()
                    else:
                        targets = ids.clone()
                        targets[:, : length - answer] = -100
                        logits, targets, _ = trained_logits(model, {**batch, "labels": targets}, pick=True)
                        loss = losses.aligned_cross_entropy(logits, targets)[0].sum()
                    del logits
                loss.backward()
            found["gradients"] = sum(p.grad.nbytes for p in trained)
            found["peak"] = live.peak
            optimizer.step()
            optimizer.zero_grad()
    found["weights"] = sum(p.nbytes for p in model.parameters())
    found["moments"] = sum(v.nbytes for s in optimizer.state.values() for v in s.values() if v.dim())
    return found


def planned(*, rows: int = 4, length: int = 64, answer: int = 64, precision: str, **given: Any) -> planning.Memory:
    sizes = {key: given.pop(key) for key in list(given) if key in SIZES}
    shape = planning.shape_of({**SIZES, **sizes, "tie_word_embeddings": True, "model_type": "llama"}, "here")
    lora = given.pop("lora", 0)
    training = Training(rows=rows, length=length, logit_positions=rows * min(answer, length - 1), lora_r=lora, **given)
    return planning.training_memory(shape, training, Layout(precision=precision))


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("labels", [LANGUAGE, 2])
@pytest.mark.parametrize("lora", [0, 4])
def test_memory_of_training_is_that_of_counted_tensors(precision: str, labels: int, lora: int) -> None:
    dtype, mixed = PRECISIONS[precision]
    given: Any = {"labels": labels, "dtype": dtype, "precision": mixed, "lora": lora}
    found, plan = counted(**given), planned(**given)
    assert plan.weights == pytest.approx(found["weights"], rel=5e-3)  # beside adapters a head keeps its own precision
    assert plan.gradients == pytest.approx(found["gradients"], rel=5e-3)
    assert plan.optimizer == pytest.approx(found["moments"], rel=5e-3)
    assert plan.peak == pytest.approx(found["peak"], rel=0.05)


@pytest.mark.parametrize(
    "given",
    [
        {"checkpointing": True, "labels": 2},
        {"checkpointing": True, "labels": LANGUAGE, "num_hidden_layers": 12, "rows": 8},
        {"accumulation": 2, "labels": 2},
        {"labels": LANGUAGE, "answer": 16, "vocab_size": 6000, "num_hidden_layers": 2},  # the logits are the most of it
        {"labels": LANGUAGE, "rows": 1, "length": 8, "answer": 8, "vocab_size": 6000},  # two gradients of a tied embedding are
        {"labels": 2, "rows": 1, "length": 8},  # gradients are
    ],
    ids=lambda given: "-".join(map(str, given)),
)  # fmt: skip
def test_what_decides_the_peak(given: dict[str, Any]) -> None:
    given = {"dtype": "float32", "precision": "no", **given}
    assert planned(**given).peak == pytest.approx(counted(**given)["peak"], rel=0.07)


@pytest.mark.parametrize("vocabulary", [300, 6000])
def test_memory_of_online_training_is_that_of_counted_tensors(vocabulary: int) -> None:
    """Policy, critic and reference: first all of them look, then policy and critic are trained; the second optimiser step."""
    sizes = {**SIZES, "vocab_size": vocabulary}
    config = LlamaConfig(**sizes, tie_word_embeddings=True, num_labels=1, classifier_dropout=0.0)
    ids, mask = torch.randint(0, 300, (4, 64)), torch.zeros(4, 63, dtype=torch.bool)
    mask[:, 40:] = True
    attention = torch.ones_like(ids)
    attention[0, -1] = 0
    with Live() as live:
        model = ActorCritic(LlamaForCausalLM(config), LlamaForTokenClassification(config), LlamaForCausalLM(config))
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True)
        for _ in range(2):
            gc.collect()
            live.peak = live.now
            with torch.no_grad():
                model(ids, attention, 1.0, reference=True, mask=mask)
            found = model(ids, attention, 1.0, mask=mask, entropy=False)
            loss = (found["logp"] + found["values"]).sum()
            del found
            loss.backward()
            del loss
            peak = live.peak
            optimizer.step()
            optimizer.zero_grad()
    shape = planning.shape_of(config.to_dict(), "here")
    training = Training(rows=4, length=64, logit_positions=4 * 23, logit_bytes=planning.ONLINE_LOGITS)
    plan = planning.policy_gradient_memory(
        shape, training, Layout(), critic=True, reference=True, generation=planning.Memory()
    )
    assert plan.weights == pytest.approx(sum(p.nbytes for p in model.parameters()), rel=5e-3)
    assert plan.peak == pytest.approx(peak, rel=0.1)


@pytest.mark.parametrize("labels", [LANGUAGE, 2])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", [LlamaConfig, Qwen2Config, Qwen3Config])
def test_parameters_are_those_of_the_real_model(kind: Any, tied: bool, labels: int) -> None:
    auto = AutoModelForTokenClassification if labels else AutoModelForCausalLM
    config = kind(**SIZES, head_dim=24, tie_word_embeddings=tied, num_labels=labels or 2)
    with torch.device("meta"):
        model = auto.from_config(config)
    assert planning.shape_of(config.to_dict(), "here").parameters(labels) == model.num_parameters()


def test_adapters_are_those_of_the_real_model(tiny_policy: Any, lab_words: Any) -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(tiny_policy(lab_words), LoraConfig(r=3, target_modules="all-linear", task_type="CAUSAL_LM"))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert planning.shape_of(model.config.to_dict(), "here").adapters(3) == trained


def test_flops_are_those_that_torch_counts() -> None:
    config = LlamaConfig(**SIZES, attn_implementation="eager")  # whose matrix products the counter sees
    ids = torch.randint(0, 300, (3, 50))
    model = LlamaForCausalLM(config)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=ids, logits_to_keep=10)
    plan = planning.forward_flops(planning.shape_of(config.to_dict(), "here"), 150, context=50, logits=30)
    rotary = 2 * 8 * 50  # the one product with the positions
    assert counter.get_total_flops() == pytest.approx(plan + rotary, rel=1e-3)


def test_a_step_of_training_is_three_forwards_with_frozen_weights_two() -> None:
    from peft import LoraConfig, get_peft_model

    ids = torch.randint(0, 300, (4, 32))
    for lora, checkpointing in ((0, False), (1, False), (0, True)):
        model: Any = LlamaForTokenClassification(LlamaConfig(**SIZES, attn_implementation="eager"))
        if lora:
            model = get_peft_model(
                model, LoraConfig(r=1, target_modules="all-linear", exclude_modules=["score"], task_type="TOKEN_CLS")
            )
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.train()
        flops = []
        for grad in (False, True):
            with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(grad):
                loss = model(input_ids=ids).logits.sum()
                if grad:
                    loss.backward()
            flops.append(counter.get_total_flops())
        factor = planning.training_factor(lora=bool(lora), checkpointing=checkpointing)
        # Adapters are trained, and attention has no frozen factor: a little more than two. The forward that is repeated ends
        # with what its layer kept last, before the last product: a little less than four.
        assert flops[1] / flops[0] == pytest.approx(factor, rel=0.08 if lora or checkpointing else 0.02)


def test_memory_of_sampling_is_that_of_counted_tensors(tiny_policy: Any, lab_words: Any) -> None:
    with Live() as live:
        model = tiny_policy(lab_words, layers=4, width=64)
        model.config.eos_token_id = model.generation_config.eos_token_id = None
        engine = TransformersEngine(model, lab_words, batch_size=32)
        engine.eos_ids = ()
        gc.collect()
        weights = live.now
        live.peak = live.now
        requests = [Request(tuple([5] * 40), (number,)) for number in range(32)]
        engine.generate(requests, Sampling(60))
    shape = planning.shape_of(model.config.to_dict(), "here")
    plan = planning.generation_memory(shape, dtype="float32", rows=32, prompts=32, prompt=40, new_tokens=60)
    assert plan.weights == pytest.approx(weights, rel=0.01)
    # What a step holds beside keys and values depends on the engine's way of growing them.
    assert 0.8 * live.peak < plan.peak < 1.25 * live.peak


@pytest.mark.parametrize(
    ("name", "engine", "weights", "gradients", "optimizer"),
    [
        ("one", "one", 4, 4, 8),
        ("multi_gpu", "ddp", 4, 4, 8),
        ("zero2", "zero2", 2, 2 / 8, 12 / 8),
        ("zero3", "zero3", 2 / 8, 2 / 8, 12 / 8),
        ("multi_node", "zero3", 2 / 8, 2 / 8, 12 / 8),
        ("fsdp2", "fsdp", 4 / 8, 4 / 8, 8 / 8),
    ],
)
def test_bytes_a_parameter_of_each_launch_file(
    name: str, engine: str, weights: float, gradients: float, optimizer: float
) -> None:
    """As docs/launch.md counts them: 16 bytes a parameter, of which ZeRO-2 splits 14 and ZeRO-3 and FSDP2 all."""
    layout = planning.read_layout(CONFIGS / f"{name}.yaml", 8)
    shape = planning.shape_of({**SIZES, "model_type": "llama"}, "here")
    memory = planning.training_memory(shape, Training(labels=2), layout)
    count = shape.parameters(2)
    assert layout.engine == engine
    found = (memory.weights / count, memory.gradients / count, memory.optimizer / count)
    assert found == pytest.approx((weights, gradients, optimizer))
    assert memory.peak > memory.weights + memory.optimizer + memory.gradients


def test_every_launch_file_is_read() -> None:
    for path in CONFIGS.glob("*.yaml"):
        planning.read_layout(path, 2)


def test_offloaded_states_take_no_memory(tmp_path: Path) -> None:
    text = (
        (CONFIGS / "zero3.yaml").read_text().replace("offload_optimizer_device: none", "offload_optimizer_device: cpu")
    )
    (tmp_path / "offload.yaml").write_text(text)
    layout = planning.read_layout(tmp_path / "offload.yaml", 8)
    shape = planning.shape_of({**SIZES, "model_type": "llama"}, "here")
    assert planning.training_memory(shape, Training(), layout).optimizer == 0


def test_a_decode_step_is_bound_by_memory_or_by_arithmetic() -> None:
    shape = planning.shape_of({**SIZES, "model_type": "llama"}, "here")
    bytes_read = 2 * shape.parameters()
    alone = planning.decode_seconds(shape, 10, rows=1, context=0, width=2, flops=1e15, bandwidth=1e6)
    assert alone == pytest.approx(10 * bytes_read / 1e6)  # every token reads all weights
    many = planning.decode_seconds(shape, 1000, rows=100, context=0, width=2, flops=1e15, bandwidth=1e6)
    assert many == pytest.approx(alone)  # a hundred rows read them together
    slow = planning.decode_seconds(shape, 1000, rows=100, context=0, width=2, flops=1e6, bandwidth=1e15)
    assert slow == pytest.approx(planning.forward_flops(shape, 1000) / 1e6)


@pytest.mark.parametrize(("text", "count", "size"), [("8x80GB", 8, 80e9), ("1x24gb", 1, 24e9), ("2 x 40G", 2, 40e9)])
def test_gpus_are_read(text: str, count: int, size: float) -> None:
    assert planning.parse_gpus(text) == (count, size)


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ({"model_type": "gpt2", "n_embd": 8}, "no vocab_size"),
        ({**SIZES, "num_local_experts": 8}, "mixture of experts"),
    ],
)
def test_a_model_that_cannot_be_planned_is_one_sentence(config: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=told):
        planning.shape_of(config, "config.json")
