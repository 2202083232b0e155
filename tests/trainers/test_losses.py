"""Losses against Python loops in float64, their gradients, and what masked positions may hold."""

from __future__ import annotations

import math

import pytest
import torch

from stepladder.trainers.losses import (
    step_bce,
    step_logit,
    step_mse,
    step_ranking,
    token_cross_entropy,
    value_mse,
    weighted_sft,
)

B, S, V = 3, 7, 5


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def some_mask(seed: int = 1) -> torch.Tensor:
    """[B, S], with one row of which nothing counts."""
    mask = draw(B, S, seed=seed) > 0
    mask[1] = False
    assert mask.any()
    return mask


def soft_targets() -> torch.Tensor:
    return torch.randint(0, 11, (B, S), generator=torch.Generator().manual_seed(2)).double() / 10


# --- log-odds ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("positive", [0, 1])
def test_two_class_log_odds_are_those_of_the_softmax(positive):
    logits = draw(B, S, 2)
    found = step_logit(logits, positive)
    for b in range(B):
        for s in range(S):
            good, bad = math.exp(logits[b, s, positive]), math.exp(logits[b, s, 1 - positive])
            assert 1 / (1 + math.exp(-found[b, s])) == pytest.approx(good / (good + bad), abs=1e-14)
    assert torch.autograd.gradcheck(lambda x: step_logit(x, positive), logits.requires_grad_())


def test_a_scalar_head_is_its_own_log_odds():
    logits = draw(B, S, 1)
    for positive in (None, 0, 1):
        assert torch.equal(step_logit(logits, positive), logits[..., 0])


@pytest.mark.parametrize("positive", [None, 2, -1])
def test_a_two_class_head_without_a_positive_class_is_refused(positive):
    with pytest.raises(ValueError, match="needs positive_class 0 or 1"):
        step_logit(draw(B, S, 2), positive)


# --- losses of steps --------------------------------------------------------------------------------------------------


def slow_bce(x: float, y: float) -> float:
    p = 1 / (1 + math.exp(-x))
    return -(y * math.log(p) + (1 - y) * math.log(1 - p))


def slow_mse(x: float, y: float) -> float:
    return (1 / (1 + math.exp(-x)) - y) ** 2


STEP_LOSSES = [(step_bce, slow_bce), (step_mse, slow_mse)]
TARGETS = {
    "hard": lambda: (soft_targets() > 0).double(),
    "soft": soft_targets,
    "threshold": lambda: (soft_targets() > 0.5).double(),
}


@pytest.mark.parametrize(("loss", "slow"), STEP_LOSSES)
@pytest.mark.parametrize("kind", TARGETS)
def test_step_losses_match_a_loop(loss, slow, kind):
    x, y, mask = 2 * draw(B, S), TARGETS[kind](), some_mask()
    found = loss(x, y, mask)
    want = [[slow(x[b, s].item(), y[b, s].item()) if mask[b, s] else 0.0 for s in range(S)] for b in range(B)]
    torch.testing.assert_close(found, torch.tensor(want, dtype=torch.float64))
    assert torch.autograd.gradcheck(lambda x, y: loss(x, y, mask), (x.requires_grad_(), y.requires_grad_()))


@pytest.mark.parametrize("loss", [step_bce, step_mse])
def test_a_soft_target_is_best_met_by_its_own_probability(loss):
    """The gradient vanishes at p = 0.9, which a target cut to 0 or 1 would not give."""
    x = torch.tensor([[math.log(0.9 / 0.1)]], dtype=torch.float64, requires_grad=True)
    loss(x, torch.tensor([[0.9]], dtype=torch.float64), torch.tensor([[True]])).sum().backward()
    assert abs(x.grad.item()) < 1e-12


def test_step_bce_keeps_its_gradient_where_the_model_is_sure():
    x = torch.tensor([[80.0, -80.0]], requires_grad=True)
    loss = step_bce(x, torch.tensor([[0.0, 1.0]]), torch.ones(1, 2, dtype=torch.bool))
    torch.testing.assert_close(loss, torch.tensor([[80.0, 80.0]]))
    loss.sum().backward()
    torch.testing.assert_close(x.grad, torch.tensor([[1.0, -1.0]]))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("loss", [step_bce, step_mse])
def test_masked_steps_may_hold_anything(loss, bad):
    logits, y, mask = draw(B, S, 2), soft_targets(), some_mask()
    clean = logits.clone().requires_grad_()
    loss(step_logit(clean, 1), y, mask).sum().backward()
    logits[~mask], y[~mask] = bad, bad
    logits.requires_grad_()
    found = loss(step_logit(logits, 1), y, mask)
    assert (found[~mask] == 0).all()
    found.sum().backward()
    assert torch.equal(logits.grad, clean.grad)
    assert (logits.grad[~mask] == 0).all()


@pytest.mark.parametrize("loss", [step_bce, step_mse])
def test_nothing_to_train_gives_zero_and_not_nan(loss):
    x = draw(B, S).requires_grad_()
    found = loss(x, soft_targets(), torch.zeros(B, S, dtype=torch.bool)).sum()
    found.backward()
    assert found.item() == 0
    assert (x.grad == 0).all()


