"""The one answer grader: reads the final answer of a text, brings it into canonical form, compares it with the reference.

Nothing here raises or hangs, whatever a model wrote. Only the end of a text is read, patterns cannot backtrack without bound,
numbers are bounded in digits before they are computed with, and comparison as mathematics runs in a child process that is
ended when its time is over (`guard`).
"""

from __future__ import annotations

import functools
import re
import unicodedata
from collections.abc import Iterator, Mapping
from fractions import Fraction
from typing import Any, Literal

from .base import Outcome, Verdict
from .guard import BrokenOff, Guard, OutOfTime

AnswerKind = Literal["number", "math", "choice", "text"]

TAIL = 6000  # characters at the end of a text that are searched for an answer
LONGEST = 400  # characters of an answer; what is longer is no answer

_INTEGER = r"(?:[0-9]{1,3}(?:,[0-9]{3}){1,20}(?![0-9])|[0-9]{1,200}(?![0-9]))"
_DECIMAL = rf"(?:{_INTEGER}(?:\.[0-9]{{1,200}})?|(?<![0-9])\.[0-9]{{1,200}})"
_POWER = r"(?:[eE][-+]?[0-9]{1,3}(?![0-9])|\s?(?:[x*]|\\times|\\cdot)\s?10\s?\^\s?\{?[-+]?[0-9]{1,3}\}?)"
_OVER = r"(?:\s?/\s?[0-9]{1,200})"
_FRAC = r"\\[dtc]?frac\s?(?:\{\s?-?[0-9]{1,200}\s?\}\s?\{\s?[0-9]{1,200}\s?\}|[0-9]\s?[0-9])"
# A sign after a digit, a letter or a bracket is an operation or a range ("3-5"), not a part of the number.
# A power too high to compute with is read all the same, and then is no number: "1e999999999" must not be taken for 1.
_NUMBER = re.compile(
    rf"(?:(?<![\w.)\]}}%])[-+]\\?[$€£]?)?(?:{_FRAC}|(?<![0-9.])(?:{_DECIMAL}(?:{_POWER}|[eE][-+]?[0-9]{{1,200}})?{_OVER}?))"
)
_BOXED = re.compile(r"\\(?:boxed|fbox)(?=\s{0,2}[{0-9A-Za-z\\-])")
_HASHES = re.compile(r"(?<!#)#{4}[ \t]{0,5}(?=[^#\s])")
_SAYS = re.compile(
    r"\banswers?[*_ ]{0,4}(?:\b(?:is|are|was)\b[*_ ]{0,4}:?|[:=])[*_]{0,4}(?:\s{0,5}\n|[ \t]{0,5})", re.IGNORECASE
)
_ENDING = re.compile(
    r"(?:\b(?:is|are|equals|get)|=|:)\s{0,3}(?:\$([^$\n]{1,200})\$|(-?[0-9][0-9.,/]{0,30}))[.*\s]{0,5}\Z"
)
_PLAIN = str.maketrans(
    {"−": "-", "–": "-", "×": "*", "⋅": "*", "·": "*", "\u00a0": " ", "\u2009": " ", "\u202f": " ", "⁄": "/"}
)


# --- grading -----------------------------------------------------------------------------------------------------------


def grade(
    gold: str, text: str, kind: AnswerKind, *, timeout: float = 5.0, choices: Mapping[str, str] | None = None
) -> Verdict:
    """Verdict on the final answer of `text` against the reference answer `gold`.

    `timeout` bounds the comparison as mathematics, in seconds of processor time; `choices` maps letters to the text of each
    choice, so that an answer may also repeat a choice in words. The verdict's answer is the canonical form of what was read,
    and never depends on `gold`: a vote that grouped right answers with the reference's help would be no vote.
    """
    answer = read_answer(text, kind, choices)
    if answer is None:
        return Verdict(None, Outcome.UNPARSEABLE, "No answer could be read from the text.")
    form = canonical(answer, kind)
    if form is None:
        return Verdict(None, Outcome.UNPARSEABLE, f"{_short(answer)} is no answer of kind {kind}.")
    try:
        same = equal(gold, answer, kind, timeout=timeout)
    except OutOfTime as error:
        return Verdict(form, Outcome.TIMEOUT, f"Comparing {_short(answer)} with {_short(gold)} was stopped: {error}.")
    except BrokenOff as error:
        return Verdict(form, Outcome.TIMEOUT, f"Comparing {_short(answer)} with {_short(gold)} broke off: {error}.")
    if same:
        return Verdict(form, Outcome.RIGHT, f"The answer {_short(answer)} equals the reference {_short(gold)}.")
    return Verdict(form, Outcome.WRONG, f"The answer is {_short(gold)}, found {_short(answer)}.")


