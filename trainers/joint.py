"""One model trained as a language model and as a reward model at once: a score head beside the language-model head.

The trained weights are written as plain checkpoints: a token-classification model, which `RewardModel` reads, and where the
policy is wanted too a causal language model. One folder could hold both heads, and transformers would load either from it; other
loaders refuse weights that they do not know, and one folder has one step format, which is a policy's or a reward model's. So
the backbone is written twice.
"""

from __future__ import annotations

import contextlib
import functools
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers.utils import ModelOutput

from ..basics import make_folder
from ..models.loading import load_model
from ..models.step_format import Encoded, StepFormat
from . import losses
from .arguments import StepladderArguments
from .common import HEADS, MetricsFile, ReadsForward, StepladderTrainer, fit, start_model
from .examples import Examples, pad_batch

JOINT = "joint"  # in the output folder, while the two checkpoints are made of it


class _WithScores:
    """What `with_score_head` puts before a causal language model's class."""

    def forward(self, *args: Any, **kwargs: Any) -> ModelOutput:
        """Logits [B, S, V] as ever, and `scores` [B, S, C] read from the same last hidden states."""
        output = super().forward(*args, **{**kwargs, "output_hidden_states": True})  # type: ignore[misc]
        head = getattr(self, head_name(self))
        return ModelOutput(logits=output.logits, scores=head(output.hidden_states[-1]))


@contextlib.contextmanager
def _unsplit() -> Iterator[None]:
    """Within it, transformers does not split among processes what it builds. Under ZeRO-3 it would, and needs weights for that."""
    from transformers.integrations import deepspeed

    kept = deepspeed._hf_deepspeed_config_weak_ref  # public functions set and unset it, and none reads it
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = kept


def head_name(model: Any) -> str:
    """The name of the score head of a model that has one."""
    return next(name for name in HEADS if hasattr(model, name))


def with_score_head(model: Any, classes: int = 1) -> Any:
    """A causal language model with a new head of `classes` scores, named as in its architecture's token-classification class.

    Checkpoints of it hold both heads. Under one name the head's weights are found by either class.
    """
    from transformers import AutoModelForTokenClassification

    with _unsplit(), torch.device("meta"):
        other = AutoModelForTokenClassification.from_config(model.config)
    name = head_name(other)
    head = torch.nn.Linear(getattr(other, name).in_features, classes, bias=getattr(other, name).bias is not None)
    torch.nn.init.normal_(head.weight, std=getattr(model.config, "initializer_range", 0.02))
    if head.bias is not None:
        torch.nn.init.zeros_(head.bias)
    setattr(model, name, head.to(model.dtype))
    model.__class__ = type(type(model).__name__, (_WithScores, type(model)), {})
    return model


def language_labels(encoded: Encoded, separator: int, eos: int) -> list[int]:
    """Language-model labels of a whole solution: its own ids behind the prompt, and its end. `separator` is its length in ids.

    A policy ends a solution where the layout of a reward model has one more separator. So the label at the last separator's first
    token is the end of the sequence, and the rest of that separator is masked.
    """
    end = encoded.step_ends[-1] + 1 - separator
    return (
        [-100] * encoded.prompt_length
        + list(encoded.ids[encoded.prompt_length : end])
        + [eos]
        + [-100] * (separator - 1)
    )


def collate(items: Sequence[dict[str, Any]], pad_id: int) -> dict[str, torch.Tensor]:
    """A batch of reward examples with language-model labels, padded on the right."""
    batch = pad_batch(items, {"input_ids": pad_id, "target": 0.0, "target_mask": False, "labels": -100})
    batch["target"] = batch["target"].float()
    return batch