def test_value_mse_is_the_squared_error_of_a_tanh():
    x, mask = 2 * draw(B, S), some_mask()
    q = 2 * soft_targets() - 1
    want = [
        [(math.tanh(x[b, s].item() / 2) - q[b, s].item()) ** 2 if mask[b, s] else 0.0 for s in range(S)]
        for b in range(B)
    ]
    torch.testing.assert_close(value_mse(x, q, mask), torch.tensor(want, dtype=torch.float64))
    # The score that a reader takes from the same logit is the value moved to [0, 1]: one squashing, not two.
    torch.testing.assert_close(4 * step_mse(x, (q + 1) / 2, mask), value_mse(x, q, mask))
    assert torch.autograd.gradcheck(lambda x, q: value_mse(x, q, mask), (x.requires_grad_(), q.requires_grad_()))


# --- rankings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("soft", [True, False])
def test_step_ranking_matches_a_loop(soft):
    chosen, rejected, mask = 2 * draw(B, S), 2 * draw(B, S, seed=6), some_mask()
    target = torch.tensor([1.0, 0.7, 0.5], dtype=torch.float64) if soft else None
    want = []
    for b in range(B):
        y = target[b].item() if soft else 1.0
        wins = [1 / (1 + math.exp(-(chosen[b, s] - rejected[b, s]).item())) for s in range(S)]
        want.append([-(y * math.log(p) + (1 - y) * math.log(1 - p)) if mask[b, s] else 0.0 for s, p in enumerate(wins)])
    found = step_ranking(chosen, rejected, mask, target)
    torch.testing.assert_close(found, torch.tensor(want, dtype=torch.float64))
    assert torch.autograd.gradcheck(
        lambda c, r: step_ranking(c, r, mask, target), (chosen.requires_grad_(), rejected.requires_grad_())
    )


def test_a_soft_target_is_met_by_its_own_gap_and_a_preference_by_none():
    """Two siblings solved 6 and 2 of 8 times: the better wins with (1 + 3/4 - 1/4) / 2 = 3/4, at a gap of log 3."""
    one = torch.ones(1, 1, dtype=torch.bool)
    gap = torch.tensor([[math.log(3)]], dtype=torch.float64, requires_grad=True)
    step_ranking(gap, torch.zeros_like(gap), one, torch.tensor([0.75])).sum().backward()
    assert abs(gap.grad.item()) < 1e-12
    gap.grad = None
    step_ranking(gap, torch.zeros_like(gap), one).sum().backward()
    assert gap.grad.item() == pytest.approx(-0.25)


def test_a_ranking_keeps_its_gradient_and_does_not_care_for_the_level():
    chosen, rejected = torch.tensor([[-80.0, 3.0]]), torch.tensor([[80.0, 1.0]])
    mask = torch.ones(1, 2, dtype=torch.bool)
    torch.testing.assert_close(step_ranking(chosen, rejected, mask)[0, 0], torch.tensor(160.0))
    torch.testing.assert_close(step_ranking(chosen + 7, rejected + 7, mask), step_ranking(chosen, rejected, mask))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_masked_rankings_and_values_may_hold_anything(bad):
    chosen, rejected, mask = draw(B, S), draw(B, S, seed=6), some_mask()
    want, values = step_ranking(chosen, rejected, mask), value_mse(chosen, rejected, mask)
    chosen[~mask], rejected[~mask] = bad, bad
    chosen.requires_grad_()
    for loss, expected in ((step_ranking, want), (value_mse, values)):
        chosen.grad = None
        found = loss(chosen, rejected, mask)
        assert torch.equal(found, expected)
        found.sum().backward()
        assert (chosen.grad[~mask] == 0).all()
        assert chosen.grad[mask].isfinite().all()


# --- losses of tokens -------------------------------------------------------------------------------------------------


def some_labels() -> torch.Tensor:
    labels = torch.randint(0, V, (B, S), generator=torch.Generator().manual_seed(3))
    labels[~some_mask()] = -100
    labels[0, 0] = 2  # predicted from nothing: it never counts
    return labels


def slow_token_losses(logits: torch.Tensor, labels: torch.Tensor) -> tuple[list[list[float]], list[list[bool]]]:
    """The loss of token t + 1 under the logits at t."""
    losses, mask = [], []
    for row, ids in zip(logits.tolist(), labels.tolist(), strict=True):
        counted = [ids[t + 1] != -100 for t in range(S - 1)]
        mask.append(counted)
        losses.append(
            [
                math.log(sum(math.exp(z) for z in row[t])) - row[t][ids[t + 1]] if counted[t] else 0.0
                for t in range(S - 1)
            ]
        )
    return losses, mask


