"""Reward models: step scores of solutions, all steps in one forward, and only the new ones when a solution grows."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch

from ..basics import UserError
from .formats import foreign_format
from .heads import HeadedModel, load_scoring_model
from .ledger import Ledger
from .loading import load_tokenizer, pick_device
from .prefix_cache import PrefixCache, cache_keyword, row_of, stack_left_padded, supports_prefix_cache, to_dynamic_cache
from .step_format import Encoded, StepFormat


def aggregate(scores: Sequence[float], how: str) -> float:
    """One number from step scores: last, min, prod or mean. An empty solution scores 0."""
    if not scores:
        return 0.0
    if how == "last":
        return scores[-1]
    if how == "min":
        return min(scores)
    if how == "prod":
        return math.prod(scores)
    if how == "mean":
        return sum(scores) / len(scores)
    raise ValueError(f"aggregation must be last, min, prod or mean, found {how!r}")


@runtime_checkable
class StepScorer(Protocol):
    """Whatever gives scores to the steps of solutions, higher is better: a reward model here, a served one, a critic."""

    name: str
    step_format: Any  # what the scores mean (label_kind) and how they become one number (aggregation)
    ledger: Ledger

    def score(self, solutions: Sequence[tuple[str, Sequence[str]]]) -> list[list[float]]:
        """Step scores [B][T_b] of (prompt, steps) pairs, in the order asked."""
        ...


class ValueScorer(StepScorer, Protocol):
    """A scorer whose scores are values in (0, 1), of the empty prefix too."""

    def score_with_root(self, solutions: Sequence[tuple[str, Sequence[str]]]) -> list[list[float]]:
        """As `score`, with the score of the empty prefix in front: [B][1 + T_b]."""
        ...


class RewardModel:
    """Scores in (0, 1) at the end of each step: outcome, process and value models alike.

    `model` gives logits at every position, [B, S, 1] (read by a sigmoid) or [B, S, 2] (read by a softmax, at
    step_format.positive_class): a token-classification model, or a `HeadedModel` for the layouts of others. With `cache`, keys
    and values of what was scored are kept, and a solution that grew by a step encodes only that step.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        step_format: StepFormat,
        *,
        name: str = "",
        batch_tokens: int = 16384,
        cache: PrefixCache | None = None,
        ledger: Ledger | None = None,
    ) -> None:
        if step_format.head == "none":
            raise _is_a_policy(name)
        labels = model.classes if isinstance(model, HeadedModel) else model.config.num_labels
        if labels != step_format.classes:
            raise UserError(f"{name}: the step format has a {step_format.head} head, the model has {labels} labels")
        self.model, self.tokenizer, self.step_format, self.name = model.train(False), tokenizer, step_format, name
        self.batch_tokens = batch_tokens
        self.cache = cache if cache is not None and supports_prefix_cache(model) else None
        self.ledger = ledger or Ledger()
        self.parameters = sum(p.numel() for p in model.parameters())
        self._cache_keyword = cache_keyword(getattr(model, "backbone", model))
        self.context = int(getattr(model.config, "max_position_embeddings", 0) or 2**31)
        self.cut_steps = 0  # steps that did not fit into the context and have no score of their own

    @classmethod
    def load(
        cls,
        path: str,
        *,
        dtype: str = "float32",
        device: str = "auto",
        keep_prefixes: bool = False,
        format: str | StepFormat = "",
    ) -> RewardModel:
        """The reward model in a checkpoint folder (or hub id) that has a step_format.json.

        A model of others has none: `format` names its layout (`qwen-prm`, `math-shepherd` ..., see docs/formats.md) or is a step
        format, as `foreign_format` makes one.
        """
        if isinstance(format, StepFormat):
            step_format = format
        elif format:
            step_format = foreign_format(path, format)
        else:
            step_format = StepFormat.load(path)
        if step_format.head == "none":
            raise _is_a_policy(path)
        model = load_scoring_model(path, step_format, dtype=dtype).to(pick_device(device))
        cache = PrefixCache() if keep_prefixes else None
        return cls(model, load_tokenizer(path), step_format, name=path, cache=cache)

    def score(self, solutions: Sequence[tuple[str, Sequence[str]]]) -> list[list[float]]:
        """Step scores [B][T_b] of (prompt, steps) pairs, in the order asked.

        Steps beyond the model's context get the score of the last step that fits (0 if none does) and are counted in
        `cut_steps`: a solution that is too long is judged by what could be read.
        """
        return [scores[len(scores) - len(steps) :] for scores, (_, steps) in self._each(solutions, root=False)]

    def score_with_root(self, solutions: Sequence[tuple[str, Sequence[str]]]) -> list[list[float]]:
        """As `score`, with the score of the empty prefix in front: [B][1 + T_b]."""
        return [scores for scores, _ in self._each(solutions, root=True)]

    def _each(
        self, solutions: Sequence[tuple[str, Sequence[str]]], root: bool
    ) -> list[tuple[list[float], tuple[str, Sequence[str]]]]:
        encoded = self.step_format.encode_all(self.tokenizer, solutions, root=root)
        read = iter(self.score_encoded([one for parts in encoded for one in parts]))
        scores = [[score for _ in parts for score in next(read)] for parts in encoded]
        return list(zip(scores, solutions, strict=True))

    @torch.inference_mode()
    def score_encoded(self, solutions: Sequence[Encoded]) -> list[list[float]]:
        """Scores at `read_at` of each, from token ids: the root's first where it is there. Equal solutions are computed once.

        With a cache a prompt that several solutions share, and a solution that others extend, are encoded before them.
        """
        if self.cache is not None and (first := _begun_by_several(solutions, self.cache)):
            self.score_encoded(first)
        results: list[list[float]] = [[] for _ in solutions]
        jobs = []
        first_of: dict[Encoded, int] = {}
        for index, one in enumerate(solutions):
            if first_of.setdefault(one, index) != index:
                continue
            ends = one.read_at
            fitting = [e for e in ends if e < self.context]
            self.cut_steps += sum(e >= self.context for e in one.step_ends)
            if not fitting:
                results[index] = [0.0] * len(ends)
                continue
            ids = one.ids[: fitting[-1] + 1]
            known, entry = self.cache.longest(ids, len(ids)) if self.cache is not None else (0, None)
            # `extra` maps positions to scores: equal ids may be cut into other steps, whose ends were not read.
            if entry is not None and not all(e in entry.extra for e in fitting if e < known):
                known, entry = 0, None
            if entry is not None and known == len(ids):
                read = [entry.extra[e] for e in fitting]
                results[index] = read + [read[-1]] * (len(ends) - len(read))
                continue
            jobs.append((index, ids, fitting, len(ends), known, entry))
        jobs.sort(key=lambda job: (len(job[1]) - job[4], len(job[1]), job[0]))
        with self.ledger.timed():
            while jobs:
                size, widest = 0, 0
                for job in jobs:
                    widest = max(widest, len(job[1]))
                    if size and widest * (size + 1) > self.batch_tokens:
                        break
                    size += 1
                self._score_batch(jobs[:size], results)
                jobs = jobs[size:]
        return [results[first_of[one]] for one in solutions]

    def _score_batch(
        self, jobs: Sequence[tuple[int, tuple[int, ...], list[int], int, int, Any]], results: list[list[float]]
    ) -> None:
        past = stack_left_padded([entry for *_, entry in jobs])
        old = 0 if past is None else past.shape[3]
        new = max(len(ids) - known for _, ids, _, _, known, _ in jobs)
        tokens = torch.full((len(jobs), new), self.tokenizer.pad_token_id or 0)
        positions = torch.zeros_like(tokens)
        mask = torch.zeros(len(jobs), old + new, dtype=torch.long)
        for row, (_, ids, _, _, known, _) in enumerate(jobs):
            fresh = len(ids) - known
            tokens[row, :fresh] = torch.tensor(ids[known:])
            positions[row, :fresh] = torch.arange(known, len(ids))
            mask[row, old - known : old + fresh] = 1
        device = self.model.device
        # A single forward over right-padded new tokens; what is behind a row's last token is masked and never read.
        cache = to_dynamic_cache(past, self.model.config) if self.cache is not None else None
        logits = self.model(
            input_ids=tokens.to(device),
            attention_mask=mask.to(device),
            position_ids=positions.to(device),
            use_cache=cache is not None,
            **{self._cache_keyword: cache},
        ).logits
        scores = self._probability(logits.float()).cpu()
        self.ledger.add_reward(self.parameters, sum(len(ids) - known for _, ids, _, _, known, _ in jobs))
        for row, (index, ids, fitting, wanted, known, entry) in enumerate(jobs):
            score_at = dict(entry.extra) if entry is not None else {}
            score_at.update((e, scores[row, e - known].item()) for e in fitting if e >= known)
            read = [score_at[e] for e in fitting]
            results[index] = read + [read[-1]] * (wanted - len(read))
            if self.cache is not None and cache is not None:
                columns = mask[row].nonzero().squeeze(-1).to(device)
                keys_values = row_of(cache, row, columns)
                # A search that looks ahead, or refines a draft, goes on from within what was scored.
                for end in fitting:
                    if known <= end < len(ids) - 1:
                        inside = {e: score for e, score in score_at.items() if e <= end}
                        self.cache.put(ids[: end + 1], keys_values[:, :, : end + 1], inside)
                self.cache.put(ids, keys_values, score_at)

    def _probability(self, logits: torch.Tensor) -> torch.Tensor:
        good, offset = self.step_format.positive_class or 0, self.step_format.offset
        if self.step_format.label_kind == "ranking":
            # Only the order counts, and nothing holds these logits near 0: in single precision high ones would tie at 1.
            logits = logits.double()
        if self.step_format.classes == 1:
            return (logits.squeeze(-1) + offset).sigmoid()
        if offset:
            return (logits[..., good] - logits[..., 1 - good] + offset).sigmoid()
        return logits.softmax(-1)[..., good]

    def save(self, folder: str | Path) -> None:
        """Writes the model, the tokenizer and the step format to `folder`."""
        if isinstance(self.model, HeadedModel):
            raise UserError(f"{self.name}: a model in the layout of another project is written by `stepladder export`")
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        self.step_format.save(folder)


def _is_a_policy(name: str) -> UserError:
    return UserError(f"{name}: its step format says head: none, so it is a policy and not a reward model")


def _begun_by_several(solutions: Sequence[Encoded], cache: PrefixCache) -> list[Encoded]:
    """What others of the solutions begin with: new prompts of more than one of them, and solutions that another one extends."""
    distinct = [one for one in dict.fromkeys(solutions) if one.rooted]
    new = [one for one in distinct if cache.longest(one.ids, len(one.ids))[0] < one.prompt_length]
    prompts = Counter((one.ids[: one.prompt_length], one.prompt_length) for one in new)
    inner = {one.ids[: end + 1] for one in distinct for end in (one.root, *one.step_ends) if end + 1 < len(one.ids)}
    shared = [Encoded(ids, length, ()) for (ids, length), count in prompts.items() if count > 1]
    return list(dict.fromkeys([*shared, *(one for one in distinct if one.ids in inner)]))
