"""The report's search trees: as many as a page has room for, packed small, for its script to draw."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from . import page

ROOM = 1_900_000  # bytes of a whole page that should be easy to mail and to open
LEAST_ROOM = 200_000  # for the trees of a page that is large already
_STATUS = ("kept", "pruned", "finished")


@dataclass
class _Search:
    """One search: the trees that are shown of it, as JSON, and what its records say, read as far as they are needed."""

    left: Iterator[Mapping[str, Any]]
    strategy: str = ""
    trees: list[str] = field(default_factory=list)
    drawn: int = 0  # records with a tree
    records: int = 0

    def next(self) -> Mapping[str, Any] | None:
        """The next record with a tree; None at the end."""
        for record in self.left:
            self.strategy = self.strategy or record["strategy"]
            self.records += 1
            if record["nodes"]:
                self.drawn += 1
                return record
        return None


def trees_section(searches: Mapping[str, Iterable[Mapping[str, Any]]], room: int = ROOM) -> str:
    """The trees of searches, to be opened in the page: name -> records of search.jsonl.

    The searches take turns, so that each shows the same problems, until `room` bytes are full; a tree that does not fit is
    left out. How many are shown is said. The trees travel as JSON, and the page's script writes all text as text.
    """
    packed = {name: _Search(iter(records)) for name, records in searches.items()}
    going = list(packed.values())
    used, least = (
        0,
        0,
    )  # bytes of what is shown, and of the smallest tree so far: with less room nothing is packed any more
    while going:
        for one in tuple(going):
            record = one.next()
            if record is None:
                going.remove(one)
            elif used + least <= room:
                tree = pack(record)
                least = min(least or len(tree), len(tree))
                if used + len(tree) <= room:
                    one.trees.append(tree)
                    used += len(tree)
    packed = {name: one for name, one in packed.items() if one.drawn}
    if not packed:
        return ""
    parts = []
    for name, one in packed.items():
        head = page.embedded({"name": name, "strategy": one.strategy})
        parts.append(f'{head[:-1]},"trees":[{",".join(one.trees)}]}}')
    counts = "; ".join(
        f"{name}: {len(one.trees)} of {one.records} problems"
        + (f" ({one.drawn} have a tree)" if one.drawn < one.records else "")
        for name, one in packed.items()
    )
    button = lambda name, words: f'<button class="{name}" type="button">{words}</button>'
    return (
        '<div class="trees"><div class="controls">'
        '<label>Search <select class="search"></select></label>'
        '<label>Show <select class="filter">'
        '<option value="all">all problems</option>'
        '<option value="right">the chosen is right</option>'
        '<option value="wrong">the chosen is not right</option>'
        '<option value="missed">a right one was found and not chosen</option></select></label>'
        '<label>Problem <select class="problem"></select></label>'
        f'<span class="pair">{button("previous", "← previous")} {button("next", "next →")}</span>'
        '<span class="status" role="status"></span></div>'
        '<p class="hint">Bar and number: the score that guided the search. A pruned step was not gone on from; a '
        "finished solution ends in its answer, with ✓ or ✗ as the verifier found it. The line on the left marks the way to "
        "the solution that was chosen. Keys: up and down move, right and left open and close, * opens what is beside, Home "
        f'and End.</p><p class="hint">Trees shown: {page.text(counts)}.</p>'
        '<div class="prompt"></div>'
        '<div class="wide" tabindex="0" role="region" aria-label="answers"><table class="votes"></table></div>'
        f'<div class="controls">{button("way", "way to the chosen")} {button("open", "open all")} '
        f'{button("close", "close all")} <label><input type="checkbox" class="pruned" checked> show pruned steps</label></div>'
        '<div class="tree"></div>'
        "<noscript><p>The trees need JavaScript; they are in this file as JSON.</p></noscript>"
        f'<script type="application/json" class="searches">[{",".join(parts)}]</script></div>'
    )


def pack(record: Mapping[str, Any]) -> str:
    """A record of search.jsonl as small JSON: steps are numbers into a list of texts, scores have four digits.

    nodes [[parent, steps, score, status, tokens, visits, value]], finals [[node, score, answer, outcome]]; where every score
    is 0, as without a reward model, there are none.
    """
    texts: dict[str, int] = {}
    scored = any(one["score"] for one in (*record["nodes"], *record["finals"]))
    short = lambda value: round(value, 4) if value is not None and math.isfinite(value) else None
    score = lambda value: short(value) if scored else None
    nodes: list[Sequence[Any]] = []
    for node in record["nodes"]:
        steps = [texts.setdefault(step, len(texts)) for step in node["steps"]]
        status = _STATUS.index(node["status"])
        row = [node["parent"], steps, score(node["score"]), status, node["tokens"]]
        if node["visits"]:
            row += [node["visits"], short(node["value"])]
        nodes.append(row)
    value = {
        "id": record["problem_id"],
        "prompt": record["prompt"],
        "gold": record["gold"],
        "chosen": record["chosen"],
        "tokens": record["tokens"],
        "texts": list(texts),
        "nodes": nodes,
        "finals": [[f["node"], score(f["score"]), f["answer"], f["outcome"]] for f in record["finals"]],
    }
    return page.embedded(value)