class JointTrainer(StepladderTrainer):
    """score_weight * (mean score loss over the labelled positions) + lm_weight * (mean cross-entropy over the trained tokens).

    Each mean is over the whole optimiser step; a step without a trained token has no language-model term.
    """

    score_weight: float
    lm_weight: float
    score_loss: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
    positive_class: int | None = None

    def count_items(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.stack([batch["target_mask"].sum(), (batch["labels"][:, 1:] != -100).sum()])

    def loss_sum(self, model: Any, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, float]]:
        output = model(input_ids=batch["input_ids"], attention_mask=self.padding_mask(batch), use_cache=False)
        log_odds = losses.step_logit(output.scores.float(), self.positive_class)
        score = self.score_loss(log_odds, batch["target"], batch["target_mask"]).sum()
        nats, _ = losses.token_cross_entropy(output.logits, batch["labels"])
        count = self.count_items(batch).clamp(min=1)
        return torch.stack([self.score_weight * score, self.lm_weight * nats.sum()]), {
            "score_loss": (score / count[0]).item(),
            "lm_loss": (nats.sum() / count[1]).item(),
        }


def train_joint(
    args: StepladderArguments,
    data: Examples,
    held_out: Examples | None,
    tokenizer: Any,
    *,
    score_format: StepFormat,
    score_loss: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor],
    score_weight: float,
    lm_weight: float,
    policy_format: StepFormat | None = None,
) -> dict[str, float]:
    """Trains both heads and writes the checkpoint of the scores; returns metrics.

    It is written to output_dir; with `policy_format` the policy is written there, and the scores to output_dir/value.
    """
    from transformers import AutoModelForCausalLM

    add_head = functools.partial(with_score_head, classes=2 if score_format.head == "two_class" else 1)
    make_folder(args.output_dir)
    trainer = JointTrainer(
        model=start_model(AutoModelForCausalLM, args, add_head),
        args=args,
        train_dataset=data,
        eval_dataset=held_out,
        data_collator=lambda items: collate(items, tokenizer.pad_token_id),
        callbacks=[MetricsFile(args.output_dir)],
    )
    trainer.add_callback(ReadsForward(trainer))
    trainer.score_loss, trainer.score_weight, trainer.lm_weight = score_loss, score_weight, lm_weight
    trainer.positive_class = score_format.positive_class
    return fit(
        trainer, tokenizer, score_format, functools.partial(save_joint, add_head=add_head, policy_format=policy_format)
    )


def save_joint(
    trainer: StepladderTrainer,
    tokenizer: Any,
    score_format: StepFormat,
    *,
    add_head: Callable[[Any], Any],
    policy_format: StepFormat | None = None,
) -> None:
    """Writes the trained model of both heads as plain checkpoints: see `train_joint`. Adapters are merged into the base."""
    from transformers import AutoModelForCausalLM, AutoModelForTokenClassification

    args = trainer.args
    folder = Path(args.output_dir)
    joint = folder / JOINT
    model = trainer.accelerator.unwrap_model(trainer.model)
    adapted = hasattr(model, "merge_and_unload")
    trainer.save_model(str(folder / "adapter" if adapted else joint))
    trainer.accelerator.wait_for_everyone()
    if trainer.is_world_process_zero():
        from transformers.integrations.deepspeed import unset_hf_deepspeed_config

        # From disk: under ZeRO-3 and FSDP no process holds whole weights, and transformers would split what it loads.
        unset_hf_deepspeed_config()
        if adapted:
            from peft import PeftModel

            base = add_head(load_model(AutoModelForCausalLM, args.model, dtype=args.dtype))
            PeftModel.from_pretrained(base, folder / "adapter").merge_and_unload().save_pretrained(joint)
        scores = folder if policy_format is None else folder / "value"
        _write(AutoModelForTokenClassification, args, joint, scores, tokenizer, score_format)
        if policy_format is not None:
            _write(AutoModelForCausalLM, args, joint, folder, tokenizer, policy_format)
        shutil.rmtree(joint)
        (folder / "adapter" / "training_args.bin").unlink(missing_ok=True)  # a pickle
    trainer.accelerator.wait_for_everyone()


def _write(
    auto_class: Any, args: StepladderArguments, joint: Path, folder: Path, tokenizer: Any, step_format: StepFormat
) -> None:
    scores = "TokenClassification" in auto_class.__name__
    labels = 2 if step_format.head == "two_class" else 1
    settings = {"num_labels": labels, "classifier_dropout": 0.0} if scores else None
    model = load_model(auto_class, str(joint), dtype=args.dtype, settings=settings)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    step_format.save(folder)
