"""What a search found, as rows: solutions with verdicts, a JSON record of the search for pages, a Tree for trainers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..basics import UserError, read_jsonl
from ..models.steps import cut_steps
from ..search.base import SearchResult, TreeNode
from ..tasks.base import Problem, Task
from .rows import Node, Solution, Source, Tree

SEARCH_FILE = "search.jsonl"  # one record a problem, beside the rows


def found_solutions(
    result: SearchResult, problem: Problem, task: Task, tokenizer: Any, source: Source
) -> list[Solution]:
    """One row for each finished solution, in the order of the result."""
    rows = []
    for number, state in enumerate(result.finals):
        ids = state.ids[state.prompt_length :]
        text = tokenizer.decode(ids, skip_special_tokens=True)
        verdict = task.verify(problem, text)
        rows.append(
            Solution(
                problem_id=problem.id, prompt=problem.prompt, gold=problem.answer, sample=number, steps=state.steps,
                text=text, answer=verdict.answer, outcome=verdict.outcome.value, stop=state.stop, token_ids=ids,
                step_ends=cut_steps(tokenizer, ids, task.step_separator)[1], logprob=state.logprob, source=source,
            )
        )  # fmt: skip
    return rows


def search_record(
    result: SearchResult, rows: Sequence[Solution], strategy: str, *, with_tree: bool = True
) -> dict[str, Any]:
    """A search as JSON values: one line of search.jsonl.

    problem_id, prompt, gold, strategy
    finals   [{sample, node, score, answer, outcome}], one a Solution row, in the same order; `score` is what chooses
    chosen   index in `finals` of the strategy's own answer
    depth, rounds, serial_tokens, tokens, curves     as in `search.base.SearchResult`
    nodes    [{parent, steps, score, status, done, tokens, logprob, visits, value, prior}] as in `search.base.TreeNode`, the
             root first, and `role` where it has one; null where the tree was not kept
    """
    finals = [
        {"sample": row.sample, "node": node, "score": score, "answer": row.answer, "outcome": row.outcome}
        for row, node, score in zip(rows, result.final_nodes, result.scores, strict=True)
    ]
    return {
        "problem_id": rows[0].problem_id,
        "prompt": rows[0].prompt,
        "gold": rows[0].gold,
        "strategy": strategy,
        "finals": finals,
        "chosen": result.chosen,
        "depth": result.depth,
        "rounds": result.rounds,
        "serial_tokens": result.serial_tokens,
        "tokens": result.tokens,
        "curves": {name: list(values) for name, values in result.curves.items()},
        "nodes": [_node(node) for node in result.nodes] if with_tree else None,
    }


def _node(node: TreeNode) -> dict[str, Any]:
    return {name: value for name, value in asdict(node).items() if name != "role" or value}


def read_searches(folder: str | Path) -> Iterator[dict[str, Any]]:
    """The records of `search_record` that a search stage left in its folder. Raises UserError where there are none."""
    path = Path(folder) / SEARCH_FILE
    if not path.is_file():
        raise UserError(f"{path}: no such file; a finished `search` stage has one")
    for number, record in read_jsonl(path):
        if not isinstance(record.get("finals"), list):
            raise UserError(f"{path}, line {number}: not a record of a search (finals is missing)")
        yield record


def tree_row(result: SearchResult, problem: Problem, source: Source, outcomes: Mapping[int, str]) -> Tree:
    """The search tree as a row: visits and values of an MCTS, from which `data_gen.tree_rows` makes labels, values and pairs.

    `outcomes` are the verdicts of finished solutions by node. A sample to the end, which adds several steps at once,
    becomes a chain of nodes; the log-probability of all its tokens stands at the last.
    """
    nodes: list[Node] = []
    place: list[int] = []  # of each search node, in `nodes`
    for index, node in enumerate(result.nodes):
        parent = -1 if node.parent < 0 else place[node.parent]
        for step in node.steps[:-1]:
            nodes.append(Node(parent, step, 0, 0, 0, None, None, 0.0))
            parent = len(nodes) - 1
        last = node.steps[-1] if node.steps else ""
        nodes.append(Node(parent, last, 0, 0, node.visits, node.value, outcomes.get(index), node.logprob))
        place.append(len(nodes) - 1)
    return Tree(problem.id, problem.prompt, problem.answer, tuple(nodes), source)
