"""The stage that measures corrections: accuracy turn by turn, flips, votes, edits, and what critics find."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..basics import UserError, read_json
from ..data_gen.inline import measure_inline
from ..data_gen.rows import Dialogue, Solution
from ..data_gen.searched import SEARCH_FILE, read_searches
from ..data_gen.store import read_about, read_rows
from ..data_gen.trajectories import (
    Chain,
    chains_of_dialogues,
    chains_of_refinements,
    chains_of_search,
    chains_of_solutions,
)
from ..models.correction_metrics import (
    at_turn,
    detection,
    edit_ratio,
    flips,
    gated_gain,
    location,
    majority_answer,
)
from ..models.ledger import Ledger
from ..search.choose import paired_bootstrap
from ..tasks.base import Problem, StepChecker, Task
from ..tasks.load import load_task
from . import options_corrections as options
from .evaluate import bootstrap_groups, record, values_of, write_results
from .making import _split
from .making_search import ABOUT_FILE


def evaluate_corrections(config: options.EvaluateCorrections, out: Path) -> None:
    """Writes results.json with every number that the rows of a source allow, and values.json problem by problem."""
    if not config.sources:
        raise UserError(
            "sources is missing: name -> rows, the folder of a search, or a list of Solution rows turn by turn"
        )
    task = load_task(config.task)
    problems = {problem.id: problem for problem in _split(task, config.split)} if _needs_task(config) else {}
    records: list[dict[str, Any]] = []
    values: list[dict[str, Any]] = []
    shown: list[dict[str, Any]] = []
    for name, source, chains, ledger in _arms(config.sources, task, problems):
        for metric, (ids, per_chain) in means(chains, _planned(source)).items():
            one = values_of(name, metric, ids, per_chain)
            interval = paired_bootstrap(list(one["values"].values()), seed=config.seed)
            records.append(record(name, metric, interval, len(one["values"]), config.seed, ledger))
            values.append(one)
        for metric, (count, interval) in _shares(chains, config.seed).items():
            records.append(record(name, metric, interval, count, config.seed, ledger))
        for metric, (count, interval) in _inline(source, task, config.reflections, config.seed).items():
            records.append(record(name, metric, interval, count, config.seed, ledger))
        shown += [_shown(name, chain) for chain in chains[: config.shown]]
    write_results(out, records, values=values, details={"corrections": shown})


def _needs_task(config: options.EvaluateCorrections) -> bool:
    return any(isinstance(s, str) and (Path(s) / SEARCH_FILE).is_file() for s in config.sources.values())


def _arms(
    sources: Mapping[str, Any], task: Task, problems: Mapping[str, Problem]
) -> Iterator[tuple[str, Any, list[Chain], Ledger]]:
    """(name, source, chains, cost) of every arm; a search with strategy glore has several, such as NAME/global."""
    for name, source in sources.items():
        if isinstance(source, str) and _strategy(source) == "glore":
            ledger = Ledger(**read_about(source)["ledger"])
            records = _records(source, problems)
            arms = chains_of_refinements(records, read_rows(source, Solution), task, problems)
            yield from ((f"{name}/{arm}" if arm else name, source, chains, ledger) for arm, chains in arms.items())
        else:
            yield name, source, *read_chains(source, task, problems)


def _planned(source: Any) -> int:
    """The attempts that a search with corrections was to make; 1 for other sources, whose chains say it."""
    if not isinstance(source, str) or _strategy(source) != "corrections":
        return 1
    return int(read_json(Path(source) / ABOUT_FILE)["settings"].get("turns", 2))


def _strategy(folder: str) -> str:
    """The strategy of a search; empty if the folder is none."""
    return read_json(Path(folder) / ABOUT_FILE)["strategy"] if (Path(folder) / SEARCH_FILE).is_file() else ""


def _records(folder: str, problems: Mapping[str, Problem]) -> list[dict[str, Any]]:
    records = list(read_searches(folder))
    missing = next((r["problem_id"] for r in records if r["problem_id"] not in problems), None)
    if missing is not None:
        raise UserError(f"{folder}: problem {missing} is not in the split that was told")
    return records


def read_chains(source: Any, task: Task, problems: Mapping[str, Problem]) -> tuple[list[Chain], Ledger]:
    """The chains of a source and what they cost together."""
    folders = source if isinstance(source, list) else [source]
    if not folders or not all(isinstance(folder, str) for folder in folders):
        raise UserError(f"sources: expected a folder or a list of folders, found {source!r}")
    ledger = sum((Ledger(**read_about(f)["ledger"]) for f in folders if Path(f).is_dir()), Ledger())
    if len(folders) > 1:
        return chains_of_solutions([read_rows(f, Solution) for f in folders], folders), ledger
    [folder] = folders
    if (Path(folder) / SEARCH_FILE).is_file():
        about = read_json(Path(folder) / ABOUT_FILE)
        if about["strategy"] not in ("corrections", "revisions"):
            raise UserError(
                f"{folder}: strategy {about['strategy']} leaves no chains of attempts; corrections and revisions do"
            )
        records = _records(folder, problems)
        return chains_of_search(records, task, problems, criticised=bool(about.get("critic"))), ledger
    if Path(folder).is_dir() and read_about(folder)["row_type"] == "Solution":
        return chains_of_solutions([read_rows(folder, Solution)], [folder]), ledger
    return chains_of_dialogues(read_rows(folder, Dialogue)), ledger


def means(chains: Sequence[Chain], planned: int = 1) -> dict[str, tuple[list[str], list[float]]]:
    """Metric -> (problems, value of each chain or problem), for what is a mean over them.

    `planned` attempts count as made where no chain went on: a critic that finds nothing wrong corrects nothing.
    """
    ids = [chain.problem_id for chain in chains]
    turns = max(planned, *(len(chain.attempts) for chain in chains))
    right = [[a.right for a in chain.attempts] for chain in chains]
    found: dict[str, tuple[list[str], list[float]]] = {}
    for turn in range(turns):
        found[f"accuracy@t{turn + 1}"] = ids, [float(at_turn(r, turn)) for r in right]
    if turns > 1:
        first, last = [r[0] for r in right], [r[-1] for r in right]
        pairs = list(zip(first, last, strict=True))
        found["accuracy"] = ids, [float(b) for b in last]
        found["delta"] = ids, [float(b) - float(a) for a, b in pairs]
        found["wrong_to_right"] = ids, [float(b and not a) for a, b in pairs]
        found["right_to_wrong"] = ids, [float(a and not b) for a, b in pairs]
        found["any"] = ids, [float(any(r)) for r in right]
        wrong = [c for c in chains if not c.attempts[0].right]
        sound = [c for c in chains if c.attempts[0].right]
        # Shares over problems that can have them: arms are comparable where they begin with the same attempts.
        if wrong:
            found["helpfulness"] = [c.problem_id for c in wrong], [float(c.attempts[-1].right) for c in wrong]
        if sound:
            found["harm"] = [c.problem_id for c in sound], [float(not c.attempts[-1].right) for c in sound]
        went_on = [c for c in chains if len(c.attempts) > 1]
        if went_on:
            own = [c.problem_id for c in went_on]
            found["changed"] = own, [float(c.attempts[-2].text != c.attempts[-1].text) for c in went_on]
            found["edit_ratio"] = own, [edit_ratio(c.attempts[-2].text, c.attempts[-1].text) for c in went_on]
        found["turns"] = ids, [float(len(c.attempts)) for c in chains]
    grouped: dict[str, list[Chain]] = {}
    for chain in chains:
        grouped.setdefault(chain.problem_id, []).append(chain)
    voted = all(a.answer is not None or not a.right for c in chains for a in c.attempts)
    if voted and (turns > 1 or len(grouped) < len(chains)):
        # One turn after the other, all chains of a turn together: the order that decides ties.
        found["majority"] = list(grouped), [float(_vote(own, range(turns))) for own in grouped.values()]
        for turn in range(turns) if len(grouped) < len(chains) else ():
            found[f"majority@t{turn + 1}"] = list(grouped), [float(_vote(o, [turn])) for o in grouped.values()]
    for metric, tokens in (
        ("tokens_attempts", lambda c: [a.tokens for a in c.attempts]),
        ("tokens_critiques", lambda c: [s.tokens for s in c.said if s is not None]),
    ):
        counted = [tokens(chain) for chain in chains]
        if any(counted) and all(n is not None for own in counted for n in own):
            found[metric] = ids, [float(sum(own)) for own in counted]
    return found


def _vote(chains: Sequence[Chain], turns: Sequence[int]) -> bool:
    # At one turn a chain that ended early still has its answer; over all turns an answer has a vote for each attempt that gave it.
    if len(turns) == 1:
        attempts = [chain.attempts[min(turns[0], len(chain.attempts) - 1)] for chain in chains]
    else:
        attempts = [c.attempts[t] for t in turns for c in chains if t < len(c.attempts)]
    winner = majority_answer([a.answer for a in attempts])
    return winner is not None and any(a.right for a in attempts if a.answer == winner)


def _shares(chains: Sequence[Chain], seed: int) -> dict[str, tuple[int, tuple[float, float, float]]]:
    """Metric -> (of how many, value with interval), for what is no mean over problems: shares of shares, and harmonic means."""
    found: dict[str, tuple[int, tuple[float, float, float]]] = {}

    def add(
        items: Sequence[Any], problem_of: Callable[[Any], str], measure: Callable[[list[Any]], Mapping[str, float]]
    ) -> None:
        groups: dict[str, list[int]] = {}
        for index, item in enumerate(items):
            groups.setdefault(problem_of(item), []).append(index)
        for metric in measure(list(items)):
            value = lambda places, m=metric: measure([items[i] for i in places])[m]
            found[metric] = len(items), bootstrap_groups(list(groups.values()), value, seed)

    several = [c for c in chains if len(c.attempts) > 1]
    if several:
        add(chains, lambda c: c.problem_id, lambda some: {
            k: v for k, v in flips([c.attempts[0].right for c in some], [c.attempts[-1].right for c in some]).items()
            if k in ("fix_rate", "break_rate")
        })  # fmt: skip
    said = [(c.problem_id, a, s) for c in chains for a, s in zip(c.attempts, c.said, strict=True) if s is not None]
    if said:
        # Verdicts are on the answer: a flawed solution with a right answer is not flawed here; `location` judges steps.
        add(said, lambda x: x[0], lambda some: {
            **{f"critic_{k}": v for k, v in detection([s.wrong for _, _, s in some], [not a.right for _, a, _ in some]).items()},
            "critic_leaks": sum(s.leak for _, _, s in some) / len(some),
        })  # fmt: skip
        known = [x for x in said if x[1].error_known]
        # What cannot be read names no step, and clears no solution either.
        named = lambda s: -1 if s.wrong is None else s.first_error
        if known:
            add(known, lambda x: x[0], lambda some: {
                f"critic_{k}": v
                for k, v in location([named(s) for _, _, s in some], [a.first_error for _, a, _ in some]).items()
            })  # fmt: skip
            # Errors in the second half of an attempt: a critic may well find early ones alone.
            late = [x for x in known if x[1].first_error is not None and 2 * x[1].first_error >= _lines(x[1].text)]
            if late:
                add(late, lambda x: x[0], lambda some: {
                    "critic_located_late": sum(named(s) == a.first_error for _, a, s in some) / len(some)
                })  # fmt: skip
    judged = [c for c in chains if len(c.attempts) == 2 and c.said[0] is not None]
    if judged and len(judged) == len(chains):
        gain = lambda some: gated_gain(
            [c.attempts[0].right for c in some], [c.said[0].wrong for c in some], [c.attempts[1].right for c in some]
        )
        add(judged, lambda c: c.problem_id, lambda some: {"gated_gain": gain(some)[0]})
    return {metric: one for metric, one in found.items() if not math.isnan(one[1][0])}


def _lines(text: str) -> int:
    return sum(bool(line.strip()) for line in text.split("\n"))


def _inline(
    source: Any, task: Task, reflections: Sequence[str], seed: int
) -> dict[str, tuple[int, tuple[float, float, float]]]:
    """What solutions do about their own wrong steps; nothing without reflections, or for other rows."""
    if not reflections or not isinstance(source, str) or not Path(source).is_dir():
        return {}
    if read_about(source)["row_type"] != "Solution":
        return {}
    if not isinstance(task, StepChecker):
        raise UserError(f"task {task.name} cannot check steps: reflections cannot be judged")
    groups: dict[str, list[int]] = {}
    found: list[Any] = []
    for row in read_rows(source, Solution):
        groups.setdefault(row.problem_id, []).append(len(found))
        problem = Problem(row.problem_id, row.prompt, row.gold)
        found.append(measure_inline(task, problem, row.steps, reflections))
    shares = {
        "inline_repair": ("repaired", "wrong"),
        "inline_noticed": ("noticed", "wrong"),
        "inline_alarms": ("alarms", "steps"),
        "wrong_steps": ("wrong", "steps"),
    }

    def share(what: str, of: str) -> Callable[[list[int]], float]:
        def value(places: list[int]) -> float:
            total = sum(found[i][of] for i in places)
            return sum(found[i][what] for i in places) / total if total else math.nan

        return value

    made = {m: (len(found), bootstrap_groups(list(groups.values()), share(*s), seed)) for m, s in shares.items()}
    return {metric: one for metric, one in made.items() if not math.isnan(one[1][0])}


def _shown(name: str, chain: Chain) -> dict[str, Any]:
    """A chain as the report shows it."""
    return {
        "source": name,
        "problem_id": chain.problem_id,
        "prompt": chain.prompt,
        "attempts": [{"text": a.text, "right": a.right, "answer": a.answer} for a in chain.attempts],
        "said": [None if s is None else {"text": s.text, "wrong": s.wrong} for s in chain.said],
    }