def equal(gold: str, answer: str, kind: AnswerKind, *, timeout: float = 5.0) -> bool:
    """Whether two answers count as equal. For `math` it may raise guard.OutOfTime or guard.BrokenOff: nothing is known then.

    Equal canonical forms are equal answers. A reference number that is no integer is met within a millionth of it, and within
    1/1000, since data sets print 2/3 as 0.6666667; an integer is met exactly. The rest of `math` is left to math-verify.
    """
    wanted, form = canonical(gold, kind), canonical(answer, kind)
    if form is None or wanted is None:
        return False
    if form == wanted:
        return True
    if kind not in ("number", "math"):
        return False
    a, b = parse_number(wanted), parse_number(form)
    if a is not None and b is not None:
        return a.denominator != 1 and abs(a - b) <= min(abs(a) / 10**6, Fraction(1, 1000))
    if kind != "math" or _has_words(gold) or _has_words(answer):
        return False  # math-verify drops words: it would call 5 p.m. and 5 a.m. equal
    return _equal_as_mathematics(_latex(gold), _latex(answer), timeout)


def _short(answer: str) -> str:
    answer = " ".join(_clean(answer).split())
    return answer if len(answer) <= 60 else answer[:57] + "..."


def _clean(text: str) -> str:
    # Half a surrogate pair can be decoded from a model's bytes but never be written to a file.
    return text.encode("utf-8", "replace").decode("utf-8")


# --- reading -----------------------------------------------------------------------------------------------------------


def read_answer(text: str, kind: AnswerKind, choices: Mapping[str, str] | None = None) -> str | None:
    r"""The final answer of a text, as written there; None if there is none.

    The last marked answer counts. Marks are, the first kind that is found and holds an answer: `\boxed{...}` or
    `<answer>...</answer>`; `#### ...`; `answer is ...`, `answer: ...`. Without a mark it is, by kind, the last number; the last
    letter in brackets or standing alone; the last line (text); and for `math` what an ending such as "is $3$." or "= 3"
    says, since an expression elsewhere cannot be told from the mathematics around it.
    """
    text = _clean(text[-TAIL:])
    if kind in ("number", "choice"):
        text = text.translate(_PLAIN)
    for marked in _marked(text):
        found = _of_kind(marked, kind, choices)
        if found is not None:
            return found
    if kind == "number":
        return _last(_NUMBER, text)
    if kind == "choice":
        return _last_letter(text, choices)
    if kind == "text":
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        return lines[-1][:LONGEST] if lines else None
    ending = _ENDING.search(text)
    return (ending[1] or ending[2]) if ending else None


def read_block(text: str, lines: int, longest: int) -> str | None:
    """The final answer of a text as `read_answer` finds it for kind `text`, for answers of several lines, such as grids.

    Of more than one line, all that follows an open mark ("Answer:") counts, and without a mark the last `lines` lines. Outer
    white space is kept, since it may belong to a grid. None if there is no answer, or one of over `longest` characters.
    """
    text = _clean(text[-max(TAIL, 2 * longest) :])
    block = next(_marked(text, lines, longest), None)
    if block is None:
        block = "\n".join(text.rstrip().split("\n")[-lines:])
    block = re.sub(r"^\s{0,9}```\w{0,20}\n|\n```\s{0,9}$", "", block).strip("\n")
    return block if block.strip() and len(block) <= longest else None


def _marked(text: str, lines: int = 1, longest: int = LONGEST) -> Iterator[str]:
    """What stands at marks, from the strongest kind of mark to the weakest, and from the last to the first of each kind."""
    closed = list(_boxes(text, longest))
    end = text.rfind("</answer>")
    begin = text.rfind("<answer>", 0, end) if end >= 0 else -1
    if begin >= 0:
        closed.append((begin, text[begin + len("<answer>") : end]))
    yield from (inner for _, inner in sorted(closed, key=lambda found: -found[0]) if inner.strip())
    for pattern in (_HASHES, _SAYS):
        for match in reversed(list(pattern.finditer(text))):
            rest = text[match.end() : match.end() + longest + 1]
            if lines == 1:
                rest = rest.partition("\n")[0]
            if rest.strip():
                yield rest


