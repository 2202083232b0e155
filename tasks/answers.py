"""The one answer grader: read the final answer of a text, bring it into canonical form, compare it with the reference.

Nothing here raises or hangs, whatever a model wrote: texts are cut to their end, patterns cannot backtrack without bound, numbers
are bounded in digits, and symbolic comparison runs in a separate process that is killed when its time is over.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from fractions import Fraction
from typing import Literal

from .base import Outcome, Verdict
from .math_worker import symbolically_equal

AnswerKind = Literal["number", "math", "choice", "text"]

_TAIL = 4000  # characters at the end of a text that are searched for an answer
_LONGEST = 400  # characters of an answer; longer ones are not answers
_NUMBER = re.compile(r"[-+]?(?:\d{1,3}(?:,\d{3}){1,6}(?!\d)|\d{1,40})(?:\.\d{1,40})?(?:[eE][-+]?\d{1,3})?(?:\s{0,2}/\s{0,2}\d{1,20})?")
_SAYS = re.compile(r"(?:final answer|answer)(?:\s{1,3}is)?\s{0,3}[:=]?\s{0,3}([^\n]{1,400})", re.IGNORECASE)
_HASHES = re.compile(r"####\s{0,3}([^\n]{1,400})")
_LETTER = re.compile(r"(?<![A-Za-z])\(?([A-J])\)?(?![A-Za-z'])")


def grade(gold: str, text: str, kind: AnswerKind, *, timeout: float = 5.0) -> Verdict:
    """Verdict on the final answer of `text` against `gold`; see `read_answer` and `canonical` for what counts as equal."""
    answer = read_answer(text, kind)
    form = canonical(answer, kind) if answer is not None else None
    if form is None:
        return Verdict(None, Outcome.UNPARSEABLE, "no answer could be read")
    wanted = canonical(gold, kind)
    if form == wanted or _close(form, wanted):
        return Verdict(form, Outcome.RIGHT)
    if kind == "math":
        same = symbolically_equal(gold, str(answer), timeout)
        if same is None:
            return Verdict(form, Outcome.TIMEOUT, f"comparing with {gold} took longer than {timeout:g} s")
        if same:
            # Equal answers must vote together: the reference's form stands for all of them.
            return Verdict(wanted if wanted is not None else form, Outcome.RIGHT)
    return Verdict(form, Outcome.WRONG, f"the answer is {gold}, found {form}")


def read_answer(text: str, kind: AnswerKind) -> str | None:
    """The final answer in a text, as written; None if there is none.

    In this order: the last \\boxed{...}, the last "#### ...", the last "answer is ..." or "answer: ...", and then, by kind, the
    last number, the last single capital letter, or the last line. For `math` a text without a marked answer has none.
    """
    text = text[-_TAIL:]
    boxed = _last_boxed(text)
    if boxed is not None:
        return boxed if kind in ("math", "text") else _first_of_kind(boxed, kind) or boxed
    for pattern in (_HASHES, _SAYS):
        found = pattern.findall(text)
        if found:
            inner = _first_of_kind(found[-1], kind)
            if inner is not None:
                return inner
    if kind == "number":
        numbers = _NUMBER.findall(text)
        return numbers[-1] if numbers else None
    if kind == "choice":
        letters = _LETTER.findall(text)
        return letters[-1] if letters else None
    if kind == "text":
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        return lines[-1][:_LONGEST] if lines else None
    return None


def _first_of_kind(text: str, kind: AnswerKind) -> str | None:
    """What of a marked answer counts: "12 apples." holds the number 12."""
    if kind == "number":
        # "24 - 6 = 18": what was computed stands last; "18 apples in 3 days" cannot be told apart and takes the first.
        after = text.rsplit("=", 1)[-1]
        found = _NUMBER.search(after) or _NUMBER.search(text)
        return found[0] if found else None
    if kind == "choice":
        letter = _LETTER.search(text)
        return letter[1] if letter else None
    return text.strip().rstrip(".") or None


def _last_boxed(text: str) -> str | None:
    """What stands between the braces of the last \\boxed{...}, with nested braces; None if there is none or it is open."""
    start = max(text.rfind("\\boxed{"), text.rfind("\\fbox{"))
    if start < 0:
        return None
    begin = text.index("{", start) + 1
    depth = 1
    for position in range(begin, min(len(text), begin + _LONGEST)):
        if text[position] == "{":
            depth += 1
        elif text[position] == "}":
            depth -= 1
            if depth == 0:
                return text[begin:position].strip() or None
    return None


def canonical(answer: str | None, kind: AnswerKind) -> str | None:
    """The form of an answer that is equal for answers that count as equal; None for what is no answer of its kind.

    Numbers become exact fractions ("1,200.0" and "1200", "0.5" and "1/2"; currency and percent signs are dropped); letters
    become capitals; mathematics loses what does not change its meaning (spaces, \\left, \\text, dollar signs, units of degrees);
    text is folded in case and white space.
    """
    if answer is None or len(answer) > _LONGEST:
        return None
    text = answer.strip()
    if kind == "number":
        value = _fraction(text)
        return str(value) if value is not None else None
    if kind == "choice":
        letter = _LETTER.search(text.upper())
        return letter[1] if letter else None
    if kind == "math":
        return _canonical_math(text)
    return " ".join(text.split()).rstrip(".").casefold() or None


def _fraction(text: str) -> Fraction | None:
    text = text.strip().strip("$€£%.").replace("\\$", "").replace("\\%", "").replace("$", "").replace(",", "").strip()
    if not re.fullmatch(r"[-+]?\d{1,60}(?:\.\d{0,60})?(?:[eE][-+]?\d{1,3})?(?:\s{0,2}/\s{0,2}\d{1,60})?", text):
        return None
    top, _, bottom = text.partition("/")
    try:
        value = Fraction(top.strip())
        return value / Fraction(bottom.strip()) if bottom else value
    except (ValueError, ZeroDivisionError):
        return None


def _close(form: str, wanted: str | None) -> bool:
    """Whether two canonical numbers differ by rounding of floats alone (relative 1e-6)."""
    if wanted is None:
        return False
    try:
        a, b = Fraction(form), Fraction(wanted)
    except (ValueError, ZeroDivisionError):
        return False
    return abs(a - b) <= Fraction(1, 10**6) * abs(b)


_DROPPED = re.compile(r"\\left|\\right|\\!|\\,|\\;|\\:|\\ |\$|\\displaystyle|\^\{?\\circ\}?|\\%|%|~")
_TEXT = re.compile(r"\\(?:text|mathrm|textbf|mbox)\{([^{}]{0,100})\}")


def _canonical_math(text: str) -> str | None:
    text = _DROPPED.sub("", text.strip().rstrip("."))
    text = _TEXT.sub(r"\1", text)
    text = text.replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac").replace("\\cdot", "*").replace("\\times", "*")
    text = re.sub(r"\\frac\{(-?\d{1,40})\}\{(\d{1,40})\}", r"\1/\2", text)
    text = re.sub(r"\\frac(\d)(\d)", r"\1/\2", text)
    text = re.sub(r"^[a-zA-Z]\s{0,3}=\s{0,3}", "", text)
    text = re.sub(r"\s+", "", text)
    value = _fraction(text)
    return str(value) if value is not None else (text or None)


def letters(count: int) -> Sequence[str]:
    """The letters of `count` choices: A, B, C ..."""
    return [chr(ord("A") + i) for i in range(count)]
