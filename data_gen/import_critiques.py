"""Published critiques and solutions to be criticised, as Dialogue rows: MathCritique, RealCritic, MR-GSM8K's reasons."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from ..basics import canonical_json
from ..models.corrections import StepVerdict, Wording, read_critique, write_critique
from ..tasks.base import Problem, split_on
from ..tasks.free import FreeText
from .imported import LeftOut, Record, prompt_id
from .rows import Dialogue, Message

_TURNS = re.compile(
    r"(?P<prompt>.*?)\n\nAssistant:(?P<draft>.*?)\s*<\|end_of_text\|>\s*Human:(?P<request>.*?)\n\n(?P<critique>.*)",
    re.DOTALL,
)
_WORDING = Wording()
_GRADER = FreeText()


def math_critique(record: Record) -> Iterator[Dialogue]:
    """MathCritique's refinements (arXiv:2411.16579): problem, draft and critique in `instruction`, the refinement in `output`.

    Rows of kind `refine`, in the data's own words. There is no gold answer: the release kept refinements that ended right, so that
    the refinement's answer is the reference, and a draft is right if its answer equals that. Where no answer can be read from a
    refinement its record is left out.
    """
    found = _TURNS.fullmatch(record.take("instruction", str))
    if found is None:
        raise record.wrong(
            "instruction", "a problem, Assistant: a draft, Human: a critique", record.values["instruction"]
        )
    prompt, draft, critique = (found[name].strip() for name in ("prompt", "draft", "critique"))
    refined = record.take("output", str).strip()
    read = _GRADER.read(refined)
    if read is None:
        raise LeftOut("whose refinement has no answer that can be read")
    problem = Problem(prompt_id("math_critique", prompt), prompt, read[0])
    verdict = _GRADER.verify(problem, draft)
    meta = _meta(problem, f"{record.file}-{record.number}", split_on(draft, "\n"), [verdict.right, True], critique)
    messages = (
        Message("user", prompt), Message("assistant", draft),
        Message("user", f"{found['request'].strip()}\n\n{critique}"), Message("assistant", refined, train=True),
    )  # fmt: skip
    meta |= {"answer": read[0], "refinement": 0}
    yield Dialogue(problem.id, "refine", messages, canonical_json(meta), record.source("unknown", "math_critique"))


def real_critic(record: Record) -> Iterator[Dialogue]:
    """RealCritic (arXiv:2501.14492): a solution to be criticised and corrected, whose answer is right or wrong.

    Rows of kind `draft`, of which nothing trains: they are for evaluation. The verdict is the data's `previous_score`.
    """
    prompt, draft = record.take("question", str).strip(), record.take("reasoning", str).strip()
    score = record.take("previous_score", list)
    if len(score) != 1 or not isinstance(score[0], bool):
        raise record.wrong("previous_score", "a list of one true or false", score)
    problem = Problem(prompt_id(f"real_critic/{record.file}", prompt), prompt, str(record.values.get("gt", "")))
    key = f"{record.file}-{record.values.get('idx', record.number)}-{record.number}"
    meta = _meta(problem, key, split_on(draft, "\n"), list(score), None)
    messages = (Message("user", prompt), Message("assistant", draft))
    source = record.source(str(record.values.get("model", "")), "real_critic")
    yield Dialogue(problem.id, "draft", messages, canonical_json({**meta, "writer": source.policy}), source)


def mr_gsm8k_reasons(record: Record) -> Iterator[Dialogue]:
    """MR-GSM8K's reasons (arXiv:2312.17080): what an annotator wrote about the first wrong step, as a critique up to that step.

    Rows of kind `critique`. Steps before it are called right, and the final answer by the data's own verdict on it.
    """
    steps = record.texts("model_output_steps")
    first = record.take("model_output_solution_first_error_step", int)
    if not 1 <= first <= len(steps):
        raise record.wrong("model_output_solution_first_error_step", f"a whole number from 1 to {len(steps)}", first)
    reason = " ".join(record.take("model_output_solution_first_error_reason", str).split())
    if not reason:
        raise LeftOut("without a reason")
    answer = record.take("model_output_answer_correctness", str).strip().lower()
    if answer not in ("correct", "wrong", "incorrect"):
        raise record.wrong("model_output_answer_correctness", "correct, or wrong or incorrect", answer)
    prompt = record.take("question", str).strip()
    problem = Problem(prompt_id("mr_gsm8k", prompt), prompt, str(record.values.get("ground_truth_answer", "")))
    verdicts = [StepVerdict(step, True) for step in steps[: first - 1]]
    critique = write_critique([*verdicts, StepVerdict(steps[first - 1], False, reason)], answer == "correct")
    key = str(record.values.get("uuid", record.number))
    meta = _meta(problem, key, steps, [answer == "correct"], critique)
    meta |= {"first_error": first - 1, "error_known": True, "writer": "MetaMath-7B"}
    [(role, asked)] = _WORDING.ask_critique(prompt, "\n".join(steps))
    messages = (Message(role, asked), Message("assistant", critique, train=True))
    yield Dialogue(problem.id, "critique", messages, canonical_json(meta), record.source("annotators", "mr_gsm8k"))


def _meta(
    problem: Problem, key: str, draft: Sequence[str], correct: list[bool], critique: str | None
) -> dict[str, Any]:
    """What the rows of data.critiques and data.refinements say of themselves."""
    reading = read_critique(critique or "")
    return {
        "id": f"{problem.id}/{key}", "prompt": problem.prompt, "reference": problem.answer, "draft": list(draft),
        "correct": correct, "source": "RG1", "writer": "unknown", "first_error": None, "error_known": False, "error": "",
        "critique": critique, "wrong": reading.wrong, "says_first_error": reading.first_error,
    }  # fmt: skip