def _boxes(text: str, longest: int) -> Iterator[tuple[int, str]]:
    """(where, what stands between the braces) of each box whose brace is closed, or the word after a box without braces."""
    boxes = list(_BOXED.finditer(text))
    partners: dict[int, int] = {}
    opened: list[int] = []
    # One pass for all boxes: a text of nothing but opened boxes must not be walked through from each of them.
    for brace in re.finditer(r"\\.|[{}]", text, re.DOTALL) if boxes else ():  # \{ is a set's brace and needs no partner
        if brace[0] == "{":
            opened.append(brace.start())
        elif brace[0] == "}" and opened:
            partners[opened.pop()] = brace.start()
    for box in boxes:
        start = box.end() + len(text[box.end() : box.end() + 3]) - len(text[box.end() : box.end() + 3].lstrip())
        if text[start] == "{":
            if 0 < partners.get(start, 0) - start - 1 <= longest:
                yield box.start(), text[start + 1 : partners[start]]
        elif word := re.match(r"[^\s$,;{}]{1,50}", text[start : start + 50]):
            yield box.start(), word[0]


def _of_kind(marked: str, kind: AnswerKind, choices: Mapping[str, str] | None) -> str | None:
    """What of a marked answer counts: the number of "12 apples." or the letter of "(B), because ..."."""
    marked = marked.strip()
    if kind == "number":
        # "24 - 6 = 18" ends in what was computed; "18 apples in 3 days" begins with it.
        _, equals, after = marked.rpartition("=")
        computed = _NUMBER.search(after) if equals else None
        found = computed or _NUMBER.search(marked)
        return found[0] if found else None
    if kind == "choice":
        return _letter_of(marked, choices)
    stripped = marked.strip("*_ \t")
    if kind == "math":
        # After "the answer is": the formula between dollar signs, if there is one, and not the sentence around it.
        formulas = re.findall(r"\$([^$]{1,400})\$|\\\((.{1,400}?)\\\)", stripped)
        if len(formulas) == 1:
            stripped = formulas[0][0] or formulas[0][1]
    return stripped.rstrip(".").strip() or None


def _last(pattern: re.Pattern[str], text: str) -> str | None:
    found = None
    for match in pattern.finditer(text):
        found = match[0]
    return found


_LETTER_FIRST = re.compile(
    r"[^\w(]{0,5}(?:(?:option|choice)\s{1,3})?(?:\(\s?([A-Ja-j])\s?\)|([A-Ja-j])(?![\w'’]))", re.IGNORECASE
)
_BRACKETED = re.compile(r"\(\s?([A-Ja-j])\s?\)")
_NAMED = re.compile(r"\b(?:option|choice)\s{1,3}([A-Ja-j])\b", re.IGNORECASE)
# "A" and "I" are words: alone they count only where no word follows.
_ALONE = re.compile(r"(?<![\w'’-])([A-J])(?![\w'’])(?!(?<=[AI])\s{1,3}[a-z])")


def _letter_of(marked: str, choices: Mapping[str, str] | None) -> str | None:
    """The letter that a marked answer begins with, or whose choice it repeats, or that stands in it."""
    in_words = canonical(marked, "text")
    for label, choice in (choices or {}).items():
        if in_words is not None and in_words == canonical(choice, "text"):
            return label
    first = _LETTER_FIRST.match(marked)
    if first:
        rest = marked[first.end() :]
        word = first[2] is not None and first[2] in "aAiI" and re.match(r"\s{1,3}[a-z]", rest) is not None
        letter = (first[1] or first[2]).upper()
        if not word and (not choices or letter in choices):
            return letter
    return _last_letter(marked, choices)


def _last_letter(text: str, choices: Mapping[str, str] | None) -> str | None:
    for pattern in (_BRACKETED, _NAMED, _ALONE):
        found = [m[1].upper() for m in pattern.finditer(text) if not choices or m[1].upper() in choices]
        if found:
            return found[-1]
    return None


