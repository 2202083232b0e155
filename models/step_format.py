"""The step format: how a problem and its steps become token ids, and where and how a score is read.

One `step_format.json` lies beside every model. The generator, the trainers, the exporters and the search read this one
object, so that they cannot disagree.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from ..basics import UserError, read_json, write_json

FILE_NAME = "step_format.json"

Head = Literal["none", "two_class", "scalar"]
LabelKind = Literal["none", "outcome", "hard", "soft", "threshold", "human", "checker", "value", "ranking"]
Aggregation = Literal["last", "min", "prod", "mean"]

# How a solution's step scores become one number depends on what a score means (arXiv:2501.07301 section 3.1; arXiv:2408.03314
# appendix E): scores that estimate "will this end right" are summarised by the last, scores that say "is this step right" by
# the worst.
ADVISED_AGGREGATION: dict[str, Aggregation] = {
    "none": "last",
    "outcome": "last",
    "hard": "last",
    "soft": "last",
    "threshold": "last",
    "human": "min",
    "checker": "min",
    "value": "last",
    "ranking": "last",  # scores order solutions of one problem and mean nothing else; mean and min can be told
}


@dataclass(frozen=True)
class Encoded:
    """Token ids of a prompt and its steps.

    `ids[:prompt_length]` is the prompt; `step_ends[t]` is the index, in `ids`, of the last separator token of step t: the
    position at which the score of step t is read and trained, without a shift.
    """

    ids: tuple[int, ...]
    prompt_length: int
    step_ends: tuple[int, ...]

    @property
    def root(self) -> int:
        """The position at which the empty prefix is scored: the last prompt token."""
        return self.prompt_length - 1


@dataclass(frozen=True)
class StepFormat:
    """How solutions are laid out for one model.

    `separator_ids` are appended to the ids of each step; strings are never joined and tokenised again, because a tokenizer
    may merge a separator with its neighbours. A prompt is `prompt_template` with `{prompt}` filled in; with `chat` it
    becomes the user turn of the tokenizer's chat template, after `system` if there is one.
    """

    separator: str
    separator_ids: tuple[int, ...]
    prompt_template: str = "{prompt}"
    chat: bool = False
    system: str | None = None
    head: Head = "none"
    positive_class: int | None = None  # of a two-class head
    label_kind: LabelKind = "none"
    aggregation: Aggregation = "last"
    version: int = 1

    def __post_init__(self) -> None:
        if not self.separator_ids:
            raise ValueError("separator_ids is empty: without a separator token no step score can be read")
        if any(not isinstance(i, int) or isinstance(i, bool) for i in self.separator_ids):
            raise ValueError(f"separator_ids must be token ids, found {self.separator_ids!r}")
        if not isinstance(self.prompt_template, str) or "{prompt}" not in self.prompt_template:
            raise ValueError(f"prompt_template must contain {{prompt}}, found {self.prompt_template!r}")
        for value, kind, field in (
            (self.head, Head, "head"),
            (self.label_kind, LabelKind, "label_kind"),
            (self.aggregation, Aggregation, "aggregation"),
        ):
            if value not in get_args(kind):
                raise ValueError(f"{field} must be one of {', '.join(get_args(kind))}, found {value!r}")
        if self.head == "two_class" and self.positive_class not in (0, 1):
            raise ValueError(f"a two-class head needs positive_class 0 or 1, found {self.positive_class!r}")

    @classmethod
    def for_policy(cls, tokenizer: Any, separator: str, **fields: Any) -> StepFormat:
        """The format of a policy whose steps end with `separator`."""
        ids = tokenizer(separator, add_special_tokens=False)["input_ids"]
        if not ids:
            raise UserError(f"the tokenizer gives no token for the step separator {separator!r}")
        return cls(separator=separator, separator_ids=tuple(ids), **fields)

    def for_reward(self, head: Head, label_kind: LabelKind, aggregation: Aggregation | None = None) -> StepFormat:
        """This layout with a reward head, its label kind and the aggregation that suits it, or the one given."""
        return dataclasses.replace(
            self,
            head=head,
            positive_class=1 if head == "two_class" else None,
            label_kind=label_kind,
            aggregation=aggregation or ADVISED_AGGREGATION[label_kind],
        )

    def layout(self) -> dict[str, Any]:
        """The part that decides token ids: two formats with the same layout read the same text alike."""
        names = ("separator", "separator_ids", "prompt_template", "chat", "system")
        return {name: getattr(self, name) for name in names}

    def encode_prompt(self, tokenizer: Any, prompt: str) -> tuple[int, ...]:
        """Token ids of the rendered prompt, up to where the first step begins."""
        text = self.prompt_template.replace("{prompt}", prompt)
        if not self.chat:
            ids = tokenizer(text)["input_ids"]
            # Some tokenizers close every text with an end-of-sequence token; a prompt that goes on must not have it.
            return tuple(ids[:-1] if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id else ids)
        if not getattr(tokenizer, "chat_template", None):
            raise UserError(
                f"the step format asks for a chat template, but the tokenizer of {tokenizer.name_or_path} has none: "
                "set chat: false, or give the tokenizer a template"
            )
        messages = [{"role": "system", "content": self.system}] if self.system is not None else []
        messages.append({"role": "user", "content": text})
        rendered = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        return tuple(tokenizer(rendered, add_special_tokens=False)["input_ids"])

    def encode(self, tokenizer: Any, prompt: str, steps: Sequence[str]) -> Encoded:
        """Ids of the prompt, then of each step followed by the separator ids."""
        return self.encode_after(tokenizer, self.encode_prompt(tokenizer, prompt), steps)

    def encode_after(self, tokenizer: Any, prompt_ids: Sequence[int], steps: Sequence[str]) -> Encoded:
        """As `encode`, for a prompt that is encoded already."""
        ids, ends = list(prompt_ids), []
        step_ids = tokenizer(list(steps), add_special_tokens=False)["input_ids"] if steps else []
        for one in step_ids:
            ids += one
            ids += self.separator_ids
            ends.append(len(ids) - 1)
        return Encoded(tuple(ids), len(prompt_ids), tuple(ends))

    def save(self, folder: str | Path) -> None:
        """Writes `folder`/step_format.json."""
        write_json(Path(folder) / FILE_NAME, dataclasses.asdict(self))

    @classmethod
    def load(cls, folder: str | Path) -> StepFormat:
        """Reads `folder`/step_format.json. Raises UserError if it is missing or not a step format."""
        path = Path(folder) / FILE_NAME
        if not path.is_file():
            raise UserError(
                f"{path}: no such file; a model used by Stepladder has its step format beside it "
                "(`stepladder train` and `stepladder import-gguf` write one)"
            )
        record = read_json(path)
        known = {f.name for f in dataclasses.fields(cls)}
        if not isinstance(record, dict) or not set(record) <= known or "separator_ids" not in record:
            raise UserError(f"{path}: not a step format (fields {sorted(known)} are expected)")
        try:
            if not isinstance(record["separator_ids"], list):
                raise ValueError(f"separator_ids must be token ids, found {record['separator_ids']!r}")
            return cls(**{**record, "separator_ids": tuple(record["separator_ids"])})
        except (TypeError, ValueError) as error:
            raise UserError(f"{path}: {error}") from None
