"""The report's dialogues that are learnt: turns, what of them trains and what is masked, and what the row says of itself."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from ..data_gen.rows import Dialogue, Message
from . import page

SHOWN = 12  # rows of each source
LONGEST = 20_000  # characters of a row, and of the rows of a source five times that: a page should be easy to mail

_OUTCOMES = {True: '<span class="right">✓ right</span>', False: '<span class="wrong">✗ wrong</span>'}
_SAYS = {True: "calls it wrong", False: "calls it right", None: "cannot be read"}


def dialogues_section(sources: Mapping[str, Sequence[Dialogue]]) -> str:
    """Some rows of each source, folded; drawn evenly from all of its rows, so that they stand for it.

    In a turn that trains the text is marked, and what its masks leave out is struck through.
    """
    parts = [_source(name, rows) for name, rows in sources.items() if rows]
    if not parts:
        return ""
    legend = (
        '<p class="hint">Rows that models learn from, and the critiques behind them. <mark>Marked</mark> text trains, <s>struck '
        "through</s> text is read and masked, all other text is context.</p>"
    )
    return f'<div class="dialogues">{legend}{"".join(parts)}</div>'


def _source(name: str, rows: Sequence[Dialogue]) -> str:
    chosen, size, left_out = [], 0, 0
    for row in evenly(rows, SHOWN):
        length = sum(len(turn.content) for turn in row.messages)
        if length > LONGEST or size + length > 5 * LONGEST:
            left_out += 1
            continue
        size += length
        chosen.append(row)
    kinds = ", ".join(dict.fromkeys(row.kind for row in rows))
    words = f"{len(chosen)} of {len(rows):,} rows ({kinds})"
    if left_out:
        words += f"; {left_out} more are too long to be shown"
    body = "".join(_row(row) for row in chosen)
    return f"<details><summary><b>{page.text(name)}</b>: {page.text(words)}</summary>{body}</details>"


def evenly(rows: Sequence[Any], count: int) -> list[Any]:
    """`count` rows at equal distances, the first among them; all if there are no more."""
    return [rows[i * len(rows) // count] for i in range(count)] if len(rows) > count else list(rows)


def _row(row: Dialogue) -> str:
    meta = json.loads(row.meta) if row.meta else {}
    notes = [page.text(f"{row.kind}, {row.problem_id}")]
    outcomes = meta.get("correct")
    if isinstance(outcomes, list) and outcomes:
        notes.append(" → ".join(_OUTCOMES[bool(right)] for right in outcomes))
    if "wrong" in meta and row.kind == "critique":
        notes.append(f"the critic {_SAYS[meta['wrong']]}")
    if meta.get("first_error") is not None:
        notes.append(f"first error in step {int(meta['first_error']) + 1}")
    for key, words in (("source", "draft"), ("error", "error"), ("mark", "critique"), ("control", "control")):
        if meta.get(key):
            notes.append(f"{words}: {page.text(meta[key])}")
    for key, words in (("reward", "reward"), ("turn", "turn")):
        if isinstance(meta.get(key), (int, float)):
            notes.append(f"{words} {meta[key]:g}")
    if meta.get("mc_rollouts"):
        notes.append(f"{meta['mc_success']:.0%} of {meta['mc_rollouts']} refinements right")
    if row.weight != 1:
        notes.append(f"weight {row.weight:.3g}")
    turns = "".join(_turn(turn) for turn in row.messages)
    return f"<details><summary>{' · '.join(notes)}</summary>{turns}</details>"


def _turn(turn: Message) -> str:
    trains = ", trains" if turn.train else ""
    if turn.train and turn.weight != 1:
        trains += f" with weight {turn.weight:g}"
    return f'<div class="turn"><span class="role">{page.text(turn.role)}{trains}</span><pre>{_text(turn)}</pre></div>'


def _text(turn: Message) -> str:
    if not turn.train:
        return page.text(turn.content)
    masked = [False] * len(turn.content)
    for begin, end in turn.mask_spans:
        masked[max(begin, 0) : end] = [True] * len(masked[max(begin, 0) : end])
    parts, place = [], 0
    while place < len(masked):
        end = next((i for i in range(place, len(masked)) if masked[i] != masked[place]), len(masked))
        tag = "s" if masked[place] else "mark"
        parts.append(f"<{tag}>{page.text(turn.content[place:end])}</{tag}>")
        place = end
    return "".join(parts)
