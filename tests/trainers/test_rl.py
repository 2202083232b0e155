"""Online training on tiny policies: where numbers lie, the first ratio, parity of batches, resume, checkpoints, learning."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from stepladder.basics import UserError
from stepladder.config import build
from stepladder.models.reward import RewardModel
from stepladder.models.step_format import StepFormat
from stepladder.tasks.base import Outcome, Problem, Verdict
from stepladder.tasks.load import load_task
from stepladder.trainers import rl, rl_batches, rl_math, step_judges
from stepladder.trainers.actor_critic import ActorCritic
from stepladder.trainers.rewards import Reward, Rollout

TASK = {"kind": "chain", "p": 7, "min_steps": 1, "max_steps": 3, "sizes": {"train": 40, "dev": 6, "test": 6}}


@pytest.fixture
def settings(tmp_path: Path, policy_folder: Path) -> Callable[..., dict[str, Any]]:
    """The settings of a short training."""

    def make(**over: Any) -> dict[str, Any]:
        return {
            "model": str(policy_folder), "output_dir": str(tmp_path / "out"), "task": TASK, "max_new_tokens": 8,
            "max_length": 64, "prompts": 4, "samples": 2, "rollouts": 2, "per_device_train_batch_size": 8,
            "learning_rate": 0.003, "seed": 1, "eval_problems": 0, "save_strategy": "no", "disable_tqdm": True,
            "use_cpu": True, **over,
        }  # fmt: skip

    return make


def run(values: dict[str, Any], *transforms: Any) -> SimpleNamespace:
    metrics = rl.train(build(rl.RLArguments, values), transforms)
    out = Path(values["output_dir"])
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return SimpleNamespace(metrics=metrics, lines=lines, out=out, steps=[line for line in lines if "loss" in line])


def by_ids(rollout: Rollout, reward: Reward) -> Reward:
    """A reward that differs between responses of a random policy, which answers nothing."""
    return Reward(sum((i + 1) * token for i, token in enumerate(rollout.ids)) % 97 / 97)


# --- where numbers lie -----------------------------------------------------------------------------------------------------


def a_rollout(prompt: tuple[int, ...], ids: tuple[int, ...], ends: tuple[int, ...], truncated: bool = False) -> Rollout:
    return Rollout(
        Problem("p", "?", "1"), prompt, ids, tuple(-0.1 * i for i in ids), "", tuple("s" for _ in ends), ends, truncated,
        Verdict("1", Outcome.RIGHT),
    )  # fmt: skip


ROLLOUTS = [a_rollout((3, 4, 5), (6, 7, 8, 2), (2, 3)), a_rollout((3,), (9, 2), (1,), truncated=True)]


def test_actions_lie_one_to_the_left_of_their_tokens() -> None:
    batch = rl_batches.layout(ROLLOUTS, [Reward(1.0, (0.5, 0.25)), Reward(0.1, (), (0.7,))], pad_id=0)
    assert batch["input_ids"].tolist() == [[3, 4, 5, 6, 7, 8, 2], [3, 9, 2, 0, 0, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1] * 7, [1, 1, 1, 0, 0, 0, 0]]
    assert batch["input_ids"][:, 1:][batch["mask"]].tolist() == [6, 7, 8, 2, 9, 2]  # the end of the sequence counts
    assert batch["engine_logp"][batch["mask"]].tolist() == pytest.approx([-0.6, -0.7, -0.8, -0.2, -0.9, -0.2])
    assert batch["outcome"].tolist()[0] == pytest.approx([0, 0, 0, 0, 0, 1.0])
    assert batch["outcome"].tolist()[1] == pytest.approx([0, 0.1, 0, 0, 0, 0])
    assert batch["step_rewards"].tolist()[0] == pytest.approx([0, 0, 0, 0.5, 0.25, 0])
    assert batch["own"].tolist()[1] == pytest.approx([0.7, 0.7, 0, 0, 0, 0])
    assert batch["finished"].tolist() == [True, False]
    short = rl_batches.cut(batch, [1])
    assert short["input_ids"].tolist() == [[3, 9, 2]]
    assert short["mask"].tolist() == [[True, True]]


def test_a_value_is_of_the_state_before_its_action(tiny_policy: Any, tiny_scorer: Any, lab_words: Any) -> None:
    model = ActorCritic(tiny_policy(lab_words), tiny_scorer(lab_words), tiny_policy(lab_words, seed=1))
    ids = torch.tensor([[5, 9, 7, 8, 2]])
    other = ids.clone()
    other[0, 3] = 10  # the token of action 2
    with torch.no_grad():
        a, b = (model(x, torch.ones_like(x), reference=True) for x in (ids, other))
        raw = model.critic(input_ids=ids).logits.squeeze(-1)
    assert all(value.shape == (1, 4) for value in a.values())
    torch.testing.assert_close(a["values"], raw[:, :-1])
    for name, first_to_differ in (("values", 3), ("entropy", 3), ("logp", 2), ("ref_logp", 2)):
        same = (a[name] - b[name]).abs()[0] < 1e-6
        assert same.tolist()[:first_to_differ] == [True] * first_to_differ, name
        assert not same[first_to_differ], name
    assert (a["logp"] - a["ref_logp"]).abs().max() > 1e-3


@pytest.mark.parametrize("picks", [True, False])
def test_logits_are_computed_at_responses_alone_and_nothing_changes(
    tiny_policy: Any, tiny_scorer: Any, lab_words: Any, monkeypatch: pytest.MonkeyPatch, picks: bool
) -> None:
    monkeypatch.setattr(
        "stepladder.trainers.forward.takes_positions", lambda model: picks and hasattr(model, "lm_head")
    )
    model = ActorCritic(tiny_policy(lab_words), tiny_scorer(lab_words), tiny_policy(lab_words, seed=1)).double()
    ids = torch.randint(3, 20, (3, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(3, 8, dtype=torch.bool)
    mask[0, 3:6], mask[1, 4:8], mask[2, 4:5] = True, True, True
    weights = torch.randn(3, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    shapes: list[int] = []
    model.policy.lm_head.register_forward_hook(lambda _m, _i, out: shapes.append(out.shape[1]))
    found, gradients = [], []
    for where in (None, mask):
        out = model(ids, torch.ones_like(ids), 0.7, reference=True, mask=where)
        found.append(out)
        sum((weights * torch.where(mask, out[name], 0.0)).sum() for name in ("logp", "entropy", "values")).backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
        model.zero_grad()
    assert shapes == [8 if picks else 9, 5 if picks else 9]
    for name in ("logp", "entropy", "ref_logp", "values"):
        torch.testing.assert_close(found[1][name], torch.where(mask, found[0][name], 0.0))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)
    assert "entropy" not in model(ids, torch.ones_like(ids), mask=mask, entropy=False)
    nothing = model(ids, torch.ones_like(ids), mask=torch.zeros_like(mask))  # a share without a response
    nothing["logp"].sum().backward()
    assert not nothing["logp"].any()


def grouped(prompts: list[list[int]], responses: list[tuple[int, list[int]]]) -> tuple[torch.Tensor, ...]:
    """(ids, attention mask, mask) of responses (prompt, ids), padded on the right."""
    rows = [prompts[number] + ids for number, ids in responses]
    width = max(map(len, rows))
    ids, attention = torch.zeros(2, len(rows), width, dtype=torch.long)
    mask = torch.zeros(len(rows), width - 1, dtype=torch.bool)
    for row, ((number, _), text) in enumerate(zip(responses, rows, strict=True)):
        ids[row, : len(text)], attention[row, : len(text)] = torch.tensor(text), 1
        mask[row, len(prompts[number]) - 1 : len(text) - 1] = True
    return ids, attention, mask


def test_a_prompt_of_several_responses_is_read_once_and_nothing_changes(
    tiny_policy: Any, tiny_scorer: Any, lab_words: Any
) -> None:
    model = ActorCritic(tiny_policy(lab_words), tiny_scorer(lab_words), tiny_policy(lab_words, seed=1)).double()
    prompts = [[3, 4, 5, 6, 7, 8, 9, 10], [11, 12, 5, 6, 7]]
    answers = [(0, [4, 5, 6, 2]), (0, [7, 2]), (1, [9, 8, 7, 6, 2]), (0, [4, 5, 6, 7, 8, 2]), (1, [5, 2])]
    ids, attention, mask = grouped(prompts, answers)
    mask[3, 9] = False  # what is not wanted of a response is 0 as well
    weights = torch.randn(mask.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    read: list[tuple[int, ...]] = []
    for part in (model.policy, model.critic, model.reference):
        part.get_input_embeddings().register_forward_hook(lambda _m, given, _o: read.append(tuple(given[0].shape)))
    found, gradients, tokens = [], [], []
    for share in (False, True):
        model.share_prompts = share
        read.clear()
        out = model(ids, attention, 0.7, reference=True, mask=mask)
        sum((weights * out[name]).sum() for name in ("logp", "entropy", "values")).backward()
        found.append(out)
        tokens.append(list(read))
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
        model.zero_grad()
    assert tokens == [
        [(5, 14)] * 3,
        [(2, 7), (5, 7)] * 3,
    ]  # prompts without their last token, which the responses begin with
    assert all((out["logp"] != 0).equal(mask) and (out["values"] != 0).equal(mask) for out in found)
    for name in ("logp", "entropy", "ref_logp", "values"):
        torch.testing.assert_close(
            found[1][name], found[0][name], rtol=1e-6, atol=1e-6
        )  # norms are in single precision
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_prompts_are_shared_only_where_that_is_less_and_the_model_can(
    tiny_policy: Any, lab_words: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = ActorCritic(tiny_policy(lab_words))
    read: list[tuple[int, ...]] = []
    model.policy.get_input_embeddings().register_forward_hook(lambda _m, given, _o: read.append(tuple(given[0].shape)))
    twice = grouped([[3, 4, 5, 6, 7, 8]], [(0, [4, 2]), (0, [5, 2])])

    def shapes(ids: torch.Tensor, attention: torch.Tensor, mask: torch.Tensor) -> list[tuple[int, ...]]:
        read.clear()
        model(ids, attention, mask=mask)
        return list(read)

    assert shapes(*twice) == [(1, 5), (2, 3)]
    assert shapes(*grouped([[3, 4], [5, 6]], [(0, [4, 2]), (1, [5, 2])])) == [(2, 4)]  # nothing is shared
    assert shapes(*grouped([[3]], [(0, [4, 2]), (0, [5, 2])])) == [(2, 3)]  # nothing is left to share
    assert shapes(*twice[:2], torch.zeros_like(twice[2])) == [(2, 8)]
    model.gradient_checkpointing_enable()
    for training in (True, False):  # the same for the pass before the updates: the first ratio is 1
        model.train(training)
        assert shapes(*twice)[0] == (2, 8)  # a model that computes activations again keeps no keys and values


def test_micro_batches_keep_a_problem_together_where_that_is_less_to_read() -> None:
    args = SimpleNamespace(share=8, like_lengths=True, per_device_train_batch_size=4, samples=4)
    # Long prompts, like responses: reading 2 x (4 x 4 + 29) tokens beats 4 x 33 + 4 x 35.
    widths = [33, 35, 33, 35, 33, 35, 33, 35]
    assert rl_batches.micro_batches(widths, args) == [[[0, 2, 4, 6], [1, 3, 5, 7]]]
    assert rl_batches.micro_batches(widths, args, [30] * 8) == [[[0, 1, 2, 3], [4, 5, 6, 7]]]
    # Short prompts, unlike responses.
    widths = [5, 60, 5, 60, 5, 60, 5, 60]
    assert rl_batches.micro_batches(widths, args, [4] * 8) == [[[0, 2, 4, 6], [1, 3, 5, 7]]]


def test_problems_come_in_shuffled_passes_without_end() -> None:
    seen = [index for k in range(7) for index in rl_batches.problems_of(k, 4, 7, seed=3)]
    for turn in range(4):
        assert sorted(seen[7 * turn : 7 * turn + 7]) == list(range(7))
    assert seen[:7] != seen[7:14]
    assert rl_batches.problems_of(2, 4, 7, seed=3) == seen[8:12]
    assert rl_batches.problems_of(0, 4, 7, seed=4) != seen[:4]


def an_advantage(algorithm: str, rewards: list[Reward], **over: Any) -> dict[str, torch.Tensor]:
    rollouts = [a_rollout((3, 4), (6, 7, 8, 2), (2, 3)), a_rollout((3, 4), (9, 9, 2), (2,))]
    batch = rl_batches.layout(rollouts, rewards, pad_id=0)
    batch["values"] = torch.zeros_like(batch["outcome"])
    batch["old_logp"] = torch.where(batch["mask"], -1.0, 0.0)
    batch["ref_logp"] = torch.where(batch["mask"], -1.5, 0.0)
    known = {
        "algorithm": algorithm, "kl_in_": "reward", "kl_estimator_": "k1", "kl_coefficient": 0.0, "gamma": 1.0, "lam": 1.0,
        "samples": 2, "scale_by_std": True, "whiten": False,
    }  # fmt: skip
    rl_batches.add_advantages(batch, SimpleNamespace(**{**known, **over}))
    return batch


def test_ppo_sums_step_rewards_and_kl_over_the_future() -> None:
    found = an_advantage("ppo", [Reward(1.0, (0.5, 0.25)), Reward(0.0)], kl_coefficient=0.1)
    # Tokens 6 7 8 <eos> with 0.5 on the second, 0.25 on the third, 1 on the last, and 0.05 of KL on each.
    assert found["advantages"][0, 1:5].tolist() == pytest.approx([1.75 - 0.2, 1.75 - 0.15, 1.25 - 0.1, 1.0 - 0.05])
    assert found["advantages"][1, 1:4].tolist() == pytest.approx([-0.15, -0.1, -0.05])
    assert found["returns"][0, 1].item() == pytest.approx(1.55)


@pytest.mark.parametrize("algorithm", ["ppo", "rloo", "grpo"])
def test_own_rewards_reach_no_other_step(algorithm: str) -> None:
    plain = an_advantage(algorithm, [Reward(1.0), Reward(0.0)])
    found = an_advantage(algorithm, [Reward(1.0, (), (0.5, -0.3)), Reward(0.0, (), (0.2,))])
    added = (found["advantages"] - plain["advantages"])[plain["mask"]].tolist()
    assert added == pytest.approx([0.5, 0.5, -0.3, -0.3, 0.2, 0.2, 0.2], abs=1e-6)


def test_group_algorithms_give_every_token_the_same_and_steps_a_baseline_of_their_own() -> None:
    kl = [0.05 * 4, 0.05 * 3]
    found = an_advantage("rloo", [Reward(1.0), Reward(0.1)], kl_coefficient=0.1)
    gap = (1.0 - kl[0]) - (0.1 - kl[1])
    assert found["advantages"][0, 1:5].tolist() == pytest.approx([gap] * 4)
    assert found["advantages"][1, 1:4].tolist() == pytest.approx([-gap] * 3)
    assert found["advantages"][~found["mask"]].abs().max() == 0
    found = an_advantage("grpo", [Reward(1.0), Reward(0.0)], scale_by_std=True)
    assert found["advantages"][0, 1].item() == pytest.approx(0.5 / (math.sqrt(0.5) + 1e-4), rel=1e-5)
    steps = [Reward(1.0, (0.4, 0.2)), Reward(0.0, (0.3,))]
    found = an_advantage("grpo", steps, scale_by_std=False)
    # b = 0.3 / 3 a token for the first response, 0.6 / 4 for the second.
    assert found["advantages"][0, 1:5].tolist() == pytest.approx([0.5 + x for x in (0.2, 0.3, 0.0, -0.1)], abs=1e-6)
    assert found["advantages"][1, 1:4].tolist() == pytest.approx([-0.5 + x for x in (-0.15, 0.0, -0.15)], abs=1e-6)


def test_whitened_advantages_have_mean_zero_over_the_batch() -> None:
    found = an_advantage("ppo", [Reward(1.0), Reward(0.0)], whiten=None)
    kept = found["advantages"][found["mask"]]
    assert kept.mean().abs().item() < 1e-6
    assert kept.std(correction=0).item() == pytest.approx(1.0, abs=1e-4)
    assert found["returns"][0, 1].item() == pytest.approx(1.0)  # as they were before


# --- rollouts and losses -----------------------------------------------------------------------------------------------------


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What each micro-batch's loss saw: the batch, and the log-probabilities of the model in training."""
    seen: list[dict[str, Any]] = []
    original = rl.PolicyTrainer.loss_sum

    def loss_sum(self: Any, model: Any, batch: dict[str, torch.Tensor]) -> Any:
        with torch.no_grad():
            out = model(batch["input_ids"], batch["attention_mask"], self.args.temperature, mask=batch["response"])
        seen.append({**batch, **{f"new_{name}": value for name, value in out.items()}, "training": model.training})
        return original(self, model, batch)

    monkeypatch.setattr(rl.PolicyTrainer, "loss_sum", loss_sum)
    return seen


