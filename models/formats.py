"""The layouts of reward models in use elsewhere, and how a checkpoint in one of them is read here.

Nothing in a foreign checkpoint says which token is the step tag or which class is good: that is convention. Each entry below is
such a convention as a step format; `foreign_format` fills in the token ids from the checkpoint's tokenizer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..basics import UserError
from ..config import unknown_key
from .loading import load_tokenizer
from .step_format import Aggregation, Arrangement, Head, LabelKind, StepFormat


@dataclass(frozen=True)
class Convention:
    """How models of one kind are read, as their authors read them."""

    about: str
    head: Head
    separator: str
    positive_class: int | None
    label_kind: LabelKind
    aggregation: Aggregation
    prompt_template: str = "{prompt}"  # {bos} stands for the tokenizer's beginning-of-sequence token
    chat: bool | None = False  # None: if the tokenizer has a chat template
    system: str | None = None
    arrangement: Arrangement = "steps"
    tail: str = ""


CONVENTIONS: dict[str, Convention] = {
    # arXiv:2501.07301: labels are of the consensus of Monte-Carlo estimates and a judge; trained and read at each <extra_0>.
    "qwen-prm": Convention(
        "Qwen2.5-Math-PRM: two-layer head, one tag behind every step",
        "mlp_two_class", "<extra_0>", 1, "hard", "prod",
        chat=True, system="Please reason step by step, and put your final answer within \\boxed{}.",
    ),
    # arXiv:2312.08935, as its authors' model card reads it.
    "math-shepherd": Convention(
        "Math-Shepherd: a language model's + and - at the tag behind every step",
        "label_tokens", " ки", 0, "hard", "min",
        prompt_template="{prompt} ", arrangement="text", tail="\n",
    ),
    "rlhflow": Convention(
        "RLHFlow: a language model's + and - as answers to steps in turns of a chat",
        "label_tokens", "", 0, "hard", "mean",
        prompt_template="{prompt} ", chat=True, arrangement="turns",
    ),
    "trl": Convention(
        "TRL token classification: two labels, or one, at the end of each separator",
        "two_class", "\n", 1, "hard", "last", prompt_template="{bos}{prompt}",
    ),
    "skywork": Convention(
        "Skywork-o1-Open-PRM: a language model with v_head.summary, one number behind every step",
        "value_head", "\n", None, "hard", "mean", prompt_template="{bos}{prompt}\n",
    ),
    "seqcls": Convention(
        "sequence classification with one label: one score of prompt and answer",
        "sequence", "\n", None, "outcome", "last", chat=None, arrangement="answer",
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Given:
    """What a user says of a foreign model; None leaves it to the convention."""

    separator: str | None = None
    tail: str | None = None
    good: str = "+"
    bad: str = "-"
    chat: bool | None = None
    system: str | None = None
    prompt_template: str | None = None
    label_kind: Any = None
    aggregation: Any = None


def foreign_format(path: str, name: str, given: Given | None = None) -> StepFormat:
    """The step format of a checkpoint (folder or hub id) that follows the convention `name`."""
    if name not in CONVENTIONS:
        raise unknown_key(name, list(CONVENTIONS), path, "format")
    convention, given = CONVENTIONS[name], given or Given()
    tokenizer = load_tokenizer(path)
    separator = convention.separator if given.separator is None else given.separator
    chat = convention.chat if given.chat is None else given.chat
    if chat is None:
        chat = bool(getattr(tokenizer, "chat_template", None))
    template = convention.prompt_template if given.prompt_template is None else given.prompt_template
    head, positive = convention.head, convention.positive_class
    if head == "two_class" and _labels(path) == 1:
        head, positive = "scalar", None
    labels: tuple[int, ...] = ()
    if head == "label_tokens":
        labels = (word_id(tokenizer, given.good, path), word_id(tokenizer, given.bad, path))
    try:
        return StepFormat(
            separator=separator,
            separator_ids=_tag_ids(tokenizer, separator, convention, path),
            prompt_template=template.replace("{bos}", _bos(tokenizer, name)),
            chat=chat,
            system=(convention.system if given.system is None else given.system) if chat else None,
            head=head,
            positive_class=positive,
            label_kind=given.label_kind or convention.label_kind,
            aggregation=given.aggregation or convention.aggregation,
            arrangement=convention.arrangement,
            tail=convention.tail if given.tail is None else given.tail,
            answer=given.good.strip() if convention.arrangement == "turns" else "",
            label_ids=labels,
        )
    except ValueError as error:
        raise UserError(f"{path} as {name}: {error}") from None


def word_id(tokenizer: Any, text: str, path: str) -> int:
    """The id of a text that is one token. Raises UserError if it is none or several."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if len(ids) != 1 or ids[0] == tokenizer.unk_token_id:
        raise UserError(f"{path}: {text!r} is not one token of its tokenizer (ids {ids}); name another word")
    return ids[0]


def _tag_ids(tokenizer: Any, separator: str, convention: Convention, path: str) -> tuple[int, ...]:
    if convention.arrangement in ("turns", "answer"):
        return ()  # no position is found by a separator
    ids = tokenizer(separator, add_special_tokens=False)["input_ids"]
    if not ids or tokenizer.unk_token_id in ids:
        raise UserError(
            f"{path}: its tokenizer has no token for the step tag {separator!r}; give the model's separator"
        )
    if convention.head == "mlp_two_class" and len(ids) > 1:
        raise UserError(f"{path}: the step tag {separator!r} is {len(ids)} tokens of its tokenizer, expected one")
    return tuple(ids)


def _bos(tokenizer: Any, name: str) -> str:
    bos = tokenizer.bos_token or ""
    if name == "trl":  # one, whether the tokenizer adds it or not; Skywork's code writes it into the text in any case
        ids = tokenizer("x")["input_ids"]
        return "" if ids and ids[0] == tokenizer.bos_token_id else bos
    return bos


def _labels(path: str) -> int:
    return read_config(path).num_labels


def read_config(path: str) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(path)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{path}: no model configuration could be read ({str(error).splitlines()[0][:200]})") from error
