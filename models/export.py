"""A reward model written in the layout of another project, so that its readers get the scores that ours gives.

An export changes the shape and the names of the head, never the token ids that the model was trained on. Every head but the
two-layer one is linear: log-odds w.x + b, which each layout writes in its own way, exactly or not at all.
"""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..basics import UserError
from ..config import unknown_key
from .formats import word_id
from .heads import MLP_NAMES, VALUE_NAMES, HeadedModel, read_tensors, refuse_changed_logits, tensor_files
from .loading import write_checkpoint
from .model_card import PROBES, model_card
from .reward import RewardModel
from .step_format import StepFormat

# The tag that each layout's readers look for by its id.
TAGS = {"qwen-prm": "<extra_0>", "math-shepherd": "ки"}


@dataclass(frozen=True)
class Wanted:
    """What a user says of an export."""

    tag: str | None = None  # the step tag as a token of its own; "" keeps the separator; None: as the layout has it
    good: str = "+"
    bad: str = "-"
    bias: str = "refuse"  # or "beside": what to do with a bias that the layout has no room for
    check: bool = True


@dataclass
class Work:
    """A checkpoint on its way into another layout: what is written in the end."""

    name: str  # of the source, for messages
    target: str
    wanted: Wanted
    reward: RewardModel
    config: Any
    tokenizer: Any
    step_format: StepFormat
    weights: dict[str, torch.Tensor]  # of the backbone, under their names in the checkpoint
    positive: int = 1  # the rows of the head that are the good class and the other
    negative: int = 0

    @property
    def backbone(self) -> Any:
        return backbone_of(self.reward.model)

    @property
    def embeddings(self) -> str:
        """The name of the input embeddings."""
        table = self.backbone.get_input_embeddings()
        [name] = [n for n, module in self.backbone.named_modules() if module is table]
        return f"{self.backbone.base_model_prefix}.{name}.weight"

    def refuse(self, why: str) -> UserError:
        return UserError(f"{self.name}: cannot be exported as {self.target}: {why}")


def export_reward(model: str, target: str, out: str, wanted: Wanted | None = None) -> float | None:
    """Writes the reward model in folder `model` to `out` in the layout `target`; returns the largest difference of scores.

    The written folder is read back and both models score the same solutions, unless `check` is off. Raises UserError for a head
    or a layout of samples that the target cannot hold.
    """
    if target not in _TARGETS:
        raise unknown_key(target, list(_TARGETS), "export", "format")
    wanted = wanted or Wanted()
    if wanted.bias not in ("refuse", "beside"):
        raise UserError(f"bias must be refuse or beside, found {wanted.bias!r}")
    if Path(out).resolve() == Path(model).resolve():
        raise UserError(f"{out}: is the model's own folder; give another --out")
    reward = RewardModel.load(model, dtype="auto", device="cpu")
    backbone = backbone_of(reward.model)
    prefix = backbone.base_model_prefix
    work = Work(
        name=model,
        target=target,
        wanted=wanted,
        reward=reward,
        config=copy.deepcopy(backbone.config),
        tokenizer=copy.deepcopy(reward.tokenizer),
        step_format=dataclasses.replace(reward.step_format, head="none", positive_class=None, label_ids=(), offset=0.0),
        weights={f"{prefix}.{name}": weight.detach() for name, weight in backbone.state_dict().items()},
    )
    _TARGETS[target](work)
    difference = None
    tolerance = 1e-4 if backbone.dtype is torch.float32 else 2e-2
    with write_checkpoint(out) as folder:
        _write(work, folder)
        if wanted.check:
            difference = _difference(reward, str(folder))
            if difference > tolerance:
                raise work.refuse(f"the written model scores differently (by {difference:.2g}): please report this")
        card = model_card(target, work.step_format, work.tokenizer, work.config, origin=model, difference=difference)
        (folder / "README.md").write_text(card, encoding="utf-8")
    return difference


def backbone_of(model: Any) -> Any:
    """The language model below a reward head."""
    return model.backbone if isinstance(model, HeadedModel) else model.base_model


