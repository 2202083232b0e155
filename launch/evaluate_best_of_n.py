"""The stage that draws curves: what k samples are worth, for every way to choose among them, from one pool."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..basics import UserError, fold_seed, read_json
from ..config import build
from ..data_gen.rows import Solution
from ..data_gen.store import read_about, read_rows
from ..models.judges import StepScorer
from ..models.ledger import Ledger
from ..models.reward import RewardModel, aggregate
from ..models.step_metrics import auroc
from ..search.choose import LARGEST_EXACT, best_of_k, majority_of_k, paired_bootstrap, pass_at_k, weighted_of_k
from . import options_eval
from .evaluate import record, values_of, write_results
from .evaluate_first_errors import judge_of
from .options import first, required
from .scoring import Scored

MAJORITY, PASS = "majority", "pass"


def evaluate_best_of_n(config: options_eval.EvaluateBestOfN, out: Path) -> None:
    """accuracy@k of majority, best-of-k and weighted vote by every model and aggregation; pass@k; gaps to both."""
    required(config, "samples")
    rows = read_rows(config.samples, Solution)
    pool: dict[str, list[int]] = {}
    for i, row in enumerate(rows):
        pool.setdefault(row.problem_id, []).append(i)
    pool = {problem: pool[problem] for problem in first(list(pool), config.limit)}
    ks = draw_sizes(config.ks, [len(own) for own in pool.values()])
    scores, costs = _scores(config, rows, out)
    curves = _votes(rows, pool, ks)  # arm -> k -> a value for each problem
    model_of: dict[str, str] = {}
    records: list[dict[str, Any]] = []
    for name, steps in scores.items():
        for how in config.aggregations:
            totals = [aggregate(one, how) for one in steps]
            best, weighted = f"best_{name}_{how}", f"weighted_{name}_{how}"
            for arm in (best, weighted):
                curves[arm], model_of[arm] = {k: [] for k in ks}, name
            for problem, places in pool.items():
                right, mine = [rows[i].right for i in places], [totals[i] for i in places]
                answers = [rows[i].answer for i in places]
                for k in ks:
                    drawn = fold_seed(config.seed, problem, k)  # the same draws for every model
                    curves[best][k].append(best_of_k(mine, right, k))
                    curves[weighted][k].append(
                        weighted_of_k(answers, right, mine, k, subsets=config.subsets, seed=drawn)
                    )
            records += _ranking(f"pool/{name}_{how}", rows, pool, totals, config.seed)
    sampled = Ledger(**read_about(config.samples)["ledger"]) if Path(config.samples).is_dir() else Ledger()
    values: list[dict[str, Any]] = []
    for arm, by_k in curves.items():
        model = model_of.get(arm, "")
        for k, own in by_k.items():
            paid = _share(sampled + costs.get(model, Ledger()), k, rows, pool)
            n, label = len(own), f"pool/{arm}"
            records.append(
                record(label, f"accuracy@{k}", paired_bootstrap(own, seed=config.seed), n, config.seed, paid)
            )
            values.append(values_of(label, f"accuracy@{k}", list(pool), own))
            if model:
                for metric, other in ((f"minus_majority@{k}", MAJORITY), (f"oracle_gap@{k}", PASS)):
                    pair = (own, curves[other][k]) if other == MAJORITY else (curves[other][k], own)
                    records.append(record(label, metric, paired_bootstrap(*pair, seed=config.seed), n, config.seed))
    write_results(out, records, values=values)
    width = max(map(len, curves))
    print(" " * width + "".join(f"{'@' + str(k):>8s}" for k in ks))
    for arm, by_k in curves.items():
        print(arm.ljust(width) + "".join(f"{100 * sum(own) / len(own):8.1f}" for own in by_k.values()))


def _ranking(
    arm: str, rows: Sequence[Solution], pool: Mapping[str, Sequence[int]], totals: Sequence[float], seed: int
) -> list[dict[str, Any]]:
    """Mean over problems of P(a right sample scores above a wrong one), of problems that have both."""
    both = [own for own in pool.values() if 0 < sum(rows[i].right for i in own) < len(own)]
    inside = [auroc([totals[i] for i in own], [rows[i].right for i in own]) for own in both]
    return (
        [record(arm, "within_question_auroc", paired_bootstrap(inside, seed=seed), len(inside), seed)] if both else []
    )


def draw_sizes(asked: Sequence[int], pools: Sequence[int]) -> list[int]:
    """The k of a curve: those asked for, or 1, 2, 4 ... and the size of the smallest pool.

    Raises UserError if a pool has fewer samples than asked for.
    """
    n = min(pools)
    if not asked:
        return sorted({2**i for i in range(n.bit_length()) if 2**i <= n} | {n})
    for k in asked:
        if not 1 <= k <= n:
            raise UserError(f"ks must lie between 1 and {n}, the samples of the problem with the fewest, found {k}")
    return sorted(set(asked))


def _votes(
    rows: Sequence[Solution], pool: Mapping[str, Sequence[int]], ks: Sequence[int]
) -> dict[str, dict[int, list[float]]]:
    """The two curves that need no model."""
    found: dict[str, dict[int, list[float]]] = {PASS: {k: [] for k in ks}, MAJORITY: {k: [] for k in ks}}
    for problem, own in pool.items():
        right, answers = [rows[i].right for i in own], [rows[i].answer for i in own]
        exact = majority_of_k(answers, right) if len(own) <= LARGEST_EXACT else None
        for k in ks:
            found[PASS][k].append(pass_at_k(len(own), sum(right), k))
            found[MAJORITY][k].append(
                exact[k - 1]
                if exact is not None
                else weighted_of_k(answers, right, [1.0] * len(own), k, seed=fold_seed(0, problem, k))
            )
    return found


def _scores(
    config: options_eval.EvaluateBestOfN, rows: Sequence[Solution], out: Path
) -> tuple[dict[str, list[list[float]]], dict[str, Ledger]]:
    """Step scores of every row, by model or from files, and what the models cost."""
    if both := set(config.models) & set(config.scores):
        raise UserError(f"{sorted(both)[0]} is named both in models and in scores")
    models = {name: _model(config, name, told) for name, told in config.models.items()}
    scored = Scored(out, "pool", models)
    found = {name: scored.steps(name, "samples", rows) or [] for name in models}
    for name, path in config.scores.items():
        read = read_json(path)
        if not isinstance(read, list) or len(read) != len(rows):
            length = len(read) if isinstance(read, list) else type(read).__name__
            raise UserError(f"{path}: expected a list of step scores for each of {len(rows)} rows, found {length}")
        for i, one in enumerate(read):
            if not isinstance(one, list) or not all(isinstance(v, (int, float)) for v in one):
                raise UserError(f"{path}, entry {i + 1}: expected a list of numbers, found {one!r:.80}")
        found[name] = read
    return found, {name: scored.cost(name, "samples") for name in models}


def _model(config: options_eval.EvaluateBestOfN, name: str, told: Any) -> StepScorer:
    """A reward model by its folder, or any judge by the options of one."""
    if isinstance(told, str):
        return RewardModel.load(told, dtype=config.dtype)
    if not isinstance(told, Mapping):
        raise UserError(f"models.{name} must be a folder or keys and values, found {told!r}")
    known = {"dtype": config.dtype, "seed": config.seed}
    return judge_of(build(options_eval.Judged, {**known, **told}, f"models.{name}"))


def _share(whole: Ledger, k: int, rows: Sequence[Solution], pool: Mapping[str, Sequence[int]]) -> Ledger:
    """What k samples of each problem cost on average."""
    share = k * len(pool) / len(rows)
    return Ledger(
        generated_tokens=round(whole.generated_tokens * share),
        flops=whole.flops * share,
        seconds=whole.seconds * share,
    )
