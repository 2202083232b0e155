"""Losses: pure functions of tensors. They return unreduced values; the caller names the reduction."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def step_logit(logits: torch.Tensor, positive_class: int | None) -> torch.Tensor:
    """The log-odds [B, S] that a step is good, from head outputs [B, S, C].

    C = 1: the scalar itself. C = 2: the difference of the two logits, so that sigmoid(log-odds) is the softmax probability of
    the positive class.
    """
    if logits.shape[-1] == 1:
        return logits.squeeze(-1)
    if positive_class not in (0, 1):
        raise ValueError(f"a two-class head needs positive_class 0 or 1, found {positive_class!r}")
    return logits[..., positive_class] - logits[..., 1 - positive_class]


def step_bce(log_odds: torch.Tensor, targets: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Binary cross-entropy in nats [B, S], 0 where `mask` [B, S] is False.

    L = -[y log p + (1 - y) log(1 - p)], p = sigmoid(log_odds), y in [0, 1]    Math-Shepherd (arXiv:2312.08935) Eq. 3; a soft
    target y is the share of right continuations (arXiv:2408.03314 appendix D).
    """
    # Masked positions may hold anything; 0 * nan is nan, in the loss and in its gradient, so both arguments are replaced before
    # the loss and not multiplied after it.
    log_odds, targets = torch.where(mask, log_odds, 0.0), torch.where(mask, targets, 0.0)
    loss = F.binary_cross_entropy_with_logits(log_odds, targets, reduction="none")
    return torch.where(mask, loss, 0.0)


