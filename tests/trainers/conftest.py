"""What the tests of the trainers share: a tiny policy on disk and rows."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from stepladder.config import build
from stepladder.data_gen.rows import Dialogue, Message, Node, Pair, Solution, Source, StepLabels, Tree
from stepladder.data_gen.store import write_rows
from stepladder.models.step_format import StepFormat
from stepladder.trainers import dpo, orm, prm, ranking, sft, value

SOURCE = Source("policy", "engine", "chain", 0)
KINDS = {
    "prm": (prm.PRMArguments, prm.train),
    "orm": (orm.ORMArguments, orm.train),
    "sft": (sft.SFTArguments, sft.train),
    "ranking": (ranking.RankingArguments, ranking.train),
    "value": (value.ValueArguments, value.train),
    "dpo": (dpo.DPOArguments, dpo.train),
}


@pytest.fixture(scope="session")
def policy_folder(tmp_path_factory: pytest.TempPathFactory, lab_words: Any, tiny_policy: Callable[..., Any]) -> Path:
    """A checkpoint of a random one-layer policy of width 16, with tokenizer and step format."""
    folder = tmp_path_factory.mktemp("policy")
    tiny_policy(lab_words, width=16, layers=1, heads=2).save_pretrained(folder)
    lab_words.save_pretrained(folder)
    StepFormat.for_policy(lab_words, "\n").save(folder)
    return folder


def steps_of(rng: random.Random, count: int) -> tuple[str, ...]:
    return tuple(f"{rng.randrange(13)} + {rng.randrange(13)} = {rng.randrange(13)}" for _ in range(count))


def labels_row(
    number: int, steps: Sequence[str], correct: Sequence[int], rollouts: Sequence[int] | int = 10, **fields: Any
) -> StepLabels:
    """Step labels with `correct` of `rollouts` right endings after each step; nothing is known about the empty prefix."""
    each = (rollouts,) * len(steps) if isinstance(rollouts, int) else tuple(rollouts)
    known: dict[str, Any] = {
        "prompt": f"Start {number % 13} ; + 5", "gold": "1", "sample": 0, "label_source": "monte_carlo", "outcome": "right",
        "first_error": None, "first_error_known": False, "source": SOURCE, **fields,
    }  # fmt: skip
    return StepLabels(
        problem_id=f"p{number}", steps=tuple(steps), n_correct=(0, *correct), n_rollouts=(0, *each), **known
    )


def solution_row(number: int, steps: Sequence[str], outcome: str, **fields: Any) -> Solution:
    known: dict[str, Any] = {"prompt": f"Start {number % 13} ; + 5", **fields}
    return Solution(
        problem_id=f"p{number}", gold="1", sample=0, steps=tuple(steps), text="\n".join(steps), answer="1", outcome=outcome,
        stop="eos", token_ids=(), step_ends=(), logprob=0.0, source=SOURCE, **known,
    )  # fmt: skip


def dialogue_row(number: int, *messages: Message) -> Dialogue:
    return Dialogue(f"p{number}", "solve", messages, "{}", SOURCE)


def pair_row(
    number: int,
    prefix: Sequence[str],
    chosen: Sequence[str],
    rejected: Sequence[str],
    rewards: tuple[float, float] = (1.0, 0.0),
    **fields: Any,
) -> Pair:
    """A pair of finished solutions, or of steps behind a prefix."""
    known: dict[str, Any] = {
        "prompt": f"Start {number % 13} ; + 5", "reward_chosen": rewards[0], "reward_rejected": rewards[1],
        "n_chosen": 1, "n_rejected": 1, "chosen_finished": not prefix, "rejected_finished": not prefix, "source": SOURCE, **fields,
    }  # fmt: skip
    return Pair(problem_id=f"p{number}", prefix=tuple(prefix), chosen=tuple(chosen), rejected=tuple(rejected), **known)


def path_row(number: int, steps: Sequence[str], values: Sequence[float | None], outcome: str, **fields: Any) -> Tree:
    """A path of a search tree with `values` of the root and of each step."""
    known: dict[str, Any] = {"prompt": f"Start {number % 13} ; + 5", **fields}
    nodes = [
        Node(i - 1, step, 0, 0, int(v is not None), v, outcome if i == len(steps) else None, 0.0)
        for i, (step, v) in enumerate(zip(["", *steps], values, strict=True))
    ]
    return Tree(problem_id=f"p{number}", gold="1", nodes=tuple(nodes), source=SOURCE, **known)


def some_rows(kind: str, count: int, seed: int = 0, longest: int = 6) -> list[Any]:
    """Rows of a trainer with lengths that differ."""
    rng = random.Random(seed)
    made: list[Any] = []
    for number in range(count):
        steps = steps_of(rng, rng.randint(1, longest))
        if kind == "prm":
            made.append(labels_row(number, steps, [rng.randint(0, 10) for _ in steps]))
        elif kind == "orm":
            made.append(solution_row(number, steps, rng.choice(["right", "wrong"])))
        elif kind == "ranking":
            made.append(pair_row(number, steps[:1], steps_of(rng, rng.randint(1, longest)), steps_of(rng, 2)))
        elif kind == "value":
            values = [rng.uniform(-1, 1) for _ in range(len(steps) + 1)]
            made.append(path_row(number, steps, values, rng.choice(["right", "wrong"])))
        elif kind == "dpo":
            prefix = steps_of(rng, rng.randint(0, 2))
            counts = {"n_chosen": rng.randint(1, 9), "n_rejected": rng.randint(0, 5)}
            made.append(pair_row(number, prefix, steps, steps_of(rng, rng.randint(1, longest)), **counts))
        else:
            reply = Message("assistant", "".join(step + "\n" for step in steps), train=True)
            made.append(dialogue_row(number, Message("user", f"Start {number % 13} ; + 5"), reply))
    return made


@pytest.fixture(scope="session")
def rows() -> SimpleNamespace:
    return SimpleNamespace(
        labels=labels_row, solution=solution_row, dialogue=dialogue_row, pair=pair_row, path=path_row, some=some_rows
    )


@pytest.fixture
def settings(tmp_path: Path, policy_folder: Path) -> Callable[..., dict[str, Any]]:
    """Writes rows into a folder, and gives the settings of a short training on them."""

    def make(kind: str, training_rows: Sequence[Any] | None = None, **over: Any) -> dict[str, Any]:
        folder = tmp_path / f"{kind}_rows"
        write_rows(folder, some_rows(kind, 16) if training_rows is None else training_rows)
        return {
            "model": str(policy_folder), "rows": str(folder), "output_dir": str(tmp_path / "out"), "seed": 1, "max_steps": 4,
            "learning_rate": 0.01, "per_device_train_batch_size": 8, "logging_steps": 1, "disable_tqdm": True,
            "save_strategy": "no", "use_cpu": True, **over,
        }  # fmt: skip

    return make


@pytest.fixture(scope="session")
def train() -> Callable[..., SimpleNamespace]:
    """Trains in this process: (kind, settings) -> metrics, the lines of metrics.jsonl and the output folder."""

    def run(kind: str, values: dict[str, Any]) -> SimpleNamespace:
        config, function = KINDS[kind]
        metrics = function(build(config, values))
        out = Path(values["output_dir"])
        return SimpleNamespace(metrics=metrics, lines=lines_of(out), out=out)

    return run


def lines_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
