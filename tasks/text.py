"""Problems in words from JSON, JSON Lines or parquet files, or from a data set on the hub, by field names."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from ..basics import UserError, fold_seed, read_json, read_jsonl
from .answers import AnswerKind, canonical, grade, letters, read_answer
from .base import Problem, Verdict, split_on


@dataclass(frozen=True)
class TextTask:
    """Problems from records, with answers that a grader of one kind reads and compares.

    `sources` maps a name to a file, a folder's file, or a hub id ("owner/name", "owner/name:config:split"). `prompt` and `answer`
    are field names, or templates over fields such as "{Body} {Question}". A problem's split is drawn from a hash of its text, so
    that equal problems are never on both sides; `splits` gives the shares, or `source_splits` assigns whole sources.
    """

    name: str
    sources: Mapping[str, str]
    prompt: str = "question"
    answer: str = "answer"
    kind: AnswerKind = "number"
    solution: str = ""  # field with a reference solution, for demonstrations
    answer_after: str = ""  # the answer is what follows this mark in the answer field, such as "####"
    choices: str = ""  # field with the choices, for kind "choice"
    records_under: str = ""  # key of the list of records in a JSON file
    splits: Mapping[str, float] = field(default_factory=lambda: {"train": 0.6, "dev": 0.1, "test": 0.3})
    source_splits: Mapping[str, str] = field(default_factory=dict)
    step_separator: str = "\n"
    timeout: float = 5.0  # seconds that comparing two answers may take

    def __post_init__(self) -> None:
        if self.kind not in get_args(AnswerKind):
            raise ValueError(f"kind must be one of {', '.join(get_args(AnswerKind))}, found {self.kind!r}")
        if not self.sources:
            raise ValueError("sources is empty: name -> file or hub id")
        if abs(sum(self.splits.values()) - 1.0) > 1e-6:
            raise ValueError(f"the shares of splits must add up to 1, found {dict(self.splits)}")
        for source in self.source_splits:
            if source not in self.sources:
                raise ValueError(f"source_splits names {source!r}, which is not among the sources {', '.join(self.sources)}")

    def problems(self, split: str) -> list[Problem]:
        """The problems of a split, in the order of the sources; of equal problem texts the first is kept."""
        known = {*self.splits, *self.source_splits.values()}
        if split not in known:
            raise ValueError(f"split must be one of {', '.join(sorted(known))}, found {split!r}")
        found: dict[str, Problem] = {}
        for source, path in self.sources.items():
            for number, record in enumerate(read_records(path, self.records_under)):
                problem = self._problem(source, number, record, f"{path}, record {number + 1}")
                key = " ".join(problem.prompt.split()).casefold()
                if key not in found and self._split(source, key) == split:
                    found[key] = problem
        return list(found.values())

    def split_steps(self, text: str) -> list[str]:
        """The non-empty lines of a solution."""
        return split_on(text, self.step_separator)

    def verify(self, problem: Problem, text: str) -> Verdict:
        """Verdict on the final answer of a text."""
        return grade(problem.answer, text, self.kind, timeout=self.timeout)

    def reference_steps(self, problem: Problem) -> list[str] | None:
        """The reference solution's steps, if the records have one."""
        solution = problem.meta.get("solution")
        return self.split_steps(solution) if solution else None

    def _split(self, source: str, key: str) -> str:
        if source in self.source_splits:
            return self.source_splits[source]
        point, passed = (fold_seed(0, "split", key) % 10**6) / 10**6, 0.0
        for name, share in self.splits.items():
            passed += share
            if point < passed:
                return name
        return list(self.splits)[-1]

    def _problem(self, source: str, number: int, record: Mapping[str, Any], where: str) -> Problem:
        prompt = str(_fill(self.prompt, record, where)).strip()
        answer = str(_fill(self.answer, record, where)).strip()
        if self.answer_after:
            answer = answer.rsplit(self.answer_after, 1)[-1].strip()
        if self.choices:
            prompt += "\n" + _show_choices(_fill(self.choices, record, where), where)
        if self.kind == "math" and "\\boxed" in answer:
            answer = read_answer(answer, "math") or answer
        if canonical(answer, self.kind) is None:
            raise UserError(f"{where}: the reference answer {answer[:80]!r} is no answer of kind {self.kind}")
        meta: dict[str, Any] = {"source": source}
        if self.solution:
            meta["solution"] = str(_fill(self.solution, record, where))
        return Problem(f"{self.name}/{source}/{number:05d}", prompt, answer, meta)


