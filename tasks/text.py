"""Problems in words from files or from the hub, by field names; and the data sets that have a name here."""

from __future__ import annotations

import difflib
import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any, get_args

from ..basics import UserError, fold_seed
from .answers import AnswerKind, canonical, grade, read_answer
from .base import Problem, Verdict, split_on
from .equations import worked_solution
from .records import Unusable, field_value, read_choices, read_records
from .splits import alike_groups, draw_split, same_text


@dataclass(frozen=True)
class Source:
    """One file or hub data set of a task; fields that are not given are the task's."""

    path: str
    split: str | Mapping[str, float] = ""  # the split of all its problems, or shares; empty: the task's shares
    prompt_field: str = ""
    answer_field: str = ""
    id_field: str = ""
    solution_field: str = ""
    equation_field: str = ""
    records_key: str = ""


@dataclass(frozen=True)
class TextTask:
    """Problems from records, whose answers the one grader reads and compares.

    Fields are field expressions (`records.field_value`): "question", "question.stem", "{Body} {Question}", "question|problem".

    A problem's split is drawn from a hash of its text: it depends neither on the order of the data nor on a seed. Equal texts are
    one problem (the first is kept, the others counted in `dropped`), and texts that share `near_duplicates` of their word
    triples are on one side. Where sources share a problem, training loses it to evaluation, and drawn splits to given ones.
    """

    name: str = "text"
    path: str = ""  # one file or hub id; or instead of it
    sources: Mapping[str, Any] = field(default_factory=dict)  # name -> file or hub id, or keys and values of a Source
    prompt_field: str = "question"
    answer_field: str = "answer"
    answer_kind: AnswerKind = "number"
    answer_pattern: str = ""  # regular expression; what its group finds last in the answer field is the answer
    choices_field: str = ""  # for answer_kind choice
    show_choices: bool = True  # write the choices under the question; false if the question already has them
    solution_field: str = ""  # a reference solution, for demonstrations
    equation_field: str = ""  # or an expression of numbers, from which one is worked out, one operation a line
    solution_drop: str = ""  # regular expression of what to leave out of reference solutions
    id_field: str = ""
    records_key: str = ""  # where a JSON file keeps its list of records
    step_separator: str = "\n"
    splits: Mapping[str, float] = field(default_factory=lambda: {"train": 0.7, "dev": 0.1, "test": 0.2})
    near_duplicates: float = (
        0.5  # share of word triples from which two problems stay on one side; 0: only equal ones do
    )
    drop_unusable: bool = False  # leave out and count records without a usable answer, instead of refusing the data
    timeout: float = 5.0  # seconds of processor time that comparing two answers may take

    def __post_init__(self) -> None:
        if self.answer_kind not in get_args(AnswerKind):
            raise ValueError(
                f"answer_kind must be one of {', '.join(get_args(AnswerKind))}, found {self.answer_kind!r}"
            )
        if bool(self.path) == bool(self.sources):
            raise ValueError("give either path (a file or hub id) or sources (name -> file or hub id)")
        if not self.step_separator:
            raise ValueError("step_separator is empty")
        if not 0 <= self.near_duplicates <= 1:
            raise ValueError(f"near_duplicates must lie between 0 and 1, found {self.near_duplicates}")
        if not self.timeout > 0:
            raise ValueError(f"timeout must be more than 0 seconds, found {self.timeout}")
        for name in ("answer_pattern", "solution_drop"):
            try:
                re.compile(getattr(self, name))
            except re.error as error:
                raise ValueError(f"{name} is no regular expression ({error})") from None
        _check_shares(self.splits, "splits")
        for name, source in self._sources.items():
            if not isinstance(source.split, str):
                _check_shares(source.split, f"sources.{name}: split")

    @cached_property
    def _sources(self) -> dict[str, Source]:
        known = [f.name for f in fields(Source)]
        made = {}
        for name, value in ({"": self.path} if self.path else self.sources).items():
            if isinstance(value, (str, Source)):
                made[name] = value if isinstance(value, Source) else Source(value)
                continue
            if not isinstance(value, Mapping):
                raise ValueError(f"sources.{name} must be a file, a hub id or keys and values, found {value!r}")
            for key in value:
                if key not in known:
                    near = difflib.get_close_matches(str(key), known, n=1)
                    hint = f"did you mean {near[0]}?" if near else f"known keys are {', '.join(known)}"
                    raise ValueError(f"sources.{name}: unknown key {key!r}; {hint}")
                if not isinstance(value[key], str) and not (key == "split" and isinstance(value[key], Mapping)):
                    raise ValueError(f"sources.{name}: {key} must be text, found {value[key]!r}")
            if not value.get("path"):
                raise ValueError(f"sources.{name}: path is missing")
            made[name] = Source(**value)
        return made

    # --- problems ------------------------------------------------------------------------------------------------------

    @property
    def split_names(self) -> list[str]:
        """The splits that this task has."""
        names: dict[str, None] = {}
        for source in self._sources.values():
            names |= dict.fromkeys(
                [source.split] if isinstance(source.split, str) and source.split else self._shares(source)
            )
        return list(names)

    def problems(self, split: str) -> list[Problem]:
        """The problems of a split. Raises UserError for an unknown split or unusable data.

        Those of one source keep its order; several sources are mixed by a hash of the ids, so that the first N stand for all.
        """
        if split not in self.split_names:
            near = difflib.get_close_matches(split, self.split_names, n=1)
            hint = f" (did you mean {near[0]}?)" if near else ""
            raise UserError(
                f"task {self.name}: split must be one of {', '.join(self.split_names)}, found {split!r}{hint}"
            )
        found = self._loaded[0].get(split, [])
        if not found:
            raise UserError(
                f"task {self.name}: no problem fell into split {split!r}; the data is too small for its share"
            )
        return list(found)

    @property
    def dropped(self) -> dict[str, int]:
        """How many records were left out, by reason; whoever loads a task prints it."""
        return dict(self._loaded[1])

    @cached_property
    def _loaded(self) -> tuple[dict[str, list[Problem]], Counter[str]]:
        dropped: Counter[str] = Counter()
        records: list[tuple[Source, str, Problem]] = []
        ids: dict[str, str] = {}
        for name, source in self._sources.items():
            for number, (where, record) in enumerate(read_records(source.path, source.records_key or self.records_key)):
                try:
                    problem = self._problem(name, source, number, record, where)
                except Unusable as error:
                    if not self.drop_unusable:
                        raise UserError(
                            f"{error}; drop_unusable: true leaves such records out and counts them"
                        ) from None
                    dropped["without a usable answer"] += 1
                    continue
                if problem.id in ids:
                    raise UserError(f"{where}: the id {problem.id!r} was already given at {ids[problem.id]}")
                ids[problem.id] = where
                records.append((source, same_text(problem.prompt), problem))
        if not records:
            raise UserError(f"task {self.name}: no record has a usable answer")

        keys = list(dict.fromkeys(key for _, key, _ in records))
        groups = dict(zip(keys, alike_groups(keys, self.near_duplicates), strict=True))
        kept: dict[str, tuple[int, str, Problem]] = {}
        for source, key, problem in records:
            fixed = source.split if isinstance(source.split, str) else ""
            split = fixed or draw_split(groups[key], self._shares(source))
            rank = 0 if split == "train" else 2 if fixed else 1
            if key in kept:
                same = canonical(kept[key][2].answer, self.answer_kind) == canonical(problem.answer, self.answer_kind)
                dropped["duplicates" if same else "duplicates with another answer"] += 1
                if rank <= kept[key][0]:
                    continue
                # A problem of an evaluation split is not trained on, and a source that is one whole split stays whole.
                del kept[key]
            kept[key] = (rank, split, problem)
        made: dict[str, list[Problem]] = {}
        for _, split, problem in kept.values():
            made.setdefault(split, []).append(problem)
        if len(self._sources) > 1:
            made = {s: sorted(problems, key=lambda p: fold_seed(0, "order", p.id)) for s, problems in made.items()}
        return made, dropped

    def _shares(self, source: Source) -> Mapping[str, float]:
        return self.splits if isinstance(source.split, str) else source.split

    def _problem(self, name: str, source: Source, number: int, record: Mapping[str, Any], where: str) -> Problem:
        prompt = field_value(source.prompt_field or self.prompt_field, record, where)
        if not isinstance(prompt, str):
            expression = source.prompt_field or self.prompt_field
            raise UserError(f"{where}: field {expression!r} must be text, found {type(prompt).__name__}")
        if not prompt.strip():
            raise Unusable(f"{where}: the prompt is empty")
        answer = self._answer(source, record, where)
        meta: dict[str, Any] = {"source": name} if name else {}
        prompt = prompt.strip()
        if self.choices_field:
            choices, labels = read_choices(field_value(self.choices_field, record, where), where)
            answer = _choice_letter(answer, choices, labels, where)
            meta["choices"] = choices
            if self.show_choices:
                prompt = "\n".join([prompt, *(f"({letter}) {text}" for letter, text in choices.items())])
        if canonical(answer, self.answer_kind) is None:
            raise Unusable(f"{where}: the reference answer {answer[:80]!r} is no answer of kind {self.answer_kind}")
        expression = source.solution_field or self.solution_field
        solution = field_value(expression, record, where) if expression else None
        if solution is not None:
            if not isinstance(solution, str):
                raise UserError(f"{where}: field {expression!r} must be text, found {type(solution).__name__}")
            meta["solution"] = re.sub(self.solution_drop, "", solution) if self.solution_drop else solution
        expression = source.equation_field or self.equation_field
        equation = field_value(expression, record, where) if expression else None
        if solution is None and equation is not None:
            worked = worked_solution(str(equation), answer)
            if worked is not None:
                meta["solution"] = self.step_separator.join(worked)
        expression = source.id_field or self.id_field
        own = field_value(expression, record, where) if expression else None
        return Problem(
            "/".join(filter(None, [self.name, name, f"{number:05d}" if own is None else str(own)])),
            prompt,
            answer,
            meta,
        )

    def _answer(self, source: Source, record: Mapping[str, Any], where: str) -> str:
        expression = source.answer_field or self.answer_field
        value = field_value(expression, record, where)
        if isinstance(value, float) and math.isfinite(value) and value == int(value):
            value = int(value)  # 43.0 means 43, and is shown to people
        if not isinstance(value, (str, int, float)):
            raise UserError(f"{where}: field {expression!r} must be text or a number, found {type(value).__name__}")
        answer = str(value).strip()
        if self.answer_pattern:
            found = list(re.finditer(self.answer_pattern, answer))
            if not found:
                raise Unusable(f"{where}: answer_pattern {self.answer_pattern!r} finds nothing in {answer[-80:]!r}")
            answer = (found[-1][1] if found[-1].re.groups else found[-1][0]).strip()
        if self.answer_kind == "math" and re.search(r"\\(?:boxed|fbox)", answer):
            answer = read_answer(answer, "math") or answer
        if not answer:
            raise Unusable(f"{where}: field {expression!r} is empty")
        return answer

    # --- solutions -----------------------------------------------------------------------------------------------------

    def split_steps(self, text: str) -> list[str]:
        """The non-empty pieces of a solution between separators."""
        return split_on(text, self.step_separator)

    def verify(self, problem: Problem, text: str) -> Verdict:
        """Verdict on the final answer of a text: see `answers.grade`."""
        return grade(problem.answer, text, self.answer_kind, timeout=self.timeout, choices=problem.meta.get("choices"))

    def reference_steps(self, problem: Problem) -> list[str] | None:
        """The steps of the reference solution; None if the records have none."""
        solution = problem.meta.get("solution")
        return self.split_steps(solution) or None if solution else None


