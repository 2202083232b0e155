"""How often does another batch size change a sample? Every sample has its own random numbers, so that only rounding can.

python bench/batch_rounding.py                                        # the lab policy, float32
python bench/batch_rounding.py --policy FOLDER --task '{kind: word_problems, folder: DATA}' --dtype bfloat16 --problems 16
"""

from __future__ import annotations

import argparse
from pathlib import Path

import yaml

import stepladder
from stepladder.basics import fold_seed
from stepladder.models.engine import Request, Sampling
from stepladder.models.loading import load_engine, load_policy_format
from stepladder.tasks.load import load_task

LAB = str(Path(stepladder.__path__[0]) / "models" / "lab_policy")
CHAIN = "{kind: chain, p: 7, min_steps: 3, max_steps: 6, sizes: {train: 20000, dev: 200, test: 500}}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", default=LAB)
    parser.add_argument("--task", default=CHAIN, help="the task as YAML")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--problems", type=int, default=256)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[512, 256, 64, 16])
    args = parser.parse_args()
    task = load_task(yaml.safe_load(args.task))
    problems = list(task.problems("test"))[: args.problems]
    found = {}
    for size in args.batch_sizes:
        engine = load_engine(args.policy, dtype=args.dtype, device="cpu", batch_size=size)
        step_format = load_policy_format(args.policy, engine.tokenizer, task.step_separator)
        requests = [
            Request(
                step_format.encode_prompt(engine.tokenizer, problem.prompt),
                tuple(fold_seed(0, problem.id, "solution", i) for i in range(args.samples)),
            )
            for problem in problems
        ]
        samples = engine.generate(requests, Sampling(args.max_new_tokens))
        found[size] = [sample.ids for row in samples for sample in row]
    first, *others = args.batch_sizes
    total, tokens = len(found[first]), sum(map(len, found[first]))
    print(f"{args.policy}, {args.dtype}: {total} samples of {tokens} tokens, against batches of {first}")
    for size in others:
        changed = sum(a != b for a, b in zip(found[first], found[size], strict=True))
        print(f"  batches of {size}: {changed} samples differ ({100 * changed / total:.2f} %)")


if __name__ == "__main__":
    main()
