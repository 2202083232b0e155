"""search.compare: strategies at several budgets, read off at equal cost, by difficulty, and as curves."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..basics import UserError, fold_seed, make_folder, read_json, write_json
from ..data_gen.rows import Solution
from ..data_gen.searched import read_searches
from ..data_gen.store import read_about, read_rows
from ..models.ledger import Ledger
from ..search.analysis import (
    answers_by_luck,
    chance_coverage,
    compute_optimal,
    coverage,
    difficulty_levels,
    fit_power_law,
    log_spaced,
)
from ..search.choose import (
    LARGEST_EXACT,
    best_credit,
    best_of_k,
    majority_of_k,
    paired_bootstrap,
    pass_at_k,
    vote_credit,
    weighted_of_k,
)
from ..tasks.base import Problem, StepChecker, Task, first_error
from ..tasks.load import load_task
from . import options_search
from .claims import VALUES
from .evaluate import DETAILS, RESULTS, record
from .making import _split
from .making_search import ABOUT_FILE, Loaded, make_search
from .options import first, required
from .options_search import UNGUIDED

# How an answer is chosen among what a search found: its own choice, weighted vote, plain vote, and the bound of any choice.
RULES = ("best", "weighted", "majority", "pass")
# Where a task can check steps: the bound again, of solutions that are right in every step and not in their answer alone.
SOUND = "sound"
UNSCORED = ("majority", "pass", SOUND)  # rules that ask no reward model
LEGIBLE = 32  # the page draws the trees of each arm's largest budget up to this one, which a person can read
# What arms are matched by, and the metric of it: FLOPs of all models, or the tokens that the policy sampled.
MATCHED = "accuracy_at_equal_flops"
MATCHED_BY: dict[str, tuple[str, Callable[[Ledger], float]]] = {
    "flops": (MATCHED, lambda ledger: ledger.flops),
    "tokens": ("accuracy_at_equal_tokens", lambda ledger: ledger.generated_tokens),
}


@dataclass
class Pool:
    """What a search found for one problem."""

    answers: list[str | None]
    right: list[bool]
    scores: list[float]
    chosen: int
    steps: list[int]
    distinct: list[tuple[int, int]] = field(default_factory=list)  # (samples, tokens) of each different solution
    gold: str = ""
    sound: list[bool] = field(default_factory=list)  # right, and every step too; empty where steps cannot be checked
    rounds: int = 0  # calls of the policy that waited for each other
    serial_tokens: int = 0  # sampled one after another

    def credit(self, rule: str) -> float:
        """Expected correctness of the answer that a rule chooses."""
        if rule in ("pass", SOUND):
            return float(any(self.right if rule == "pass" else self.sound))
        if rule == "majority":
            return vote_credit(self.answers, self.right)
        if rule == "weighted":
            return vote_credit(self.answers, self.right, self.scores)
        # A search's own choice is one of those that tie for the best score, unless it goes by something else (MCTS).
        if self.scores[self.chosen] == max(self.scores):
            return best_credit(self.scores, self.right)
        return float(self.right[self.chosen])

    def serial_of(self, k: int) -> float:
        """Expected tokens one after another of k samples drawn from a pool of independent ones: those of the longest."""
        lengths = [tokens for samples, tokens in self.distinct for _ in range(samples)]
        return best_of_k(lengths, lengths, k)

    def credit_of(self, rule: str, k: int, seed: int) -> float:
        """The same of k samples drawn from a pool of independent ones."""
        if k == len(self.answers):
            return self.credit(rule)
        if rule in ("pass", SOUND):
            return pass_at_k(len(self.right), sum(self.right if rule == "pass" else self.sound), k)
        if rule == "best":
            return best_of_k(self.scores, self.right, k)
        if rule == "majority" and len(self.answers) <= LARGEST_EXACT:
            return majority_of_k(self.answers, self.right)[k - 1]
        weights = self.scores if rule == "weighted" else [1.0] * len(self.answers)
        return weighted_of_k(self.answers, self.right, weights, k, seed=seed)


@dataclass
class Run:
    """One strategy at one budget: correctness by rule and problem, and what each rule costs."""

    arm: str
    budget: int
    values: dict[str, dict[str, float]]
    ledgers: dict[str, Ledger]
    serial_tokens: float  # sampled one after another, mean over problems
    about: dict[str, float] = field(default_factory=dict)  # means over problems that tell how the search behaves


def compare_searches(config: options_search.Compare, out: Path) -> None:
    """Runs every arm at every budget (a killed comparison continues), and writes results.json, curves and report.html."""
    from .report_search import write_comparison
    from .tables import format_table

    if not config.arms:
        raise UserError("arms is missing: name -> strategy, settings, budgets")
    searches = config.searches()
    for search in searches.values():
        if search.strategy not in UNGUIDED and search.simulated is None:
            required(search, "reward")
    task = load_task(config.task)
    ids = [problem.id for problem in first(_split(task, config.split), config.limit)]
    loaded, unfinished = Loaded(), []
    for (name, budget), search in searches.items():
        if not _from_pool(config, name, budget) and not make_search(search, _folder(out, name, budget), loaded):
            unfinished.append(f"{name}@{budget}")
    if unfinished:
        raise UserError(
            f"{out}: other shards of {', '.join(unfinished)} are not finished; run this again when they are"
        )
    pools = {
        (name, budget): read_pools(_folder(out, name, budget), task)
        for name, budget in searches
        if not _from_pool(config, name, budget)
    }
    runs: dict[tuple[str, int], Run] = {}
    for name, budget in searches:
        largest = config.budgets_of(config.arms[name])[-1] if _from_pool(config, name, budget) else budget
        unguided = config.arms[name].strategy in UNGUIDED
        folder = _folder(out, name, largest)
        runs[name, budget] = measure(name, budget, largest, pools[name, largest], ids, folder, unguided, config.seed)
    # Independent samples: what others are measured by, and what tells how hard a problem is. Greedy decoding is none.
    pool = next((n for n, arm in config.arms.items() if arm.strategy == "best_of_n" and arm.temperature != 0), None)
    reference = config.reference or pool or next(iter(config.arms))
    records: list[dict[str, Any]] = []
    values: list[dict[str, Any]] = []

    def add(
        arm: str, metric: str, found: Mapping[str, float], ledger: Ledger, base: Mapping[str, float] | None = None
    ) -> None:
        some = [found[i] for i in ids]
        interval = paired_bootstrap(some, None if base is None else [base[i] for i in ids], seed=config.seed)
        records.append(record(arm, metric, interval, len(ids), config.seed, ledger))
        if base is None:
            values.append({"arm": arm, "metric": metric, "values": dict(found)})

    for (name, budget), run in runs.items():
        for rule in run.values:
            add(f"{rule}/{name}@{budget}", "accuracy", run.values[rule], run.ledgers[rule])
    matched: list[dict[str, Any]] = []
    easiness = _easiness(pools, pool, config) if pool is not None and config.levels else {}
    choices: dict[str, Any] = {}
    for budget in config.budgets_of(config.arms[reference]):
        for rule in ("best", "weighted"):
            base = runs[reference, budget]
            affordable: dict[str, dict[str, Run]] = {}
            for cost, (metric, paid) in MATCHED_BY.items():
                allowed = paid(base.ledgers[rule]) * (1 + config.slack)
                at = {name: within(runs, name, rule, allowed, paid) for name in config.arms}
                at[reference] = base
                found = affordable[cost] = {name: run for name, run in at.items() if run is not None}
                # An arm that is dearer at its least budget is told, as undefined, and not left out.
                records += [
                    record(f"{rule}/{name}~{budget}", metric, math.nan, len(ids), config.seed)
                    for name in config.arms
                    if name not in found
                ]
                for name, run in found.items():
                    arm = f"{rule}/{name}~{budget}"
                    add(arm, metric, run.values[rule], run.ledgers[rule])
                    if name != reference:
                        minus = f"{metric}_minus_{reference}"
                        add(arm, minus, run.values[rule], run.ledgers[rule], base.values[rule])
                    matched.append(
                        {
                            "cost": cost,
                            "rule": rule,
                            "arm": name,
                            "at": budget,
                            "budget": run.budget,
                            "allowed": allowed,
                        }
                    )
            found = affordable["flops"]
            for kind, easy in easiness.items():
                levels = difficulty_levels({i: easy.get(i, 0.0) for i in ids}, config.levels)
                chosen = compute_optimal({n: r.values[rule] for n, r in found.items()}, levels, seed=config.seed)
                arm = f"{rule}/compute_optimal_{kind}~{budget}"
                spent = _mean_ledger(found, chosen.choices, levels)
                add(arm, MATCHED, chosen.values, spent)
                add(arm, f"{MATCHED}_minus_{reference}", chosen.values, spent, base.values[rule])
                choices[f"{rule}, {kind}, {budget}"] = {
                    str(level): [chosen.choices.get((fold, level), "") for fold in (0, 1)]
                    for level in sorted(set(levels.values()))
                }
        if pool is not None and (rival := _votes_within(config, pools, runs, pool, budget, reference, ids, out)):
            add(f"majority/{pool}~{budget}", MATCHED, rival.values["majority"], rival.ledgers["majority"])
            matched.append(
                {
                    "cost": "flops",
                    "rule": "majority",
                    "arm": pool,
                    "at": budget,
                    "budget": rival.budget,
                    "allowed": None,
                }
            )
    by_level: list[dict[str, Any]] = []
    if "oracle" in easiness:
        levels = difficulty_levels({i: easiness["oracle"].get(i, 0.0) for i in ids}, config.levels)
        for level in sorted(set(levels.values())):
            group = [i for i in ids if levels[i] == level]
            for (name, budget), run in runs.items():
                mean = paired_bootstrap([run.values["weighted"][i] for i in group], seed=config.seed, resamples=1000)
                arm, metric = f"weighted/{name}@{budget}", f"accuracy_level_{level}"
                by_level.append(record(arm, metric, mean, len(group), config.seed, run.ledgers["weighted"]))
    law = _coverage(pools, pool, config) if pool is not None else None
    if law:
        n = len(ids)
        records += [
            record(f"pass/{pool}", f"coverage_law_{key}", law["law"].get(key, math.nan), n, config.seed)
            for key in ("a", "b", "rmse", "r2")
        ]
        for k, by_luck in zip(law["k"], law["chance"], strict=True):
            if (pool, k) in runs:
                records.append(record(f"chance/{pool}@{k}", "accuracy", by_luck, n, config.seed))
    details = {
        "reference": reference,
        "problems": len(ids),
        "runs": [
            {
                "arm": run.arm,
                "budget": run.budget,
                "accuracy": {rule: sum(found[i] for i in ids) / len(ids) for rule, found in run.values.items()},
                "flops": {rule: ledger.flops / len(ids) for rule, ledger in run.ledgers.items()},
                "tokens": run.ledgers["best"].generated_tokens / len(ids),
                "serial": run.serial_tokens,
                "ledger": run.ledgers["best"].to_json(),
                "about": run.about,
            }
            for run in runs.values()
        ],
        "matched": matched,
        "choices": choices,
        "coverage": law,
    }
    write_json(make_folder(out) / DETAILS, {"search": details})
    write_json(out / VALUES, values)
    drawn: dict[str, int] = {}
    for name, each in config.arms.items():
        budgets = [budget for budget in config.budgets_of(each) if not _from_pool(config, name, budget)]
        drawn[name] = max((budget for budget in budgets if budget <= LEGIBLE), default=budgets[0])
    trees = {f"{name}@{budget}": read_searches(_folder(out, name, budget)) for name, budget in drawn.items()}
    write_comparison(out, records + by_level, details, f"Search on {task.name}", trees)
    write_json(out / RESULTS, records + by_level)
    print(format_table([r for r in records if r["metric"] == "accuracy"]))
    print(f"\nresults: {out / RESULTS}\nreport:  {out / 'report.html'}")


def _folder(out: Path, name: str, budget: int) -> Path:
    return out / f"{name}@{budget}"


def _from_pool(config: options_search.Compare, name: str, budget: int) -> bool:
    """Whether an arm's budget is read off a larger pool of independent samples instead of being run."""
    arm = config.arms[name]
    return arm.strategy == "best_of_n" and budget < config.budgets_of(arm)[-1]


