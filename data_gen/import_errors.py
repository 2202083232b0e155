"""Data in which people marked the first wrong step: ProcessBench, PRMBench, MR-GSM8K, MR-Ben, BIG-Bench Mistake.

Rows count steps from 0. Behind the first wrong step nothing is known, except in PRMBench.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Sequence

from .imported import UNKNOWN, LeftOut, Record, labelled, process_bench_record
from .rows import StepLabels


def processbench(record: Record) -> Iterator[StepLabels]:
    """ProcessBench (arXiv:2412.06559): `label` counts from 0, -1 says that no step is wrong."""
    one = process_bench_record(dict(record.values), record.where)
    if not one["steps"]:
        raise LeftOut("without a step")
    right = one.get("final_answer_correct")
    yield labelled(
        record,
        problem_id=str(one.get("id", f"{record.file}-{record.number}")),
        prompt=one["problem"],
        steps=one["steps"],
        wrong=[] if one["label"] == -1 else [one["label"]],
        outcome=UNKNOWN if right is None else "right" if right else "wrong",
        policy=str(one.get("generator") or ""),
        task="processbench",
    )


def prmbench(record: Record) -> Iterator[StepLabels]:
    """PRMBench (arXiv:2501.03124): a solution of PRM800K with planted errors; `error_steps` count from 1, all others are right.

    The unchanged solution is a row of the class `correct`; it is taken from the records of the class `redundency` (sic) alone, as
    in the released evaluation, since all classes share it. `problem_id` is prmbench/CLASS/IDX.
    """
    kind, idx = record.take("classification", str), str(record.values.get("idx", record.number))
    steps, wrong = record.texts("modified_process"), record.take("error_steps", list)
    if not all(type(step) is int and step >= 1 for step in wrong):
        raise record.wrong("error_steps", "whole numbers from 1", wrong)
    if kind == "redundency":
        yield labelled(
            record,
            problem_id=f"prmbench/correct/{idx}",
            prompt=record.take("original_question", str),
            steps=record.texts("original_process"),
            wrong=[],
            outcome=UNKNOWN,
            policy="prm800k",
            task="prmbench",
            all_known=True,
        )
    if not wrong and kind != "multi_solutions":
        record.dropped["without a wrong step"] += 1
        return
    if wrong and max(wrong) > len(steps):
        record.dropped["with a wrong step behind the last"] += 1
        return
    yield labelled(
        record,
        problem_id=f"prmbench/{kind}/{idx}",
        prompt=record.take("modified_question", str),
        steps=steps,
        wrong=[step - 1 for step in wrong],
        outcome=UNKNOWN,
        policy="prm800k, changed by a model",
        task="prmbench",
        all_known=True,
    )


def mr_gsm8k(record: Record) -> Iterator[StepLabels]:
    """MR-GSM8K (arXiv:2312.17080), as released (first errors count from 1) or in ProcessBench's fields (from 0)."""
    if "label" in record.values:
        for row in processbench(record):
            yield _renamed(row, f"mr_gsm8k/{record.values.get('id', record.number)}", "mr_gsm8k")
        return
    steps = record.texts("model_output_steps")
    sound = _verdict(record, "model_output_solution_correctness")
    answer = _verdict(record, "model_output_answer_correctness")
    wrong: list[int] = []
    if not sound:
        wrong = [_from_one(record, "model_output_solution_first_error_step", len(steps))]
    yield labelled(
        record,
        problem_id=f"mr_gsm8k/{record.values.get('uuid', record.number)}",
        prompt=record.take("question", str),
        gold=str(record.values.get("ground_truth_answer", "")),
        steps=steps,
        wrong=wrong,
        outcome="right" if answer else "wrong",
        policy="MetaMath-7B",
        task="mr_gsm8k",
    )


