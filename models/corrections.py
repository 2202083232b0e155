"""What is said in corrections: how a critique and another attempt are asked for, and how a critique is written and read.

A critique goes through a solution step by step and ends with a verdict on the answer (the format of arXiv:2411.16579):

    Step: 3 + 5 = 1
    Verdict: Correct
    Step: 1 * 2 = 3
    Verdict: Wrong
    Explanation: expected 1 * 2 = 2
    Final answer verdict: Wrong

The lab writes the same words, one token each, and no explanation where nothing is wrong.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

CRITIQUE = """Here is a problem and a solution, one step a line.

Problem:
{prompt}

Solution:
{draft}

Go through the solution step by step. For each step write three lines: "Step: " and the step, "Verdict: " and Correct or Wrong, \
"Explanation: " and why. End with a line "Final answer verdict: " and Correct or Wrong. Do not give the answer of the problem."""
REFINE = """Here is a step-by-step critique of your solution:

{critique}

Use it, and write a new complete solution with all steps."""
RETRY = """There may be an error in the solution above. Find it if there is one, and write the whole solution again.

{prompt}"""
# Self-Refine's feedback and Reflexion's reflection in our own words.
FEEDBACK = """{prompt}

A solution:
{draft}

Check the solution. Say what exactly should be changed, or write "Final answer verdict: Correct" if nothing should."""
REFLECT = """{prompt}

An attempt, whose answer is known to be wrong:
{draft}

In two sentences: what went wrong, and what should be done differently the next time? Do not solve the problem."""
REMEMBER = """{prompt}

Lessons from earlier attempts that failed:
{critique}"""
_LAB = {
    "critique": "{prompt}Draft: \n {draft} \n Critique: \n ",
    "refine": "Critique: \n {critique} \n Retry: \n ",
    "retry": "Retry: \n {prompt}",
}
_KNOWN = {
    "text": {"critique": CRITIQUE, "refine": REFINE, "retry": RETRY},
    "lab": _LAB,
    "self_refine": {"critique": FEEDBACK, "refine": REFINE, "retry": RETRY},
    "reflexion": {"critique": REFLECT, "refine": REMEMBER, "retry": RETRY},
}

Turn = tuple[str, str]  # (role, content)
BAD = "[BAD]"  # stands before the first wrong step of a draft that a local refiner gets (arXiv:2402.10963)


@dataclass(frozen=True)
class Wording:
    """The texts that ask for a critique ({prompt}, {draft}), for a refinement by it ({critique}), and for another attempt."""

    critique: str = CRITIQUE
    refine: str = REFINE
    retry: str = RETRY
    # Reflexion: a new attempt sees the problem and what was said about earlier ones, in one turn, and not the attempts.
    forgetful: bool = False

    @classmethod
    def named(cls, kind: str, **own: str) -> Wording:
        """The wording text, lab, self_refine or reflexion, with texts of one's own in place of those that are not empty."""
        if kind not in _KNOWN:
            raise ValueError(f"wording must be one of {', '.join(_KNOWN)}, found {kind!r}")
        texts = {**_KNOWN[kind], **{name: text for name, text in own.items() if text}}
        forgetful = kind == "reflexion"
        needed = {"critique": ("{prompt}", "{draft}"), "refine": ("{critique}",) + ("{prompt}",) * forgetful}
        for name, parts in needed.items():
            for part in parts:
                if part not in texts[name]:
                    raise ValueError(f"{name}_prompt must contain {part}, found {texts[name]!r:.80}")
        return cls(**texts, forgetful=forgetful)

    def ask_critique(self, prompt: str, draft: str) -> list[Turn]:
        """The question put to a critic."""
        return [("user", fill(self.critique, prompt=prompt, draft=draft))]

    def ask_attempt(
        self, prompt: str, attempts: Sequence[str], critiques: Sequence[str | None], shown: int = 1
    ) -> list[Turn]:
        """What is put to the policy before its next attempt: the problem, and the last `shown` attempts with what was said of them.

        `critiques[i]` is about `attempts[i]`; None is a plain request to try again. With `shown` 0 all are shown.
        """
        pairs = list(zip(attempts, critiques, strict=True))
        pairs = pairs[-shown:] if shown else pairs
        if self.forgetful:
            said = "\n".join(critique for _, critique in pairs if critique)
            return [("user", fill(self.refine, prompt=prompt, critique=said) if said else prompt)]
        turns: list[Turn] = [("user", prompt)]
        for attempt, critique in pairs:
            text = self.retry if critique is None else self.refine
            turns += [("assistant", attempt), ("user", fill(text, prompt=prompt, critique=critique or ""))]
        return turns