def step_mse(log_odds: torch.Tensor, targets: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Squared error of the probability [B, S], 0 where `mask` is False: (sigmoid(log_odds) - y)^2.

    The verifier loss of Cobbe et al. (arXiv:2110.14168, section 4.2).
    """
    error = torch.sigmoid(torch.where(mask, log_odds, 0.0)) - torch.where(mask, targets, 0.0)
    return torch.where(mask, error * error, 0.0)


def token_cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(nats [B, S-1], mask [B, S-1]) of predicting labels[:, 1:] from logits[:, :-1]; label -100 is masked."""
    return aligned_cross_entropy(logits[:, :-1], labels[:, 1:])


def aligned_cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(nats [B, K], mask [B, K]) of labels [B, K] that logits [B, K, V] predict, without a shift; label -100 is masked."""
    mask = labels != -100
    # Trained positions alone are picked: what the others hold cannot enter, and their logits are not copied to float32.
    trained = F.cross_entropy(logits[mask].float(), labels[mask], reduction="none")
    return torch.zeros(mask.shape, dtype=trained.dtype, device=trained.device).masked_scatter(mask, trained), mask


def weighted_sft(
    losses: torch.Tensor,
    mask: torch.Tensor,
    sequence_weight: torch.Tensor,
    token_weight: torch.Tensor | None,
    reduction: str,
) -> torch.Tensor:
    """Weighted fine-tuning loss, summed over what it is to be averaged over.

    With u the token weights and w the sequence weights,
      `sequence`: sum_b w_b (sum_t m_bt u_bt CE_bt / sum_t m_bt), to be divided by the number of sequences;
      `token`: sum_b w_b sum_t m_bt u_bt CE_bt, to be divided by the number of trained tokens.
    A sequence without a trained token counts 0.

    Args: losses [B, S] nats; mask [B, S]; sequence_weight [B]; token_weight [B, S] or None for ones.
    """
    weighted = torch.where(mask, losses, 0.0)
    if token_weight is not None:
        weighted = weighted * torch.where(mask, token_weight, 0.0)
    per_sequence = weighted.sum(1)
    if reduction == "sequence":
        per_sequence = per_sequence / mask.sum(1).clamp(min=1)
    elif reduction != "token":
        raise ValueError(f"reduction must be sequence or token, found {reduction!r}")
    return (sequence_weight * per_sequence).sum()


def value_mse(log_odds: torch.Tensor, targets: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Squared error of the value [B, S], 0 where `mask` is False: (V - Q)^2 with V = tanh(log_odds / 2) and Q in [-1, 1].

    AlphaMath (arXiv:2405.03553) Eq. 8. tanh(x / 2) = 2 sigmoid(x) - 1, so that a reader who takes sigmoid(x) for the score, as all
    do here, has (V + 1) / 2, and tanh is applied once. The paper has tanh(x): the head's scale is free.
    """
    error = torch.tanh(torch.where(mask, log_odds, 0.0) / 2) - torch.where(mask, targets, 0.0)
    return torch.where(mask, error * error, 0.0)


def step_ranking(
    chosen: torch.Tensor, rejected: torch.Tensor, mask: torch.Tensor, target: torch.Tensor | None = None
) -> torch.Tensor:
    """Cross-entropy in nats [B, T] of "the chosen step beats the rejected one", 0 where `mask` [B, T] is False.

    L = -[y log sigmoid(r+ - r-) + (1 - y) log sigmoid(r- - r+)]

    y = 1 (`target` None) is the Bradley-Terry loss, summed over the steps behind the branch by Tree-PLV (arXiv:2407.00390); a
    target [B] of (1 + p - q) / 2, p and q the shares of two siblings, is OmegaPRM's soft one (arXiv:2406.06592 appendix B).

    Args: chosen, rejected [B, T] scores r at the steps that are compared.
    """
    gap = torch.where(mask, chosen, 0.0) - torch.where(mask, rejected, 0.0)  # masked scores may hold anything
    y = torch.ones_like(gap) if target is None else target[:, None].to(gap).expand_as(gap)
    return torch.where(mask, -(y * F.logsigmoid(gap) + (1 - y) * F.logsigmoid(-gap)), 0.0)


def preference_loss(
    chosen: torch.Tensor, rejected: torch.Tensor, beta: float, smoothing: torch.Tensor | None = None
) -> torch.Tensor:
    """The DPO loss of each pair in nats [B].

    With h = chosen - rejected, the difference of two log-ratios log pi(y|x) - log pi_ref(y|x),
      L = -(1 - eps) log sigmoid(beta h) - eps log sigmoid(-beta h)
    DPO (arXiv:2305.18290) Eq. 7; eps > 0 is the chance that the preference is the wrong way round (arXiv:2405.00451, where
    visit counts give it).

    Args: chosen, rejected [B] log-ratios, summed over the tokens and not averaged; beta > 0; smoothing [B] in [0, 0.5] or None.
    """
    scaled = beta * (chosen - rejected)
    loss = -F.logsigmoid(scaled)
    if smoothing is None:
        return loss
    return (1 - smoothing) * loss - smoothing * F.logsigmoid(-scaled)


def ipo_loss(
    chosen: torch.Tensor,
    rejected: torch.Tensor,
    beta: float,
    chosen_tokens: torch.Tensor,
    rejected_tokens: torch.Tensor,
) -> torch.Tensor:
    """The IPO loss of each pair [B]: (h - 1 / (2 beta))^2 with h the difference of log-ratios for each token.

    arXiv:2310.12036 Eq. 17; dividing each log-ratio by its number of tokens is what its authors do (and TRL after them).

    Args: chosen, rejected [B] summed log-ratios; beta > 0; chosen_tokens, rejected_tokens [B] numbers of tokens.
    """
    return (chosen / chosen_tokens - rejected / rejected_tokens - 1 / (2 * beta)) ** 2


def visit_smoothing(n_chosen: int, n_rejected: int) -> float:
    """eps = min(N_l / (N_l + max(1, N_w)), 0.5): how likely a preference of two counted steps is the wrong way round.

    As in the code of arXiv:2405.00451 (the paper writes 1 / (N_w / N_l + 1)). At 0.5 a pair teaches nothing.
    """
    return min(n_rejected / (n_rejected + max(1, n_chosen)), 0.5)