@pytest.mark.parametrize("over", [{"temperature": 0.7}, {"algorithm": "grpo", "lora_r": 2, "temperature": 1.3}])
def test_the_first_ratio_is_exactly_one(settings: Any, watched: Any, over: dict[str, Any]) -> None:
    values = settings(per_device_train_batch_size=2, gradient_accumulation_steps=2, update_epochs=2, **over)
    found = run(values, by_ids)
    steps, size = 4, 2  # two mini-batches twice, of two micro-batches
    assert len(watched) == 2 * steps * size
    for rollout in (0, 1):
        first = watched[rollout * steps * size : rollout * steps * size + size]
        for batch in first:
            mask = batch["mask"]
            assert batch["training"]
            assert torch.equal(batch["new_logp"][mask], batch["old_logp"][mask])
            # What the engine sampled from is what is trained: temperature, shift and layout agree.
            assert (batch["engine_logp"] - batch["old_logp"])[mask].abs().max() < 1e-4
            assert (batch["advantages"][mask] != 0).any()
            if "returns" in batch:
                assert torch.equal(batch["new_values"], batch["values"])
        last = watched[(rollout + 1) * steps * size - 1]
        assert not torch.equal(last["new_logp"], last["old_logp"])
    start = watched[0]
    torch.testing.assert_close(start["ref_logp"], start["old_logp"])  # the reference is the start
    assert found.steps[0]["kl"] == pytest.approx(0.0, abs=1e-4)
    assert found.steps[1]["kl"] != 0.0


