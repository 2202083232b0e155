"""The step format: how a problem and its steps become token ids, and where and how a score is read.

One `step_format.json` lies beside every model. The generator, the trainers, the exporters and the search read this one
object, so that they cannot disagree.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from ..basics import UserError, read_json, write_json

FILE_NAME = "step_format.json"

# What turns the hidden state at a position into a score:
#   two_class, scalar   token classification with two labels (softmax) or one (sigmoid)
#   mlp_two_class       Linear, ReLU, Linear to two labels (Qwen2.5-Math-PRM)
#   label_tokens        a language model's softmax over two words of its vocabulary (Math-Shepherd, RLHFlow)
#   value_head          a language model with `v_head.summary`, one number (Skywork-o1-Open-PRM)
#   sequence            sequence classification with one label (outcome reward models)
Head = Literal["none", "two_class", "scalar", "mlp_two_class", "label_tokens", "value_head", "sequence"]
TWO_CLASSES = ("two_class", "mlp_two_class", "label_tokens")
# How a solution becomes token ids:
#   steps    prompt ids, then each step's ids and the separator ids; read at the last separator id
#   text     prompt, steps and separators tokenised as one text; read at the token with the separator's last character
#   turns    a conversation: problem and first step, then one step a user turn, each answered by `answer`; read at the token
#            before that answer, which predicts it
#   answer   each prefix by itself: the problem, answered by the steps so far; read at the last token
Arrangement = Literal["steps", "text", "turns", "answer"]
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
    position at which the score of step t is read and trained, without a shift. In a layout that is not `rooted` the empty
    prefix has other ids than the beginning of these: it cannot be read here.
    """

    ids: tuple[int, ...]
    prompt_length: int
    step_ends: tuple[int, ...]
    rooted: bool = True

    @property
    def root(self) -> int:
        """The position at which the empty prefix is scored: the last prompt token."""
        return self.prompt_length - 1

    @property
    def read_at(self) -> tuple[int, ...]:
        """Every position with a score: the root, if it is here, and the steps' ends."""
        return (self.root, *self.step_ends) if self.rooted else self.step_ends