def _check_shares(shares: Mapping[str, float], where: str) -> None:
    if not shares or not all(isinstance(s, (int, float)) and 0 <= s <= 1 for s in shares.values()):
        raise ValueError(f"{where} must give each split a share between 0 and 1, found {dict(shares)}")
    if not math.isclose(sum(shares.values()), 1.0, abs_tol=1e-6):
        raise ValueError(f"the shares of {where} must add up to 1, found {dict(shares)}")


def _choice_letter(answer: str, choices: Mapping[str, str], labels: Mapping[str, str], where: str) -> str:
    """The letter that a reference means: a label of the data, a 0-based index, or the text of a choice."""
    label = answer.strip("() .:").upper()
    if label in labels:
        return labels[label]
    if answer.isdecimal() and int(answer) < len(choices):
        return list(choices)[int(answer)]
    for letter, text in choices.items():
        if canonical(text, "text") == canonical(answer, "text"):
            return letter
    raise Unusable(f"{where}: the answer {answer[:80]!r} is none of the choices {', '.join(labels)}")


# --- data sets with a name -----------------------------------------------------------------------------------------------
#
# Each takes files of the published form or hub ids, and any field of TextTask to override. The hub ids are those in common use.


def gsm8k(train: str = "openai/gsm8k:main:train", test: str = "openai/gsm8k:main:test", **overrides: Any) -> TextTask:
    """GSM8K (arXiv:2110.14168): the answer follows "####"; its calculator notes <<48/2=24>> are left out of solutions.

    Splits: its own training problems, of which a hash keeps 5 % for `dev`, and its own test problems.
    """
    preset = {
        "name": "gsm8k",
        "sources": {
            "train": {"path": train, "split": {"train": 0.95, "dev": 0.05}},
            "test": {"path": test, "split": "test"},
        },
        "answer_pattern": r"####[ \t]*(.+)",
        "solution_field": "answer",
        "solution_drop": r"<<[^<>\n]*>>",
    }
    return TextTask(**{**preset, **overrides})


