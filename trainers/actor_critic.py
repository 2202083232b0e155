"""The models of a policy-gradient run as one module, and the engine that samples with the weights in training."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from ..basics import UserError
from ..models.engine import Request, Sample, Sampling
from ..models.transformers_engine import TransformersEngine
from . import rl_math
from .common import plain_class
from .forward import masked_logits, share_prompts


class ActorCritic(torch.nn.Module):
    """Policy, critic and reference in one module, so that one wrapper (DDP, ZeRO) and one optimiser serve all of them.

    `critic` is a token classifier with one label, whose raw output is a value. `reference` is a frozen policy; with LoRA there
    is none, and the policy without its adapters takes its place. Dropout is off: the first pass over a batch must have ratio 1.
    """

    def __init__(self, policy: Any, critic: Any = None, reference: Any = None) -> None:
        super().__init__()
        self.policy, self.critic, self.reference = policy, critic, reference
        self.config = policy.config  # DeepSpeed sizes its buckets by it
        self.share_prompts = True
        if reference is not None:
            reference.requires_grad_(False)
        module: Any
        for module in self.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
            if hasattr(module, "attention_dropout"):
                module.attention_dropout = 0.0

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        temperature: float = 1.0,
        reference: bool = False,
        mask: torch.Tensor | None = None,
        entropy: bool = True,
    ) -> dict[str, torch.Tensor]:
        """logp, with `entropy` entropy, with a critic values, all [B, S-1] in action coordinates; with `reference` ref_logp too.

        `mask` [B, S-1] says where they are needed: what stands outside of it is 0, and logits are computed in its columns alone.
        A prompt that several rows share is read once for all of them where that is less work.
        """
        shared = share_prompts(input_ids, attention_mask, mask) if mask is not None and self.share_prompts else None
        if mask is None:
            mask = torch.ones_like(input_ids[:, 1:], dtype=torch.bool)

        def read(model: Any) -> torch.Tensor:
            return masked_logits(model, input_ids, attention_mask, mask, shared)

        def placed(values: torch.Tensor) -> torch.Tensor:
            return torch.zeros(mask.shape, dtype=values.dtype, device=values.device).masked_scatter(mask, values)

        ids = input_ids[:, 1:][mask]
        logp, spread = rl_math.logprobs_and_entropy(read(self.policy), ids, temperature, entropy=entropy)
        found = {"logp": placed(logp)}
        if spread is not None:
            found["entropy"] = placed(spread)
        if self.critic is not None:
            found["values"] = placed(read(self.critic).float().squeeze(-1))  # of the state before each action
        if reference:
            with torch.no_grad(), self.reference_policy() as model:
                ref_logp, _ = rl_math.logprobs_and_entropy(read(model), ids, temperature, entropy=False)
            found["ref_logp"] = placed(ref_logp)
        return found

    @contextlib.contextmanager
    def reference_policy(self) -> Iterator[Any]:
        """The policy that training started from."""
        if self.reference is not None:
            yield self.reference
        else:
            with self.policy.disable_adapter():
                yield self.policy

    def gradient_checkpointing_enable(self, **options: Any) -> None:
        for model in (self.policy, self.critic):
            if model is not None:
                model.gradient_checkpointing_enable(**options)

    def activation_checkpointing_enable(self, **options: Any) -> None:
        for model in (self.policy, self.critic):
            if model is not None:
                model.activation_checkpointing_enable(**options)


def whole_weights(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, weight) of every parameter, gathered from all processes one at a time where ZeRO-3 has split it.

    All processes must take all of them, in step.
    """
    for name, weight in model.named_parameters():
        if hasattr(weight, "ds_id"):
            import deepspeed

            with deepspeed.zero.GatheredParameters([weight]):
                yield name, weight.data
        else:
            yield name, weight.data


class TrainingEngine:
    """An engine over a policy in training: `refresh` after every change of its weights, then `generate`.

    In process the policy itself is sampled. Where ZeRO-3 has split it, each process keeps a whole copy (2 bytes a parameter in
    bfloat16): a forward through split weights would gather every layer for every token, and would have to run equally often in all
    processes. vLLM holds weights of its own, which are overwritten in place.
    """

    def __init__(self, policy: Any, tokenizer: Any, batch_size: int, vllm: Any = None) -> None:
        self.policy = policy
        # LoRA layers lie inside the base model, whose forward names its arguments.
        self.model = policy.get_base_model() if hasattr(policy, "get_base_model") else policy
        self.vllm, self.copy = vllm, None
        if vllm is None and any(hasattr(weight, "ds_id") for weight in policy.parameters()):
            self.copy = self._empty_copy()
        self.engine = vllm or TransformersEngine(
            self.copy if self.copy is not None else self.model, tokenizer, batch_size=batch_size
        )

    def _empty_copy(self) -> Any:
        if self.model is not self.policy:
            from peft import get_peft_model

            base = plain_class(self.model)(self.model.config)
            copy = get_peft_model(base, self.policy.peft_config["default"]).get_base_model()
        else:
            copy = plain_class(self.model)(self.model.config)
        weight = next(self.model.parameters())
        copy.generation_config = self.model.generation_config
        return copy.to(device=weight.device, dtype=weight.dtype).requires_grad_(False)

    def refresh(self) -> None:
        """Makes the next samples those of the policy as it is now."""
        if self.vllm is not None:
            self.vllm.update_weights(whole_weights(self.model))
        elif self.copy is not None:
            places = dict(self.copy.named_parameters())
            for name, weight in whole_weights(self.model):
                places[name].copy_(weight)

    @torch.no_grad()
    def generate(self, requests: list[Request], sampling: Sampling) -> list[list[Sample]]:
        was = self.model.training
        self.model.train(False)  # with activation checkpointing a model in training keeps no keys and values
        try:
            return self.engine.generate(requests, sampling)
        finally:
            self.model.train(was)


def vllm_engine(path: str, tokenizer: Any, options: dict[str, Any]) -> Any:
    """A vLLM engine whose weights can be overwritten: its model runs in this process, not in one of its own."""
    import os

    if os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0") != "0":
        raise UserError("backend vllm needs VLLM_ENABLE_V1_MULTIPROCESSING=0: its weights are overwritten in process")
    from ..models.vllm_engine import VLLMEngine

    return VLLMEngine(path, tokenizer, **options)