@pytest.mark.parametrize(
    "over",
    [
        {},
        {"algorithm": "rloo", "reduction": "token"},
        {"algorithm": "grpo", "policy_loss": "gspo", "reduction": "constant", "entropy_coefficient": 0.01},
    ],
)
def test_8_by_1_equals_1_by_8(settings: Any, tmp_path: Path, over: dict[str, Any]) -> None:
    """Responses have other lengths: a loss divided per micro-batch, or advantages whitened there, would differ."""
    results = []
    for size, accumulation in ((8, 1), (1, 8), (2, 4)):
        values = settings(
            per_device_train_batch_size=size, gradient_accumulation_steps=accumulation, rollouts=3,
            output_dir=str(tmp_path / str(size)), **over,
        )  # fmt: skip
        found = run(values, by_ids)
        results.append(([line["loss"] for line in found.steps], load_file(found.out / "model.safetensors")))
    losses, weights = results[0]
    assert len(set(losses)) == 3
    for other_losses, other_weights in results[1:]:
        differences = [a - b for a, b in zip(losses, other_losses, strict=True)]
        assert max(map(abs, differences)) < 1e-5
        assert abs(sum(differences)) / 3 < 3e-6
        for name, weight in weights.items():
            torch.testing.assert_close(other_weights[name], weight, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("algorithm", ["ppo", "rloo", "grpo"])
def test_a_policy_learns_what_is_rewarded(settings: Any, algorithm: str) -> None:
    """The first token decides: from a share of about one in twenty to most of the samples."""

    def first_token(rollout: Rollout, reward: Reward) -> Reward:
        return Reward(float(rollout.ids[0] == 9))

    values = settings(
        algorithm=algorithm, rollouts=40, prompts=16, samples=4, per_device_train_batch_size=64, max_new_tokens=2,
        learning_rate=0.02, kl_coefficient=0.0, partial_reward=0.0, shown_samples=0,
    )  # fmt: skip
    found = run(values, first_token)
    rewards = [line["reward"] for line in found.steps]
    assert sum(rewards[:3]) / 3 < 0.4
    assert sum(rewards[-3:]) / 3 > 0.85
    if algorithm == "ppo":
        assert abs(found.steps[0]["value"]) < 0.3
        assert found.steps[-1]["value"] == pytest.approx(rewards[-1], abs=0.15)


def test_kl_in_the_reward_holds_a_policy_back(settings: Any, tmp_path: Path) -> None:
    def first_token(rollout: Rollout, reward: Reward) -> Reward:
        return Reward(float(rollout.ids[0] == 9))

    ends = []
    for coefficient in (0.0, 1.0):
        values = settings(
            algorithm="rloo", rollouts=15, prompts=16, samples=4, per_device_train_batch_size=64, max_new_tokens=2,
            learning_rate=0.02, kl_coefficient=coefficient, output_dir=str(tmp_path / str(coefficient)),
        )  # fmt: skip
        ends.append(run(values, first_token).steps[-1])
    assert ends[0]["kl"] > 2 * ends[1]["kl"] > 0
    assert ends[0]["reward"] > ends[1]["reward"]


def test_metrics_and_samples_of_every_rollout(settings: Any) -> None:
    found = run(settings(rollouts=3, eval_problems=5, eval_every=2, log_every=1, shown_samples=3))
    for number, line in enumerate(found.steps, 1):
        assert {
            "loss", "grad_norm", "learning_rate", "reward", "accuracy", "kl", "entropy", "clip_fraction", "explained_variance",
            "length", "steps", "repeated_steps", "truncated", "unparseable", "even_groups", "policy_loss", "value_loss",
            "update_kl", "engine_gap", "value", "length_wrong",
        } <= set(line)  # fmt: skip
        assert line["samples"] == 8 * number
        assert 0 <= line["clip_fraction"] <= 1
        assert line["engine_gap"] < 1e-4
    tokens = [line["generated_tokens"] for line in found.steps]
    assert tokens[0] == found.steps[0]["length"] * 8
    assert tokens[2] - tokens[1] == pytest.approx(found.steps[2]["length"] * 8)
    evaluated = [line for line in found.lines if "eval_accuracy" in line]
    assert [line["epoch"] for line in evaluated] == [2.0, 3.0]
    assert found.metrics["eval_accuracy"] == evaluated[-1]["eval_accuracy"]
    shown = [json.loads(line) for line in (found.out / rl.SAMPLES).read_text().splitlines()]
    assert [one["rollout"] for one in shown] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert {"problem_id", "prompt", "text", "outcome", "reward", "step_rewards"} <= set(shown[0])


def test_truncated_responses_can_be_left_out(settings: Any, watched: Any) -> None:
    run(settings(mask_truncated=True, rollouts=1), by_ids)
    assert any((~batch["mask"]).all(1).any() for batch in watched)
    for batch in watched:
        ends = batch["input_ids"].eq(2).any(1)
        assert torch.equal(batch["mask"].any(1), ends)


def test_the_critic_alone_is_trained_first(settings: Any, policy_folder: Path) -> None:
    found = run(settings(rollouts=2, critic_warmup=2), by_ids)
    before, after = (load_file(f / "model.safetensors") for f in (policy_folder, found.out))
    assert all(torch.equal(before[name], after[name]) for name in before)
    critic = load_file(found.out / "critic" / "model.safetensors")
    assert any(not torch.equal(critic[name], before[name]) for name in critic if name in before)


# --- process rewards ---------------------------------------------------------------------------------------------------------


def test_a_reward_model_with_another_tokenizer_scores_text(
    merging_tokenizer: Any, tiny_scorer: Any, lab_words: Any
) -> None:
    """Steps are read as text by the reward model's own tokenizer, and their rewards lie where the policy's steps end."""
    model = RewardModel(
        tiny_scorer(merging_tokenizer),
        merging_tokenizer,
        StepFormat.for_policy(merging_tokenizer, "\n").for_reward("scalar", "hard"),
    )
    words = ["3 + 5 = 1", "1 * 2 = 2", "Answer: 2"]
    ids = (*lab_words("\n".join(words))["input_ids"], lab_words.eos_token_id)
    from stepladder.models.steps import cut_steps

    steps, ends = cut_steps(lab_words, ids, "\n")
    assert list(steps) == words
    one = Rollout(
        Problem("p", "Start 3 ; + 5 ; * 2", "2"),
        (1,),
        ids,
        (0.0,) * len(ids),
        "",
        steps,
        ends,
        False,
        Verdict("2", Outcome.RIGHT),
    )
    [scores] = step_judges.ScoredSteps(model).score([one])
    assert scores == pytest.approx(model.score_with_root([("Start 3 ; + 5 ; * 2", words)])[0])
    values = {"model": "m", "output_dir": "o", "samples": 1, "prompts": 8, "use_cpu": True}
    args = build(rl.RLArguments, {**values, "process_reward": "m", "process_form": "difference"})
    stub = SimpleNamespace(args=args, scorer=step_judges.ScoredSteps(model), transforms=[])
    [reward] = rl.PolicyTrainer.reward(stub, [one])  # type: ignore[arg-type]
    batch = rl_batches.layout([one], [reward], 0)
    at = batch["step_rewards"][0].nonzero().squeeze(-1).tolist()
    newlines = [i for i, token in enumerate(ids) if lab_words.decode([token]) == "\n"]
    assert at == [*newlines, len(ids) - 2]  # the answer has no line break behind it: its last token before the end
    assert batch["step_rewards"][0, at].tolist() == pytest.approx(
        [b - a for a, b in itertools.pairwise(scores)], abs=1e-6
    )


def test_checkers_in_place_of_a_reward_model() -> None:
    task = load_task(TASK)
    problem = Problem("p", "Start 3 ; + 5 ; * 2 \n", "2")
    steps = ("3 + 5 = 1", "1 * 2 = 3", "1 * 2 = 2", "1 * 2 = 2")
    one = dataclasses.replace(ROLLOUTS[0], problem=problem, steps=steps)
    assert step_judges.CheckedSteps(task, "checker", 0.0, 0).score([one]) == [[1.0, 1.0, 0.0, 0.0, 0.0]]
    assert step_judges.CheckedSteps(task, "facts", 0.0, 0).score([one]) == [
        [1.0, 1.0, 0.0, 1.0, 1.0]
    ]  # padding deceives it
    assert step_judges.CheckedSteps(task, "checker", 1.0, 0).score([one]) == [[1.0] * 5]
    many = [
        dataclasses.replace(one, problem=Problem(f"p{i}", problem.prompt, "2"), steps=("3 + 5 = 2",))
        for i in range(400)
    ]
    noisy = step_judges.CheckedSteps(task, "checker", 0.1, 0)
    share = sum(scores[1] for scores in noisy.score(many)) / 400
    assert 0.05 < share < 0.16
    assert noisy.score(many) == noisy.score(many)


# --- resume and checkpoints --------------------------------------------------------------------------------------------------


def numbers(out: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "train_runtime" not in line]


def test_a_killed_training_equals_one_left_alone(settings: Any, starter: Any, tmp_path: Path) -> None:
    """Policy, critic, optimiser, schedule, problems, seeds and counters: every line and both models, bit for bit."""
    values = settings(
        rollouts=9, save_every=2, save_strategy="steps", update_epochs=2, per_device_train_batch_size=4, log_every=2,
        lr_scheduler_type="cosine", eval_problems=4, eval_every=3, critic_learning_rate=0.01,
    )  # fmt: skip
    path = tmp_path / "rl.yaml"
    path.write_text(yaml.safe_dump({k: v for k, v in values.items() if k != "output_dir"}))
    command = lambda name: ("stepladder.trainers.rl", "--config", path, "--output_dir", tmp_path / name)
    alone = starter(*command("alone"))
    assert alone.status == 0, alone.err
    out = tmp_path / "killed"
    for step in (8, 24):  # four optimiser steps a rollout
        ended = starter(*command("killed"), kill=lambda step=step: (out / f"checkpoint-{step}" / "whole.json").exists())
        assert ended.status == -9, ended.err
    with (out / rl.SAMPLES).open("a") as file:
        file.write('{"rollout": 99, "te')
    again = starter(*command("killed"))
    assert again.status == 0, again.err
    assert "'epoch': '2'" not in again.out  # it did not begin again
    assert numbers(out) == numbers(tmp_path / "alone")
    for file in ("model.safetensors", "critic/model.safetensors", rl.SAMPLES):
        assert (out / file).read_bytes() == (tmp_path / "alone" / file).read_bytes(), file


def test_lora_resumes_and_is_merged(settings: Any, tmp_path: Path, policy_folder: Path) -> None:
    class Stopped(Exception):
        pass

    def stop(rollout: Rollout, reward: Reward) -> Reward:
        if (tmp_path / "stopped" / "checkpoint-4").exists() and not (tmp_path / "told").exists():
            (tmp_path / "told").touch()
            raise Stopped
        return by_ids(rollout, reward)

    base = {"rollouts": 4, "save_every": 2, "save_strategy": "steps", "lora_r": 2}
    alone = run(settings(**base, output_dir=str(tmp_path / "alone")), by_ids)
    values = settings(**base, output_dir=str(tmp_path / "stopped"))
    with pytest.raises(Stopped):
        run(values, stop)
    again = run(values, stop)
    assert numbers(again.out) == numbers(alone.out)
    for place in (again.out, again.out / "critic"):
        ours, theirs = (load_file(p / "model.safetensors") for p in (place, alone.out / place.relative_to(again.out)))
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
        assert not [name for name in ours if "lora" in name or "base_layer" in name]
    before, after = load_file(policy_folder / "model.safetensors"), load_file(again.out / "model.safetensors")
    assert any(not torch.equal(before[name], after[name]) for name in before)
    adapter = load_file(again.out / "adapter" / "adapter_model.safetensors")
    assert any("lora_B" in name and weight.abs().max() > 0 for name, weight in adapter.items())


def test_policy_and_critic_are_plain_checkpoints(settings: Any) -> None:
    from transformers import AutoModelForCausalLM, AutoModelForTokenClassification

    found = run(settings(save_strategy="steps", save_every=1), by_ids)
    for folder in (found.out, found.out / "checkpoint-4"):
        _, loading = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
        assert not loading["missing_keys"]
        assert not loading["unexpected_keys"]
        assert StepFormat.load(folder).head == "none"
        _, loading = AutoModelForTokenClassification.from_pretrained(folder / "critic", output_loading_info=True)
        assert not loading["missing_keys"]
        # Ranks as its values do: the sigmoid of a value grows with it.
        scores = RewardModel.load(str(folder / "critic"), device="cpu").score([("Start 3 ; + 5", ["3 + 5 = 1"])])
        assert 0 < scores[0][0] < 1
    assert not list(found.out.glob("*.bin"))
    assert (found.out / "engine.json").is_file()


def test_a_critic_may_start_from_a_reward_model(settings: Any, tmp_path: Path, policy_folder: Path) -> None:
    first = run(settings(rollouts=1, output_dir=str(tmp_path / "first")), by_ids)
    again = run(
        settings(rollouts=1, critic=str(first.out / "critic"), learning_rate=1e-12, output_dir=str(tmp_path / "b")),
        by_ids,
    )
    ours, theirs = (load_file(f / "critic" / "model.safetensors") for f in (again.out, first.out))
    assert all(torch.allclose(ours[name], theirs[name], atol=1e-8) for name in ours)


def test_tied_weights_are_saved_and_sampled(settings: Any, tmp_path: Path, policy_folder: Path, lab_words: Any) -> None:
    from transformers import AutoModelForCausalLM

    folder = tmp_path / "tied"
    shutil.copytree(policy_folder, folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.config.tie_word_embeddings = True
    model.tie_weights()
    model.save_pretrained(folder)
    found = run(settings(model=str(folder), save_strategy="steps", save_every=1), by_ids)
    assert found.steps[-1]["engine_gap"] < 1e-4
    trained = AutoModelForCausalLM.from_pretrained(found.out)
    assert trained.lm_head.weight.data_ptr() == trained.model.embed_tokens.weight.data_ptr()


def test_activation_checkpointing_changes_nothing(settings: Any, tmp_path: Path) -> None:
    plain = run(settings(output_dir=str(tmp_path / "plain")), by_ids)
    found = run(settings(gradient_checkpointing=True, output_dir=str(tmp_path / "kept")), by_ids)
    assert [line["loss"] for line in found.steps] == pytest.approx([line["loss"] for line in plain.steps], abs=1e-6)
    assert found.steps[-1]["engine_gap"] < 1e-4


def test_samples_are_a_table_in_wandb(settings: Any, starter: Any, tmp_path: Path) -> None:
    values = settings(report_to="wandb", rollouts=2)
    path = tmp_path / "rl.yaml"
    path.write_text(yaml.safe_dump(values))
    environment = {"WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path), "WANDB_SILENT": "true"}
    ended = starter("stepladder.trainers.rl", "--config", path, environment=environment)
    assert ended.status == 0, ended.err
    tables = [json.loads(p.read_text()) for p in (tmp_path / "wandb").rglob("samples_*.table.json")]
    assert tables
    assert {"problem_id", "text", "reward"} <= set(tables[0]["columns"])
    shown = [json.loads(line) for line in (tmp_path / "out" / rl.SAMPLES).read_text().splitlines()]
    texts = {row[table["columns"].index("text")] for table in tables for row in table["data"]}
    assert texts <= {one["text"] for one in shown}


def test_the_page_names_every_option_with_its_default_and_its_example_trains(settings: Any) -> None:
    page = (Path(__file__).parents[2] / "docs" / "rl.md").read_text()
    rows = {line.split("|")[1].strip(" `"): line for line in page.splitlines() if line.startswith("| `")}
    for field in dataclasses.fields(rl.RLArguments):
        if field.name in vars(rl.RLArguments)["__annotations__"] and field.name not in ("args", "task", "vllm_options"):
            shown = {"True": "true", "False": "false", "None": "null"}.get(str(field.default), field.default)
            assert field.name in rows, f"docs/rl.md says nothing of {field.name}"
            assert rows[field.name].split("|")[2].strip(" `") == str(shown).replace("\n", '"\\n"'), field.name
    [block] = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    small = settings(rollouts=1, prompts=4, per_device_train_batch_size=16, eval_problems=2)
    found = run(
        {**yaml.safe_load(block), "learning_rate": 1e-4, **{k: small[k] for k in small if k not in ("task", "samples")}}
    )
    metrics = {name for line in found.lines for name in line}
    for name in re.findall(r"`(\w+)`", page.split("## What is logged")[1].split("`samples.jsonl`")[0]):
        known = metrics | {"report_to", "eval_split", "reward", "max_new_tokens", "rloo", "grpo", "wandb"}
        assert name in known or name in ("process_reward", "flawed_right", "length_right", "explained_variance"), name


# --- vLLM's seam ---------------------------------------------------------------------------------------------------------------


def test_another_engine_is_given_the_weights_before_it_samples(settings: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for vLLM: its weights are whole, named as in the checkpoint, and those of the moment."""
    from transformers import AutoModelForCausalLM

    from stepladder.models.loading import load_tokenizer
    from stepladder.models.transformers_engine import TransformersEngine

    made: list[Any] = []

    class Separate(TransformersEngine):
        updates = 0

        def update_weights(self, weights: Any) -> None:
            missing, unexpected = self.model.load_state_dict(dict(weights), strict=False)
            assert not missing
            assert not unexpected
            self.updates += 1

    def fake(path: str, tokenizer: Any, options: dict[str, Any]) -> Any:
        assert options == {"gpu_memory_utilization": 0.3}
        made.append(Separate(AutoModelForCausalLM.from_pretrained(path), load_tokenizer(path)))
        return made[0]

    monkeypatch.setattr(rl, "vllm_engine", fake)
    found = run(settings(backend="vllm", vllm_options={"gpu_memory_utilization": 0.3}, rollouts=3), by_ids)
    assert [made[0].updates, len(made)] == [3, 1]
    assert all(line["engine_gap"] < 1e-4 for line in found.steps)
    plain = run(settings(rollouts=3), by_ids)
    assert [line["loss"] for line in plain.steps] == pytest.approx([line["loss"] for line in found.steps], abs=1e-6)


# --- mistakes ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("over", "message"),
    [
        ({"algorithm": "pp"}, "algorithm must be one of ppo, rloo, grpo, found 'pp'"),
        ({"rows": "x"}, "rows has no meaning in online training; what says it here: task and split"),
        ({"max_steps": 5}, "max_steps has no meaning in online training; what says it here: rollouts"),
        ({"lora_dropout": 0.1}, "lora_dropout has no meaning in online training"),
        ({"algorithm": "grpo", "samples": 1}, "grpo compares responses to one problem: samples must be 2 or more"),
        ({"per_device_train_batch_size": 3}, "= 3 must hold whole groups of samples = 2"),
        ({"prompts": 5}, "prompts x samples = 10 must be a multiple of the responses in an optimiser step, 8 x 1"),
        ({"reference": False}, "kl_coefficient needs the reference"),
        ({"process_form": "sum"}, "process_reward .* and process_form .* go together"),
        ({"process_reward": "checker"}, "process_reward .* and process_form .* go together"),
        ({"temperature": 0.0}, "temperature must be greater than 0"),
        ({"backend": "vllm", "lora_r": 2}, "backend vllm takes whole weights"),
        ({"split": "trian"}, "split must be one of"),
        (
            {"max_length": 10},
            "no problem of split 'train' is left: prompts may have .* = 2 tokens",
        ),
        ({"max_length": 5000, "max_new_tokens": 510}, "prompts may have .* = 2 tokens"),
        ({"process_reward": "nowhere/here/x", "process_form": "sum"}, "nowhere/here/x"),
        ({"separator": "\n", "model": "./none"}, "./none: no such model folder"),
    ],
)
def test_each_mistake_is_one_sentence(settings: Any, over: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        rl.train(build(rl.RLArguments, settings(**over), "rl.yaml"))


def test_without_a_reference_nothing_is_compared(settings: Any) -> None:
    found = run(settings(reference=False, kl_coefficient=0.0, rollouts=1), by_ids)
    assert "kl" not in found.steps[0]
    assert rl_math.KL_ESTIMATORS