_FIELD = re.compile(r"\{([^{}]{1,100})\}")


def _fill(template: str, record: Mapping[str, Any], where: str) -> Any:
    """A record's field by name or dotted path, or a template over such fields with its white space folded."""
    names = _FIELD.findall(template)
    if not names:
        return _lookup(template, record, where)
    return " ".join(_FIELD.sub(lambda m: str(_lookup(m[1], record, where)), template).split())


def _lookup(path: str, record: Mapping[str, Any], where: str) -> Any:
    value: Any = record
    for name in path.split("."):
        if not isinstance(value, Mapping) or name not in value:
            fields = [str(k) for k in value] if isinstance(value, Mapping) else []
            near = difflib.get_close_matches(name, fields, n=1)
            hint = f"did you mean {near[0]}?" if near else f"it has {', '.join(fields) or 'no fields'}"
            raise UserError(f"{where}: field {path!r} is missing; {hint}")
        value = value[name]
    return value


def _show_choices(choices: Any, where: str) -> str:
    """Choices as lines "(A) ...": from a list, a {label: text} mapping, or {label: [...], text: [...]}."""
    if isinstance(choices, Mapping) and {"label", "text"} <= set(choices):
        pairs = list(zip(choices["label"], choices["text"], strict=True))
    elif isinstance(choices, Mapping):
        pairs = list(choices.items())
    elif isinstance(choices, Sequence) and not isinstance(choices, str):
        pairs = [
            (c.get("label"), c.get("text")) if isinstance(c, Mapping) else (letter, c)
            for letter, c in zip(letters(len(choices)), choices, strict=True)
        ]
    else:
        raise UserError(f"{where}: choices must be a list or a mapping, found {type(choices).__name__}")
    return "\n".join(f"({label}) {text}" for label, text in pairs)


def read_records(source: str, under: str = "") -> Iterator[Mapping[str, Any]]:
    """Records of a JSON, JSON Lines (gzipped or not) or parquet file, or of a hub data set. Raises UserError if there is none."""
    path = Path(source)
    count = 0
    for record in _read(path, source, under):
        count += 1
        yield record
    if not count:
        raise UserError(f"{source}: the data set is empty")


def _read(path: Path, source: str, under: str) -> Iterator[Mapping[str, Any]]:
    if path.suffix == ".json" and path.is_file():
        value = read_json(path)
        value = value.get(under, value) if under and isinstance(value, dict) else value
        if not isinstance(value, list) or not all(isinstance(r, dict) for r in value):
            raise UserError(f"{source}: expected a list of records{f' under {under!r}' if under else ''}")
        yield from value
    elif path.suffix == ".parquet" and path.is_file():
        import pyarrow.parquet as pq

        yield from pq.read_table(path).to_pylist()
    elif path.is_file():
        yield from (record for _, record in read_jsonl(path))
    elif path.suffix or source.startswith((".", "/", "~")) or source.count("/") != 1:
        raise UserError(f"{source}: no such file")
    else:
        yield from _from_hub(source)