# --- canonical forms ---------------------------------------------------------------------------------------------------


def canonical(answer: str, kind: AnswerKind) -> str | None:
    r"""The form of an answer that is equal for answers that count as equal in a vote; None for what is no answer of its kind.

    Numbers become exact fractions ("1,200.0" and "1200", "0.5" and "1/2"; signs of currency and percent are dropped), choices
    capitals, text loses case, outer quotes and the width of white space. Mathematics loses what does not change its
    meaning (spaces, \left, \text, dollar signs, degrees, common units, "x =" in front), and what is then a number becomes a
    fraction; it is not simplified, which would need a computer algebra system for each vote.
    """
    text = _clean(answer).strip()
    if len(text) > LONGEST:
        return None
    if kind == "number":
        value = parse_number(text)
        return str(value) if value is not None else None
    if kind == "choice":
        letter = re.fullmatch(r"\W{0,5}([A-Ja-j])\W{0,5}", text)
        return letter[1].upper() if letter else None
    if kind == "math":
        return _canonical_math(text)
    text = (
        " ".join(unicodedata.normalize("NFKC", text).split()).strip("*_ ").rstrip(".").strip().strip("\"'`“”‘’").strip()
    )
    return text.casefold() or None


def parse_number(text: str) -> Fraction | None:
    r"""The exact value of a decimal, a fraction, a power of ten or \frac{a}{b}; None for anything else, however long."""
    text = text.translate(_PLAIN).strip()
    text = text.strip("*_ ").rstrip(".").removesuffix("\\%").rstrip("%").strip()
    text = re.sub(r"^([-+]?)\s?\\?[$€£]\s?([-+]?)", r"\1\2", text).rstrip("$€£ ")
    match = re.fullmatch(rf"([-+]?)\s?(?:({_FRAC})|({_DECIMAL}|[0-9]{{1,200}}\.)({_POWER})?({_OVER})?)", text)
    if match is None:
        return None
    sign, frac, decimal, power, over = match.groups()
    if frac:
        top, bottom = re.findall(r"-?[0-9]+", frac) if "{" in frac else re.findall(r"[0-9]", frac)
        value = Fraction(int(top), int(bottom)) if int(bottom) else None
    else:
        value = Fraction(decimal.replace(",", "").rstrip("."))
        if power:
            # Three digits of exponent at most: 10**999 is a long number, 10**999999999 would be the end of the process.
            value *= Fraction(10) ** int(re.findall(r"[-+]?[0-9]+", power)[-1])
        if over:
            bottom = int(over.replace("/", ""))
            value = value / bottom if bottom else None
    return -value if sign == "-" and value is not None else value


_UNIT = (
    r"(?:square|cubic)?\s?(?:cm|mm|km|m|in|ft|yd|mi|kg|g|mg|lb|s|h|min|inch|inches|foot|feet|yards?|miles?|meters?|centimeters?|"
    r"kilometers?|grams?|pounds?|units?|degrees?|dollars?|cents?|hours?|minutes?|seconds?|days?|weeks?|months?|years?|mph|percent|"
    r"points?|ways|people|students)"
)
_LATEX_UNIT = re.compile(
    rf"(?<=.)(?:\\[ ,;:!]|\s|~)*\\(?:text|mathrm|mbox|textrm)\s?\{{[\s~]*{_UNIT}\.?\s*\}}(?:\^\{{?[23]\}}?)?$"
)
_WRAPPED = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mathit|mbox|operatorname)\s?\{([^{}]{0,200})\}")
_DROPPED = re.compile(
    r"\\left(?![a-z])\.?|\\right(?![a-z])\.?|\\[bB]igg?[lr]?(?![a-z])|\\[!,;:]|(?<!\\)\\ |\\q?quad(?![a-z])|\\displaystyle|"
    r"\^\s?\{?\s?\\circ\s?\}?|\\degree|°|\\?%|\\?\$|\\\(|\\\)|(?<!\\)\\\[|(?<!\\)\\\]|~"
)
_RENAMED = (
    (re.compile(r"\\[dtc]frac(?![a-z])"), r"\\frac"),
    (re.compile(r"\\(?:cdot|times|ast)(?![a-z])"), "*"),
    (re.compile(r"\\leq?(?![a-z])"), r"\\le "),
    (re.compile(r"\\geq?(?![a-z])"), r"\\ge "),
    (re.compile(r"\\neq?(?![a-z])"), r"\\ne "),
    (re.compile(r"\\sqrt\s?([0-9a-z])(?![0-9])"), r"\\sqrt{\1}"),
    (re.compile(r"\\frac\s?([0-9])\s?([0-9])"), r"\\frac{\1}{\2}"),
    (re.compile(r"\\frac\s?\{([^{}]{1,50})\}\s?([0-9])"), r"\\frac{\1}{\2}"),
    (re.compile(r"([\^_])\{([0-9A-Za-z])\}"), r"\1\2"),
)
_MIXED = re.compile(r"(-?)([0-9]{1,50})\\frac\{([0-9]{1,50})\}\{([0-9]{1,50})\}")


