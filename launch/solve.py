"""`stepladder solve`: one problem, its answer, the vote, the tree and the cost."""

from __future__ import annotations

import json
import shutil
import sys

from ..basics import finite
from .options_solve import Solve
from .solving import Solver
from .tree_text import solved_text


def solve(config: Solve, text: str) -> str:
    """What is printed for a problem: text for people, or one JSON object."""
    solver = Solver(config)
    asked = solver.ask(text, seed=config.seed, reference=config.reference)
    [found], ledger = solver.solve([asked])
    if config.json:
        solution, record = found.solution, found.record
        value = {
            "answer": solution.answer,
            "outcome": record["finals"][found.chosen]["outcome"],
            "text": solution.text,
            "steps": solution.steps,
            "choose": config.choose,
            "settings": config.settings,
            "votes": [
                {"answer": answer, "count": count, "score": score} for answer, (count, score) in found.votes.items()
            ],
            "prompt_tokens": found.prompt_tokens,
            "cost": ledger.to_json(),
            "search": record,
        }
        return json.dumps(finite(value))  # ASCII: model text may hold what this terminal has no bytes for
    encoding = sys.stdout.encoding or "ascii"
    try:
        "├└│�".encode(encoding)
        boxes = True
    except (UnicodeEncodeError, LookupError):
        boxes = False
    shown = solved_text(
        found, ledger.to_json(), choose=config.choose, guided=solver.reward is not None, lines=config.lines,
        width=config.width or shutil.get_terminal_size((100, 24)).columns, boxes=boxes,
    )  # fmt: skip
    return shown.encode(encoding, "replace").decode(encoding)