def read_pools(folder: Path, task: Task) -> dict[str, Pool]:
    """What a finished search found, problem by problem."""
    steps: dict[str, list[int]] = {}
    sound: dict[str, list[bool]] = {}
    solutions: dict[str, dict[tuple[str, ...], list[int]]] = {}
    for row in read_rows(folder, Solution):
        steps.setdefault(row.problem_id, []).append(len(row.steps))
        solutions.setdefault(row.problem_id, {}).setdefault(row.steps, []).append(len(row.token_ids))
        if isinstance(task, StepChecker):
            checks = task.check_steps(Problem(row.problem_id, row.prompt, row.gold), row.steps)
            sound.setdefault(row.problem_id, []).append(row.right and first_error(checks) is None)
    pools = {}
    for one in read_searches(folder):
        finals = one["finals"]
        pools[one["problem_id"]] = Pool(
            answers=[f["answer"] for f in finals],
            right=[f["outcome"] == "right" for f in finals],
            scores=[f["score"] for f in finals],
            chosen=one["chosen"],
            steps=steps[one["problem_id"]],
            distinct=[(len(tokens), tokens[0]) for tokens in solutions[one["problem_id"]].values()],
            gold=one["gold"],
            sound=sound.get(one["problem_id"], []),
            rounds=one["rounds"],
            serial_tokens=one.get("serial_tokens", 0),
        )
    return pools


