"""A search and its tree as text for a terminal."""

from __future__ import annotations

import math
import textwrap
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

from .solving import Solved
from .tables import short

MARKS = {"chosen": "*", "finished": "=", "kept": "+", "pruned": "-"}
LEGEND = "* chosen, = finished, + kept, - pruned"
_BARS = {True: ("├─ ", "└─ ", "│  ", "   "), False: ("|- ", "`- ", "|  ", "   ")}


def solved_text(
    solved: Solved, cost: Mapping[str, Any], *, choose: str, guided: bool, lines: int, width: int, boxes: bool = True
) -> str:
    """The chosen answer, the vote, the tree and what all cost. `guided`: there are scores; `boxes`: lines may be drawn."""
    record, solution = solved.record, solved.solution
    reference = bool(record["gold"])
    told = f", {solution.outcome} (the reference is {plain(record['gold'])})" if reference else ""
    parts = [f"answer: {plain(solution.answer or 'none could be read')}{told}"]
    finals = len(record["finals"])
    how = {"best": "the search's own choice", "weighted": "weighted vote", "majority": "majority vote"}[choose]
    ties = ""
    if choose != "best" and solved.votes:
        by = [weight if choose == "weighted" else count for count, weight in solved.votes.values()]
        tied = sum(math.isclose(by[0], other, rel_tol=1e-9, abs_tol=1e-12) for other in by[1:])
        ties = f" (a tie of {tied + 1} answers: the one that came first)" if tied else ""
    parts.append(f"chosen: solution {solved.chosen + 1} of {finals}, by {how}{ties}")
    parts += ["", *(f"  {plain(step)}" for step in solution.steps)]
    parts += ["", "vote:"]
    size = min(30, max([len(plain(answer)) for answer in solved.votes], default=0))
    for answer, (count, weight) in solved.votes.items():
        scores = f"  sum of scores {weight:.2f}" if guided else ""
        parts.append(f"  {cut(plain(answer), size).ljust(size)}  {count} of {finals}{scores}")
    if unread := finals - sum(count for count, _ in solved.votes.values()):
        parts.append(f"  ({unread} without a readable answer)")
    if lines:
        parts += ["", *_wrapped(f"tree ({_legend(record, guided)}):", width)]
        parts += [plain(record["prompt"]).strip(), *tree_lines(record, lines, boxes)]
    spent = (
        f"cost: {cost['generated_tokens']:,} tokens sampled, {cost['prefilled_tokens']:,} prefilled, "
        f"{cost['reward_tokens']:,} read by the reward model; {short(cost['flops'])} FLOPs; {cost['seconds']:.2f} s"
    )
    parts += ["", *_wrapped(spent, width)]
    return "\n".join(cut(line, width) for line in parts)


def _legend(record: Mapping[str, Any], guided: bool) -> str:
    words = LEGEND + ("; the number is the score that guided the search" if guided else "")
    return words + ("; n visits, Q their mean value" if any(node["visits"] for node in record["nodes"]) else "")


def _wrapped(text: str, width: int) -> list[str]:
    return textwrap.wrap(text, max(width, 20), subsequent_indent="  ")


def tree_lines(record: Mapping[str, Any], most: int = -1, boxes: bool = True) -> list[str]:
    """The tree of a record of search.jsonl, a line a step, in at most `most` lines (-1: all).

    What a node adds beyond its first step stands below it. A tree that is too long loses its pruned nodes, which are counted
    where they were, then all but the way to the chosen solution, and then its end.
    """
    nodes = record["nodes"]
    children: list[list[int]] = [[] for _ in nodes]
    for index, node in enumerate(nodes):
        if node["parent"] >= 0:
            children[node["parent"]].append(index)
    finals = {final["node"]: final for final in reversed(record["finals"])}
    chosen = record["finals"][record["chosen"]]["node"]
    path = {chosen}
    while (parent := nodes[min(path)]["parent"]) >= 0:  # parents come before their children
        path.add(parent)
    keeps = (
        lambda index: True,
        lambda index: nodes[index]["status"] != "pruned" or index in path,
        lambda index: index in path,
    )
    lines: list[str] = []
    for keep in keeps:
        lines = _draw(nodes, children, finals, chosen, keep, _BARS[boxes])
        if most < 0 or len(lines) <= most:
            return lines
    return [*lines[: most - 1], f"... {len(lines) - most + 1} more lines"]


def _draw(
    nodes: Sequence[Any], children: Sequence[Sequence[int]], finals: Mapping[int, Any], chosen: int, keep: Any,
    bars: tuple[str, str, str, str],
) -> list[str]:  # fmt: skip
    tee, corner, through, blank = bars
    lines: list[str] = []
    # (node, or the number of nodes left out, what stands before its line, whether it is the last child)
    stack: list[tuple[int | None, int, str, bool]] = []

    def push(index: int, before: str) -> None:
        shown = [child for child in children[index] if keep(child)]
        left = len(children[index]) - len(shown)
        rows: list[tuple[int | None, int]] = [(child, 0) for child in shown] + ([(None, left)] if left else [])
        stack.extend(
            (child, n, before, place == len(rows) - 1) for place, (child, n) in reversed(list(enumerate(rows)))
        )

    push(0, "")
    while stack:
        index, left, before, last = stack.pop()
        joint, under = before + (corner if last else tee), before + (blank if last else through)
        if index is None:
            lines.append(f"{joint}... {left} more")
            continue
        node = nodes[index]
        mark = MARKS["chosen" if index == chosen else node["status"]]
        score = f"{node['score']:.2f} " if node["score"] is not None else ""
        final = finals.get(index)
        visits = f"  (n {node['visits']}, Q {node['value']:.2f})" if node["visits"] else ""
        verdict = f"  -> {plain(final['answer'] or 'no answer')}" if final else ""
        verdict += f" {final['outcome']}" if final and final["outcome"] else ""
        steps = [plain(step).strip() for step in node["steps"]] or ["(end)"]
        lines.append(f"{joint}{mark} {score}{steps[0]}" + (verdict if len(steps) == 1 else "") + visits)
        # Children hang below all steps of their parent.
        bar = through if any(keep(child) for child in children[index]) else blank
        for place, step in enumerate(steps[1:], 2):
            lines.append(f"{under}{bar}{step}" + (verdict if place == len(steps) else ""))
        push(index, under)
    return lines


def plain(text: str) -> str:
    """Text on one line in which nothing steers a terminal."""
    shown = (c if unicodedata.category(c)[0] != "C" else " " if c in "\n\t" else "�" for c in text)
    return "".join(shown)


def cut(text: str, width: int) -> str:
    """The text, cut to so many columns; wide characters take two."""
    if len(text) * 2 <= width:
        return text
    used, columns = 0, [2 if unicodedata.east_asian_width(c) in "WF" else not unicodedata.combining(c) for c in text]
    if sum(columns) <= width:
        return text
    for place, size in enumerate(columns):
        used += size
        if used > width - 3:
            return text[:place] + "..."[: max(width, 0)]
    return text
