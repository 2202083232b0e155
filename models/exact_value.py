"""Exact values of a policy on chain arithmetic: what step scores are to estimate, without sampling.

The policy's distribution over the result it writes is read at the "=" of a line, for every fact (value, operation, operand). With
these, V(t, z), the probability to end right after t lines of which the last says z, follows by dynamic programming:

    V(T, z) = P(writes "Answer: gold" after z)          V(t, z) = sum_z' P(z' | z, op_{t+1}, a_{t+1}) V(t+1, z')

It is exact if what is written depends on nothing but the fact, and if the rest of a line (value, operation, operand) is copied
without fault. Neither is quite so: `FactTable.spread` says how much distributions of one fact differ between contexts, and
`launch.evaluate_steps` sets values beside sampled ones.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..basics import UserError, fold_seed
from ..tasks.base import Problem
from ..tasks.chain import OPERATIONS, ChainArith
from .ledger import Ledger
from .sampling import filtered_probabilities
from .step_format import StepFormat

Fact = tuple[int, str, int]  # value, operation, operand


@dataclass(frozen=True)
class FactTable:
    """P(result) [p] of every fact, and of the answer [p][p] after every last value; what is missing to 1 is something else.

    `spread`: mean total variation distance between a context's distribution and the mean over contexts.
    """

    results: dict[Fact, np.ndarray]
    answers: np.ndarray
    spread: float
    lost: float  # mean probability of writing no residue at all


def read_facts(
    model: Any,
    tokenizer: Any,
    step_format: StepFormat,
    task: ChainArith,
    *,
    contexts: int = 8,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int = 0,
    ledger: Ledger | None = None,
) -> FactTable:
    """The table of a policy, from one forward over each fact in `contexts` random problems, at random places.

    Raises UserError if a residue is more than one token.
    """
    ids = [tokenizer(str(z), add_special_tokens=False)["input_ids"] for z in range(task.p)]
    if any(len(one) != 1 for one in ids):
        raise UserError("exact values need a tokenizer in which every residue is one token, such as the lab's")
    residues = [one[0] for one in ids]
    operands = {"*": task.units}
    facts = [(z, op, a) for z in range(task.p) for op in OPERATIONS for a in operands.get(op, range(1, task.p))]
    keys: list[Fact | int] = [*facts, *range(task.p)]
    prefixes = [
        _prefix(tokenizer, step_format, task, key, random.Random(fold_seed(seed, "context", str(key), c)))
        for key in keys
        for c in range(contexts)
    ]
    ledger = ledger or Ledger()
    with ledger.timed():
        read = _next_token(model, tokenizer, prefixes, residues, temperature, top_p)
    ledger.add_policy(sum(p.numel() for p in model.parameters()), prefilled=sum(map(len, prefixes)))
    found = read.reshape(len(keys), contexts, task.p)
    mean = found.mean(1)
    spread = 0.5 * np.abs(found - mean[:, None]).sum(-1).mean()
    lost = float(1 - mean.sum(-1).mean())
    results = {fact: mean[i] for i, fact in enumerate(facts)}
    return FactTable(results, mean[len(facts) :], float(spread), max(lost, 0.0))


def _prefix(
    tokenizer: Any, step_format: StepFormat, task: ChainArith, key: Fact | int, rng: random.Random
) -> tuple[int, ...]:
    """Ids of a random problem with lines up to the "=" of the fact, or up to "Answer:" after the value `key`."""
    steps = rng.randint(task.min_steps, task.max_steps)
    start, operations = task.parse(task.problem(steps, rng.randrange(2**62)))
    at = steps if isinstance(key, int) else rng.randrange(steps)
    value = key if isinstance(key, int) else key[0]
    if not isinstance(key, int):
        operations[at] = (key[1], key[2])
    if at == 0:
        start = value
    problem = Problem("", " ; ".join([f"Start {start}", *(f"{op} {a}" for op, a in operations)]) + " \n", "")
    lines = task.reference_steps(problem)[:at]
    if lines:
        lines[-1] = f"{lines[-1].rpartition('=')[0]}= {value}"
    last = "Answer:" if isinstance(key, int) else f"{value} {key[1]} {key[2]} ="
    ids = step_format.encode(tokenizer, problem.prompt, lines).ids
    return (*ids, *tokenizer(last, add_special_tokens=False)["input_ids"])


@torch.inference_mode()
def _next_token(
    model: Any,
    tokenizer: Any,
    prefixes: Sequence[tuple[int, ...]],
    residues: Sequence[int],
    temperature: float,
    top_p: float,
    batch: int = 512,
) -> np.ndarray:
    """P(each residue) [B, p] of the token behind each prefix."""
    order = sorted(range(len(prefixes)), key=lambda i: len(prefixes[i]))
    found = np.zeros((len(prefixes), len(residues)))
    for first in range(0, len(order), batch):
        rows = order[first : first + batch]
        width = max(len(prefixes[i]) for i in rows)
        tokens = torch.full((len(rows), width), tokenizer.pad_token_id or 0)
        mask = torch.zeros_like(tokens)
        for r, i in enumerate(rows):
            tokens[r, : len(prefixes[i])] = torch.tensor(prefixes[i])
            mask[r, : len(prefixes[i])] = 1
        logits = model(input_ids=tokens.to(model.device), attention_mask=mask.to(model.device)).logits
        last = logits[torch.arange(len(rows)), mask.sum(1) - 1].float()
        probabilities = filtered_probabilities(last, temperature, 0, top_p)[:, list(residues)]
        found[rows] = probabilities.double().cpu().numpy()
    return found


def chain_values(table: FactTable, operations: Sequence[tuple[str, int]], answer: int) -> np.ndarray:
    """V [T + 1, p]: probability of a right answer after t lines of which the last (or the start) says z."""
    p = len(table.answers)
    values = np.zeros((len(operations) + 1, p))
    values[-1] = table.answers[:, answer]
    for t in range(len(operations) - 1, -1, -1):
        op, a = operations[t]
        values[t] = [table.results[z, op, a] @ values[t + 1] for z in range(p)]
    return values


def solution_values(
    table: FactTable, task: ChainArith, problem: Problem, steps: Sequence[str], right: bool
) -> list[float]:
    """V [1 + len(steps)] before the first step and after each; NaN where a line has no result to go on from.

    After the answer line it is 1 or 0: whether the solution is right.
    """
    start, operations = task.parse(problem)
    values = chain_values(table, operations, int(problem.answer))
    found = [float(values[0, start])]
    for t, step in enumerate(steps, 1):
        if t <= len(operations):
            z = task.written_result(step)
            found.append(math.nan if z is None else float(values[t, z]))
        else:
            found.append(float(right) if t == len(operations) + 1 else math.nan)
    return found
