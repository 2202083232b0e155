"""Pieces of HTML that the report's sections are made of."""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from typing import Any

from .tables import Record, show


def text(value: Any) -> str:
    """What stands for any value between tags and in attributes."""
    return html.escape(str(value))


def figure(title: str, body: str, words: str) -> str:
    """A drawing with its heading and its words."""
    head = f"<h3>{text(title)}</h3>" if title else ""
    return f"<figure>{head}{body}<figcaption>{text(words)}</figcaption></figure>"


def table(
    title: str, groups: Sequence[tuple[str, Sequence[str]]], rows: Sequence[Sequence[str]], caption: str = ""
) -> str:
    """A table of HTML cells whose first is the row's head; columns come in named groups."""
    names = [name for _, columns in groups for name in columns]
    starts = {sum(len(columns) for _, columns in groups[:g]) for g in range(len(groups))} - {0}
    mark = lambda i: ' class="start"' if i in starts else ""
    above = ""
    if any(group for group, _ in groups):
        tops = "".join(f'<th class="start" scope="colgroup" colspan="{len(c)}">{text(g)}</th>' for g, c in groups)
        above = f"<tr><td></td>{tops}</tr>"
    heads = "".join(f'<th scope="col"{mark(i)}>{text(name)}</th>' for i, name in enumerate(names))
    lines = "".join(
        f'<tr><th scope="row">{row[0]}</th>'
        + "".join(f"<td{mark(i)}>{cell}</td>" for i, cell in enumerate(row[1:]))
        + "</tr>"
        for row in rows
    )
    words = f'<p class="hint">{text(caption)}</p>' if caption else ""
    head = f"<h3>{text(title)}</h3>" if title else ""
    # Whoever has no mouse scrolls a wide table with the keyboard, so it must take the focus.
    region = f'<div class="wide" tabindex="0" role="region" aria-label="{text(title or "table")}">'
    return f"{head}{region}<table><thead>{above}<tr><td></td>{heads}</tr></thead><tbody>{lines}</tbody></table></div>{words}"


def cell(record: Record | None, difference: bool = False) -> str:
    """A record's value and interval; a difference whose interval leaves out 0 stands in bold."""
    value, _, interval = show(record).partition(" ")
    small = f"<small>{interval}</small>" if interval else ""
    if difference and record and record["ci"] and not record["ci"][0] <= 0 <= record["ci"][1]:
        value = f"<b>{value}</b>"
    return value + small


def embedded(value: Any) -> str:
    """JSON to stand in a script element."""
    # Only "<" could end the element early; ASCII keeps half surrogate pairs whole.
    return json.dumps(value, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