def linear_head(reward: RewardModel) -> tuple[torch.Tensor, torch.Tensor] | None:
    """(weight [2, h], bias [2]) in float32 of a linear head, row 1 the good class; None of a two-layer head.

    A single output v becomes the two logits (0, v): their softmax is the sigmoid of v.
    """
    head, step_format = _head_of(reward.model), reward.step_format
    if not isinstance(head, torch.nn.Linear):
        return None
    weight = head.weight.detach().float()
    bias = head.bias.detach().float() if head.bias is not None else weight.new_zeros(len(weight))
    if step_format.classes == 1:
        weight, bias = torch.cat([torch.zeros_like(weight), weight]), torch.cat([torch.zeros_like(bias), bias])
    else:
        order = [1 - (step_format.positive_class or 0), step_format.positive_class or 0]
        weight, bias = weight[order], bias[order]
    return weight, bias + bias.new_tensor([0.0, step_format.offset])


def pass_through_mlp(weight: torch.Tensor, bias: torch.Tensor) -> list[torch.Tensor]:
    """W1 [h, h], b1 [h], W2 [2, h], b2 [2] with W2 relu(W1 x + b1) + b2 = weight x + bias.

    w.x = relu(w.x) - relu(-w.x): two hidden units a class, the others stay at zero.
    """
    width = weight.shape[1]
    first, second = weight.new_zeros(width, width), weight.new_zeros(2, width)
    for row in range(2):
        first[2 * row], first[2 * row + 1] = weight[row], -weight[row]
        second[row, 2 * row], second[row, 2 * row + 1] = 1.0, -1.0
    return [first, weight.new_zeros(width), second, bias]


def _head_of(model: Any) -> Any:
    if isinstance(model, HeadedModel):
        return model.head
    inside = f"{model.base_model_prefix}."
    [head] = [m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and not n.startswith(inside)]
    return head


# --- the layouts ---------------------------------------------------------------------------------------------------------


def _to_qwen_prm(work: Work) -> None:
    _set_tag(work)
    found = linear_head(work.reward)
    if found is not None:
        parts = pass_through_mlp(*found)
    else:
        head, ours = work.reward.model.head, work.reward.step_format
        order = [1 - (ours.positive_class or 0), ours.positive_class or 0]
        bias = head[2].bias.detach().float()[order]
        bias = bias + bias.new_tensor([0.0, ours.offset])
        parts = [head[0].weight.detach(), head[0].bias.detach(), head[2].weight.detach()[order], bias]
    work.weights.update(zip(MLP_NAMES, parts, strict=True))
    work.config.num_labels = 2
    work.config.architectures = [_stem(work) + "ForProcessRewardModel"]
    work.step_format = dataclasses.replace(work.step_format, head="mlp_two_class", positive_class=1)


def _to_skywork(work: Work) -> None:
    _needs(work, "steps")
    weight, bias = _one_row(work)
    work.weights.update(zip(VALUE_NAMES, (weight, bias), strict=True))
    # The reward model has no vocabulary head; a tied one lets readers of causal language models load the folder.
    work.config.tie_word_embeddings = True
    work.config.architectures = [_stem(work) + "ForPrmModel"]
    work.step_format = dataclasses.replace(work.step_format, head="value_head")


def _to_trl(work: Work) -> None:
    from transformers import MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING

    _needs(work, "steps")
    weight, bias = _linear(work)
    work.config.num_labels = 2
    offset = _place(work, MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING, weight, bias)
    work.step_format = dataclasses.replace(work.step_format, head="two_class", positive_class=1, offset=offset)


def _to_seqcls(work: Work) -> None:
    from transformers import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING

    _needs(work, "steps", "answer")
    weight, bias = _one_row(work)
    work.config.num_labels = 1
    work.config.pad_token_id = work.tokenizer.pad_token_id
    if work.step_format.separator_ids[-1:] == (work.config.pad_token_id,):
        raise work.refuse("its separator is its padding token, and readers look for the last token that is not padding")
    offset = _place(work, MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING, weight, bias)
    work.step_format = dataclasses.replace(work.step_format, head="sequence", offset=offset)


def _to_math_shepherd(work: Work) -> None:
    _set_tag(work)
    good, bad = (word_id(work.tokenizer, text, work.name) for text in (work.wanted.good, work.wanted.bad))
    _place_labels(work, good, bad)


