"""Chains of attempts and what was said of them, read from rows of any source: searches, dialogues, solutions of several turns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..basics import UserError
from ..models.corrections import leaks, read_critique
from ..tasks.base import Problem, StepChecker, Task, first_error
from .dialogues import meta_of
from .rows import Dialogue, Solution


@dataclass(frozen=True)
class Attempt:
    """One attempt at a problem."""

    text: str
    answer: str | None
    right: bool
    first_error: int | None = None
    error_known: bool = False
    tokens: int | None = None


@dataclass(frozen=True)
class Said:
    """A critique of an attempt, as it was read. `leak`: it gives the reference answer away, which the attempt did not have."""

    text: str
    wrong: bool | None
    first_error: int | None
    leak: bool
    tokens: int | None = None


@dataclass(frozen=True)
class Chain:
    """Attempts at one problem, each the correction of the one before; `said[i]` is about `attempts[i]` (None: nothing was said)."""

    problem_id: str
    number: int
    attempts: tuple[Attempt, ...]
    said: tuple[Said | None, ...]
    prompt: str = ""


def attempt(task: Task, problem: Problem, text: str, tokens: int | None = None) -> Attempt:
    """An attempt with its verdict, and its first error where the task can check steps."""
    verdict = task.verify(problem, text)
    known = isinstance(task, StepChecker)
    error = first_error(task.check_steps(problem, task.split_steps(text))) if isinstance(task, StepChecker) else None
    return Attempt(text, verdict.answer, verdict.right, error, known, tokens)


def said_of(problem: Problem, about: Attempt, text: str, tokens: int | None = None) -> Said:
    """A critique as it is read."""
    found = read_critique(text)
    leak = not about.right and leaks(text, problem.answer, problem.prompt + about.text)
    return Said(text, found.wrong, found.first_error, leak, tokens)


def chains_of_search(
    records: Sequence[Mapping[str, Any]], task: Task, problems: Mapping[str, Problem], *, criticised: bool
) -> list[Chain]:
    """The chains of searches with the strategies `corrections` and `revisions`. Raises UserError where a tree was not kept.

    With `criticised` every other level of a tree is a critique.
    """
    chains: list[Chain] = []
    for record in records:
        if record["nodes"] is None:
            raise UserError(
                f"the search of problem {record['problem_id']} was kept without its tree: search with trees: -1"
            )
        problem = problems[record["problem_id"]]
        children: dict[int, list[int]] = {}
        for place, node in enumerate(record["nodes"]):
            children.setdefault(node["parent"], []).append(place)
        for number, begin in enumerate(children.get(0, [])):
            attempts: list[Attempt] = []
            said: list[Said | None] = []
            index: int | None = begin
            while index is not None:
                node = record["nodes"][index]
                text = task.step_separator.join(node["steps"])
                if criticised and len(said) < len(attempts):
                    said.append(said_of(problem, attempts[-1], text, node["tokens"]))
                else:
                    said += [None] * (len(attempts) - len(said))
                    attempts.append(attempt(task, problem, text, node["tokens"]))
                index = next(iter(children.get(index, [])), None)
            said += [None] * (len(attempts) - len(said))
            chains.append(Chain(problem.id, number, tuple(attempts), tuple(said), problem.prompt))
    return chains


def chains_of_refinements(
    records: Sequence[Mapping[str, Any]], rows: Sequence[Solution], task: Task, problems: Mapping[str, Problem]
) -> dict[str, list[Chain]]:
    """The chains of searches with the strategy `glore` and their rows, by arm. Raises UserError where a tree was not kept.

    ""              the first draft, and what the scorer chose among drafts and refinements
    global, local   each draft and its refinement; the draft alone where it has none
    either          each draft and a refinement that is right, if one is: a perfect choice between the two (an oracle)
    """
    chains: dict[str, list[Chain]] = {"": [], "global": [], "local": [], "either": []}
    found = {(row.problem_id, row.sample): row for row in rows}
    for record in records:
        if record["nodes"] is None:
            raise UserError(
                f"the search of problem {record['problem_id']} was kept without its tree: search with trees: -1"
            )
        problem, nodes = problems[record["problem_id"]], record["nodes"]
        # A node of a local refinement holds what it adds to its draft, a row the whole solution.
        attempts = {
            final["node"]: attempt(
                task, problem, found[problem.id, final["sample"]].text.strip(), nodes[final["node"]]["tokens"]
            )
            for final in record["finals"]
        }

        drafts = [place for place, node in enumerate(nodes) if node["parent"] == 0]
        made = [("", 0, [attempts[drafts[0]], attempts[record["finals"][record["chosen"]]["node"]]])]
        for number, draft in enumerate(drafts):
            refined = {node["role"]: attempts[p] for p, node in enumerate(nodes) if node["parent"] == draft}
            own = {role: [refined[role]] if role in refined else [] for role in ("global", "local")}
            own["either"] = sorted(refined.values(), key=lambda a: not a.right)[:1]
            made += [(arm, number, [attempts[draft], *after]) for arm, after in own.items()]
        for arm, number, chain in made:
            chains[arm].append(Chain(problem.id, number, tuple(chain), (None,) * len(chain), problem.prompt))
    made_any = {arm: any(len(chain.attempts) > 1 for chain in own) for arm, own in chains.items()}
    made_any["either"] = made_any["global"] and made_any["local"]
    return {arm: own for arm, own in chains.items() if made_any[arm]}


def chains_of_dialogues(rows: Sequence[Dialogue]) -> list[Chain]:
    """The chains of rows of the kinds draft, critique (of a draft) and refine; verdicts are those of their meta."""
    chains = []
    for number, row in enumerate(rows):
        if row.kind not in ("draft", "critique", "refine"):
            raise UserError(f"row {row.problem_id}: kind {row.kind} has no attempts; draft, critique and refine have")
        meta = meta_of(row)
        draft = "\n".join(meta["draft"])
        attempts = [Attempt(draft, None, meta["correct"][0], meta.get("first_error"), bool(meta.get("error_known")))]
        if row.kind == "refine":
            # A local refinement holds what stands behind the steps that it keeps.
            text = "\n".join([*meta.get("prefix", ()), row.messages[-1].content])
            attempts.append(Attempt(text, meta.get("answer"), meta["correct"][1], tokens=meta.get("tokens")))
        problem = Problem(row.problem_id, meta["prompt"], meta["reference"])
        critique = None
        if meta.get("critique") is not None and not meta.get("control"):
            critique = said_of(problem, attempts[0], meta["critique"])
        said = (critique, *[None] * (len(attempts) - 1))
        chains.append(Chain(row.problem_id, number, tuple(attempts), said, meta["prompt"]))
    return chains


def chains_of_solutions(turns: Sequence[Sequence[Solution]], where: Sequence[str]) -> list[Chain]:
    """The chains of Solution rows of one turn each, matched by problem and sample. Raises UserError if a turn lacks one."""
    keyed = [{(row.problem_id, row.sample): row for row in rows} for rows in turns]
    chains = []
    for key in keyed[0]:
        for rows, name in zip(keyed, where, strict=True):
            if key not in rows:
                raise UserError(f"{name}: no solution {key[1]} of problem {key[0]}, which {where[0]} has")
        attempts = tuple(
            Attempt(r.text, r.answer, r.right, tokens=len(r.token_ids) or None) for r in (rows[key] for rows in keyed)
        )
        chains.append(Chain(key[0], key[1], attempts, (None,) * len(attempts), keyed[0][key].prompt))
    return chains
