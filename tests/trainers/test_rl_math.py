"""The arithmetic of policy gradients against loops over Python floats, gradients too."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from stepladder.trainers import rl_math

B, T, G = 6, 7, 3
LENGTHS = [7, 1, 4, 6, 3, 5]  # of the responses; row b's begins at b % 2
MASK = torch.zeros(B, T, dtype=torch.bool)
for row, length in enumerate(LENGTHS):
    MASK[row, row % 2 : row % 2 + length] = True


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def each(mask: torch.Tensor = MASK) -> list[list[int]]:
    """The columns that count in each row."""
    return [[t for t in range(mask.shape[1]) if mask[b, t]] for b in range(len(mask))]


def assert_gradient(function: Callable[[torch.Tensor], torch.Tensor], at: torch.Tensor, step: float = 1e-6) -> None:
    """The gradient of a scalar function against central differences."""
    x = at.clone().requires_grad_(True)
    function(x).backward()
    slow = torch.zeros_like(at)
    for i in range(at.numel()):
        moved = [at.clone(), at.clone()]
        for sign, one in zip((1, -1), moved, strict=True):
            one.view(-1)[i] += sign * step
        slow.view(-1)[i] = (function(moved[0]) - function(moved[1])) / (2 * step)
    torch.testing.assert_close(x.grad, slow, atol=1e-6, rtol=1e-5)


# --- log-probabilities and means -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_and_entropy_by_hand(temperature: float) -> None:
    logits, ids = draw(6, 5), torch.tensor([0, 3, 1, 4, 2, 2])
    logp, entropy = rl_math.logprobs_and_entropy(logits, ids, temperature)
    assert entropy is not None
    for n in range(6):
        weights = [math.exp(z / temperature) for z in logits[n].tolist()]
        p = [w / sum(weights) for w in weights]
        assert logp[n].item() == pytest.approx(math.log(p[ids[n]]), abs=1e-6)
        assert entropy[n].item() == pytest.approx(-sum(x * math.log(x) for x in p), abs=1e-6)
    assert_gradient(lambda z: rl_math.logprobs_and_entropy(z, ids[:2], temperature)[0].sum(), draw(2, 5, seed=3))
    assert_gradient(lambda z: rl_math.logprobs_and_entropy(z, ids[:2], temperature)[1].sum(), draw(2, 5, seed=4))
    alone, nothing = rl_math.logprobs_and_entropy(logits, ids, temperature, entropy=False)
    assert nothing is None
    assert torch.equal(alone, logp)


def test_masked_mean_never_sees_what_is_masked() -> None:
    values = draw(B, T)
    expected = [values[b, t].item() for b, row in enumerate(each()) for t in row]
    values[~MASK] = float("nan")
    values.requires_grad_(True)
    mean = rl_math.masked_mean(values, MASK)
    assert mean.item() == pytest.approx(sum(expected) / len(expected))
    mean.backward()
    torch.testing.assert_close(values.grad, MASK.double() / MASK.sum())
    assert rl_math.masked_mean(values, torch.zeros_like(MASK)).item() == 0.0


def test_whitening_uses_the_global_batch() -> None:
    values = draw(B, T)
    kept = [values[b, t].item() for b, row in enumerate(each()) for t in row]
    mean = sum(kept) / len(kept)
    variance = sum((x - mean) ** 2 for x in kept) / len(kept)  # of the population
    values[~MASK] = 1e9
    whole = rl_math.whiten(values, MASK)
    for b, row in enumerate(each()):
        for t in range(T):
            want = (values[b, t].item() - mean) / math.sqrt(variance + 1e-8) if t in row else 0.0
            assert whole[b, t].item() == pytest.approx(want, abs=1e-12)
    # Two processes that sum over both: the same numbers as one process with all rows.
    shares = (slice(0, 2), slice(2, B))
    said: list[list[torch.Tensor]] = [[], []]
    for _ in range(4):  # each pass learns the sums that the other process contributes to one more call
        for me, other in ((0, 1), (1, 0)):
            calls: list[torch.Tensor] = []

            def total(x: torch.Tensor, calls: Any = calls, other: int = other) -> torch.Tensor:
                calls.append(x)
                theirs = said[other]
                return x + theirs[len(calls) - 1] if len(theirs) >= len(calls) else x

            part = rl_math.whiten(values[shares[me]], MASK[shares[me]], total)
            said[me] = calls
            if me == 1:
                last = part
    torch.testing.assert_close(last, whole[shares[1]])
    assert (rl_math.whiten(values[shares[1]], MASK[shares[1]]) - whole[shares[1]]).abs().max() > 1e-2


def test_explained_variance() -> None:
    returns, values = draw(B, T), draw(B, T, seed=1)
    pairs = [(returns[b, t].item(), values[b, t].item()) for b, row in enumerate(each()) for t in row]
    spread = lambda xs: sum((x - sum(xs) / len(xs)) ** 2 for x in xs) / len(xs)
    expected = 1 - spread([r - v for r, v in pairs]) / spread([r for r, _ in pairs])
    assert rl_math.explained_variance(values, returns, MASK) == pytest.approx(expected)
    assert rl_math.explained_variance(returns + 3.0, returns, MASK) == pytest.approx(1.0)  # a constant is not variance
    assert math.isnan(rl_math.explained_variance(values, torch.ones(B, T), MASK))


# --- advantages ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.8), (1.0, 1.0), (1.0, 0.0)])
def test_gae_is_the_sum_of_discounted_errors(gamma: float, lam: float) -> None:
    rewards, values = draw(B, T), draw(B, T, seed=1)
    for x in (rewards, values):
        x[~MASK] = 1e6
    advantages, returns = rl_math.gae(rewards, values, MASK, gamma, lam)
    for b, row in enumerate(each()):
        r, v = [rewards[b, t].item() for t in row], [*(values[b, t].item() for t in row), 0.0]
        delta = [r[i] + gamma * v[i + 1] - v[i] for i in range(len(row))]
        for i, t in enumerate(row):
            want = sum((gamma * lam) ** (k - i) * delta[k] for k in range(i, len(row)))
            assert advantages[b, t].item() == pytest.approx(want)
            assert returns[b, t].item() == pytest.approx(want + v[i])
    assert advantages[~MASK].abs().max() == returns[~MASK].abs().max() == 0


def test_a_reward_on_the_end_reaches_every_earlier_token() -> None:
    """The off-by-one test of the last token: with gamma = lambda = 1 all tokens of a response have the same return."""
    rewards = torch.zeros(B, T, dtype=torch.float64)
    for b, row in enumerate(each()):
        rewards[b, row[-1]] = b + 1.0
    values = draw(B, T)
    advantages, returns = rl_math.gae(rewards, values, MASK, 1.0, 1.0)
    per_row = torch.arange(1.0, B + 1, dtype=torch.float64)[:, None].expand(B, T)
    torch.testing.assert_close(returns[MASK], per_row[MASK])
    torch.testing.assert_close(advantages[MASK], (per_row - values)[MASK])
    torch.testing.assert_close(rl_math.returns_to_go(rewards, MASK)[MASK], per_row[MASK])


def test_group_advantages() -> None:
    rewards = draw(B)
    for i, r in enumerate(rewards.tolist()):
        group = rewards.tolist()[i // G * G : i // G * G + G]
        others = [x for k, x in enumerate(group) if k != i % G]
        mean = sum(group) / G
        deviation = math.sqrt(sum((x - mean) ** 2 for x in group) / (G - 1))
        assert rl_math.leave_one_out(rewards, G)[i].item() == pytest.approx(r - sum(others) / (G - 1))
        assert rl_math.group_relative(rewards, G)[i].item() == pytest.approx((r - mean) / (deviation + 1e-4))
        assert rl_math.group_relative(rewards, G, scale=False)[i].item() == pytest.approx(r - mean)
    torch.testing.assert_close(
        rl_math.leave_one_out(rewards, G), rl_math.group_relative(rewards, G, False) * G / (G - 1)
    )
    even = torch.tensor([2.0, 2.0, 2.0, 0.0, 0.0, 1.0])
    assert torch.equal(rl_math.group_relative(even, G)[:3], torch.zeros(3))


def test_process_rewards_are_set_against_the_others_reward_a_token() -> None:
    rewards = draw(B, T)
    rewards[~MASK] = 99.0
    found = rl_math.process_leave_one_out(rewards, MASK, G)
    columns = each()
    for b, row in enumerate(columns):
        others = [k for k in range(b // G * G, b // G * G + G) if k != b]
        earned = sum(rewards[k, t].item() for k in others for t in columns[k])
        baseline = earned / sum(len(columns[k]) for k in others)
        for i, t in enumerate(row):
            assert found[b, t].item() == pytest.approx(sum(rewards[b, u].item() - baseline for u in row[i:]))
    assert found[~MASK].abs().max() == 0
    # One giant step and many small ones that earn the same for each token have no advantage over each other.
    mask = torch.ones(2, 4, dtype=torch.bool)
    steps = torch.tensor([[0.0, 0.0, 0.0, 1.0], [0.25, 0.25, 0.25, 0.25]])
    torch.testing.assert_close(rl_math.process_leave_one_out(steps, mask, 2)[:, 0], torch.zeros(2))


# --- KL --------------------------------------------------------------------------------------------------------------------


def test_kl_estimates_and_their_expectations() -> None:
    p, q = [0.5, 0.3, 0.2], [0.2, 0.2, 0.6]
    logp, ref = torch.tensor(p, dtype=torch.float64).log(), torch.tensor(q, dtype=torch.float64).log()
    for i in range(3):
        d = math.log(q[i]) - math.log(p[i])
        for kind, want in (("k1", -d), ("k2", d * d / 2), ("k3", math.exp(d) - d - 1)):
            assert rl_math.kl_estimate(logp, ref, kind)[i].item() == pytest.approx(want)
    exact = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    mean = lambda kind: (logp.exp() * rl_math.kl_estimate(logp, ref, kind)).sum().item()
    assert mean("k1") == pytest.approx(exact)
    assert mean("k3") == pytest.approx(exact)
    assert (rl_math.kl_estimate(logp, ref, "k3") >= 0).all()
    for kind in rl_math.KL_ESTIMATORS:
        assert_gradient(lambda x, k=kind: rl_math.kl_estimate(x, draw(4, seed=1), k).sum(), draw(4))
    with pytest.raises(ValueError, match="k1, k2, k3, found 'k4'"):
        rl_math.kl_estimate(logp, ref, "k4")


# --- losses ----------------------------------------------------------------------------------------------------------------


def ratios(logp: torch.Tensor, old: torch.Tensor, level: str) -> list[list[float]]:
    found = []
    for b, row in enumerate(each()):
        logs = [(logp[b, t] - old[b, t]).item() for t in row]
        found.append([math.exp(x if level == "token" else sum(logs) / len(logs)) for x in logs])
    return found


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_the_clipped_policy_loss(level: str) -> None:
    logp, old, advantages = 0.3 * draw(B, T), 0.3 * draw(B, T, seed=1), draw(B, T, seed=2)
    for x in (logp, old):
        x[~MASK] = float("nan")
    low, high = 0.2, 0.28
    found, clipped = rl_math.clipped_policy_loss(rl_math.log_ratio(logp, old, MASK, level), advantages, MASK, low, high)
    saw = set()
    for b, (row, rho) in enumerate(zip(each(), ratios(logp, old, level), strict=True)):
        for t, ratio in zip(row, rho, strict=True):
            a = advantages[b, t].item()
            bounded = min(max(ratio, 1 - low), 1 + high) * a
            assert found[b, t].item() == pytest.approx(max(-ratio * a, -bounded))
            assert clipped[b, t].item() == (bounded < ratio * a)
            saw.add((bounded < ratio * a, a > 0))
    assert len(saw) == 4  # clipped and free, both signs
    assert found[~MASK].abs().max() == 0
    safe = torch.where(MASK, logp, 0.0)
    loss = lambda x: rl_math.clipped_policy_loss(rl_math.log_ratio(x, old, MASK, level), advantages, MASK, low, high)[
        0
    ].sum()
    assert_gradient(loss, safe)


def test_the_first_pass_has_ratio_one_and_the_gradient_of_reinforce() -> None:
    logp = draw(B, T).requires_grad_(True)
    advantages = draw(B, T, seed=1)
    log_rho = rl_math.log_ratio(logp, logp.detach(), MASK)
    assert torch.equal(log_rho.exp(), torch.ones(B, T, dtype=torch.float64))
    loss, clipped = rl_math.clipped_policy_loss(log_rho, advantages, MASK, 0.2, 0.2)
    assert not clipped.any()
    loss.sum().backward()
    torch.testing.assert_close(logp.grad, torch.where(MASK, -advantages, 0.0))


def test_cispo_keeps_a_gradient_on_capped_tokens() -> None:
    logp, old, advantages = draw(B, T), draw(B, T, seed=1), draw(B, T, seed=2)
    found, capped = rl_math.cispo_loss(logp, rl_math.log_ratio(logp, old, MASK), advantages, MASK, 0.28)
    weights = torch.zeros(B, T, dtype=torch.float64)
    for b, (row, rho) in enumerate(zip(each(), ratios(logp, old, "token"), strict=True)):
        for t, ratio in zip(row, rho, strict=True):
            weights[b, t] = min(ratio, 1.28)
            assert found[b, t].item() == pytest.approx(-min(ratio, 1.28) * advantages[b, t].item() * logp[b, t].item())
            assert capped[b, t].item() == (ratio > 1.28)
    assert capped.any()
    x = logp.clone().requires_grad_(True)
    rl_math.cispo_loss(x, rl_math.log_ratio(x, old, MASK), advantages, MASK, 0.28)[0].sum().backward()
    torch.testing.assert_close(x.grad, -weights * advantages)


@pytest.mark.parametrize("clip", [0.2, 0.0])
def test_the_clipped_value_loss(clip: float) -> None:
    values, old, returns = draw(B, T), draw(B, T, seed=1), draw(B, T, seed=2)
    found = rl_math.clipped_value_loss(values, old, returns, MASK, clip)
    larger = 0
    for b, row in enumerate(each()):
        for t in row:
            v, o, r = (x[b, t].item() for x in (values, old, returns))
            near = min(max(v, o - clip), o + clip) if clip else v
            larger += (near - r) ** 2 > (v - r) ** 2
            assert found[b, t].item() == pytest.approx(0.5 * max((v - r) ** 2, (near - r) ** 2))
    assert bool(larger) == bool(clip)
    assert_gradient(lambda x: rl_math.clipped_value_loss(x, old, returns, MASK, clip).sum(), values)


def test_importance_weights_are_capped_and_have_no_gradient() -> None:
    old = torch.tensor([[0.0, 1.0, -1.0]], requires_grad=True)
    weight = rl_math.importance_weight(old, torch.zeros(1, 3), 2.0)
    assert weight.tolist()[0] == pytest.approx([1.0, 2.0, math.exp(-1)])
    assert not weight.requires_grad


LOSS_TABLE = {
    "sequence": lambda rows, k: sum(sum(row) / len(row) for row in rows) / len(rows),
    "token": lambda rows, k: sum(map(sum, rows)) / sum(map(len, rows)),
    "constant": lambda rows, k: sum(map(sum, rows)) / (len(rows) * k),
    "sum": lambda rows, k: sum(map(sum, rows)) / len(rows),
}


@pytest.mark.parametrize("how", LOSS_TABLE)
def test_reductions_do_not_depend_on_how_a_batch_is_cut(how: str) -> None:
    losses, longest = draw(B, T), 9
    rows = [[losses[b, t].item() for t in row] for b, row in enumerate(each())]
    losses[~MASK] = float("nan")
    for pieces in ([range(B)], [range(2), range(2, B)], [[b] for b in range(B)]):
        parts = [(losses[list(p)], MASK[list(p)]) for p in pieces]
        items = sum(rl_math.loss_items(m, how, longest).item() for _, m in parts)
        total = sum(rl_math.reduce_loss(x, m, how).item() for x, m in parts)
        assert total / items == pytest.approx(LOSS_TABLE[how](rows, longest))


def test_bnpo_does_depend_on_it_and_is_grpo_one_by_one() -> None:
    losses = draw(B, T)
    rows = [[losses[b, t].item() for t in row] for b, row in enumerate(each())]

    def mean(pieces: list[list[int]]) -> float:
        parts = [(losses[p], MASK[p]) for p in pieces]
        items = sum(rl_math.loss_items(m, "micro_batch", 9).item() for _, m in parts)
        return sum(rl_math.reduce_loss(x, m, "micro_batch").item() for x, m in parts) / items

    assert mean([list(range(B))]) == pytest.approx(LOSS_TABLE["token"](rows, 9))
    assert mean([[b] for b in range(B)]) == pytest.approx(LOSS_TABLE["sequence"](rows, 9))
    halves = [LOSS_TABLE["token"](rows[:3], 9), LOSS_TABLE["token"](rows[3:], 9)]
    assert mean([[0, 1, 2], [3, 4, 5]]) == pytest.approx(sum(halves) / 2)


def test_an_unknown_reduction_or_level_is_told() -> None:
    with pytest.raises(ValueError, match="found 'mean'"):
        rl_math.reduce_loss(draw(B, T), MASK, "mean")
    with pytest.raises(ValueError, match="found 'mean'"):
        rl_math.loss_items(MASK, "mean", 9)
    with pytest.raises(ValueError, match="token or sequence"):
        rl_math.log_ratio(draw(B, T), draw(B, T), MASK, "batch")


def test_a_response_without_a_counting_token_adds_nothing() -> None:
    """A truncated response that is left out: no 0 / 0, and its row still counts as a sequence."""
    losses, mask = draw(2, 3), torch.tensor([[True, True, False], [False, False, False]])
    for how in rl_math.REDUCTIONS:
        value = rl_math.reduce_loss(losses, mask, how) / rl_math.loss_items(mask, how, 3)
        assert torch.isfinite(value)
    assert rl_math.loss_items(mask, "sequence", 3).item() == 2
