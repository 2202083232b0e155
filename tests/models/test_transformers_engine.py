"""The embedded engine against `model.generate`, full forwards and hand-made next-token tables."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from stepladder.basics import fold_seed
from stepladder.models.engine import Request, Sampling, StopReason
from stepladder.models.prefix_cache import PrefixCache
from stepladder.models.sampling import filtered_probabilities
from stepladder.models.transformers_engine import StopScanner, TransformersEngine


def prefixes(tokenizer: Any, count: int, seed: int = 0, longest: int = 30) -> list[tuple[int, ...]]:
    rng = random.Random(seed)
    return [tuple(rng.randrange(4, len(tokenizer)) for _ in range(rng.randint(1, longest))) for _ in range(count)]


def requests_of(tokenizer: Any, count: int, samples: int, seed: int = 0) -> list[Request]:
    return [
        Request(prefix, tuple(fold_seed(seed, i, k) for k in range(samples)))
        for i, prefix in enumerate(prefixes(tokenizer, count, seed))
    ]


@contextmanager
def forwards(model: Any) -> Iterator[list[tuple[int, int]]]:
    """The shapes [rows, columns] of every forward of the model."""
    shapes: list[tuple[int, int]] = []
    hook = model.register_forward_pre_hook(
        lambda _, __, kw: shapes.append(tuple(kw["input_ids"].shape)), with_kwargs=True
    )
    try:
        yield shapes
    finally:
        hook.remove()


def test_greedy_equals_the_models_own_generate(lab_words, tiny_policy):
    model = tiny_policy(lab_words)
    engine = TransformersEngine(model, lab_words, batch_size=5)
    requests = [Request(p, (0,)) for p in prefixes(lab_words, 12)]
    found = engine.generate(requests, Sampling(20, temperature=0.0))
    for request, (sample,) in zip(requests, found, strict=True):
        want = model.generate(torch.tensor([request.prefix]), do_sample=False, max_new_tokens=20)[
            0, len(request.prefix) :
        ]
        assert sample.ids == tuple(want.tolist())
        assert sample.stop is (StopReason.EOS if sample.ids[-1] == lab_words.eos_token_id else StopReason.LENGTH)


@pytest.mark.parametrize(
    ("temperature", "top_p", "top_k"), [(0.0, 1.0, 0), (1.0, 1.0, 0), (0.7, 1.0, 0), (1.3, 0.8, 0), (1.0, 1.0, 4)]
)
def test_log_probabilities_are_those_of_a_full_forward(lab_words, tiny_policy, temperature, top_p, top_k):
    model = tiny_policy(lab_words)
    engine = TransformersEngine(model, lab_words, batch_size=64)
    requests = requests_of(lab_words, 6, 3)
    found = engine.generate(requests, Sampling(12, temperature, top_p, top_k))
    for request, samples in zip(requests, found, strict=True):
        for sample in samples:
            with torch.no_grad():
                logits = model(torch.tensor([request.prefix + sample.ids])).logits[0, len(request.prefix) - 1 : -1]
            if temperature == 0:
                want = logits.log_softmax(-1)
            else:
                want = filtered_probabilities(logits, temperature, top_k, top_p).log()
            want = want.gather(-1, torch.tensor(sample.ids)[:, None]).squeeze(-1)
            torch.testing.assert_close(torch.tensor(sample.logprobs), want, atol=1e-4, rtol=1e-4)


def test_samples_follow_the_models_distribution(lab_words, tiny_policy):
    model = tiny_policy(lab_words, scale=0.5)
    prefix = prefixes(lab_words, 1)[0]
    n = 4000
    engine = TransformersEngine(model, lab_words, batch_size=2000)
    [found] = engine.generate([Request(prefix, tuple(fold_seed(1, i) for i in range(n)))], Sampling(2))
    with torch.no_grad():
        want = model(torch.tensor([prefix])).logits[0, -1].softmax(-1).tolist()
    counts = [0] * len(lab_words)
    for sample in found:
        counts[sample.ids[0]] += 1
    chi_square = sum((c - n * p) ** 2 / (n * p) for c, p in zip(counts, want, strict=True))
    assert chi_square < len(want) - 1 + 4 * (2 * (len(want) - 1)) ** 0.5
    # The second token is drawn from its own number: given the same first token, second tokens differ.
    first = max(range(len(counts)), key=counts.__getitem__)
    assert len({s.ids[1] for s in found if s.ids[0] == first and len(s.ids) > 1}) > 5


def test_same_seeds_same_samples_whatever_the_batch(lab_words, tiny_policy):
    """Batch size, neighbours, order and repetition. Rounding alone may change a sample, and must be rare: it is printed."""
    model = tiny_policy(lab_words, scale=2.0)
    requests = requests_of(lab_words, 60, 4)
    sampling = Sampling(24)
    whole = TransformersEngine(model, lab_words, batch_size=256).generate(requests, sampling)
    samples = [s.ids for found in whole for s in found]
    assert len(set(samples)) > 0.9 * len(samples)  # they are not all alike by accident

    again = TransformersEngine(model, lab_words, batch_size=256)
    assert again.generate(requests, sampling) == whole
    assert again.generate(requests, sampling) == whole  # nothing of the first call is left behind

    changed = total = 0
    for batch_size in (2, 7, 64):
        found = TransformersEngine(model, lab_words, batch_size=batch_size).generate(requests, sampling)
        other = [s.ids for one in found for s in one]
        changed += sum(a != b for a, b in zip(samples, other, strict=True))
        total += len(samples)
    order = list(range(len(requests)))
    random.Random(0).shuffle(order)
    shuffled = TransformersEngine(model, lab_words, batch_size=10).generate([requests[i] for i in order], sampling)
    for position, index in enumerate(order):
        changed += sum(a.ids != b.ids for a, b in zip(shuffled[position], whole[index], strict=True))
        total += len(whole[index])
    few = TransformersEngine(model, lab_words).generate(
        [Request(r.prefix, r.seeds[2:3]) for r in requests[:10]], sampling
    )
    changed += sum(found[0].ids != whole[i][2].ids for i, found in enumerate(few))
    total += len(few)
    print(f"\nsamples changed by batch composition in float32: {changed} of {total}")
    assert changed <= 0.01 * total


def test_temperature_zero_ignores_seeds(lab_words, tiny_policy):
    engine = TransformersEngine(tiny_policy(lab_words), lab_words)
    [found] = engine.generate([Request((5, 6, 7), (1, 2, 3))], Sampling(10, temperature=0.0))
    assert found[0] == found[1] == found[2]


def test_a_prefix_is_encoded_once_for_all_its_samples(lab_words, tiny_policy):
    model = tiny_policy(lab_words)
    engine = TransformersEngine(model, lab_words, batch_size=64)
    requests = requests_of(lab_words, 5, 8)
    with forwards(model) as shapes:
        found = engine.generate(requests, Sampling(6))
    assert shapes[0] == (5, max(len(r.prefix) for r in requests))
    assert all(columns == 1 for _, columns in shapes[1:])
    ledger = engine.ledger
    assert ledger.prefilled_tokens == sum(len(r.prefix) for r in requests)
    assert ledger.generated_tokens == sum(len(s.ids) for one in found for s in one)
    assert ledger.policy_calls == 40
    assert ledger.flops == 2 * engine.parameters * (ledger.prefilled_tokens + ledger.generated_tokens)
    assert engine.parameters == sum(p.numel() for p in model.parameters())
    assert ledger.seconds > 0


def test_prefixes_of_one_another_are_encoded_once(lab_words, tiny_policy):
    """All prefixes of a solution: the samples are those of each prefix encoded by itself."""
    model = tiny_policy(lab_words)
    solutions = [p for p in prefixes(lab_words, 8, seed=3, longest=40) if len(p) > 12]
    assert len(solutions) > 3
    asked = [one[:length] for one in solutions for length in (5, 9, len(one))]
    asked.append(tuple(range(4, 12)))  # a prefix of none
    requests = [Request(prefix, (fold_seed(i, 0), fold_seed(i, 1))) for i, prefix in enumerate(asked)]
    together, apart = (TransformersEngine(model, lab_words, batch_size=10, share_bytes=n) for n in (2**30, 0))
    found, want = together.generate(requests, Sampling(8)), apart.generate(requests, Sampling(8))
    assert [[s.ids for s in one] for one in found] == [[s.ids for s in one] for one in want]
    for one, other in zip(found, want, strict=True):
        for a, b in zip(one, other, strict=True):
            torch.testing.assert_close(torch.tensor(a.logprobs), torch.tensor(b.logprobs), atol=1e-4, rtol=1e-4)
    # All but the last token of a solution, and then the last one of each prefix.
    assert together.ledger.prefilled_tokens == sum(len(one) - 1 + 3 for one in solutions) + 8
    assert together.ledger.generated_tokens == apart.ledger.generated_tokens


def test_a_request_with_more_samples_than_a_batch_is_cut(lab_words, tiny_policy):
    model = tiny_policy(lab_words)
    requests = requests_of(lab_words, 3, 10)
    with forwards(model) as shapes:
        found = TransformersEngine(model, lab_words, batch_size=4).generate(requests, Sampling(3))
    assert max(rows for rows, _ in shapes) <= 4
    assert [len(one) for one in found] == [10, 10, 10]
    whole = TransformersEngine(model, lab_words, batch_size=100).generate(requests, Sampling(3))
    assert [[s.ids for s in one] for one in found] == [[s.ids for s in one] for one in whole]


def test_finished_sequences_leave_the_batch_and_equal_ones_are_one_row(lab_words, tiny_policy):
    model = tiny_policy(lab_words, scale=2.0)
    requests = requests_of(lab_words, 40, 4)
    engine = TransformersEngine(model, lab_words, batch_size=1000)
    with forwards(model) as shapes:
        found = engine.generate(requests, Sampling(30))
    samples = [(index, sample.ids) for index, one in enumerate(found) for sample in one]
    lengths = [len(ids) for _, ids in samples]
    assert len(set(lengths)) > 5
    # A forward after t sampled tokens has a row for each different text that goes on.
    want = [len({(index, ids[:t]) for index, ids in samples if len(ids) > t}) for t in range(1, max(lengths))]
    assert [rows for rows, _ in shapes[1:]] == want
    assert sum(want) < sum(sum(length > t for length in lengths) for t in range(1, max(lengths)))
    # What samples share is counted for each of them: a sample costs what it costs alone.
    assert engine.ledger.generated_tokens == sum(lengths)


def test_equal_seeds_share_every_row(lab_words, tiny_policy):
    model = tiny_policy(lab_words)
    with forwards(model) as shapes:
        [found] = TransformersEngine(model, lab_words).generate([Request((5, 6, 7), (1, 1, 1))], Sampling(10))
    assert found[0] == found[1] == found[2]
    assert {rows for rows, _ in shapes} == {1}


def test_like_lengths_are_batched_together(lab_words, tiny_policy):
    model = tiny_policy(lab_words)
    requests = [Request((5,) * n, (0,)) for n in (20, 1, 19, 2, 18, 3)]
    with forwards(model) as shapes:
        TransformersEngine(model, lab_words, batch_size=3, share_bytes=0).generate(requests, Sampling(1))
    assert shapes == [(3, 3), (3, 20)]


def test_an_end_of_sequence_is_kept_as_the_last_id(lab_words, markov_policy):
    start, end = lab_words("8 9")["input_ids"]
    model = markov_policy(lab_words, {start: end, end: lab_words.eos_token_id})
    engine = TransformersEngine(model, lab_words)
    [[sample]] = engine.generate([Request((start,), (0,))], Sampling(5, temperature=0.0))
    assert (sample.ids, sample.stop) == ((end, lab_words.eos_token_id), StopReason.EOS)
    assert len(sample.logprobs) == 2
    # The same token at the limit is still the end of the sequence, and not of the length.
    [[sample]] = engine.generate([Request((start,), (0,))], Sampling(2, temperature=0.0))
    assert sample.stop is StopReason.EOS


def test_several_end_of_sequence_tokens(lab_words, markov_policy):
    start, end = lab_words("8 9")["input_ids"]
    model = markov_policy(lab_words, {start: end})
    model.generation_config.eos_token_id = [lab_words.eos_token_id, end]
    [[sample]] = TransformersEngine(model, lab_words).generate([Request((start,), (0,))], Sampling(5, temperature=0.0))
    assert (sample.ids, sample.stop) == ((end,), StopReason.EOS)


def run_table(
    model: Any, tokenizer: Any, start: int, stop: tuple[str, ...], limit: int = 8
) -> tuple[str, StopReason, int]:
    [[sample]] = TransformersEngine(model, tokenizer).generate(
        [Request((start,), (0,))], Sampling(limit, 0.0, stop=stop)
    )
    return tokenizer.decode(sample.ids), sample.stop, len(sample.ids)


def test_stop_strings(merging_tokenizer, markov_policy):
    token = {
        text: merging_tokenizer(text)["input_ids"][0] for text in ("a", "b", "c", "\n", "\n\n", ".\n", "E", "N", "D")
    }
    table = lambda *chain: markov_policy(merging_tokenizer, {token[x]: token[y] for x, y in itertools.pairwise(chain)})

    # Two newlines as two tokens; as one token; as the end of one token and the next one.
    assert run_table(table("a", "\n", "\n"), merging_tokenizer, token["a"], ("\n\n",)) == ("\n\n", StopReason.STOP, 2)
    assert run_table(table("a", "b", "\n\n", "c"), merging_tokenizer, token["a"], ("\n\n",)) == (
        "b\n\n",
        StopReason.STOP,
        2,
    )
    assert run_table(table("a", ".\n", "\n", "c"), merging_tokenizer, token["a"], ("\n\n",)) == (
        ".\n\n",
        StopReason.STOP,
        2,
    )
    # A stop string inside a token's text ends there too, and the whole token is kept.
    assert run_table(table("a", "b", ".\n", "c"), merging_tokenizer, token["a"], (".",)) == ("b.\n", StopReason.STOP, 2)
    # Over three tokens, beside another one that never comes.
    assert run_table(table("a", "E", "N", "D", "b"), merging_tokenizer, token["a"], ("zzz", "END")) == (
        "END",
        StopReason.STOP,
        3,
    )
    # Parts of it are no stop string, and what stands in the prefix does not count.
    assert run_table(table("a", "E", "N", "b", "c"), merging_tokenizer, token["a"], ("END",), 4) == (
        "ENbc",
        StopReason.LENGTH,
        4,
    )
    assert run_table(table("\n", "b", "c"), merging_tokenizer, token["\n"], ("\nb",), 2) == ("bc", StopReason.LENGTH, 2)
    # No stop strings: only the length ends it.
    assert run_table(table("a", "\n", "\n"), merging_tokenizer, token["a"], (), 5) == ("\n" * 5, StopReason.LENGTH, 5)


def test_stop_strings_of_characters_split_over_tokens(merging_tokenizer, markov_policy):
    ids = merging_tokenizer("é!")["input_ids"]
    assert len(ids) == 3  # two bytes of é
    start = merging_tokenizer("a")["input_ids"][0]
    model = markov_policy(merging_tokenizer, dict(zip([start, *ids], [*ids, start], strict=True)))
    assert run_table(model, merging_tokenizer, start, ("é",)) == ("é", StopReason.STOP, 2)


def test_the_scanner_never_skips_a_token_that_completes_a_stop_string(merging_tokenizer):
    """Against decoding after every token, on random ids."""
    rng = random.Random(0)
    stops = ("\n\n", "the", "4\n", ". S")
    scanner = StopScanner(merging_tokenizer, stops, len(merging_tokenizer))
    pool = merging_tokenizer("\n\n\n.\nSo the4\n t h e. S")["input_ids"]
    completed = 0
    for _ in range(300):
        ids: list[int] = []
        for _ in range(12):
            ids.append(rng.choice(pool))
            slow = any(s in merging_tokenizer.decode(ids) for s in stops)
            fast = bool(scanner.may_end(torch.tensor(ids[-1:]))[0]) and scanner.ends(ids)
            assert fast == slow
            if slow:
                completed += 1
                break
    assert completed > 100


def test_stopped_samples_equal_unstopped_ones_up_to_the_stop(lab_words, tiny_policy):
    engine = TransformersEngine(tiny_policy(lab_words), lab_words, batch_size=512)
    requests = requests_of(lab_words, 30, 4)
    free = engine.generate(requests, Sampling(30))
    stopped = engine.generate(requests, Sampling(30, stop=("\n",)))
    newline = lab_words("\n")["input_ids"][0]
    seen = 0
    for one, other in zip(free, stopped, strict=True):
        for long, short in zip(one, other, strict=True):
            if newline in long.ids:
                seen += 1
                assert short.ids == long.ids[: long.ids.index(newline) + 1]
                assert short.stop is StopReason.STOP
            else:
                assert short.ids == long.ids
                assert short.stop is long.stop
    assert seen > 20


def test_the_context_is_never_passed(lab_words, tiny_policy):
    model = tiny_policy(lab_words, context=16)
    engine = TransformersEngine(model, lab_words, share_bytes=0)
    requests = [Request((5,) * n, (3, 4)) for n in (15, 16, 17, 40, 10, 14)]
    with forwards(model) as shapes:
        found = engine.generate(requests, Sampling(50))
    for request, samples in zip(requests, found, strict=True):
        room = 16 - len(request.prefix)
        for sample in samples:
            if room <= 0:
                assert (sample.ids, sample.logprobs, sample.stop) == ((), (), StopReason.CONTEXT)
            elif sample.stop is StopReason.LENGTH:
                assert len(sample.ids) == room
            else:
                assert sample.stop is StopReason.EOS
                assert len(sample.ids) <= room
    assert shapes[0] == (3, 15)  # what does not fit is not encoded
    assert engine.ledger.prefilled_tokens == 15 + 10 + 14
    # Neighbours with less room leave the others as they are.
    [alone] = engine.generate([requests[4]], Sampling(50))
    assert [s.ids for s in alone] == [s.ids for s in found[4]]


def test_nothing_asked_nothing_sampled(lab_words, tiny_policy):
    engine = TransformersEngine(tiny_policy(lab_words), lab_words)
    assert engine.generate([], Sampling(5)) == []
    assert engine.generate([Request((5,), ()), Request((6,), (1,)), Request((7, 8), ())], Sampling(1))[0::2] == [[], []]
    assert engine.generate([Request((5,), ())], Sampling(5)) == [[]]
    [[sample]] = engine.generate([Request((), (1,))], Sampling(5))  # an empty prefix has nothing to go on from
    assert (sample.ids, sample.stop) == ((), StopReason.CONTEXT)


def test_a_prefix_cache_changes_nothing_but_the_work(lab_words, tiny_policy):
    """Prefixes that grow step by step, some of them with samples that end at once: only what is new is encoded."""
    model = tiny_policy(lab_words, scale=2.0)
    plain = TransformersEngine(model, lab_words, batch_size=64)
    cached = TransformersEngine(model, lab_words, batch_size=64, cache=PrefixCache())
    sampling = Sampling(9, stop=("\n",))
    grown = prefixes(lab_words, 20)
    changed = total = 0
    for depth in range(5):
        requests = [Request(p, (fold_seed(depth, i), fold_seed(depth, i, "other"))) for i, p in enumerate(grown)]
        before = cached.ledger.prefilled_tokens
        want, found = plain.generate(requests, sampling), cached.generate(requests, sampling)
        changed += sum(
            a.ids != b.ids for one, other in zip(want, found, strict=True) for a, b in zip(one, other, strict=True)
        )
        total += 2 * len(requests)
        for one, other in zip(want, found, strict=True):
            for a, b in zip(one, other, strict=True):
                if a.ids == b.ids:
                    torch.testing.assert_close(torch.tensor(a.logprobs), torch.tensor(b.logprobs), atol=1e-4, rtol=1e-4)
        # Whatever was sampled is known, but for its last token.
        new = cached.ledger.prefilled_tokens - before
        assert new == (sum(map(len, grown)) if depth == 0 else len(grown))
        grown = [
            r.prefix + one[depth % 2].ids
            for r, one in zip(requests, found, strict=True)
            if one[depth % 2].stop is not StopReason.EOS
        ]
    print(f"\nsamples changed by the prefix cache: {changed} of {total}")
    assert changed <= 0.01 * total
    assert len(grown) > 3


def test_a_full_prefix_cache_still_gives_the_same_samples(lab_words, tiny_policy):
    model = tiny_policy(lab_words)
    small = TransformersEngine(model, lab_words, cache=PrefixCache(capacity_bytes=20_000))
    plain = TransformersEngine(model, lab_words)
    requests = requests_of(lab_words, 15, 2)
    for _ in range(2):
        assert [[s.ids for s in one] for one in small.generate(requests, Sampling(6))] == [
            [s.ids for s in one] for one in plain.generate(requests, Sampling(6))
        ]


def test_the_engine_is_named_after_its_model_and_precision(lab_words, tiny_policy):
    assert TransformersEngine(tiny_policy(lab_words), lab_words).name.endswith(":float32")
    half = tiny_policy(lab_words).to(torch.bfloat16)
    engine = TransformersEngine(half, lab_words)
    assert engine.name.endswith(":bfloat16")
    [[sample]] = engine.generate([Request((5, 6), (1,))], Sampling(5))
    assert sample.ids
    assert TransformersEngine(half, lab_words, name="x").name == "x"