@dataclass(frozen=True)
class StepFormat:
    """How solutions are laid out for one model.

    `separator_ids` are appended to the ids of each step; strings are never joined and tokenised again, because a tokenizer
    may merge a separator with its neighbours. A prompt is `prompt_template` with `{prompt}` filled in; with `chat` it
    becomes the user turn of the tokenizer's chat template, after `system` if there is one.

    The fields from `arrangement` on describe models that others trained, or that were written for others to read. A file
    holds them only where they differ from their defaults, so that formats of our own models stay readable by older versions.
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
    arrangement: Arrangement = "steps"
    tail: str = ""  # with `text`: what stands between a separator and the next step
    answer: str = ""  # with `turns`: what each step is answered with
    label_ids: tuple[int, ...] = ()  # of a label_tokens head: the vocabulary ids of its two classes
    offset: float = 0.0  # added to the log-odds that the head gives: a bias that the head has no room for

    def __post_init__(self) -> None:
        if not self.separator_ids and self.arrangement in ("steps", "text"):
            raise ValueError("separator_ids is empty: without a separator token no step score can be read")
        if any(not isinstance(i, int) or isinstance(i, bool) for i in self.separator_ids):
            raise ValueError(f"separator_ids must be token ids, found {self.separator_ids!r}")
        if not isinstance(self.prompt_template, str) or "{prompt}" not in self.prompt_template:
            raise ValueError(f"prompt_template must contain {{prompt}}, found {self.prompt_template!r}")
        for value, kind, field in (
            (self.head, Head, "head"),
            (self.label_kind, LabelKind, "label_kind"),
            (self.aggregation, Aggregation, "aggregation"),
            (self.arrangement, Arrangement, "arrangement"),
        ):
            if value not in get_args(kind):
                raise ValueError(f"{field} must be one of {', '.join(get_args(kind))}, found {value!r}")
        if self.head in TWO_CLASSES and self.positive_class not in (0, 1):
            raise ValueError(f"a two-class head needs positive_class 0 or 1, found {self.positive_class!r}")
        if self.head == "label_tokens" and len(set(self.label_ids)) != 2:
            raise ValueError(f"a label_tokens head needs two label_ids, found {self.label_ids!r}")
        if self.tail and self.arrangement != "text":
            raise ValueError(f"tail belongs to the arrangement text, found {self.tail!r} with {self.arrangement}")
        if (self.arrangement == "turns") != bool(self.answer):
            raise ValueError(f"the arrangement turns, and no other, needs an answer, found {self.answer!r}")

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
            label_ids=(),
            offset=0.0,
        )

    @property
    def classes(self) -> int:
        """How many numbers the head gives at a position."""
        return 2 if self.head in TWO_CLASSES else 1

    def layout(self) -> dict[str, Any]:
        """The part that decides token ids: two formats with the same layout read the same text alike."""
        names = ("separator", "separator_ids", "prompt_template", "chat", "system", "arrangement", "tail", "answer")
        return {name: getattr(self, name) for name in names}

    def encode_prompt(self, tokenizer: Any, prompt: str) -> tuple[int, ...]:
        """Token ids of the rendered prompt, up to where the first step begins."""
        text = self.prompt_template.replace("{prompt}", prompt)
        if not self.chat:
            return _without_eos(tokenizer, tokenizer(text)["input_ids"])
        rendered = self._render(tokenizer, [("user", text)])
        return tuple(tokenizer(rendered, add_special_tokens=False)["input_ids"])

    def encode_dialogue(self, tokenizer: Any, turns: Sequence[tuple[str, str]]) -> tuple[int, ...]:
        """Token ids of a conversation of (role, content), up to where the assistant answers its last turn.

        One turn is a prompt. More go through the tokenizer's chat template, as fine-tuning lays them out.
        """
        if len(turns) == 1:
            return self.encode_prompt(tokenizer, turns[0][1])
        if not getattr(tokenizer, "chat_template", None):
            raise UserError(
                f"a dialogue of {len(turns)} turns needs a chat template, and the tokenizer of {tokenizer.name_or_path} has none"
            )
        first = self.prompt_template.replace("{prompt}", turns[0][1])
        rendered = self._render(tokenizer, [(turns[0][0], first), *turns[1:]])
        return tuple(tokenizer(rendered, add_special_tokens=False)["input_ids"])

    def _render(self, tokenizer: Any, turns: Iterable[tuple[str, str]], *, open_turn: bool = True) -> str:
        """The conversation as text, after `system`; with `open_turn` up to where the assistant begins to speak."""
        if not getattr(tokenizer, "chat_template", None):
            raise UserError(
                f"the step format asks for a chat template, but the tokenizer of {tokenizer.name_or_path} has none: "
                "set chat: false, or give the tokenizer a template"
            )
        messages = [{"role": "system", "content": self.system}] if self.system is not None else []
        messages += [{"role": role, "content": content} for role, content in turns]
        return tokenizer.apply_chat_template(messages, add_generation_prompt=open_turn, tokenize=False)

    def encode(self, tokenizer: Any, prompt: str, steps: Sequence[str]) -> Encoded:
        """Ids of the prompt, then of each step followed by the separator ids, or as the arrangement says."""
        if self.arrangement == "text":
            return self._encode_text(tokenizer, prompt, steps)
        if self.arrangement == "turns":
            return self._encode_turns(tokenizer, prompt, steps)
        if self.arrangement == "answer":
            raise UserError("this step format reads whole answers, one at a time: it has no positions of single steps")
        return self.encode_after(tokenizer, self.encode_prompt(tokenizer, prompt), steps)

    def encode_all(
        self, tokenizer: Any, solutions: Sequence[tuple[str, Sequence[str]]], *, root: bool
    ) -> list[list[Encoded]]:
        """What must be encoded to score each (prompt, steps): its `read_at`, one after the other, are the steps' ends.

        With `root` the empty prefix comes first; without it, it may.
        """
        if self.arrangement == "steps":
            prompts = {prompt: self.encode_prompt(tokenizer, prompt) for prompt, _ in solutions}
            return [[self.encode_after(tokenizer, prompts[prompt], steps)] for prompt, steps in solutions]
        if self.arrangement == "text":
            return [[self.encode(tokenizer, prompt, steps)] for prompt, steps in solutions]
        if self.arrangement == "turns":
            return [
                [self.encode(tokenizer, p, ())] * (root or not steps) + [self.encode(tokenizer, p, steps)] * bool(steps)
                for p, steps in solutions
            ]
        return [
            [self._encode_answer(tokenizer, prompt, steps[:t]) for t in range(0 if root else 1, len(steps) + 1)]
            for prompt, steps in solutions
        ]

    def encode_after(self, tokenizer: Any, prompt_ids: Sequence[int], steps: Sequence[str]) -> Encoded:
        """As `encode`, for a prompt that is encoded already."""
        ids, ends = list(prompt_ids), []
        step_ids = tokenizer(list(steps), add_special_tokens=False)["input_ids"] if steps else []
        for one in step_ids:
            ids += one
            ids += self.separator_ids
            ends.append(len(ids) - 1)
        return Encoded(tuple(ids), len(prompt_ids), tuple(ends))

    def _encode_text(self, tokenizer: Any, prompt: str, steps: Sequence[str]) -> Encoded:
        text = self.prompt_template.replace("{prompt}", prompt)
        if self.chat:
            text = self._render(tokenizer, [("user", text)])
        begin, ends = len(text), []
        for step in steps:
            text += step + self.separator
            ends.append(len(text) - 1)
            text += self.tail
        ids, spans = _tokens_and_spans(tokenizer, text, special=not self.chat)
        positions = [_holding(spans, end) for end in ends]
        if any(ids[position] != self.separator_ids[-1] for position in positions):
            raise UserError(
                f"the tokenizer merges the step tag {self.separator!r} with what stands beside it; "
                "the scores would be read at another token"
            )
        return Encoded(ids, _wholly_before(spans, begin), tuple(positions))

    def _encode_turns(self, tokenizer: Any, prompt: str, steps: Sequence[str]) -> Encoded:
        before = self.prompt_template.replace("{prompt}", prompt)
        if not steps:
            rendered = self._render(tokenizer, [("user", before.rstrip())])
            ids, _ = _tokens_and_spans(tokenizer, rendered, special=False)
            return Encoded(ids, len(ids), ())
        turns: list[tuple[str, str]] = []
        answered = []  # where each answer begins, in characters
        for number, step in enumerate(steps):
            turns.append(("user", step if number else before + step))
            answered.append(len(self._render(tokenizer, turns)))
            turns.append(("assistant", self.answer))
        text = self._render(tokenizer, turns, open_turn=False)
        first = turns[0][1].strip()
        begin = text.find(first)
        if begin < 0 or any(not text.startswith(self.answer, at) for at in answered):
            raise UserError(
                "the tokenizer's chat template changes turns that were written before: "
                "a conversation that grows by a step has no fixed ids"
            )
        ids, spans = _tokens_and_spans(tokenizer, text, special=False)
        positions = [_holding(spans, at) for at in answered]
        wanted = self.label_ids[self.positive_class or 0] if self.head == "label_tokens" else None
        if any(spans[p][0] < at or wanted not in (None, ids[p]) for p, at in zip(positions, answered, strict=True)):
            raise UserError(
                f"the tokenizer merges the answer {self.answer!r} with what stands beside it in the chat template"
            )
        steps_begin = begin + len(before.lstrip())
        return Encoded(ids, _wholly_before(spans, steps_begin), tuple(p - 1 for p in positions), rooted=False)

    def _encode_answer(self, tokenizer: Any, prompt: str, steps: Sequence[str]) -> Encoded:
        text, answer = self.prompt_template.replace("{prompt}", prompt), self.separator.join(steps)
        if self.chat:
            rendered = self._render(tokenizer, [("user", text), ("assistant", answer)], open_turn=False)
            ids = tokenizer(rendered, add_special_tokens=False)["input_ids"]
        else:
            ids = tokenizer(text + answer)["input_ids"]
        return Encoded(tuple(ids), 0, (len(ids) - 1,), rooted=False)

    def save(self, folder: str | Path) -> None:
        """Writes `folder`/step_format.json."""
        write_json(Path(folder) / FILE_NAME, self.to_json())

    def to_json(self) -> dict[str, Any]:
        """The fields of the file: those that every version knows, and of the others what is not at its default."""
        late = {f.name: f.default for f in dataclasses.fields(self)[_EVERY_VERSION:]}
        return {k: v for k, v in dataclasses.asdict(self).items() if k not in late or v != late[k]}

    @classmethod
    def load(cls, folder: str | Path) -> StepFormat:
        """Reads `folder`/step_format.json. Raises UserError if it is missing or not a step format."""
        path = Path(folder) / FILE_NAME
        if not path.is_file():
            raise UserError(
                f"{path}: no such file; a model used by Stepladder has its step format beside it "
                "(`stepladder train` writes one; for a reward model of others, `stepladder import-reward` does)"
            )
        record = read_json(path)
        known = {f.name for f in dataclasses.fields(cls)}
        if not isinstance(record, dict) or not set(record) <= known or "separator_ids" not in record:
            raise UserError(f"{path}: not a step format (fields {sorted(known)} are expected)")
        try:
            for name in ("separator_ids", "label_ids"):
                if not isinstance(record.get(name, []), list):
                    raise ValueError(f"{name} must be token ids, found {record[name]!r}")
            ids = {name: tuple(record[name]) for name in ("separator_ids", "label_ids") if name in record}
            return cls(**{**record, **ids})
        except (TypeError, ValueError) as error:
            raise UserError(f"{path}: {error}") from None


# Fields that files of every version hold: separator to version.
_EVERY_VERSION = [f.name for f in dataclasses.fields(StepFormat)].index("version") + 1


def _without_eos(tokenizer: Any, ids: Sequence[int]) -> tuple[int, ...]:
    # Some tokenizers close every text with an end-of-sequence token; a prompt that goes on must not have it.
    return tuple(ids[:-1] if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id else ids)


def _tokens_and_spans(tokenizer: Any, text: str, *, special: bool) -> tuple[tuple[int, ...], list[tuple[int, int]]]:
    """(ids, [begin, end) in characters of each id) of a whole text that goes on."""
    try:
        found = tokenizer(text, add_special_tokens=special, return_offsets_mapping=True)
    except NotImplementedError:
        raise UserError(
            f"the tokenizer of {tokenizer.name_or_path} does not say where its tokens lie in the text: "
            "a fast tokenizer (tokenizer.json) is needed"
        ) from None
    ids = _without_eos(tokenizer, found["input_ids"]) if special else tuple(found["input_ids"])
    return ids, [(int(a), int(b)) for a, b in found["offset_mapping"][: len(ids)]]


def _holding(spans: Sequence[tuple[int, int]], character: int) -> int:
    """The last token that holds a character of the text."""
    return max((i for i, (begin, end) in enumerate(spans) if begin <= character < end), default=-1)


def _wholly_before(spans: Sequence[tuple[int, int]], character: int) -> int:
    """How many tokens, from the first, end before a character or at it."""
    return next((i for i, (_, end) in enumerate(spans) if end > character), len(spans))