def test_token_cross_entropy_is_shifted_by_one():
    logits, labels = draw(B, S, V), some_labels()
    found, mask = token_cross_entropy(logits.requires_grad_(), labels)
    want, counted = slow_token_losses(logits.detach(), labels)
    assert mask.tolist() == counted
    torch.testing.assert_close(found, torch.tensor(want))  # the function itself works in float32
    # d loss / d logit = softmax - one-hot, and 0 where nothing is predicted.
    found.sum().backward()
    for b in range(B):
        for t in range(S):
            row = logits[b, t].tolist()
            total = sum(math.exp(z) for z in row)
            following = labels[b, t + 1].item() if t + 1 < S else -100
            want = [math.exp(z) / total - (v == following) if following != -100 else 0.0 for v, z in enumerate(row)]
            assert logits.grad[b, t].tolist() == pytest.approx(want, abs=1e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_masked_tokens_may_hold_anything(bad):
    logits, labels = draw(B, S, V), some_labels()
    clean = logits.clone().requires_grad_()
    token_cross_entropy(clean, labels)[0].sum().backward()
    untrained = torch.cat([labels[:, 1:] == -100, torch.ones(B, 1, dtype=torch.bool)], 1)
    logits[untrained] = bad
    found, mask = token_cross_entropy(logits.requires_grad_(), labels)
    assert (found[~mask] == 0).all()
    found.sum().backward()
    assert torch.equal(logits.grad, clean.grad)


def test_labels_that_are_all_masked_give_zero():
    logits = draw(B, S, V).requires_grad_()
    found, mask = token_cross_entropy(logits, torch.full((B, S), -100))
    assert found.shape == (B, S - 1)
    assert not mask.any()
    found.sum().backward()
    assert found.sum().item() == 0
    assert (logits.grad == 0).all()


def slow_weighted(losses, mask, sequence_weight, token_weight, reduction):
    total = 0.0
    for b in range(B):
        terms = [
            losses[b][t] * (token_weight[b][t] if token_weight is not None else 1.0) for t in range(S) if mask[b][t]
        ]
        share = sum(terms) / len(terms) if reduction == "sequence" and terms else sum(terms)
        total += sequence_weight[b] * share
    return total


@pytest.mark.parametrize("reduction", ["sequence", "token"])
@pytest.mark.parametrize("with_token_weights", [True, False])
def test_weighted_sft_matches_a_loop(reduction, with_token_weights):
    losses, mask = draw(B, S).abs(), some_mask()
    w, u = draw(B, seed=4).abs(), (draw(B, S, seed=5).abs() if with_token_weights else None)
    want = slow_weighted(losses.tolist(), mask.tolist(), w.tolist(), u.tolist() if u is not None else None, reduction)
    found = weighted_sft(losses, mask, w, u, reduction)
    assert found.item() == pytest.approx(want, rel=1e-12)
    weights = (losses.requires_grad_(), w.requires_grad_()) + ((u.requires_grad_(),) if u is not None else ())
    assert torch.autograd.gradcheck(lambda losses, w, u=None: weighted_sft(losses, mask, w, u, reduction), weights)


def test_the_two_reductions_differ_by_the_length_of_a_sequence():
    """One sequence of 2 tokens at 1 nat, one of 4 at 2 nats: means (1 + 2) / 2 = 1.5 and (2 + 8) / 6 = 1.667."""
    losses = torch.tensor([[1.0, 1.0, 0.0, 0.0], [2.0, 2.0, 2.0, 2.0]])
    mask = torch.tensor([[True, True, False, False], [True] * 4])
    one = torch.ones(2)
    assert weighted_sft(losses, mask, one, None, "sequence").item() / 2 == 1.5
    assert weighted_sft(losses, mask, one, None, "token").item() / 6 == pytest.approx(10 / 6)


def test_weights_of_one_are_no_weights_and_a_weight_of_zero_takes_a_sequence_out():
    losses, mask, ones = draw(B, S).abs(), some_mask(), torch.ones(B, dtype=torch.float64)
    for reduction in ("sequence", "token"):
        plain = weighted_sft(losses, mask, ones, None, reduction)
        assert torch.equal(plain, weighted_sft(losses, mask, ones, torch.ones(B, S, dtype=torch.float64), reduction))
        without = weighted_sft(losses[1:], mask[1:], ones[1:], None, reduction)
        torch.testing.assert_close(
            weighted_sft(losses, mask, torch.tensor([0.0, 1, 1]).double(), None, reduction), without
        )


@pytest.mark.parametrize("reduction", ["sequence", "token"])
def test_masked_losses_and_weights_may_hold_anything(reduction):
    losses, mask, w, u = draw(B, S).abs(), some_mask(), torch.ones(B).double(), draw(B, S, seed=5).abs()
    want = weighted_sft(losses, mask, w, u, reduction)
    losses[~mask], u[~mask] = math.nan, math.inf
    losses.requires_grad_(), u.requires_grad_()
    found = weighted_sft(losses, mask, w, u, reduction)
    assert torch.equal(found, want)
    found.backward()
    assert (losses.grad[~mask] == 0).all()
    assert (u.grad[~mask] == 0).all()


def test_an_unknown_reduction_is_refused():
    with pytest.raises(ValueError, match="must be sequence or token, found 'mean'"):
        weighted_sft(draw(B, S), some_mask(), torch.ones(B), None, "mean")