def _to_rlhflow(work: Work) -> None:
    _needs(work, "steps", "turns")
    step_format, tokenizer = work.step_format, work.tokenizer
    if step_format.arrangement == "turns":
        ids = []
        for answer in (step_format.answer, work.wanted.bad):
            spoken = dataclasses.replace(step_format, answer=answer, head="none").encode(tokenizer, *PROBES[0])
            ids.append(spoken.ids[spoken.step_ends[0] + 1])
        return _place_labels(work, *ids)
    good, bad = (word_id(tokenizer, text, work.name) for text in (work.wanted.good, work.wanted.bad))
    why = "a chat turn holds 'problem step', and its ids would be others than those the model was trained on"
    if step_format.chat or tokenizer.eos_token is None:
        raise work.refuse(why)
    # The template writes turns as this model saw its steps: separators for the answers, and the sign only where it is read.
    tokenizer.chat_template = (
        "{%- for message in messages -%}{%- if message['role'] == 'assistant' -%}"
        "{%- if loop.last -%}{{ message['content'] + eos_token }}{%- endif -%}"
        "{%- else -%}{{ message['content'] + SEPARATOR }}{%- endif -%}{%- endfor -%}"
    ).replace("SEPARATOR", json.dumps(step_format.separator, ensure_ascii=False))
    for prompt, steps in PROBES:
        encoded = step_format.encode(tokenizer, prompt, steps)
        problem = step_format.prompt_template.replace("{prompt}", prompt).removesuffix(" ")  # the turn has a blank here
        turns = [{"role": "user", "content": f"{problem} {steps[0]}"}]
        for number, end in enumerate(encoded.step_ends):
            turns += [{"role": "user", "content": steps[number]}] if number else []
            turns.append({"role": "assistant", "content": work.wanted.good})
            text = tokenizer.apply_chat_template(turns, tokenize=False)
            found = tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
            if found != (*encoded.ids[: end + 1], good, tokenizer.eos_token_id):
                raise work.refuse(why)
    _place_labels(work, good, bad)


_TARGETS: dict[str, Callable[[Work], None]] = {
    "qwen-prm": _to_qwen_prm,
    "math-shepherd": _to_math_shepherd,
    "rlhflow": _to_rlhflow,
    "trl": _to_trl,
    "skywork": _to_skywork,
    "seqcls": _to_seqcls,
}


# --- their parts ---------------------------------------------------------------------------------------------------------


def _needs(work: Work, *arrangements: str) -> None:
    if work.step_format.arrangement not in arrangements:
        raise work.refuse(
            f"its samples are laid out as {work.step_format.arrangement}, and this format reads {' or '.join(arrangements)}"
        )


def _linear(work: Work) -> tuple[torch.Tensor, torch.Tensor]:
    found = linear_head(work.reward)
    if found is None:
        raise work.refuse("its head has two layers, and this format has room for one")
    return found


def _one_row(work: Work) -> tuple[torch.Tensor, torch.Tensor]:
    """(weight [1, h], bias [1]) whose sigmoid is the good class's softmax."""
    weight, bias = _linear(work)
    return weight[1:] - weight[:1], bias[1:] - bias[:1]


def _stem(work: Work) -> str:
    """Qwen2 of Qwen2Model."""
    return type(work.backbone).__name__.removesuffix("Model")


def _place(work: Work, mapping: Any, weight: torch.Tensor, bias: torch.Tensor) -> float:
    """Puts a linear head under the names of transformers' class for this architecture; returns what must be added beside.

    The class is built without weights, so that what `from_pretrained` will ask for is known and not assumed.
    """
    found = mapping.get(type(work.config), None)
    if found is None:
        raise work.refuse(f"transformers has no such class for the architecture {work.config.model_type}")
    work.config.architectures = [found.__name__]
    with torch.device("meta"):
        skeleton = found(copy.deepcopy(work.config))
    expected = skeleton.state_dict()
    names = [name for name in expected if not name.startswith(f"{work.backbone.base_model_prefix}.")]
    biases = [name for name in names if name.endswith(".bias")]
    [weight_name] = [name for name in names if name not in biases]
    work.weights[weight_name] = weight
    beside = 0.0
    if biases:
        work.weights[biases[0]] = bias
    else:
        # Of two logits only the difference counts, and it goes to the one log-odds.
        beside = float(bias[work.positive] - bias[work.negative]) if len(bias) > 1 else float(bias[0])
        if beside and work.wanted.bias == "refuse":
            raise work.refuse(
                f"its head has a bias ({beside:+.4g} on the log-odds), and {found.__name__} has none; "
                "with --bias beside it is written to step_format.json, which other readers do not know"
            )
    if set(expected) != set(work.weights):
        odd = ", ".join(sorted(set(expected) ^ set(work.weights))[:3])
        raise work.refuse(f"its weights are not those of {found.__name__} ({odd})")
    return beside


