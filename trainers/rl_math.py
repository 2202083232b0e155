"""The arithmetic of policy gradients: advantages, ratios, losses and KL estimates. Pure functions of tensors.

Everything is in *action* coordinates [B, T]: entry t belongs to the sampled token t + 1 of a padded row, is scored from the hidden
state at t, and `mask` says where that token belongs to the response, the end-of-sequence token included and padding excluded.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

import torch

Reduction = Literal["sequence", "token", "constant", "sum", "micro_batch"]
KLEstimator = Literal["k1", "k2", "k3"]
REDUCTIONS, KL_ESTIMATORS = get_args(Reduction), get_args(KLEstimator)


def logprobs_and_entropy(
    logits: torch.Tensor, ids: torch.Tensor, temperature: float = 1.0, *, entropy: bool = True
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(log-probability [N] in nats of each id under its row of softmax(logits [N, V] / temperature), that row's entropy [N]).

    H = log sum e^z - sum p z, over the whole vocabulary; without `entropy` it is None and costs nothing.
    """
    scaled = _full(logits) / temperature
    total = scaled.logsumexp(-1)
    found = scaled.gather(-1, ids[:, None]).squeeze(-1) - total
    return found, total - ((scaled - total[:, None]).exp() * scaled).sum(-1) if entropy else None


def _full(logits: torch.Tensor) -> torch.Tensor:
    return logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits


# --- means -------------------------------------------------------------------------------------------------------------