MATH_SUBJECTS = (
    "algebra", "counting_and_probability", "geometry", "intermediate_algebra", "number_theory", "prealgebra", "precalculus",
)  # fmt: skip


def math_problems(path: str = "", **overrides: Any) -> TextTask:
    """MATH (arXiv:2103.03874): the answer is boxed in `solution`, or stands in `final_answer` or `answer`.

    `path` is one file, split by shares; without it the seven subjects come from the hub with their own splits, and a hash
    keeps 5 % of the training problems for `dev`.
    """
    hub = {
        f"{subject}_{split}": {
            "path": f"EleutherAI/hendrycks_math:{subject}:{split}",
            "split": {"train": 0.95, "dev": 0.05} if split == "train" else split,
        }
        for subject in MATH_SUBJECTS
        for split in ("train", "test")
    }
    preset = {
        "name": "math",
        **({"path": path} if path else {} if {"path", "sources"} & set(overrides) else {"sources": hub}),
        "prompt_field": "problem",
        "answer_field": "final_answer|answer|solution",
        "answer_kind": "math",
        "solution_field": "solution|",
        "drop_unusable": True,  # some files of problems and answers have a few empty ones
    }
    return TextTask(**{**preset, **overrides})


def word_problems(
    folder: str = "",
    multiarith: str = "ChilleD/MultiArith::train+test",
    singleeq: str = "allenai/lila:singleq:train+validation+test",
    addsub: str = "allenai/lila:addsub:train+validation+test",
    svamp: str = "ChilleD/SVAMP::train+test",
    unseen: bool = False,
    singleop: str = "allenai/lila:singleop:train+validation+test",
    **overrides: Any,
) -> TextTask:
    """MultiArith, SingleEq, AddSub and SVAMP as one task with shares of its own; each problem's meta names its source.

    With `unseen`, SingleOp is added as the split `unseen`: a set of which nothing is trained on (equal texts stay there alone).

    `folder` holds mawps/{multiarith,singleeq,addsub,singleop}.jsonl (input, target) and svamp/SVAMP.json (Body, Question, Answer);
    without it each may be a file or hub id. An empty one is left out.
    """
    paths = {"multiarith": multiarith, "singleeq": singleeq, "addsub": addsub, "svamp": svamp}
    if folder:
        here = Path(folder)
        paths = {name: str(here / "mawps" / f"{name}.jsonl") for name in ("multiarith", "singleeq", "addsub")}
        paths["svamp"] = str(here / "svamp" / "SVAMP.json")
        singleop = str(here / "mawps" / "singleop.jsonl")
    apart = {"singleop": {"path": singleop, "split": "unseen"}} if unseen else {}
    preset = {
        "name": "word_problems",
        "sources": {**{name: path for name, path in paths.items() if path}, **apart},
        "prompt_field": "{Body!sentence} {Question}|input|question",
        "answer_field": "Answer|target|final_ans|output_answer|answer",
        "equation_field": "Equation|",  # SVAMP has it
    }
    return TextTask(**{**preset, **overrides})


def multiple_choice(path: str = "tau/commonsense_qa", **overrides: Any) -> TextTask:
    """Questions with lettered choices, in the fields of CommonsenseQA, ARC, MathQA or MMLU; on the hub or as published files."""
    preset = {
        "name": "multiple_choice",
        "path": "" if overrides.get("sources") else path,
        "prompt_field": "question.stem|question|problem|Problem|Question",
        "answer_field": "answerKey|correct|gt|answer|Ground_Truth_Answer",
        "answer_kind": "choice",
        "choices_field": "question.choices|choices|options|Options",
        "drop_unusable": True,  # MathQA has references that are none of its choices
    }
    return TextTask(**{**preset, **overrides})
