"""The formulas of `stepladder plan` beside tensors that were counted one by one on small models."""

from __future__ import annotations

import gc
import math
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForTokenClassification, Qwen2Config, Qwen3Config

from stepladder.basics import UserError
from stepladder.launch import planning
from stepladder.launch.planning import LANGUAGE, Layout, Training
from stepladder.models.engine import Request, Sampling
from stepladder.models.transformers_engine import TransformersEngine
from stepladder.trainers import losses
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