def fill(template: str, **parts: str) -> str:
    """The template with {name} replaced by each part, in one pass: a problem may well contain {draft}."""
    return re.sub(r"\{(\w+)\}", lambda match: parts.get(match[1], match[0]), template)


def mark_step(steps: Sequence[str], error: int, separator: str) -> str:
    """The text of a draft with `BAD` before step `error` (from 0). Raises ValueError if there is no such step."""
    if not 0 <= error < len(steps):
        raise ValueError(f"step {error} is none of {len(steps)} steps")
    return separator.join([*steps[:error], f"{BAD} {steps[error]}", *steps[error + 1 :]])


# --- critiques as text ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StepVerdict:
    """What a critique says of one step."""

    step: str
    right: bool
    explanation: str = ""


@dataclass(frozen=True)
class Reading:
    """What a critique says: of each step it goes through, and of the answer (None if it does not say)."""

    steps: tuple[bool, ...]
    answer: bool | None

    @property
    def wrong(self) -> bool | None:
        """Whether the critique calls the solution wrong; None if nothing can be read.

        The verdict on the answer decides, else a step that is called wrong.
        """
        if self.answer is not None:
            return not self.answer
        return (False in self.steps) if self.steps else None

    @property
    def first_error(self) -> int | None:
        """0-based index of the first step that is called wrong."""
        return self.steps.index(False) if False in self.steps else None


def write_critique(verdicts: Sequence[StepVerdict], answer_right: bool | None, *, reason_first: bool = False) -> str:
    """The text of a critique; with `reason_first` each explanation stands before its verdict, which then follows from it.

    Without a verdict on the answer (None) it is left to the steps, as `Reading.wrong` has it.
    """
    lines = []
    for one in verdicts:
        verdict = f"Verdict: {'Correct' if one.right else 'Wrong'}"
        why = [f"Explanation: {one.explanation}"] * bool(one.explanation)
        lines += [f"Step: {' '.join(one.step.split())}", *([*why, verdict] if reason_first else [verdict, *why])]
    if answer_right is not None:
        lines.append(f"Final answer verdict: {'Correct' if answer_right else 'Wrong'}")
    return "\n".join(lines)


_VERDICT = re.compile(
    r"^[ \t*]{0,8}(?P<what>final answer verdict|correctness of the final answer|verdict|correctness of the step)[*]{0,2}\s{0,3}:"
    r"[ \t*]{0,8}(?P<word>correct|right|wrong|incorrect)\b",
    re.IGNORECASE | re.MULTILINE,
)


def read_critique(text: str) -> Reading:
    """What a critique says, in our words or in those of MathCritique's data ("Correctness of the step: ..."); the last verdict
    on the answer counts."""
    steps: list[bool] = []
    answer: bool | None = None
    for match in _VERDICT.finditer(text):
        right = match["word"].lower() in ("correct", "right")
        if "final" in match["what"].lower():
            answer = right
        else:
            steps.append(right)
    return Reading(tuple(steps), answer)


_SENTENCE = re.compile(r"(?<=[.!?;])\s+")


def strip_leaks(critique: str, answer: str, shown: str) -> tuple[str, int]:
    """(the critique without sentences that give the reference answer away; how many were cut).

    A sentence gives it away if it says "answer" before it, or if it holds the answer as a word of its own and the answer
    stands nowhere
    in `shown` (problem and draft); an answer of one character stands anywhere by chance, so that only the first counts.
    Lines that repeat a step of the draft are left alone. A label without a text goes too.
    """
    if not answer.strip():
        return critique, 0
    word = rf"(?<![\w.]){re.escape(answer.strip())}(?!\w|\.\d)"
    hidden = len(answer.strip()) > 1 and not re.search(word, shown)
    told = re.compile(word if hidden else rf"answer\b[^.\n]{{0,40}}?{word}", re.IGNORECASE)
    lines, cut = [], 0
    for line in critique.split("\n"):
        label, colon, rest = line.partition(":")
        if label.strip().lower() in ("step", "step sentence") or not told.search(line):
            lines.append(line)
            continue
        head, body = (
            (f"{label}{colon} ", rest.strip()) if colon and label.strip().lower() == "explanation" else ("", line)
        )
        kept = [sentence for sentence in _SENTENCE.split(body) if not told.search(sentence)]
        cut += len(_SENTENCE.split(body)) - len(kept)
        if kept:
            lines.append(head + " ".join(kept))
    return "\n".join(lines), cut


def leaks(critique: str, answer: str, shown: str) -> bool:
    """Whether a critique gives the reference answer away."""
    return strip_leaks(critique, answer, shown)[1] > 0
