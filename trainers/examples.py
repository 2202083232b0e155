"""Rows to batches: tokenised examples, their order and padding, and a count of what was kept and what was lost."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset, Sampler

from ..basics import UserError, fold_seed
from ..data_gen.store import read_rows
from ..models.loading import load_policy_format
from ..models.step_format import FILE_NAME, StepFormat
from .arguments import StepladderArguments


class Examples(Dataset):
    """Tokenised examples in memory, each a mapping with `input_ids`: one sequence, or those of both sides of a pair."""

    def __init__(self, items: Sequence[dict[str, Any]]) -> None:
        self.items = list(items)
        # A pair is as long as its longer side.
        self.lengths = [
            max(map(len, ids)) if ids and isinstance(ids[0], list) else len(ids)
            for ids in (item["input_ids"] for item in self.items)
        ]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.items[index]


class LikeLengths(Sampler[int]):
    """All indices once an epoch, shuffled, with like lengths beside each other; the order is a function of (seed, epoch).

    `pool` batches are sorted together. Where lengths tell something of the targets, as those of solutions that are trained up
    to their first error do, batches of one length are batches of one target: with a pool of 1 each batch is drawn at random
    and only sorted inside, so that its micro-batches, and the shares of the processes, are of like lengths.

    transformers' own length-grouped sampler draws from the global generator, so that a resumed epoch has another order.
    """

    def __init__(self, lengths: Sequence[int], batch: int, seed: int, *, group: bool = True, pool: int = 50) -> None:
        self.lengths, self.batch, self.seed, self.group, self.pool = lengths, batch, seed, group, pool
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.lengths)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(fold_seed(self.seed, "epoch", self.epoch) % 2**62)
        order = torch.randperm(len(self.lengths), generator=generator).tolist()
        if not self.group:
            return iter(order)
        size = self.batch * self.pool
        grouped = [
            i
            for start in range(0, len(order), size)
            for i in sorted(order[start : start + size], key=lambda j: self.lengths[j])
        ]
        batches = [grouped[s : s + self.batch] for s in range(0, len(grouped), self.batch)]
        # The short last batch stays last; the others are shuffled so that a step's length says nothing about its time.
        whole = [b for b in batches if len(b) == self.batch]
        rest = [b for b in batches if len(b) < self.batch]
        shuffled = torch.randperm(len(whole), generator=generator).tolist()
        return iter([i for b in [*(whole[k] for k in shuffled), *rest] for i in b])


def pad_batch(items: Sequence[dict[str, Any]], fill: dict[str, float]) -> dict[str, torch.Tensor]:
    """Tensors [B, longest] of the per-token fields in `fill`, padded on the right with its values, and `attention_mask`."""
    longest = max(len(item["input_ids"]) for item in items)
    batch = {}
    for name, value in fill.items():
        rows = [list(item[name]) + [value] * (longest - len(item[name])) for item in items]
        batch[name] = torch.tensor(rows)
    lengths = torch.tensor([len(item["input_ids"]) for item in items])
    batch["attention_mask"] = (torch.arange(longest) < lengths[:, None]).long()
    return batch


def pick_rows(rows: Sequence[Any], limit: int, seed: int) -> list[Any]:
    """`limit` rows drawn with the seed, in their order; all if `limit` is 0."""
    if not limit or limit >= len(rows):
        return list(rows)
    generator = torch.Generator().manual_seed(fold_seed(seed, "rows") % 2**62)
    return [rows[i] for i in sorted(torch.randperm(len(rows), generator=generator)[:limit].tolist())]


def picked(args: StepladderArguments, path: str, row_type: type) -> list[Any]:
    """The rows of a file or folder that are trained on, at most `args.max_rows`."""
    return pick_rows(read_rows(path, row_type), args.max_rows, args.seed)


# Makes an example of a row, or counts why it makes none.
MakeExample = Callable[[Any, Counter[str]], dict[str, Any] | None]


def read_examples(
    args: StepladderArguments, row_type: type, make: MakeExample, *, rows: Sequence[Any] | None = None
) -> tuple[Examples, Examples | None]:
    """Examples of `args.rows` (of `rows` if they were read already), and of `args.eval_rows` if they are given.

    Prints what was kept and what was lost. Raises UserError if nothing is left of one of them.
    """

    def examples(path: str, rows: Sequence[Any] | None = None) -> Examples:
        counts: Counter[str] = Counter()
        rows = picked(args, path, row_type) if rows is None else rows
        items = [item for row in rows if (item := make(row, counts)) is not None]
        report_counts(path, counts)
        if not items:
            told = ", ".join(f"{n} {what}" for what, n in counts.items())
            raise UserError(f"{path}: no row can be trained on ({told}; max_length {args.max_length})")
        return Examples(items)

    return examples(args.rows, rows), examples(args.eval_rows) if args.eval_rows else None


def counted(made: tuple[dict[str, Any] | None, str], counts: Counter[str]) -> dict[str, Any] | None:
    """The example of (example, what happened to its row), which is counted."""
    counts[made[1]] += 1
    return made[0]


def policy_format(args: StepladderArguments, tokenizer: Any, separator: str) -> StepFormat:
    """The step format of the policy `args.model`. Raises UserError for a reward model."""
    step_format = load_policy_format(args.model, tokenizer, separator)
    if step_format.head != "none":
        raise UserError(
            f"{args.model}: its step format says head: {step_format.head}, so it is a reward model and not a policy"
        )
    return step_format


def report_counts(what: str, counts: Mapping[str, int]) -> None:
    """Prints one line with what was kept and what was lost, from the first process only."""
    if int(os.environ.get("RANK", "0")) == 0:
        print(f"{what}: " + ", ".join(f"{n} {name}" for name, n in counts.items()), flush=True)


def check_rows_layout(args: StepladderArguments, step_format: StepFormat) -> None:
    """Raises UserError if a folder of rows has a step format that lays text out differently from the model's.

    Rows are text: to train another kind of model on them, give the file of rows instead of its folder.
    """
    for folder in (args.rows, args.eval_rows):
        if folder and Path(folder).is_dir() and Path(folder, FILE_NAME).is_file():
            check_layout(StepFormat.load(folder), step_format, folder)


def check_layout(rows_layout: StepFormat, model_layout: StepFormat, where: str) -> None:
    """Raises UserError if two step formats lay text out differently."""
    theirs, ours = rows_layout.layout(), model_layout.layout()
    for name in ours:
        if theirs[name] != ours[name]:
            raise UserError(
                f"{where}: the step format of the data has {name} {theirs[name]!r}, the model's has {ours[name]!r}; "
                "scores would be read at the wrong tokens"
            )
