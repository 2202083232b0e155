"""Monte-Carlo labels: labelled steps a second, beside plain `generate` one problem at a time and in large sorted batches.

    python bench/labels.py                                       # the lab policy, chains of 8 steps, 8 continuations a prefix
    python bench/labels.py --policy FOLDER --task '{kind: word_problems, folder: DATA}' --dtype bfloat16 --problems 24
        --batch-size 128 --max-new-tokens 48

All arms continue every prefix of the same solutions, K copies each, and check every answer. The plain arms sample by
`model.generate` (its own random numbers: shares of right answers agree only on average, see "right"). "one problem at a time" gives
it all prefixes of a solution at once, "one prefix at a time" one after another; both do a part of the problems, as their rate does
not depend on how many there are.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from measure import Question, Work, bench

CHAIN = "{kind: chain, p: 7, min_steps: 8, max_steps: 8, sizes: {train: 20000, dev: 200, test: 500}}"
OPTIONS = {
    "policy": "", "task": CHAIN, "dtype": "float32", "problems": 200, "alone": 16, "rollouts": 8, "max_new_tokens": 64,
    "batch_size": 256, "problem_target": 8.0, "sorted_target": 1.5,
}  # fmt: skip
OURS, PREFIX, PROBLEM, SORTED = "stepladder", "one prefix at a time", "one problem at a time", "sorted batches"


def question(args: argparse.Namespace) -> Question:
    asks = f"Monte-Carlo labels, K = {args.rollouts}, {Path(args.policy).name or 'the lab policy'}"
    targets = {PREFIX: args.problem_target, PROBLEM: args.problem_target, SORTED: args.sorted_target}
    return Question(
        "labels", asks, "labelled steps a second", (OURS, PREFIX, PROBLEM, SORTED), targets, dtype=args.dtype
    )


def prepare(arm: str, args: argparse.Namespace) -> Callable[[], Work]:
    """Solutions of the policy itself; the work labels all their prefixes."""
    import torch
    import yaml

    import stepladder
    from stepladder.data_gen.solutions import sample_solutions
    from stepladder.data_gen.step_labels import monte_carlo_labels
    from stepladder.models.engine import Sampling
    from stepladder.models.loading import load_engine, load_policy_format
    from stepladder.tasks.load import load_task

    policy = args.policy or str(Path(stepladder.__path__[0]) / "models" / "lab_policy")
    task = load_task(yaml.safe_load(args.task))
    engine: Any = load_engine(policy, dtype=args.dtype, device="cpu", batch_size=args.batch_size)
    step_format = load_policy_format(policy, engine.tokenizer, task.step_separator)
    alone = arm in (PREFIX, PROBLEM)
    problems = list(task.problems("test"))[: min(args.problems, args.alone) if alone else args.problems]
    by_id = {problem.id: problem for problem in problems}
    sampling = Sampling(args.max_new_tokens)
    solutions = sample_solutions(
        engine, task, step_format, problems, samples=1, sampling=sampling, seed=0, policy="policy"
    ).rows
    engine.ledger = type(engine.ledger)()

    def label(rows: Any) -> Work:
        found = monte_carlo_labels(
            engine, task, step_format, rows, by_id, rollouts=args.rollouts, sampling=sampling, seed=1, policy="policy"
        )
        counts = [(c, n) for row in found.rows for c, n in zip(row.n_correct[:-1], row.n_rollouts[:-1], strict=True)]
        return Work(
            units=len(counts),
            tokens=found.ledger.generated_tokens,
            flops=found.ledger.flops,
            extra={"right": sum(c for c, _ in counts) / sum(n for _, n in counts), "prefixes": len(counts)},
        )

    tokenizer, model = engine.tokenizer, engine.model

    def generate(prefixes: list[tuple[Any, tuple[int, ...], tuple[int, ...]]]) -> tuple[int, int]:
        """(right answers, tokens generated) of K continuations of each (problem, prompt, ids behind it)."""
        longest = max(len(prompt) + len(ids) for _, prompt, ids in prefixes)
        tokens = torch.full((len(prefixes), longest), tokenizer.pad_token_id)
        mask = torch.zeros_like(tokens)
        for row, (_, prompt, ids) in enumerate(prefixes):
            size = len(prompt) + len(ids)
            tokens[row, longest - size :], mask[row, longest - size :] = torch.tensor(prompt + ids), 1
        with torch.inference_mode():
            out = model.generate(
                input_ids=tokens, attention_mask=mask, do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
                num_return_sequences=args.rollouts, max_new_tokens=args.max_new_tokens,
                pad_token_id=tokenizer.pad_token_id, eos_token_id=list(engine.eos_ids),
            )[:, longest:]  # fmt: skip
        right = count = 0
        texts = [list(ids) for _, _, ids in prefixes for _ in range(args.rollouts)]
        for row, (new, before) in enumerate(zip(out.tolist(), texts, strict=True)):
            ended = next((i + 1 for i, token in enumerate(new) if token in engine.eos_ids), len(new))
            text = tokenizer.decode(before + new[:ended], skip_special_tokens=True)
            right += task.verify(prefixes[row // args.rollouts][0], text).right
            count += ended
        return right, count

    def plain(rows: Any) -> Work:
        asked = []
        for row in rows:
            prompt = step_format.encode_prompt(tokenizer, row.prompt)
            starts = (0, *row.step_ends[:-1])
            asked.append([(by_id[row.problem_id], prompt, row.token_ids[:start]) for start in starts if row.steps])
        flat = [prefix for one in asked for prefix in one]
        if arm == PREFIX:
            batches = [[prefix] for prefix in flat]
        elif arm == PROBLEM:
            batches = [one for one in asked if one]
        else:
            flat.sort(key=lambda one: len(one[1]) + len(one[2]))
            size = max(args.batch_size // args.rollouts, 1)
            batches = [flat[i : i + size] for i in range(0, len(flat), size)]
        right = tokens = 0
        for batch in batches:
            found = generate(batch)
            right, tokens = right + found[0], tokens + found[1]
        encoded = sum(len(prompt) + len(ids) for _, prompt, ids in flat) * args.rollouts
        flops = 2.0 * engine.parameters * (tokens + encoded)
        extra = {"right": right / (len(flat) * args.rollouts), "prefixes": len(flat)}
        return Work(units=len(flat), tokens=tokens, flops=flops, extra=extra)

    torch.manual_seed(0)
    work = label if arm == OURS else plain
    work(solutions[:1])  # once, to warm up
    return lambda: work(solutions)


if __name__ == "__main__":
    bench(question, prepare, **OPTIONS)
