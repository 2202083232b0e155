"""First errors: policy calls to locate one, by OmegaPRM's binary search and by Monte-Carlo labels of every step.

    python bench/first_error.py                                  # solutions of 16 steps, 8 continuations a prefix
    python bench/first_error.py --searches 8                     # trees that search 8 wrong rollouts of each problem
    python bench/first_error.py --p 11 --tolerance 1             # answers of which a wrong value often finds back: noisy labels
    python bench/first_error.py --policy lab --steps 7           # a model in place of the simulated policy

The search is that of `stepladder data omegaprm` with `doubt: 1`, and without it as published; the labels are those of
`stepladder data step_labels`, of the very rollouts that were searched, and again with `stop_early: hard`, which gives a prefix no
more continuations once its label is decided. A call is one sampled continuation. The search pays for its roots too, from which the
rollouts come and where a problem may turn out to have no wrong one; the labels do not pay for the solutions. A label is whether any
continuation of a prefix ends right, and the first error is the first step without one. All arms see the same continuations of the
same prefix, for equal seeds sample equally; each repetition has problems of its own. "first errors right" are those of the exact
checker; "labels right" counts every step, good before the error that was found and bad from there on.

The lab's policy writes 7 lines and cannot write 16. THE POLICY OF THE DEFAULT IS THEREFORE SIMULATED: it errs in each line with
`--error-rate`, writes another residue then, uniformly, and goes on from it. What its labels are worth is known in closed form
(tasks/chain.py): with probability of about 1/p a wrong value finds back, so that a small `--p` makes labels noisy. Calls do not
depend on how a continuation is made.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

from measure import Question, Work, bench

SEARCH, PAPER, LABELS, EARLY = "binary search", "without doubt", "every step", "every step, stopping early"
OPTIONS = {
    "policy": "", "steps": 16, "p": 101, "error_rate": 0.05, "problems": 200, "rollouts": 8, "searches": 1, "doubt": 1,
    "target": 3.0, "tolerance": 0.05,
}  # fmt: skip


def question(args: argparse.Namespace) -> Question:
    return Question(
        "first_error",
        f"First errors of solutions of {args.steps} steps, K = {args.rollouts}, "
        + ("the lab policy" if args.policy else "a simulated policy"),
        "policy calls a solution",
        (SEARCH, PAPER, LABELS, EARLY),
        {LABELS: args.target},
        less_is_better=True,
        tolerance=args.tolerance,
        note=f"The results that must be equal, to within {args.tolerance:g}, are the shares of first errors located rightly; "
        f"{PAPER} is a control.",
    )


def prepare(arm: str, args: argparse.Namespace) -> Callable[[], Work]:
    """Searches of problems, or labels of the rollouts that were searched."""
    from pathlib import Path

    import stepladder
    from stepladder.data_gen.growing import Roller, grow
    from stepladder.data_gen.omegaprm import Options, search_question
    from stepladder.data_gen.rows import Solution, Source
    from stepladder.data_gen.step_labels import StopRule, monte_carlo_labels
    from stepladder.models.engine import Sampling
    from stepladder.models.lab import lab_tokenizer
    from stepladder.models.loading import load_engine, load_policy_format
    from stepladder.models.step_format import StepFormat
    from stepladder.tasks.base import first_error
    from stepladder.tasks.chain import ChainArith

    lines = args.steps - 1  # the last step is the answer
    p = 7 if args.policy else args.p
    task = ChainArith(p=p, min_steps=lines, max_steps=lines, sizes={"test": 10 * args.problems})
    if args.policy:
        lab = str(Path(stepladder.__path__[0]) / "models" / "lab_policy")
        engine = load_engine(lab, device="cpu", batch_size=1024)
        step_format = load_policy_format(lab, engine.tokenizer, task.step_separator)
    else:
        tokenizer = lab_tokenizer(p - 1)
        engine, step_format = Slips(task, tokenizer, args.error_rate), StepFormat.for_policy(tokenizer, "\n")
    sampling = Sampling(8 * args.steps + 8)
    repetitions = iter(range(10))
    told: Counter[str] = Counter()

    doubt = 0 if arm == PAPER else args.doubt

    def searched(repetition: int) -> tuple[dict[str, Any], list[Any]]:
        first = repetition * args.problems
        problems = task.problems("test")[first : first + args.problems]
        options = Options(rollouts=args.rollouts, filter_rollouts=0, search_limit=args.searches, doubt=doubt)
        roller = Roller(engine, task, step_format, sampling, repetition)
        found = grow(roller, problems, [search_question(roller.cut, options) for _ in problems])
        spans = [
            (problem, rollout, roller.cut(rollout.ids), bad if bad == good + 1 else None)
            for problem, one in zip(problems, found, strict=True)
            for rollout, good, bad in one.spans
        ]
        return {problem.id: problem for problem in problems}, spans

    def work() -> Work:
        repetition = next(repetitions)
        before = engine.ledger.copy()
        problems, spans = searched(repetition)
        located = [None if bad is None else bad - 1 for *_, bad in spans]
        if arm in (LABELS, EARLY):
            before = engine.ledger.copy()
            source = Source("policy", engine.name, task.name, repetition)
            rows = [
                Solution(
                    problem.id, problem.prompt, problem.answer, number, steps, "", None, rollout.outcome, "eos",
                    rollout.ids, ends, 0.0, source,
                )
                for number, (problem, rollout, (steps, ends), _) in enumerate(spans)
            ]  # fmt: skip
            labels = monte_carlo_labels(
                engine, task, step_format, rows, problems, rollouts=args.rollouts, sampling=sampling, seed=repetition,
                policy="policy", stop=StopRule() if arm == EARLY else None,
            ).rows  # fmt: skip
            located = [next((t for t, c in enumerate(row.n_correct[1:]) if not c), None) for row in labels]
        exact = [first_error(task.check_steps(problem, steps)) for problem, _, (steps, _), _ in spans]
        spent = engine.ledger - before
        told["solutions"] += len(spans)
        told["right"] += sum(one == other for one, other in zip(located, exact, strict=True))
        for (*_, (steps, _), _), one, other in zip(spans, located, exact, strict=True):
            first, error = (len(steps) if t is None else t for t in (one, other))
            told["steps"] += len(steps)
            told["steps right"] += len(steps) - abs(first - error)
        right = told["right"] / told["solutions"]
        extra = {
            "first errors right": right,
            "labels right": told["steps right"] / told["steps"],
            "solutions in all": told["solutions"],
        }
        return Work(
            units=len(spans),
            tokens=spent.generated_tokens,
            same=None if arm == PAPER else right,
            cost=spent.policy_calls,
            extra=extra,
        )

    return work


class Slips:
    """An engine without a model: it writes chain arithmetic and errs in each line with a probability, uniformly."""

    name, context, eos_ids = "simulated", 2**31, ()

    def __init__(self, task: Any, tokenizer: Any, error_rate: float) -> None:
        from stepladder.models.ledger import Ledger

        self.task, self.tokenizer, self.error_rate, self.ledger = task, tokenizer, error_rate, Ledger()
        self.words = tokenizer.get_vocab()

    def generate(self, requests: Any, sampling: Any) -> list[list[Any]]:
        """A sample for each seed of each request."""
        return [list(self._samples(request)) for request in requests]

    def _samples(self, request: Any) -> Iterator[Any]:
        import random

        from stepladder.models.engine import Sample, StopReason
        from stepladder.tasks.chain import apply

        prompt, *lines = self.tokenizer.decode(request.prefix, skip_special_tokens=True).strip().split("\n")
        start, operations = self.task.parse(SimpleNamespace(prompt=prompt))
        before = int(lines[-1].split()[-1]) if lines else start
        for seed in request.seeds:
            rng, value, words = random.Random(seed), before, list[str]()
            for operation, operand in operations[len(lines) :]:
                after = apply(value, operation, operand, self.task.p)
                if rng.random() < self.error_rate:
                    after = (after + rng.randrange(1, self.task.p)) % self.task.p
                words += [str(value), operation, str(operand), "=", str(after), "\n"]
                value = after
            if len(lines) <= len(operations):
                words += ["Answer:", str(value)]
            ids = (*(self.words[word] for word in words), self.tokenizer.eos_token_id)
            self.ledger.add_policy(0, generated=len(ids), calls=1)
            yield Sample(ids, (0.0,) * len(ids), StopReason.EOS)


if __name__ == "__main__":
    bench(question, prepare, **OPTIONS)