def _place_labels(work: Work, good: int, bad: int) -> None:
    """Writes the two classes as two rows of the vocabulary head, which is untied from the embeddings first."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    refuse_changed_logits(work.name, work.config)
    if good == bad:
        raise work.refuse(f"its good and its bad word are the same token ({good})")
    rows, gap = _linear(work)
    table = work.weights[work.embeddings]
    head, bias = torch.zeros_like(table, dtype=torch.float32), torch.zeros(len(table))
    if work.reward.step_format.head == "label_tokens":  # a language model: its other words stay
        files = tensor_files(work.name)
        tied = getattr(work.config, "tie_word_embeddings", False)
        [old] = [work.backbone.get_input_embeddings().weight] if tied else read_tensors(work.name, ["lm_head.weight"])
        head[: len(old)] = old.detach().float()
        if "lm_head.bias" in files:
            bias[: len(old)] = read_tensors(work.name, ["lm_head.bias"])[0].float()
    head[bad], head[good] = rows
    bias[bad], bias[good] = gap
    work.config.tie_word_embeddings = False
    work.positive, work.negative = good, bad
    offset = _place(work, MODEL_FOR_CAUSAL_LM_MAPPING, head, bias)
    work.step_format = dataclasses.replace(
        work.step_format, head="label_tokens", positive_class=0, label_ids=(good, bad), offset=offset
    )


def _set_tag(work: Work) -> None:
    """Gives the separator's place to a token of its own, as readers look for it by id.

    A new word whose embedding is that of the separator is the same input to the model: every score stays what it was.
    """
    from tokenizers import AddedToken

    step_format, tokenizer, tag = work.step_format, work.tokenizer, work.wanted.tag
    _needs(work, "steps", "text")
    if step_format.arrangement == "text":
        return
    if len(step_format.separator_ids) != 1:
        raise work.refuse(
            f"its separator {step_format.separator!r} is {len(step_format.separator_ids)} tokens, "
            "and the one tag token of this format cannot stand for them"
        )
    tag = TAGS[work.target] if tag is None else tag
    [old] = step_format.separator_ids
    if not tag or tokenizer(tag, add_special_tokens=False)["input_ids"] == [old]:
        return
    if tag in tokenizer.get_vocab():
        raise work.refuse(f"its vocabulary has a word {tag!r} already, with a meaning of its own; choose another --tag")
    tokenizer.add_tokens([AddedToken(tag, special=True, normalized=False)], special_tokens=True)
    new = tokenizer.convert_tokens_to_ids(tag)
    table = work.weights[work.embeddings]
    rows = table.new_zeros(max(len(table), new + 1), table.shape[1])
    rows[: len(table)] = table
    rows[new] = table[old]
    work.weights[work.embeddings] = rows
    work.config.vocab_size = len(rows)
    work.step_format = dataclasses.replace(step_format, separator=tag, separator_ids=(new,))


def _write(work: Work, folder: Path) -> None:
    from huggingface_hub import save_torch_state_dict

    dtype = work.backbone.dtype
    # Rows of a head are read one by one and the embeddings may be shared: everything is written by itself.
    weights = {name: weight.to(dtype).clone() for name, weight in work.weights.items()}
    work.config.dtype = dtype
    work.config.save_pretrained(folder)
    save_torch_state_dict(weights, folder, metadata={"format": "pt"})
    work.tokenizer.save_pretrained(folder)
    work.step_format.save(folder)


def _difference(reward: RewardModel, folder: str) -> float:
    """The largest difference of a step score between a reward model and the one in a folder, both in float32."""
    ours = RewardModel(reward.model.float(), reward.tokenizer, reward.step_format)
    theirs = RewardModel.load(folder, device="cpu")
    pairs = zip(ours.score(PROBES), theirs.score(PROBES), strict=True)
    return max(abs(a - b) for one, other in pairs for a, b in zip(one, other, strict=True))
