"""Tensors of a rollout: which problems it has, how responses are laid out, their advantages, and the micro-batches of an update.

Pure functions; the arithmetic behind them is in rl_math.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..basics import fold_seed
from . import rewards as earned
from . import rl_math
from .forward import shared_cost


def problems_of(rollout: int, count: int, of: int, seed: int) -> list[int]:
    """Indices of the `count` problems of a rollout: an endless stream of shuffled passes over `of` problems, cut in pieces."""
    found, orders = [], {}
    for place in range(rollout * count, (rollout + 1) * count):
        turn, index = divmod(place, of)
        if turn not in orders:
            generator = torch.Generator().manual_seed(fold_seed(seed, "problems", turn) % 2**62)
            orders[turn] = torch.randperm(of, generator=generator).tolist()
        found.append(orders[turn][index])
    return found


def layout(
    rollouts: Sequence[earned.Rollout], rewards: Sequence[earned.Reward], pad_id: int
) -> dict[str, torch.Tensor]:
    """Tensors of responses, one row each, padded on the right: ids and attention mask [N, S]; mask, response, engine_logp,
    outcome, step_rewards and own [N, S-1] in action coordinates; and `width`, the columns of each row that hold something.

    `response` is the mask before anything is left out of the loss.
    """
    widths = [len(r.prompt_ids) + len(r.ids) for r in rollouts]
    n, s = len(rollouts), max(widths)
    ids = torch.full((n, s), pad_id)
    batch = {name: torch.zeros(n, s - 1) for name in ("engine_logp", "outcome", "step_rewards", "own")}
    mask = torch.zeros(n, s - 1, dtype=torch.bool)
    for row, (rollout, reward) in enumerate(zip(rollouts, rewards, strict=True)):
        # The first response token is scored from the last prompt token: action coordinates lie one to the left.
        begin, length = len(rollout.prompt_ids) - 1, len(rollout.ids)
        ids[row, : widths[row]] = torch.tensor(rollout.prompt_ids + rollout.ids)
        here = slice(begin, begin + length)
        mask[row, here] = True
        batch["engine_logp"][row, here] = torch.tensor(rollout.logprobs)
        steps, own = earned.on_tokens(earned.Reward(0.0, reward.steps, reward.own), rollout.step_ends, length)
        batch["step_rewards"][row, here] = torch.tensor(steps)
        batch["own"][row, here] = torch.tensor(own)
        batch["outcome"][row, begin + length - 1] = reward.outcome
    attention = (torch.arange(s) < torch.tensor(widths)[:, None]).long()
    kept = torch.tensor([not r.truncated for r in rollouts])
    return {
        "input_ids": ids, "attention_mask": attention, "mask": mask, "response": mask.clone(), "width": torch.tensor(widths),
        "finished": kept, **batch,
    }  # fmt: skip


def add_advantages(batch: dict[str, torch.Tensor], args: Any, total: Any = lambda x: x) -> None:
    """Adds `advantages` and, with a critic, `returns` [N, T] to a batch of whole groups.

    ppo: GAE over outcome, step rewards and KL. rloo, grpo: the group's baseline for the response's outcome (and KL), and a baseline
    per token for step rewards, each source for itself. Own rewards are added last: they reach no other step.
    """
    mask = batch["mask"]
    outcome = batch["outcome"]
    if "ref_logp" in batch and args.kl_in_ == "reward":
        kl = rl_math.kl_estimate(batch["old_logp"], batch["ref_logp"], args.kl_estimator_)
        outcome = outcome - args.kl_coefficient * torch.where(mask, kl, 0.0)
    if args.algorithm == "ppo":
        advantages, batch["returns"] = rl_math.gae(
            outcome + batch["step_rewards"], batch["values"], mask, args.gamma, args.lam
        )
    else:
        whole = outcome.sum(1)
        if args.algorithm == "rloo":
            whole = rl_math.leave_one_out(whole, args.samples)
        else:
            whole = rl_math.group_relative(whole, args.samples, args.scale_by_std)
        advantages = torch.where(mask, whole[:, None], 0.0)
        if batch["step_rewards"].any():
            advantages = advantages + rl_math.process_leave_one_out(batch["step_rewards"], mask, args.samples)
    advantages = advantages + batch["own"]
    if args.whiten if args.whiten is not None else args.algorithm == "ppo":
        advantages = rl_math.whiten(advantages, mask, total)
    batch["advantages"] = advantages


def micro_batches(widths: Sequence[int], args: Any, prompts: Sequence[int] = ()) -> list[list[list[int]]]:
    """Rows [mini-batch][micro-batch][row]: consecutive shares of the responses, within each like lengths together.

    Consecutive `args.samples` rows answer one prompt. With the tokens of each row's prompt, `prompts`, responses to one prompt stay
    together wherever that leaves less to read, for a prompt is then read once (`forward.share_prompts`).
    """
    size, found = args.per_device_train_batch_size, []
    for start in range(0, len(widths), args.share):
        rows = range(start, start + args.share)
        orders = [list(rows)]
        if args.like_lengths:
            orders = [sorted(rows, key=lambda row: (widths[row], row))]
            if prompts:
                groups = [rows[i : i + args.samples] for i in range(0, len(rows), args.samples)]
                groups.sort(key=lambda group: (max(widths[row] for row in group), group[0]))
                orders.append([row for group in groups for row in group])
        cuts = [[order[i : i + size] for i in range(0, len(order), size)] for order in orders]
        found.append(
            min(cuts, key=lambda pieces: sum(_to_read(rows, widths, args.samples, prompts) for rows in pieces))
        )
    return found


def _to_read(rows: Sequence[int], widths: Sequence[int], samples: int, prompts: Sequence[int]) -> int:
    """Tokens of a micro-batch, padding included."""
    lengths = [widths[row] for row in rows]
    if not prompts:
        return len(rows) * max(lengths)
    return min(shared_cost([prompts[row] for row in rows], lengths, [row // samples for row in rows]))


def cut(batch: dict[str, torch.Tensor], rows: Sequence[int]) -> dict[str, torch.Tensor]:
    """Some rows of a batch without the columns that are padding in all of them."""
    width = int(batch["width"][rows].max())
    made = {}
    for name, value in batch.items():
        if value.dim() == 2:
            made[name] = value[rows, : width if name in ("input_ids", "attention_mask") else width - 1]
    return made
