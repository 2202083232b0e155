"""Scores and verdicts of the models that judge, kept in files so that a killed evaluation does not ask again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..basics import fingerprint, read_json, write_json
from ..data_gen.rows import Solution
from ..models.critic import Critic
from ..models.judges import ErrorFinder, StepScorer
from ..models.ledger import Ledger
from ..models.reward import aggregate
from .evaluate import content_of
from .making import tell_cut_steps

_ASKED_AT_ONCE = 64  # solutions that a critic judges between two writes: what a kill can cost


class Scored:
    """Step scores of Solution rows by each of several models, by the name that the arms give them."""

    def __init__(self, out: Path, name: str, models: Mapping[str, StepScorer]) -> None:
        self.out, self.name, self.models = out, name, models
        self.ledgers: dict[tuple[str, str], Ledger] = {}

    def steps(self, which: str, kind: str, rows: Sequence[Solution]) -> list[list[float]] | None:
        """Step scores of each row by the model `which`; None without that model."""
        model = self.models.get(which)
        if model is None:
            return None
        settings = [model.settings] if isinstance(model, Critic) else []
        key = fingerprint([content_of(model.name), [(r.problem_id, r.sample, r.steps) for r in rows], *settings])
        path = self.out / f"scores-{self.name}-{kind}-{which}.json"
        if path.is_file() and (kept := read_json(path)).get("key") == key:
            self.ledgers[which, kind] = Ledger(**kept["ledger"])
            return kept["scores"]
        before = model.ledger.copy()
        scores = model.score([(row.prompt, row.steps) for row in rows])
        tell_cut_steps(model)
        ledger = self.ledgers[which, kind] = model.ledger - before
        write_json(path, {"key": key, "ledger": ledger.to_json(), "scores": scores})
        return scores

    def totals(self, which: str, kind: str, rows: Sequence[Solution]) -> list[float] | None:
        """One score a row, aggregated as the model's step format advises."""
        steps = self.steps(which, kind, rows)
        if steps is None:
            return None
        how = self.models[which].step_format.aggregation
        return [aggregate(one, how) for one in steps]

    def cost(self, which: str, kind: str) -> Ledger:
        return self.ledgers.get((which, kind), Ledger())


def kept_scores(
    path: Path, key: str, judge: StepScorer, cases: Sequence[tuple[str, Sequence[str]]]
) -> list[list[float]]:
    """Step scores of (problem, steps) cases, from the file `path` if it holds those of `key`."""
    if path.is_file() and (kept := read_json(path)).get("key") == key:
        return kept["scores"]
    scores = judge.score(cases)
    write_json(path, {"key": key, "scores": scores})
    return scores


def kept_votes(
    path: Path, key: str, judge: ErrorFinder, cases: Sequence[tuple[str, Sequence[str]]]
) -> list[list[int | None]]:
    """Votes for the first error of each case; the file is written after every few, and a killed evaluation goes on there."""
    kept: dict[str, Any] = read_json(path) if path.is_file() else {}
    votes: list[list[int | None]] = kept["votes"] if kept.get("key") == key else []
    while len(votes) < len(cases):
        votes += judge.votes(cases[len(votes) : len(votes) + _ASKED_AT_ONCE])
        write_json(path, {"key": key, "votes": votes})
    return votes
