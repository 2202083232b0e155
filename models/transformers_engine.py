"""The embedded engine: a transformers causal language model on any device, sampled in batches across problems."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .decoding import decoder_of
from .engine import Request, Sample, Sampling, StopReason
from .ledger import Ledger
from .prefix_cache import (
    Entry,
    PrefixCache,
    cache_keyword,
    row_of,
    stack_left_padded,
    supports_prefix_cache,
    to_dynamic_cache,
)
from .sampling import draw, uniforms


class TransformersEngine:
    """Samples from `model` in batches of up to `batch_size` sequences.

    Requests are sorted by length, a prefix is encoded once for all its samples, so is every token that several of them have in
    common, prefixes of one another are encoded once (keys and values of up to `share_bytes` are kept during a call), and finished
    sequences leave the batch. Every sample has its own random numbers, so that batch composition can change
    it only through floating-point rounding. The ledger counts each sample's tokens, shared or not. With `cache`, keys and values of
    what was sampled are kept, and a request that extends a known prefix encodes only the rest.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        name: str = "",
        batch_size: int = 256,
        cache: PrefixCache | None = None,
        ledger: Ledger | None = None,
        share_bytes: int = 2**30,
    ) -> None:
        self.model = model.train(False)
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        self.cache = cache if cache is not None and supports_prefix_cache(model) else None
        self.ledger = ledger or Ledger()
        self.name = name or f"transformers:{model.name_or_path}:{str(model.dtype).removeprefix('torch.')}"
        self.parameters = sum(p.numel() for p in model.parameters())
        self._cache_keyword = cache_keyword(model)
        self.context = int(getattr(model.config, "max_position_embeddings", 0) or 2**31)
        eos = model.generation_config.eos_token_id if model.generation_config is not None else None
        eos = tokenizer.eos_token_id if eos is None else eos
        self.eos_ids = tuple(eos) if isinstance(eos, (list, tuple)) else (() if eos is None else (eos,))
        self.share_bytes = share_bytes
        self._extended: dict[tuple[int, ...], Entry] = {}  # prefix -> keys and values of one that begins with it
        self._scanners: dict[tuple[str, ...], StopScanner] = {}

    @torch.inference_mode()
    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[list[Sample]]:
        """Samples [len(requests)][len(request.seeds)], in the order asked."""
        results: list[list[Sample | None]] = [[None] * len(r.seeds) for r in requests]
        with self.ledger.timed():
            self._encode_extended([request.prefix for request in requests if request.seeds])
            for batch in self._batches(requests):
                self._run_batch(requests, batch, sampling, results)
            self._extended.clear()
        return results  # type: ignore[return-value]

    def _batches(self, requests: Sequence[Request]) -> list[list[tuple[int, int, int]]]:
        """Lists of (request, first seed, end seed) with at most `batch_size` sequences each; like lengths together."""
        order = sorted(range(len(requests)), key=lambda i: (len(requests[i].prefix), i))
        batches: list[list[tuple[int, int, int]]] = []
        room = 0
        for index in order:
            first, total = 0, len(requests[index].seeds)
            while first < total:
                # A request goes whole into a batch if it can: its prefix is then encoded once.
                if room == 0 or (total - first > room and room < self.batch_size):
                    batches.append([])
                    room = self.batch_size
                end = min(total, first + room)
                batches[-1].append((index, first, end))
                room -= end - first
                first = end
        return batches

    def _run_batch(
        self,
        requests: Sequence[Request],
        batch: list[tuple[int, int, int]],
        sampling: Sampling,
        results: list[list[Sample | None]],
    ) -> None:
        for index, first, end in batch:
            if len(requests[index].prefix) >= self.context or not requests[index].prefix:
                results[index][first:end] = [Sample((), (), StopReason.CONTEXT)] * (end - first)
        batch = [b for b in batch if 0 < len(requests[b[0]].prefix) < self.context]
        if not batch:
            return
        prefixes = [requests[index].prefix for index, _, _ in batch]
        logits, cache, mask = self._prefill(prefixes)

        # Samples of a prefix share a row of the model for as long as they hold the same tokens: from here on every row is
        # another text, and what several samples have in common is computed once.
        owners = [(index, seed) for index, first, end in batch for seed in range(first, end)]
        device = self.model.device
        decoder = decoder_of(self.model, cache, mask, most=len(owners))
        del cache, mask  # where the decoder copied them they would be held twice
        repeats = torch.tensor([end - first for _, first, end in batch], device=device)
        rows = torch.repeat_interleave(torch.arange(len(batch), device=device), repeats)  # of the samples that go on
        lengths = torch.tensor([len(p) for p in prefixes], device=device)[rows]

        scanner = self._scanner(sampling.stop)
        limits = torch.clamp(self.context - lengths, max=sampling.max_new_tokens)
        random = None
        if sampling.temperature > 0:
            random = uniforms([requests[i].seeds[s] for i, s in owners], sampling.max_new_tokens)
        end_tokens = torch.tensor(self.eos_ids, dtype=torch.long, device=device)
        ids = torch.zeros(len(owners), sampling.max_new_tokens, dtype=torch.long)
        logprobs = torch.zeros(len(owners), sampling.max_new_tokens)
        generated = 0
        alive = torch.arange(len(owners))  # the samples that go on
        for position in range(sampling.max_new_tokens):
            now, logp = draw(logits, None if random is None else random[alive, position], sampling, rows)
            ids[alive, position], logprobs[alive, position] = now.cpu(), logp.cpu()
            generated += len(alive)
            ended, full = torch.isin(now, end_tokens).cpu(), (limits <= position + 1).cpu()
            going = torch.ones(len(alive), dtype=torch.bool)
            for place in (ended | full | scanner.may_end(now)).nonzero().squeeze(-1).tolist():
                owner = int(alive[place])
                if ended[place]:
                    stop = StopReason.EOS
                elif scanner.ends(ids[owner, max(0, position + 1 - scanner.tail) : position + 1].tolist()):
                    stop = StopReason.STOP
                elif full[place]:
                    stop = StopReason.LENGTH
                else:
                    continue
                index, seed = owners[owner]
                sampled = tuple(ids[owner, : position + 1].tolist())
                results[index][seed] = Sample(sampled, tuple(logprobs[owner, : position + 1].tolist()), stop)
                going[place] = False
                if self.cache is not None and stop is not StopReason.EOS:
                    # The last sampled token has not been encoded: it is left to the next request.
                    self.cache.put(requests[index].prefix + sampled[:-1], decoder.row(int(rows[place])))
            if not going.any():
                break
            if not going.all():
                alive, going = alive[going], going.to(device)
                now, rows, lengths, limits = now[going], rows[going], lengths[going], limits[going]
            # Equal text: the same row and the same token behind it.
            texts, which = (rows * logits.shape[-1] + now).unique(return_inverse=True)
            places = torch.tensor(decoder.become((texts // logits.shape[-1]).tolist()), device=device)
            rows = places[which]
            tokens, positions = torch.empty_like(places), torch.empty_like(places)
            tokens[rows], positions[rows] = now, lengths + position
            logits = decoder.step(tokens, positions)
        self.ledger.add_policy(self.parameters, generated=generated, calls=len(owners))

    def _prefill(self, prefixes: Sequence[tuple[int, ...]]) -> tuple[torch.Tensor, Any, torch.Tensor]:
        """(logits of the next token [B, V], key/value cache, mask [B, columns]) of prefixes padded on the left."""
        known = [self._known(prefix) for prefix in prefixes]
        past = stack_left_padded([entry for _, entry in known])
        old = 0 if past is None else past.shape[3]
        new = max(len(p) - length for p, (length, _) in zip(prefixes, known, strict=True))
        tokens = torch.full((len(prefixes), new), self.tokenizer.pad_token_id or 0)
        positions = torch.zeros_like(tokens)
        mask = torch.zeros(len(prefixes), old + new, dtype=torch.long)
        for row, (prefix, (length, _)) in enumerate(zip(prefixes, known, strict=True)):
            fresh = len(prefix) - length
            tokens[row, new - fresh :] = torch.tensor(prefix[length:])
            positions[row, new - fresh :] = torch.arange(length, len(prefix))
            mask[row, old - length : old] = 1
            mask[row, old + new - fresh :] = 1
        device = self.model.device
        tokens, positions, mask = tokens.to(device), positions.to(device), mask.to(device)
        cache = to_dynamic_cache(past, self.model.config)
        logits = self.model(
            input_ids=tokens,
            attention_mask=mask,
            position_ids=positions,
            use_cache=True,
            logits_to_keep=1,
            **{self._cache_keyword: cache},
        ).logits[:, -1]
        self.ledger.add_policy(
            self.parameters, prefilled=sum(len(p) - length for p, (length, _) in zip(prefixes, known, strict=True))
        )
        return logits, cache, mask

    def _known(self, prefix: tuple[int, ...]) -> tuple[int, Entry | None]:
        """(how many of the first tokens are encoded, their keys and values), never all of them: the last one gives the logits."""
        if self.cache is not None:
            return self.cache.longest(prefix, len(prefix) - 1)
        if prefix in self._extended:
            longer = self._extended[prefix].keys_values
            return len(prefix) - 1, Entry(longer[:, :, : len(prefix) - 1])
        return 0, None

    def _encode_extended(self, prefixes: Sequence[tuple[int, ...]]) -> None:
        """Encodes what others of the prefixes begin, so that those need their last token only: all prefixes of one solution."""
        if self.cache is not None or not self.share_bytes or not supports_prefix_cache(self.model):
            return
        longest_of: dict[tuple[int, ...], list[tuple[int, ...]]] = {}
        longest: tuple[int, ...] = ()
        # In reversed alphabetical order what begins with a prefix stands right before it.
        for prefix in sorted({p for p in prefixes if 1 < len(p) < self.context}, reverse=True):
            if longest[: len(prefix)] != prefix:
                longest = prefix
            longest_of.setdefault(longest, []).append(prefix)
        shared = sorted((one for one, begins in longest_of.items() if len(begins) > 1), key=lambda one: (len(one), one))
        room = self.share_bytes
        for first in range(0, len(shared), self.batch_size):
            batch = shared[first : first + self.batch_size]
            _, cache, mask = self._prefill([one[:-1] for one in batch])
            for row, one in enumerate(batch):
                entry = Entry(row_of(cache, row, mask[row].nonzero().squeeze(-1)))
                room -= entry.keys_values.numel() * entry.keys_values.element_size()
                if room < 0:
                    return
                self._extended.update((prefix, entry) for prefix in longest_of[one])

    def _scanner(self, stop: tuple[str, ...]) -> StopScanner:
        if stop not in self._scanners:
            self._scanners[stop] = StopScanner(self.tokenizer, stop, self.model.config.get_text_config().vocab_size)
        return self._scanners[stop]


class StopScanner:
    """Finds stop strings in token ids. Text is decoded only where the newest token could have completed one."""

    def __init__(self, tokenizer: Any, stop: tuple[str, ...], vocabulary: int) -> None:
        self.tokenizer, self.stop = tokenizer, stop
        self.tail = 8 + max((len(s) for s in stop), default=0)
        flags = torch.zeros(vocabulary, dtype=torch.bool)
        if stop:
            last = {s[-1] for s in stop}
            pieces = tokenizer.batch_decode([[i] for i in range(min(vocabulary, len(tokenizer)))])
            # A piece that is not whole text by itself (part of a character) may complete anything.
            flags[: len(pieces)] = torch.tensor([bool(last & set(p)) or "\ufffd" in p for p in pieces])
        self._flags = flags

    def may_end(self, tokens: torch.Tensor) -> torch.Tensor:
        """Whether each token [B] could complete a stop string."""
        return self._flags[tokens.cpu()]

    def ends(self, ids: Sequence[int]) -> bool:
        """Whether the text of `ids` contains a stop string near its end."""
        text = self.tokenizer.decode(ids[-self.tail :])
        return any(s in text for s in self.stop)