def scored_share(pools: Iterable[Pool], k: int) -> float:
    """Share of the tokens of all different solutions that are among k samples of each pool, in expectation.

    A reward model reads equal solutions once, and the fewer samples the fewer of them are equal: k of n cost more than k / n.
    """
    whole = part = 0.0
    for pool in pools:
        n = len(pool.answers)
        for samples, tokens in pool.distinct:
            whole += tokens
            part += tokens * pass_at_k(n, samples, min(k, n))
    return part / whole if whole else 0.0


def measure(
    name: str, budget: int, largest: int, pools: Mapping[str, Pool], ids: Sequence[str], folder: Path, unguided: bool,
    seed: int,
) -> Run:  # fmt: skip
    """One arm at one budget, read off pools of `largest` samples. A problem without a row counts as wrong."""
    values: dict[str, dict[str, float]] = {}
    for rule in (*RULES, SOUND) if any(pool.sound for pool in pools.values()) else RULES:
        values[rule] = {}
        for i in ids:
            pool = pools.get(i)
            if pool is None:
                values[rule][i] = 0.0
            elif budget == largest:
                values[rule][i] = pool.credit(rule)
            else:
                values[rule][i] = pool.credit_of(rule, min(budget, len(pool.answers)), fold_seed(seed, i, budget))
    sizes = read_json(folder / ABOUT_FILE)["parameters"]
    ledger = Ledger(**read_about(folder)["ledger"])
    if budget < largest:
        ledger = scaled(ledger, budget / largest, scored_share(pools.values(), budget), sizes)
    votes = without_reward(ledger, sizes) if unguided else ledger
    some = list(pools.values())
    about = {
        "solutions": sum(len(p.answers) for p in some) / len(some) * budget / largest,
        "steps_of_the_chosen": sum(p.steps[p.chosen] for p in some) / len(some),
        "different_answers": sum(len({a for a in p.answers if a is not None}) for p in some) / len(some),
        "rounds": sum(p.rounds for p in some) / len(some),
    }
    waits = [p.serial_tokens if budget == largest else p.serial_of(min(budget, len(p.answers))) for p in some]
    ledgers = {rule: votes if rule in UNSCORED else ledger for rule in values}
    kept = about if budget == largest else {key: about[key] for key in ("solutions", "rounds")}
    return Run(name, budget, values, ledgers, sum(waits) / len(waits), kept)