def _from_hub(source: str) -> Iterator[Mapping[str, Any]]:
    from datasets import load_dataset

    name, *rest = source.split(":")
    config, split = (rest[0] or None if rest else None), (rest[1] if len(rest) > 1 else "train")
    try:
        data = load_dataset(name, config, split=split)
    except Exception as error:
        # The hub's client raises many unrelated classes for "cannot be reached", "not found" and "needs a login".
        line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"{source}: not a file, and no data set could be loaded from the hub ({line[:200]})") from None
    yield from data


# --- presets -------------------------------------------------------------------------------------------------------------


def gsm8k(train: str = "openai/gsm8k:main:train", test: str = "openai/gsm8k:main:test", **fields: Any) -> TextTask:
    """GSM8K (arXiv:2110.14168): the answer follows "####"."""
    preset: dict[str, Any] = {
        "name": "gsm8k", "sources": {"train": train, "test": test}, "solution": "answer", "answer_after": "####",
        "source_splits": {"train": "train", "test": "test"},
    }  # fmt: skip
    return TextTask(**{**preset, **fields})


def math_problems(path: str = "EleutherAI/hendrycks_math:algebra:train", **fields: Any) -> TextTask:
    """MATH (arXiv:2103.03874): the answer is boxed in the solution and compared as mathematics."""
    preset: dict[str, Any] = {
        "name": "math", "sources": {"math": path}, "prompt": "problem", "answer": "solution", "kind": "math", "solution": "solution",
    }  # fmt: skip
    return TextTask(**{**preset, **fields})


def word_problems(
    multiarith: str = "ChilleD/MultiArith",
    singleeq: str = "allenai/lila:singleq:train",
    addsub: str = "allenai/lila:addsub:train",
    svamp: str = "ChilleD/SVAMP",
    folder: str = "",
    **fields: Any,
) -> WordProblems:
    """MultiArith, SingleEq, AddSub and SVAMP as one task; `folder` holds mawps/*.jsonl and svamp/SVAMP.json."""
    sources = {"multiarith": multiarith, "singleeq": singleeq, "addsub": addsub, "svamp": svamp}
    if folder:
        base = Path(folder)
        sources = {name: str(base / "mawps" / f"{name}.jsonl") for name in ("multiarith", "singleeq", "addsub")}
        sources["svamp"] = str(base / "svamp" / "SVAMP.json")
    return WordProblems(**{"name": "word_problems", "sources": sources, **fields})


@dataclass(frozen=True)
class WordProblems(TextTask):
    """Sources whose records name their fields differently: (input, target), (question, final_ans) or (Body, Question, Answer)."""

    def _problem(self, source: str, number: int, record: Mapping[str, Any], where: str) -> Problem:
        shapes = (("input", "target"), ("{Body} {Question}", "Answer"), ("question", "final_ans"), ("input", "output_answer"))
        for prompt, answer in shapes:
            names = _FIELD.findall(prompt) or [prompt]
            if all(n in record for n in [*names, answer]):
                text = str(_fill(prompt, record, where))
                if source == "svamp":
                    # SVAMP's body ends without a full stop where the question follows.
                    body = str(record["Body"]).strip()
                    text = f"{body}{'' if body.endswith(('.', '?', '!')) else '.'} {str(record['Question']).strip()}"
                gold = str(record[answer]).strip()
                if canonical(gold, self.kind) is None:
                    raise UserError(f"{where}: the reference answer {gold[:80]!r} is no number")
                return Problem(f"{self.name}/{source}/{number:05d}", " ".join(text.split()), gold, {"source": source})
        raise UserError(f"{where}: expected fields input and target, or Body, Question and Answer; found {', '.join(record)}")


def multiple_choice(path: str = "tau/commonsense_qa", **fields: Any) -> TextTask:
    """Questions with lettered choices; by default the fields of CommonsenseQA on the hub."""
    preset: dict[str, Any] = {
        "name": "multiple_choice", "sources": {"choice": path}, "prompt": "question", "answer": "answerKey", "kind": "choice",
        "choices": "choices",
    }  # fmt: skip
    return TextTask(**{**preset, **fields})
