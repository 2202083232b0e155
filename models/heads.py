"""What gives a score at every position: a backbone and a head, under the weight names of each layout in use."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from ..basics import UserError, read_json, told_as_user_error
from .loading import hub_folder, load_model
from .step_format import StepFormat

# What the weights of a head are called in a checkpoint.
MLP_NAMES = ("score.0.weight", "score.0.bias", "score.2.weight", "score.2.bias")
VALUE_NAMES = ("v_head.summary.weight", "v_head.summary.bias")
SEQUENCE_NAMES = ("score.weight",)


class HeadedModel(torch.nn.Module):
    """`.logits` [B, S, classes] at every position, from a backbone and a head.

    For layouts of which transformers has no class (Qwen2ForProcessRewardModel, Qwen2ForPrmModel), or one that reads less than
    every position (sequence classification) or computes more than is read (the whole vocabulary of a language model).
    """

    def __init__(self, backbone: Any, head: torch.nn.Module, classes: int) -> None:
        super().__init__()
        self.backbone, self.head, self.classes = backbone, head, classes

    @property
    def config(self) -> Any:
        return self.backbone.config

    @property
    def device(self) -> Any:
        return self.backbone.device

    @property
    def dtype(self) -> Any:
        return self.backbone.dtype

    def forward(self, **inputs: Any) -> SimpleNamespace:
        return SimpleNamespace(logits=self.head(self.backbone(**inputs).last_hidden_state))


def load_scoring_model(path: str, step_format: StepFormat, *, dtype: str = "float32") -> Any:
    """The model that a step format's head reads, whole: a weight that is not in the checkpoint is an error, not drawn at random."""
    from transformers import AutoModel, AutoModelForTokenClassification

    if step_format.head in ("two_class", "scalar"):
        return load_model(AutoModelForTokenClassification, path, dtype=dtype)
    backbone = load_model(AutoModel, path, dtype=dtype)
    head = _HEADS[step_format.head](path, backbone, step_format)
    return HeadedModel(backbone, head.to(backbone.dtype), step_format.classes)


def _mlp(path: str, backbone: Any, step_format: StepFormat) -> torch.nn.Module:
    first, first_bias, second, second_bias = read_tensors(path, MLP_NAMES)
    return torch.nn.Sequential(linear(first, first_bias), torch.nn.ReLU(), linear(second, second_bias))


def _value(path: str, backbone: Any, step_format: StepFormat) -> torch.nn.Module:
    weight, bias = read_tensors(path, VALUE_NAMES)
    return linear(weight, bias)


def _sequence(path: str, backbone: Any, step_format: StepFormat) -> torch.nn.Module:
    [weight] = read_tensors(path, SEQUENCE_NAMES)
    return linear(weight, None)


def _label_tokens(path: str, backbone: Any, step_format: StepFormat) -> torch.nn.Module:
    """The two rows of the vocabulary head that are read."""
    refuse_changed_logits(path, backbone.config)
    rows, bias = list(step_format.label_ids), None
    vocabulary = backbone.get_input_embeddings().weight
    if max(rows) >= vocabulary.shape[0]:
        raise UserError(f"{path}: label_ids {rows} are not in the vocabulary of {vocabulary.shape[0]} words")
    if getattr(backbone.config, "tie_word_embeddings", False):
        weight = vocabulary.detach()[rows]
    else:
        [whole] = read_tensors(path, ["lm_head.weight"])
        weight = whole[rows]
        if "lm_head.bias" in tensor_files(path):
            bias = read_tensors(path, ["lm_head.bias"])[0][rows]
    return linear(weight, bias)


_HEADS: dict[str, Callable[[str, Any, StepFormat], torch.nn.Module]] = {
    "mlp_two_class": _mlp,
    "value_head": _value,
    "sequence": _sequence,
    "label_tokens": _label_tokens,
}


def refuse_changed_logits(path: str, config: Any) -> None:
    """Raises UserError for architectures whose vocabulary logits are scaled or capped behind the head."""
    for name in ("final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier"):
        if getattr(config, name, None) not in (None, 1, 1.0):
            raise UserError(f"{path}: its logits are changed behind the head ({name}), which label tokens do not allow")


def linear(weight: torch.Tensor, bias: torch.Tensor | None) -> torch.nn.Linear:
    """A linear layer with these weights [out, in] and bias [out]."""
    made = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    made.weight = torch.nn.Parameter(weight.detach().clone(), requires_grad=False)
    if bias is not None:
        made.bias = torch.nn.Parameter(bias.detach().clone(), requires_grad=False)
    return made


def tensor_files(path: str) -> dict[str, Path]:
    """Weight name -> safetensors file that holds it, of a checkpoint folder or hub id."""
    from safetensors import SafetensorError, safe_open

    folder = Path(path) if Path(path).is_dir() else hub_folder(path)
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        return {name: folder / file for name, file in read_json(index)["weight_map"].items()}
    whole = folder / "model.safetensors"
    if not whole.is_file():
        raise UserError(f"{path}: no model.safetensors in it; weights in other formats are not read")
    try:
        with told_as_user_error(f"read {whole}"), safe_open(whole, "pt") as opened:
            return dict.fromkeys(opened.keys(), whole)
    except SafetensorError as error:
        raise UserError(f"{whole}: not a safetensors file ({error})") from None


def read_tensors(path: str, names: Sequence[str]) -> list[torch.Tensor]:
    """Weights of a checkpoint by name. Raises UserError if one is not there."""
    from safetensors import safe_open

    files = tensor_files(path)
    if missing := [name for name in names if name not in files]:
        raise UserError(f"{path}: the checkpoint has no {', '.join(missing)}: it is no reward model of this format")
    found = []
    for name in names:
        with safe_open(files[name], "pt") as opened:
            found.append(opened.get_tensor(name))
    return found