def scaled(ledger: Ledger, share: float, scored: float, sizes: Mapping[str, int]) -> Ledger:
    """What a share of the independent samples of a pool would have cost: the prompt whole for both models, everything else in
    part, of what the reward model reads the part `scored`."""
    prompts = min(ledger.prefilled_tokens, ledger.reward_tokens)
    part = Ledger(
        generated_tokens=round(ledger.generated_tokens * share),
        prefilled_tokens=ledger.prefilled_tokens,
        reward_tokens=round(prompts + (ledger.reward_tokens - prompts) * scored),
        policy_calls=round(ledger.policy_calls * share),
        seconds=ledger.seconds * share,
    )
    part.flops = 2.0 * sizes["policy"] * (part.generated_tokens + part.prefilled_tokens)
    part.flops += 2.0 * sizes["reward"] * part.reward_tokens
    return part


def without_reward(ledger: Ledger, sizes: Mapping[str, int]) -> Ledger:
    """The ledger of a rule that asks no reward model."""
    rest = ledger.copy()
    rest.flops -= 2.0 * sizes["reward"] * rest.reward_tokens
    rest.reward_tokens = 0
    return rest


def within(
    runs: Mapping[tuple[str, int], Run], name: str, rule: str, allowed: float, paid: Callable[[Ledger], float]
) -> Run | None:
    """The most expensive run of an arm that costs no more than `allowed`; None if all cost more."""
    inside = [run for (n, _), run in runs.items() if n == name and paid(run.ledgers[rule]) <= allowed * (1 + 1e-9)]
    return max(inside, key=lambda run: paid(run.ledgers[rule]), default=None)


