"""Particle filtering: prefixes are drawn again in proportion to a weight, in place of being cut (arXiv:2502.01618)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from .base import Policy, Scorer, SearchResult, State
from .loop import Growth, Node, Tree, check, search

Weighting = Literal["score", "odds", "likelihood"]
Resampling = Literal["multinomial", "systematic"]


def particle_filter(
    roots: Sequence[State],
    policy: Policy,
    scorer: Scorer,
    *,
    n: int = 16,
    weighting: Weighting = "odds",
    temperature: float = 1.0,
    end_temperature: float | None = None,
    anneal_steps: int = 0,
    resampling: Resampling = "multinomial",
    resample_below: float = 1.0,
    resample_finished: bool = True,
    islands: int = 1,
    max_depth: int = 40,
    seed: int = 0,
) -> list[SearchResult]:
    """`n` solutions for each root: after each step, `n` of the particles are drawn with replacement, by softmax(l /
    temperature).

    The paper can be read in three ways (`log_weights`): l = r (`score`, its Algorithm 1), l = ln r - ln(1 - r) (`odds`,
    both official code bases and the default) or l = ln r (`likelihood`, its section 4.1). l is that of the newest prefix
    and replaces the one before. `resample_below` f draws only when the effective sample size 1 / sum w^2 is at most f n
    (1: at every step); l then adds up from step to step since the last draw. Finished particles keep their l and take
    part, unless `resample_finished` is false. `islands` splits the particles into filters that never meet. The
    temperature runs linearly to `end_temperature` within `anneal_steps` steps. At `max_depth` the particles are sampled
    to the end.

    `curves`: `ess` before each draw (summed over islands), `distinct` particles after it, and `lineages`, how many of the
    first steps have descendants among them.
    """
    check(1, n=n, islands=islands, max_depth=max_depth)
    check(0, anneal_steps=anneal_steps)
    for name, value in (("temperature", temperature), ("end_temperature", end_temperature)):
        if value is not None and value <= 0:
            raise ValueError(f"{name} must be more than 0, found {value}")
    if not 0 <= resample_below <= 1:
        raise ValueError(f"resample_below must lie in [0, 1], found {resample_below}")
    if n % islands:
        raise ValueError(f"n must be a multiple of islands, found n {n} and islands {islands}")
    log_weights([], weighting)
    ancestors([1.0], 0, [], resampling)

    def grow(tree: Tree) -> Growth:
        particles = [tree.root] * n
        logs = [0.0] * n
        size = n // islands
        for depth in range(1, max_depth + 1):
            # Copies of one particle go on from one node, with a seed for each.
            plan: dict[int, list[int]] = {}
            for i, node in enumerate(particles):
                if not node.state.done:
                    plan.setdefault(id(node), []).append(i)
            nodes = [particles[where[0]] for where in plan.values()]
            seeds = [[tree.fold("particle", depth, i) for i in where] for where in plan.values()]
            grown = yield from tree.grow(list(zip(nodes, seeds, strict=True)), to_the_end=depth == max_depth)
            for where, children in zip(plan.values(), grown, strict=True):
                for i, child in zip(where, children, strict=True):
                    particles[i] = child
            yield from tree.score([particles[i] for where in plan.values() for i in where])
            if all(node.state.done for node in particles):
                break
            new = log_weights([node.score or 0.0 for node in particles], weighting)
            logs = [old + more for old, more in zip(logs, new, strict=True)]
            tau = _temperature(depth - 1, temperature, end_temperature, anneal_steps)
            sizes = 0.0
            for island in range(islands):
                inside = range(island * size, (island + 1) * size)
                taking = [i for i in inside if resample_finished or not particles[i].state.done]
                if not taking:
                    continue
                weights = softmax([logs[i] / tau for i in taking])
                sizes += effective_size(weights)
                if effective_size(weights) <= resample_below * len(taking) * (1 + 1e-9):
                    points = [tree.uniform("resample", depth, island, k) for k in range(len(taking))]
                    drawn = [particles[taking[a]] for a in ancestors(weights, len(taking), points, resampling)]
                    for i, node in zip(taking, drawn, strict=True):
                        particles[i], logs[i] = node, 0.0
            tree.note("ess", sizes)
            tree.note("distinct", len({id(node) for node in particles}))
            tree.note("lineages", len({id(_first_step(node)) for node in particles}))
            if all(node.state.done for node in particles):
                break
        return particles, None

    return search(roots, policy, scorer, grow, seed=seed)


def _first_step(node: Node) -> Node:
    while node.depth > 1 and node.parent is not None:
        node = node.parent
    return node


def _temperature(step: int, start: float, end: float | None, steps: int) -> float:
    if end is None or steps < 1:
        return start
    return start - (start - end) * min(step / max(steps - 1, 1), 1.0)


def log_weights(scores: Sequence[float], weighting: Weighting) -> list[float]:
    """Log-weights of scores in (0, 1): r (`score`), the log-odds ln r - ln(1 - r) (`odds`) or ln r (`likelihood`).

    Scores are kept 1e-7 away from 0 and 1, as in the official code.
    """
    inside = [min(max(r, 1e-7), 1 - 1e-7) for r in scores]
    if weighting == "score":
        return list(scores)
    if weighting == "odds":
        return [math.log(r) - math.log1p(-r) for r in inside]
    if weighting == "likelihood":
        return [math.log(r) for r in inside]
    raise ValueError(f"weighting must be score, odds or likelihood, found {weighting!r}")


def softmax(logs: Sequence[float]) -> list[float]:
    """exp(l_i) / sum_j exp(l_j)."""
    top = max(logs)
    weights = [math.exp(value - top) for value in logs]
    total = sum(weights)
    return [w / total for w in weights]


def effective_size(weights: Sequence[float]) -> float:
    """1 / sum w^2 of weights that sum to 1: n where all are equal, 1 where one has everything."""
    return 1 / sum(w * w for w in weights)


def ancestors(weights: Sequence[float], n: int, uniforms: Sequence[float], resampling: Resampling) -> list[int]:
    """`n` indices drawn with the probabilities `weights`.

    `multinomial` inverts the cumulative distribution at each of the `uniforms`; `systematic` at the comb (u + k) / n of
    the first, which draws i at least floor(n w_i) and at most ceil(n w_i) times.
    """
    if resampling == "systematic":
        points = [(uniforms[0] + k) / n for k in range(n)]
    elif resampling == "multinomial":
        points = list(uniforms[:n])
    else:
        raise ValueError(f"resampling must be multinomial or systematic, found {resampling!r}")
    steps, total = [], 0.0
    for w in weights:
        total += w
        steps.append(total)
    last = max(i for i, w in enumerate(weights) if w > 0)  # rounding can leave the total under 1
    return [next((i for i, step in enumerate(steps) if point < step), last) for point in points]
