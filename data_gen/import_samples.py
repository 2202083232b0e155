"""Published samples with verdicts, as Solution rows: GSM8K's example model solutions, and 8 samples a problem of MATH."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator

from ..tasks.answers import canonical
from ..tasks.base import split_on
from .imported import Record, prompt_id
from .rows import Solution

_NOTES = re.compile(r"<<[^<>\n]*>>")
_COLUMNS = ("6b_finetuning", "6b_verification", "175b_finetuning", "175b_verification")


def gsm8k_solutions(record: Record) -> Iterator[Solution]:
    """GSM8K's example model solutions (arXiv:2110.14168): one of each of four GPT-3 systems, the answer behind "A:".

    The verdict is the data's `is_correct`. The two `_verification` systems chose theirs among 100 by a verifier. Steps are lines,
    without the calculator's notes <<48/2=24>>; `text` keeps them.
    """
    question = record.take("question", str).strip()
    gold = _after(record.take("ground_truth", str)) or ""
    for sample, column in enumerate(_COLUMNS):
        one = record.take(column, dict)
        if not isinstance(one.get("solution"), str) or not isinstance(one.get("is_correct"), bool):
            raise record.wrong(column, "an object with solution and is_correct", one)
        answer = canonical(_after(one["solution"]) or "", "number")
        outcome = "right" if one["is_correct"] else "wrong" if answer is not None else "unparseable"
        steps = split_on(_NOTES.sub("", one["solution"]), "\n")
        yield Solution(
            problem_id=prompt_id("gsm8k", question), prompt=question, gold=gold, sample=sample, steps=tuple(steps),
            text=one["solution"], answer=answer, outcome=outcome, stop="eos", token_ids=(), step_ends=(), logprob=0.0,
            source=record.source(column, "gsm8k_solutions"),
        )  # fmt: skip


def _after(text: str) -> str | None:
    found = re.findall(r"^\s{0,5}A:(.*)$", text, re.MULTILINE)
    return found[-1].strip() if found else None


def math_best_of_8(record: Record) -> Iterator[Solution]:
    """Qwen2.5-Math's example of 8 samples for each problem of MATH, with verdicts and a reward model's scores.

    `pred` is the answer that was read, `score` the verdict, `pred_score` a logit of the reward model, kept as its sigmoid.
    """
    question, gold = record.take("question", str), record.take("gt", str)
    texts, answers, verdicts = record.texts("code"), record.take("pred", list), record.take("score", list)
    logits = record.values.get("pred_score")
    for name, found in (("pred", answers), ("score", verdicts), ("pred_score", logits)):
        if found is not None and (not isinstance(found, list) or len(found) != len(texts)):
            raise record.wrong(name, f"a list with an entry for each of {len(texts)} samples", found)
    if not all(isinstance(v, bool) for v in verdicts):
        raise record.wrong("score", "true or false for each sample", verdicts)
    for sample, (text, written, right) in enumerate(zip(texts, answers, verdicts, strict=True)):
        answer = canonical(str(written), "math") if written else None
        yield Solution(
            problem_id=f"math_best_of_8/{record.values.get('idx', record.number)}", prompt=question, gold=gold, sample=sample,
            steps=tuple(split_on(text, "\n\n")), text=text, answer=answer,
            outcome="right" if right else "wrong" if answer is not None else "unparseable", stop="eos", token_ids=(),
            step_ends=(), logprob=0.0, source=record.source("Qwen2.5-Math", "math_best_of_8"),
        )  # fmt: skip
    if logits is not None:
        flat = [one[0] if isinstance(one, list) and one else one for one in logits]
        if not all(isinstance(v, (int, float)) and math.isfinite(v) for v in flat):
            raise record.wrong("pred_score", "numbers", logits)
        record.scores = [[1 / (1 + math.exp(-max(-700.0, min(700.0, v))))] for v in flat]