def _votes_within(
    config: options_search.Compare,
    pools: Mapping[tuple[str, int], Mapping[str, Pool]],
    runs: Mapping[tuple[str, int], Run],
    pool: str,
    budget: int,
    reference: str,
    ids: Sequence[str],
    out: Path,
) -> Run | None:
    """Majority among as many samples as the reference's cost buys without a reward model, as far as the pool reaches."""
    largest = config.budgets_of(config.arms[pool])[-1]
    allowed = runs[reference, budget].ledgers["best"].flops
    whole = runs[pool, largest].ledgers["majority"].flops
    folder = _folder(out, pool, largest)
    sizes = read_json(folder / ABOUT_FILE)["parameters"]
    ledger = Ledger(**read_about(folder)["ledger"])
    fixed = 2.0 * sizes["policy"] * ledger.prefilled_tokens
    if whole <= fixed or allowed <= fixed:
        return None
    k = min(largest, math.floor(largest * (allowed - fixed) / (whole - fixed) + 1e-9))
    return measure(pool, k, largest, pools[pool, largest], ids, folder, True, config.seed) if k >= 1 else None


def _easiness(
    pools: Mapping[tuple[str, int], Mapping[str, Pool]], pool: str, config: options_search.Compare
) -> dict[str, dict[str, float]]:
    """How easy each problem is: by its share of right samples, and by the mean score, which needs no reference answer."""
    samples = pools[pool, config.budgets_of(config.arms[pool])[-1]]
    easy = {"oracle": {i: sum(p.right) / len(p.right) for i, p in samples.items()}}
    own = config.arms[pool].reward
    if config.simulated is not None or (config.reward if own is None else own):
        easy["predicted"] = {i: sum(p.scores) / len(p.scores) for i, p in samples.items()}
    return easy


def _mean_ledger(found: Mapping[str, Run], choices: Mapping[tuple[int, int], str], levels: Mapping[str, int]) -> Ledger:
    """About what a choice by level costs: each level's share of problems at the mean cost of what was chosen for it."""
    total = Ledger()
    for level in set(levels.values()):
        names = [name for (_, at), name in choices.items() if at == level]
        share = sum(v == level for v in levels.values()) / len(levels) / len(names)
        for name in names:
            cost = found[name].ledgers["best"].to_json()
            parts = {key: value * share for key, value in cost.items()}
            total = total + Ledger(**{k: v if k in ("flops", "seconds") else round(v) for k, v in parts.items()})  # type: ignore[arg-type]
    return total


def _coverage(
    pools: Mapping[tuple[str, int], Mapping[str, Pool]], pool: str, config: options_search.Compare
) -> dict[str, Any]:
    """Coverage over k with the fitted law (None where it cannot be fitted), what luck alone would cover, and how many problems
    have which share right."""
    budgets = config.budgets_of(config.arms[pool])
    most = budgets[-1]
    samples = pools[pool, most]
    counts = [(len(p.right), sum(p.right)) for p in samples.values()]
    ks = [k for k in sorted({*log_spaced(most), *budgets}) if all(k <= n for n, _ in counts)]
    luck = answers_by_luck({i: p.answers for i, p in samples.items()}, {i: p.gold for i, p in samples.items()})
    values = [coverage(counts, k) for k in ks]
    law: dict[str, float] = {}
    try:
        fit = fit_power_law(ks, values)
        law = {"a": fit.a, "b": fit.b, "rmse": fit.rmse, "worst": fit.worst, "r2": fit.r2}
    except ValueError as error:
        print(f"coverage: no power law ({error})", flush=True)
    shares = [sum(1 for n, c in counts if i <= 10 * c / n < i + 1 or (i == 9 and c == n)) for i in range(10)]
    chance = [chance_coverage(list(luck.values()), k) for k in ks]
    found = {"k": ks, "coverage": values, "law": law, "chance": chance, "right_share_histogram": shares}
    if all(p.sound for p in samples.values()):
        sound = [(len(p.sound), sum(p.sound)) for p in samples.values()]
        found["sound"] = [coverage(sound, k) for k in ks]
    return found