def mr_ben(record: Record) -> Iterator[StepLabels]:
    """MR-Ben (arXiv:2406.13975): first errors count from 1, "N/A" for sound solutions; of code, a line is given instead.

    Blank steps between steps are left out and the index moves along. The outcome is read from a last step "Solution: Choice_X".
    """
    subject = record.take("Subject", str)
    sound = _verdict(record, "Model_Solution_Correctness")
    marked = record.take("Model_Solution_First_Error_Step", str)
    written = record.values.get("Model_Solution_Steps")
    code = isinstance(written, str)
    lines = written.split("\n") if isinstance(written, str) else record.texts("Model_Solution_Steps")
    kept = [i for i, line in enumerate(lines) if line.strip()]
    if not kept:
        raise LeftOut("without a step")
    wrong: list[int] = []
    if not sound:
        at = _line_of(lines, marked) if code else _from_one(record, "Model_Solution_First_Error_Step", len(lines))
        if at not in kept:
            raise LeftOut("whose first wrong step is blank")
        wrong = [kept.index(at)]
    steps = [lines[i].rstrip() if code else lines[i].strip() for i in kept]
    question, options = record.take("Question", str), record.values.get("Options")
    yield labelled(
        record,
        problem_id=f"mr_ben/{subject}/{record.values.get('Question_UUID', record.number)}",
        prompt=f"{question}\n{options}" if options else question,
        gold=str(record.values.get("Ground_Truth_Answer_Modified") or record.values.get("Ground_Truth_Answer") or ""),
        steps=steps,
        wrong=wrong,
        outcome=_choice_outcome(record, steps[-1]),
        policy=str(record.values.get("Sampled_Model") or ""),
        task="mr_ben",
        sample=record.number,  # three models answer each question
    )


def big_bench_mistake(record: Record) -> Iterator[StepLabels]:
    """BIG-Bench Mistake (arXiv:2311.08516): `mistake_index` counts from 0, null says that no step is wrong."""
    steps = record.texts("steps")
    mistake = record.values.get("mistake_index")
    if mistake is not None and not (type(mistake) is int and 0 <= mistake < len(steps)):
        raise record.wrong("mistake_index", f"null or a whole number from 0 to {len(steps) - 1}", mistake)
    answer, target = record.values.get("answer"), record.take("target", str)
    yield labelled(
        record,
        problem_id=f"big_bench_mistake/{record.file}/{record.number:05d}",
        prompt=record.take("input", str),
        gold=target,
        steps=steps,
        wrong=[] if mistake is None else [mistake],
        outcome="unparseable" if answer is None else "right" if answer == target else "wrong",
        policy="PaLM 2-L",
        task="big_bench_mistake",
    )


def _renamed(row: StepLabels, problem_id: str, task: str) -> StepLabels:
    return dataclasses.replace(row, problem_id=problem_id, source=dataclasses.replace(row.source, task=task))


def _verdict(record: Record, name: str) -> bool:
    """A field that says correct, or wrong or incorrect."""
    said = record.take(name, str).strip().lower()
    if said not in ("correct", "wrong", "incorrect"):
        raise record.wrong(name, "correct, or wrong or incorrect", said)
    return said == "correct"


def _from_one(record: Record, name: str, steps: int) -> int:
    """The 0-based index in a field that counts from 1, as a number or as text."""
    found = record.values.get(name)
    number = int(found) if isinstance(found, str) and re.fullmatch(r"[0-9]{1,6}", found.strip()) else found
    if type(number) is not int or not 1 <= number <= steps:
        raise record.wrong(name, f"a whole number from 1 to {steps}", found)
    return number - 1


def _line_of(lines: Sequence[str], marked: str) -> int:
    """The index of the line of code that is marked. Raises LeftOut if there is none or if several are the same."""
    for same in (lambda line: line == marked, lambda line: line.strip() == marked.strip()):
        at = [i for i, line in enumerate(lines) if line.strip() and same(line)]
        if len(at) == 1:
            return at[0]
    raise LeftOut("whose first wrong line is in doubt")


def _choice_outcome(record: Record, last: str) -> str:
    chosen = re.search(r"Choice_([A-J])\b", last)
    gold = record.values.get("Ground_Truth_Answer_Modified") or record.values.get("Ground_Truth_Answer")
    if not chosen or not isinstance(gold, str) or not gold.strip():
        return UNKNOWN
    return "right" if chosen[1] == gold.strip() else "wrong"