def masked_mean(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """sum(a m) / max(1, sum m), a scalar; what is masked may hold anything."""
    return torch.where(mask, values, 0.0).sum() / mask.sum().clamp(min=1)


def whiten(
    values: torch.Tensor, mask: torch.Tensor, total: Callable[[torch.Tensor], torch.Tensor] = lambda x: x
) -> torch.Tensor:
    """(a - mu) / sqrt(sigma^2 + 1e-8) [B, T], 0 where masked; statistics over the masked-in entries of the global batch.

    `total` sums a tensor over all processes. The variance is the population's, taken around the mean in a second pass.
    """
    count = total(mask.sum().to(values.dtype)).clamp(min=1)
    mean = total(torch.where(mask, values, 0.0).sum()) / count
    centred = torch.where(mask, values - mean, 0.0)
    variance = total((centred * centred).sum()) / count
    return centred / torch.sqrt(variance + 1e-8)


def explained_variance(
    values: torch.Tensor,
    returns: torch.Tensor,
    mask: torch.Tensor,
    total: Callable[[torch.Tensor], torch.Tensor] = lambda x: x,
) -> float:
    """1 - Var(returns - values) / Var(returns) over the global batch; NaN if the returns do not vary."""
    spread = []
    for x in (returns - values, returns):
        count = total(mask.sum().to(x.dtype)).clamp(min=1)
        mean = total(torch.where(mask, x, 0.0).sum()) / count
        spread.append((total(torch.where(mask, (x - mean) ** 2, 0.0).sum()) / count).item())
    return 1.0 - spread[0] / spread[1] if spread[1] > 1e-12 else float("nan")


# --- advantages --------------------------------------------------------------------------------------------------------


def gae(
    rewards: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, gamma: float, lam: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(advantages, returns), both [B, T] and 0 where masked: generalised advantage estimation (arXiv:1506.02438 Eq. 16).

    delta_t = r_t + gamma V_{t+1} - V_t with V after the last token 0;  A_t = sum_l (gamma lam)^l delta_{t+l};  R_t = A_t + V_t,
    before any whitening. values[:, t] is the value of the state *before* the action at t.
    """
    advantages = torch.zeros_like(rewards)
    running = torch.zeros_like(rewards[:, 0])
    after = torch.zeros_like(running)
    for t in reversed(range(rewards.shape[1])):
        here = mask[:, t]
        delta = rewards[:, t] + gamma * after - values[:, t]
        running = torch.where(here, delta + gamma * lam * running, 0.0)
        after = torch.where(here, values[:, t], 0.0)
        advantages[:, t] = running
    return advantages, torch.where(mask, advantages + values, 0.0)


def returns_to_go(rewards: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """sum over t' >= t of r_t' m_t' [B, T] (gamma 1), 0 where masked."""
    kept = torch.where(mask, rewards, 0.0)
    return torch.where(mask, kept.flip(1).cumsum(1).flip(1), 0.0)


def leave_one_out(rewards: torch.Tensor, group: int) -> torch.Tensor:
    """RLOO advantages [N]: r_i - mean of the others of its group = G/(G-1) (r_i - mean)   (arXiv:2402.14740 Eq. 8).

    Consecutive `group` entries are samples of one prompt; there must be two or more.
    """
    r = rewards.view(-1, group)
    return ((r - r.mean(1, keepdim=True)) * (group / (group - 1))).reshape(-1)


def group_relative(rewards: torch.Tensor, group: int, scale: bool = True) -> torch.Tensor:
    """GRPO advantages [N]: (r_i - mean) / (sigma + 1e-4) (arXiv:2402.03300), or r_i - mean without `scale` (Dr. GRPO,
    arXiv:2503.20783). sigma is the sample standard deviation (divisor G - 1), as in TRL."""
    r = rewards.view(-1, group)
    centred = r - r.mean(1, keepdim=True)
    return (centred / (r.std(1, keepdim=True) + 1e-4) if scale else centred).reshape(-1)


def process_leave_one_out(rewards: torch.Tensor, mask: torch.Tensor, group: int) -> torch.Tensor:
    """Advantages [N, T] of rewards that lie on step ends: returns to go of r_t - b_i.

    b_i is the mean reward *per token* of the group's other responses, so that a step of n tokens is set against n b_i
    (PURE, arXiv:2504.15275). A baseline per step would pay for few, giant steps.
    """
    sums = torch.where(mask, rewards, 0.0).sum(1).view(-1, group)
    tokens = mask.sum(1).to(rewards.dtype).view(-1, group)
    others = (sums.sum(1, keepdim=True) - sums) / (tokens.sum(1, keepdim=True) - tokens).clamp(min=1)
    return returns_to_go(rewards - others.reshape(-1, 1), mask)


# --- KL ----------------------------------------------------------------------------------------------------------------


def kl_estimate(logp: torch.Tensor, ref_logp: torch.Tensor, kind: str) -> torch.Tensor:
    """One-sample estimates [B, T] of KL(pi || ref) at tokens sampled from pi (Schulman 2020, "Approximating KL divergence").

    With d = ref_logp - logp:  k1 = -d;  k2 = d^2 / 2;  k3 = e^d - d - 1, which is never negative and unbiased as k1 is.
    """
    d = ref_logp - logp
    if kind == "k1":
        return -d
    if kind == "k2":
        return 0.5 * d * d
    if kind == "k3":
        return torch.expm1(d) - d
    raise ValueError(f"a KL estimator must be one of {', '.join(KL_ESTIMATORS)}, found {kind!r}")


# --- losses ------------------------------------------------------------------------------------------------------------


def log_ratio(logp: torch.Tensor, old_logp: torch.Tensor, mask: torch.Tensor, level: str = "token") -> torch.Tensor:
    """log rho [B, T], 0 where masked: log pi - log pi_old of each token, or its mean over the sequence at all of its tokens.

    `sequence` is GSPO's ratio (arXiv:2507.18071 Eq. 7): exp of the mean log-ratio.
    """
    difference = torch.where(mask, logp - old_logp, 0.0)
    if level == "token":
        return difference
    if level != "sequence":
        raise ValueError(f"a ratio's level must be token or sequence, found {level!r}")
    mean = difference.sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)
    return torch.where(mask, mean, 0.0)


def clipped_policy_loss(
    log_rho: torch.Tensor, advantages: torch.Tensor, mask: torch.Tensor, clip_low: float, clip_high: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(loss [B, T], clipped [B, T]): l = -min(rho A, clip(rho, 1 - low, 1 + high) A), 0 where masked (arXiv:1707.06347 Eq. 7).

    `clipped` says where the clipped term is the smaller one, so that the token has no gradient.
    """
    rho = log_rho.exp()
    plain, bounded = rho * advantages, rho.clamp(1 - clip_low, 1 + clip_high) * advantages
    return torch.where(mask, -torch.minimum(plain, bounded), 0.0), (bounded < plain) & mask


def cispo_loss(
    logp: torch.Tensor, log_rho: torch.Tensor, advantages: torch.Tensor, mask: torch.Tensor, clip_high: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(loss [B, T], capped [B, T]): l = -sg[min(rho, 1 + high)] A log pi, 0 where masked (CISPO, arXiv:2506.13585).

    The weight is capped and not the objective, so that capped tokens keep a gradient.
    """
    rho = log_rho.exp().detach()
    weight = rho.clamp(max=1 + clip_high)
    return torch.where(mask, -weight * advantages * logp, 0.0), (rho > weight) & mask


def clipped_value_loss(
    values: torch.Tensor, old_values: torch.Tensor, returns: torch.Tensor, mask: torch.Tensor, clip: float
) -> torch.Tensor:
    """1/2 max((V - R)^2, (clip(V, V_old +- clip) - R)^2) [B, T], 0 where masked. `clip` 0 does not clip."""
    plain = (values - returns) ** 2
    if clip > 0:
        near = old_values + (values - old_values).clamp(-clip, clip)
        plain = torch.maximum(plain, (near - returns) ** 2)
    return torch.where(mask, 0.5 * plain, 0.0)


def importance_weight(old_logp: torch.Tensor, engine_logp: torch.Tensor, cap: float) -> torch.Tensor:
    """min(pi_train / pi_engine, cap) [B, T], without gradient: for samples whose engine computes other probabilities than the
    trainer (truncated importance sampling)."""
    return (old_logp - engine_logp).exp().clamp(max=cap).detach()


def reduce_loss(losses: torch.Tensor, mask: torch.Tensor, how: str) -> torch.Tensor:
    """The loss summed over what it is to be averaged over, a scalar; `loss_items` counts that.

    `sequence`     sum_b (sum_t l_bt / len_b), over sequences (ReFT, GRPO)
    `token`        sum_bt l_bt, over all tokens of the global batch (DAPO)
    `constant`     sum_bt l_bt, over sequences x longest possible response (Dr. GRPO)
    `sum`          sum_bt l_bt, over sequences (REINFORCE of whole sequences, RLOO)
    `micro_batch`  the token mean of this micro-batch, over micro-batches (BNPO)
    """
    kept = torch.where(mask, losses, 0.0)
    if how == "sequence":
        return (kept.sum(1) / mask.sum(1).clamp(min=1)).sum()
    if how == "micro_batch":
        return kept.sum() / mask.sum().clamp(min=1)
    if how in REDUCTIONS:
        return kept.sum()
    raise ValueError(f"reduction must be one of {', '.join(REDUCTIONS)}, found {how!r}")


def loss_items(mask: torch.Tensor, how: str, longest: int) -> torch.Tensor:
    """What a sum of `reduce_loss` is divided by, before it is summed over micro-batches and processes: a scalar."""
    counts = {
        "sequence": len(mask), "token": mask.sum(), "constant": len(mask) * longest, "sum": len(mask), "micro_batch": 1,
    }  # fmt: skip
    if how not in counts:
        raise ValueError(f"reduction must be one of {', '.join(REDUCTIONS)}, found {how!r}")
    return torch.as_tensor(counts[how], device=mask.device)
