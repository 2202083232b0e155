"""What is read out of trees: step labels, values along paths, and pairs of steps or of paths. Pure functions of rows.

Nodes are read by what they hold: counts (`n_rollouts` > 0) as the share right; else a visited node's `value` in [-1, 1]; else
the verdict of a solution that ends there. A node with none of these was passed but never judged.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from ..basics import fold_seed
from .rows import Node, Pair, StepLabels, Tree

# The outcome of a row whose steps are the beginning of a solution.
UNFINISHED = "unfinished"


def children_of(tree: Tree) -> list[list[int]]:
    """The children of each node, in order."""
    children: list[list[int]] = [[] for _ in tree.nodes]
    for index, node in enumerate(tree.nodes[1:], 1):
        children[node.parent].append(index)
    return children


def path_to(tree: Tree, index: int) -> tuple[int, ...]:
    """The nodes from below the root to `index`; empty for the root."""
    path = []
    while index > 0:
        path.append(index)
        index = tree.nodes[index].parent
    return tuple(reversed(path))


def steps_of(tree: Tree, path: Sequence[int]) -> tuple[str, ...]:
    """The steps along a path of nodes."""
    return tuple(tree.nodes[i].step for i in path)


def node_share(node: Node) -> float | None:
    """How good a node is, in [0, 1]: share right, or value moved from [-1, 1]; None if it was never judged."""
    if node.n_rollouts:
        return node.n_correct / node.n_rollouts
    if node.visits and node.value is not None:
        return (node.value + 1) / 2
    if node.outcome is not None:
        return float(node.outcome == "right")
    return None


def _weight(node: Node) -> int:
    return node.n_rollouts or node.visits or int(node.outcome is not None)


def step_labels(tree: Tree, *, single_steps: bool = True) -> list[StepLabels]:
    """Counts of the tree as StepLabels rows, one for each leaf; every node's counts stand in one row only, the first.

    With `single_steps` a node counts only if its parent was probed too: an edge of several steps says that one of them is wrong,
    not which (OmegaPRM, arXiv:2406.06592 section 3.4). Rows end with their last counted step, and rows without any are left out.
    """
    children = children_of(tree)
    told: set[int] = set()
    rows: list[StepLabels] = []
    for leaf in (i for i in range(len(tree.nodes)) if not children[i]):
        path = path_to(tree, leaf)
        counts = []
        for index in (0, *path):
            node = tree.nodes[index]
            known = node.n_rollouts > 0 and index not in told
            if known and single_steps and index and not tree.nodes[node.parent].n_rollouts:
                known = False
            counts.append((node.n_correct, node.n_rollouts) if known else (0, 0))
            told.update({index} if known else ())
        while len(counts) > 1 and not counts[-1][1]:
            counts.pop()
        if len(counts) == 1:
            continue
        kept = path[: len(counts) - 1]
        outcome = tree.nodes[kept[-1]].outcome
        rows.append(
            StepLabels(
                problem_id=tree.problem_id,
                prompt=tree.prompt,
                gold=tree.gold,
                sample=len(rows),
                steps=steps_of(tree, kept),
                n_correct=tuple(c for c, _ in counts),
                n_rollouts=tuple(n for _, n in counts),
                label_source="monte_carlo",
                outcome=UNFINISHED if outcome is None else outcome,
                first_error=None,
                first_error_known=False,
                source=tree.source,
            )
        )
    return rows


def value_paths(tree: Tree) -> list[tuple[tuple[str, ...], tuple[float | None, ...], str]]:
    """(steps, values, outcome) of every path from the root to a leaf: what a value model learns from.

    `values` has len(steps) + 1 entries in [-1, 1], the empty prefix first, None where a node was never judged; for a search with
    values these are its Q (AlphaMath, arXiv:2405.03553 Eq. 7), a share s becomes 2 s - 1. `outcome` is UNFINISHED at an open leaf.
    """
    children = children_of(tree)
    found = []
    for leaf in (i for i in range(1, len(tree.nodes)) if not children[i]):
        path = path_to(tree, leaf)
        shares = [node_share(tree.nodes[i]) for i in (0, *path)]
        values = tuple(None if s is None else 2 * s - 1 for s in shares)
        found.append((steps_of(tree, path), values, tree.nodes[leaf].outcome or UNFINISHED))
    return found


def chosen_paths(trees: Sequence[Tree], *, right: int, wrong: int, seed: int, likely: bool = False) -> list[Tree]:
    """Finished solutions of the trees of one problem as trees of one path each: up to `right` right and `wrong` others.

    Node values are those of `value_paths`. A solution that several trees found counts once, as the first has it. Which are kept is
    drawn with the seed; right ones come first (AlphaMath keeps at most four of each, arXiv:2405.03553 section 4.1). With `likely`
    the right ones kept are those that the policy is most likely to write: a search finds improbable ways to a right answer too,
    and where few answers are possible many of them are wrong steps that made each other good.
    """
    distinct: dict[tuple[str, ...], Tree] = {}
    for tree in trees:
        children = children_of(tree)
        for leaf in (i for i in range(1, len(tree.nodes)) if not children[i] and tree.nodes[i].outcome is not None):
            path = path_to(tree, leaf)
            nodes = []
            for place, index in enumerate((0, *path)):
                share = node_share(tree.nodes[index])
                value = None if share is None else 2 * share - 1
                nodes.append(dataclasses.replace(tree.nodes[index], parent=place - 1, value=value))
            distinct.setdefault(steps_of(tree, path), dataclasses.replace(tree, nodes=tuple(nodes)))
    ordered = sorted(distinct, key=lambda steps: fold_seed(seed, trees[0].problem_id, "path", *steps))
    sides = [[s for s in ordered if (distinct[s].nodes[-1].outcome == "right") is side] for side in (True, False)]
    if likely:
        sides[0].sort(key=lambda steps: -sum(node.logprob for node in distinct[steps].nodes))
    return [distinct[steps] for steps in (*sides[0][:right], *sides[1][:wrong])]


def flipped(tree: Tree, share: float, seed: int) -> Tree:
    """The tree with the counts of a `share` of its judged steps turned round, drawn with the seed: a control for label noise."""
    nodes = [
        dataclasses.replace(node, n_correct=node.n_rollouts - node.n_correct)
        if i and node.n_rollouts and _drawn(seed, tree.problem_id, steps_of(tree, path_to(tree, i))) < share
        else node
        for i, node in enumerate(tree.nodes)
    ]
    return dataclasses.replace(tree, nodes=tuple(nodes))


def _drawn(seed: int, problem_id: str, steps: Sequence[str]) -> float:
    """Uniform in [0, 1), one number for each prefix."""
    return fold_seed(seed, problem_id, "flip", *steps) / 2**63


def step_pairs(
    tree: Tree,
    *,
    margin: float,
    most: int = 0,
    whole_paths: bool = False,
    extremes: bool = False,
    seed: int = 0,
) -> list[Pair]:
    """Sibling steps, the better first, whose shares differ by at least `margin` (Tree-PLV, arXiv:2407.00390; step-level DPO).

    With `whole_paths` each step is gone on with along its best judged descendants, so that a pair is two paths that share a prefix
    and part at one step. With `extremes` only the best and the worst child of a node make a pair (arXiv:2405.00451). `most` pairs
    of a tree are drawn with the seed; 0 keeps all. Rewards are shares in [0, 1], `n_chosen` and `n_rejected` the rollouts or visits
    behind them. A side is finished if a solution ends with its last step.
    """
    if not 0 < margin <= 1:
        raise ValueError(f"margin must lie in (0, 1], found {margin}")
    children = children_of(tree)
    pairs: list[Pair] = []
    for parent in range(len(tree.nodes)):
        judged = [(share, i) for i in children[parent] if (share := node_share(tree.nodes[i])) is not None]
        judged.sort(key=lambda pair: (-pair[0], pair[1]))
        both = [(a, b) for k, a in enumerate(judged) for b in judged[k + 1 :]]
        if extremes:
            both = both and [(judged[0], judged[-1])]
        prefix = steps_of(tree, path_to(tree, parent))
        for (better, chosen), (worse, rejected) in both:
            # Shares are ratios of small numbers: 3/8 must reach a margin of 0.375 whatever the rounding of a difference.
            if better - worse < margin - 1e-9 or tree.nodes[chosen].step == tree.nodes[rejected].step:
                continue
            sides = [_best_path(tree, children, i) if whole_paths else (i,) for i in (chosen, rejected)]
            ended = [tree.nodes[side[-1]].outcome is not None and not children[side[-1]] for side in sides]
            pairs.append(
                Pair(
                    problem_id=tree.problem_id,
                    prompt=tree.prompt,
                    prefix=prefix,
                    chosen=steps_of(tree, sides[0]),
                    rejected=steps_of(tree, sides[1]),
                    reward_chosen=better,
                    reward_rejected=worse,
                    n_chosen=_weight(tree.nodes[chosen]),
                    n_rejected=_weight(tree.nodes[rejected]),
                    chosen_finished=ended[0],
                    rejected_finished=ended[1],
                    source=tree.source,
                )
            )
    if most and len(pairs) > most:
        rank = lambda i: fold_seed(
            seed, tree.problem_id, "pair", *pairs[i].prefix, *pairs[i].chosen, "", *pairs[i].rejected
        )
        pairs = [pairs[i] for i in sorted(sorted(range(len(pairs)), key=rank)[:most])]
    return pairs


def _best_path(tree: Tree, children: Sequence[Sequence[int]], index: int) -> tuple[int, ...]:
    """`index` and, below it, the best judged child of each node, the first among equals; where none was judged, the first."""
    path = [index]
    while True:
        judged = [(share, -i) for i in children[path[-1]] if (share := node_share(tree.nodes[i])) is not None]
        if not children[path[-1]]:
            return tuple(path)
        path.append(-max(judged)[1] if judged else children[path[-1]][0])
