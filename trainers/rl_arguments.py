"""What online training is told."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from ..config import at_least, option
from . import rewards, rl_math
from .arguments import StepladderArguments

# What other trainers count in optimiser steps or rows, and what says it here.
_COUNTED_IN_ROLLOUTS = {
    "num_train_epochs": "rollouts",
    "max_steps": "rollouts",
    "logging_steps": "log_every",
    "save_steps": "save_every",
    "eval_steps": "eval_every",
    "eval_strategy": "eval_every",
    "rows": "task and split",
    "eval_rows": "eval_split",
    "max_rows": "limit",
    "lora_dropout": "nothing: with dropout the first pass over a batch has no ratio of 1",
}


@dataclass
class RLArguments(StepladderArguments):
    """Trains a policy online on the verdicts of a task (PPO, RLOO or GRPO)."""

    algorithm: Literal["ppo", "rloo", "grpo"] = option(
        "ppo", "ppo (critic and GAE), rloo (leave one out) or grpo (relative to the group)"
    )
    task: dict[str, Any] = option({"kind": "chain"}, "the task: kind and its fields")
    split: str = option("train", "the split whose problems are sampled")
    limit: int = option(0, "use the first so many problems; 0 for all")
    separator: str = option("\n", "text that ends a step, for a policy that has no step format yet")

    rollouts: int = option(100, "how often the policy is sampled and updated")
    prompts: int = option(64, "problems of one rollout, over all processes")
    samples: int = option(4, "responses to each problem")
    max_new_tokens: int = option(128, "longest response in tokens")
    temperature: float = option(1.0, "sampling temperature, of ratios and KL too")
    update_epochs: int = option(2, "passes over each rollout")
    generation_batch: int = option(256, "responses sampled at once")

    policy_loss: Literal["clip", "gspo", "cispo"] = option(
        "clip", "clip (token ratios), gspo (clipped sequence ratios) or cispo (capped weights)"
    )
    clip_low: float = option(0.2, "ratios are clipped at 1 - clip_low")
    clip_high: float = option(0.2, "ratios are clipped at 1 + clip_high")
    reduction: Literal["", rl_math.Reduction] = option(
        "", "what the loss is a mean over: sequence, token, constant, sum, micro_batch; empty: as published"
    )
    scale_by_std: bool = option(True, "grpo: divide by the group's standard deviation")
    whiten: bool | None = option(None, "whiten advantages over the global batch; null: with ppo only")
    mask_truncated: bool = option(False, "leave responses that were cut at max_new_tokens out of the loss")
    importance_cap: float = option(0.0, "cap of the weight pi_train / pi_engine; 0: no weight")

    kl_coefficient: float = option(0.05, "weight of the KL penalty against the policy that training started from")
    kl_in: Literal["", "reward", "loss"] = option("", "reward or loss; empty: in the reward, with grpo in the loss")
    kl_estimator: Literal["", rl_math.KLEstimator] = option("", "k1, k2 or k3; empty: k1 in the reward, k3 in the loss")
    reference: bool = option(True, "keep the starting policy, to penalise or measure KL; false saves its memory")
    entropy_coefficient: float = option(0.0, "weight of an entropy bonus")

    gamma: float = option(1.0, "ppo: discount of a token")
    lam: float = option(0.95, "ppo: lambda of GAE")
    critic: str = option(
        "", "ppo: checkpoint with one label to start the critic from; empty: the policy with a new head"
    )
    critic_learning_rate: float = option(0.0, "ppo: learning rate of the critic; 0: that of the policy")
    critic_warmup: int = option(0, "ppo: rollouts in which the critic alone is trained")
    value_coefficient: float = option(1.0, "ppo: weight of the value loss")
    value_clip: float = option(0.2, "ppo: values are clipped around the old ones; 0: not at all")

    outcome_weight: float = option(1.0, "weight of the outcome reward; 0 leaves process rewards alone")
    partial_reward: float = option(0.1, "outcome reward of a wrong answer that could be read; a right one earns 1")
    process_reward: str = option("", "reward model that scores steps; or, where the task can, checker or facts")
    process_form: rewards.Form = option(
        "none", "how step scores become rewards: sum, difference, clip, delta, min, pav, none"
    )
    process_coefficient: float = option(1.0, "weight of process rewards (alpha of pav)")
    process_temperature: float = option(0.1, "min: temperature of the weights; near 0 is a hard minimum")
    process_margin: float = option(0.5, "clip: scores above it cost nothing")
    prover_k: int = option(1, "pav: the prover is the best of so many samples")
    process_dtype: str = option("float32", "precision of the reward model")
    false_positives: float = option(0.0, "share of wrong steps that checker or facts take for right")
    overlong_buffer: int = option(0, "subtract up to 1 from responses that end in the last so many tokens; 0: off")
    most_repetition: float = option(1.0, "an outcome of -1 if a larger share of the steps repeats others; 1: off")

    eval_split: str = option("dev", "split of the greedy evaluation")
    eval_problems: int = option(200, "problems of the greedy evaluation")
    eval_every: int = option(
        0, "rollouts between evaluations; 0: at the end only, and not at all without eval_problems"
    )
    log_every: int = option(1, "rollouts between two lines of metrics.jsonl")
    save_every: int = option(10, "rollouts between checkpoints")
    shown_samples: int = option(2, "responses of each rollout that are kept to read")
    backend: Literal["transformers", "vllm"] = option(
        "transformers", "what samples: transformers (the training weights in process) or vllm"
    )
    vllm_options: dict[str, Any] = option({}, "options of vllm.LLM, gpu_memory_utilization for one")

    learning_rate: float = option(1e-6, "learning rate of the policy")
    lr_scheduler_type: Any = option("constant", "learning-rate schedule")

    def __post_init__(self) -> None:
        self.check_given("model")
        for name, instead in _COUNTED_IN_ROLLOUTS.items():
            if getattr(self, name) != _default(type(self), name):
                raise ValueError(f"{name} has no meaning in online training; what says it here: {instead}")
        at_least(
            self, 1, "rollouts", "prompts", "samples", "max_new_tokens", "update_epochs", "log_every", "save_every"
        )
        if self.algorithm != "ppo" and self.samples < 2:
            raise ValueError(f"{self.algorithm} compares responses to one problem: samples must be 2 or more")
        if self.temperature <= 0:
            raise ValueError(f"temperature must be greater than 0, found {self.temperature}")
        if self.kl_coefficient and not self.reference:
            raise ValueError("kl_coefficient needs the reference; set kl_coefficient: 0 to do without")
        if bool(self.process_reward) != (self.process_form != "none"):
            raise ValueError("process_reward (what scores steps) and process_form (what is made of it) go together")
        if self.backend == "vllm" and self.lora_r:
            raise ValueError("backend vllm takes whole weights: train without lora_r, or sample with transformers")
        super().__post_init__()
        share = self.per_device_train_batch_size * self.gradient_accumulation_steps
        if share % self.samples:
            raise ValueError(
                f"per_device_train_batch_size x gradient_accumulation_steps = {share} must hold whole groups of "
                f"samples = {self.samples}"
            )
        if self.prompts * self.samples % (share * self.world_size):
            raise ValueError(
                f"prompts x samples = {self.prompts * self.samples} must be a multiple of the responses in an optimiser "
                f"step, {share} x {self.world_size} processes"
            )
        self.num_train_epochs = float(self.rollouts)
        self.logging_steps, self.save_steps = self.log_every * self.steps, self.save_every * self.steps
        if self.eval_every:
            from transformers.trainer_utils import IntervalStrategy

            self.eval_strategy, self.eval_steps = IntervalStrategy.STEPS, self.eval_every * self.steps

    @property
    def share(self) -> int:
        """Responses of one process in one optimiser step."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps

    @property
    def minibatches(self) -> int:
        """Optimiser steps of one pass over a rollout."""
        return self.prompts * self.samples // (self.share * self.world_size)

    @property
    def steps(self) -> int:
        """Optimiser steps of one rollout."""
        return self.update_epochs * self.minibatches

    @property
    def reduction_(self) -> str:
        return self.reduction or {"ppo": "sequence", "rloo": "sum", "grpo": "sequence"}[self.algorithm]

    @property
    def kl_in_(self) -> str:
        return self.kl_in or ("loss" if self.algorithm == "grpo" else "reward")

    @property
    def kl_estimator_(self) -> str:
        return self.kl_estimator or ("k1" if self.kl_in_ == "reward" else "k3")


def _default(cls: type, name: str) -> Any:
    field: Any = next(f for f in dataclasses.fields(cls) if f.name == name)
    return field.default if field.default is not dataclasses.MISSING else field.default_factory()