def _canonical_math(text: str) -> str | None:
    text = unicodedata.normalize("NFC", text).translate(_PLAIN).replace("π", "\\pi ").replace("√", "\\sqrt").strip()
    text = text.strip("$").strip().rstrip(".").rstrip()
    text = text.replace("{,}", ",").replace(",\\!", ",")
    text = _LATEX_UNIT.sub("", text)
    text = _WRAPPED.sub(r"\1", text)
    text = _DROPPED.sub("", text)
    for pattern, replacement in _RENAMED:
        text = pattern.sub(replacement, text)
    listed = re.search(r",\s", text) is not None  # "1, 234" is a list of two, "1,234" a number
    text = re.sub(r"\s+", "", text)
    text = re.sub(r"^[A-Za-z](?:=|\\in)(?=.)", "", text).strip(".")
    mixed = _MIXED.fullmatch(text)
    if mixed and int(mixed[4]):
        value: Fraction | None = int(mixed[2]) + Fraction(int(mixed[3]), int(mixed[4]))
        return str(-value if mixed[1] and value is not None else value)
    value = None if listed else parse_number(text)
    return str(value) if value is not None else (text or None)


def _has_words(text: str) -> bool:
    r"""Whether \text{...} says something that is neither a unit nor a connective, such as "even" or "a.m."."""
    words = " ".join(_WRAPPED.findall(_LATEX_UNIT.sub("", _clean(text).strip().strip("$").rstrip(". "))))
    return bool(set(re.findall(r"[a-z]{2,}|[a-z](?=\.)", words.lower())) - {"and", "or", "if", "for", "is"})


# --- mathematics -------------------------------------------------------------------------------------------------------


def _latex(text: str) -> str:
    """An answer as math-verify wants it: one formula, whose dollar signs are its delimiters."""
    return _clean(text).strip().replace("\\$", "").replace("$", "")[:LONGEST]


@functools.lru_cache(maxsize=50_000)
def _known_equality(gold: str, answer: str, seconds: float) -> bool | None:
    # None: out of processor time, which another try would be too. What else goes wrong is raised, and so not remembered.
    try:
        return bool(_math_guard.call(gold, answer, seconds=seconds))
    except OutOfTime as error:
        if error.repeatable:
            return None
        raise


def _equal_as_mathematics(gold: str, answer: str, seconds: float) -> bool:
    same = _known_equality(gold, answer, seconds)
    if same is None:
        raise OutOfTime(f"it took longer than {seconds:g} s of processor time", repeatable=True)
    return same


def load_math_verify(_: Any) -> tuple[Any, Any]:
    """math-verify's `parse` and `verify`. Called in the guarded child."""
    from math_verify import parse, verify

    verify(
        parse("$1$", parsing_timeout=None), parse("$2$", parsing_timeout=None), timeout_seconds=None
    )  # loads the rest
    return parse, verify


def compare_as_mathematics(loaded: tuple[Any, Any], gold: str, answer: str) -> bool:
    """Whether math-verify finds two LaTeX answers equal. Called in the guarded child, which keeps the time."""
    parse, verify = loaded
    left = parse(f"${gold}$", parsing_timeout=None)
    right = parse(f"${answer}$", parsing_timeout=None)
    return bool(left and right and verify(left, right, timeout_seconds=None))


_math_guard = Guard(__name__, "load_math_verify", "compare_as_mathematics")
