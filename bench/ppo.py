"""PPO: seconds per optimiser step, beside plain `generate` and separate forwards of policy, reference and critic with all logits.

    python bench/ppo.py --policy FOLDER --task '{kind: word_problems, folder: DATA}' [--prompts 8 --samples 4 --rollouts 2]

Both arms sample as many responses from the same problems, of at most as many tokens, give them the same rewards, and take as many
optimiser steps of the same losses (those of trainers/rl_math.py) in micro-batches of the same size. Their samples differ, for
`generate` has another generator: `extra` says how many tokens were sampled. Setting the trainer up (about a third of a second)
is within the time that is measured, so that few rollouts count against it.

With the lab's policy three fifths of a step are matrix products: a rollout of two epochs is fifteen forwards' worth of arithmetic
(three before the updates, twelve in them), and sampling a tenth beside it. What helped is reading less: a prompt once for its
responses, responses to one problem in one micro-batch, like lengths together. What was not done: old log-probabilities taken from
the engine save one forward of fifteen, but the first ratio is then 1 only to rounding, in bfloat16 not even that; taken from the
first epoch's forward they are there for the first mini-batch alone, for a reward that holds a KL, and whitening, need all of them
before the first update. AdamW is torch's fused one already, and takes 0.4 % of a step.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from measure import Question, Work, bench

ARMS = ("stepladder", "separate forwards")
CHAIN = "{kind: chain, p: 7, min_steps: 3, max_steps: 6, sizes: {train: 2000, dev: 20, test: 20}}"


def prepare(arm: str, args: argparse.Namespace) -> Callable[[], Work]:
    """`--rollouts` rollouts with their updates."""
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForTokenClassification

    import stepladder
    from stepladder.config import build
    from stepladder.models.loading import load_model, load_policy_format, load_tokenizer
    from stepladder.tasks.load import load_task
    from stepladder.trainers.rl_arguments import RLArguments

    args.policy = args.policy or str(Path(stepladder.__path__[0]) / "models" / "lab_policy")
    task = load_task(yaml.safe_load(args.task))
    about = build(
        RLArguments,
        {
            "model": args.policy, "output_dir": tempfile.mkdtemp(), "task": yaml.safe_load(args.task), "algorithm": "ppo",
            "rollouts": args.rollouts, "prompts": args.prompts, "samples": args.samples, "update_epochs": 2,
            "max_new_tokens": args.max_new_tokens, "per_device_train_batch_size": args.batch, "eval_problems": 0,
            "gradient_accumulation_steps": max(args.prompts * args.samples // (2 * args.batch), 1), "learning_rate": 1e-6,
            "dtype": args.dtype, "disable_tqdm": True, "report_to": "none", "save_strategy": "no", "shown_samples": 0,
        },
    )  # fmt: skip
    tokenizer = load_tokenizer(args.policy)
    step_format = load_policy_format(args.policy, tokenizer, task.step_separator)
    problems = task.problems("train")[: args.prompts * args.rollouts]
    torch.manual_seed(0)
    load = lambda auto, **more: load_model(auto, args.policy, dtype=args.dtype, **more)
    policy, reference = load(AutoModelForCausalLM), load(AutoModelForCausalLM)
    settings = {"num_labels": 1, "classifier_dropout": 0.0}
    critic = load(AutoModelForTokenClassification, settings=settings, new=("score",))
    steps = args.rollouts * about.steps
    if arm == "stepladder":
        from stepladder.trainers.actor_critic import ActorCritic
        from stepladder.trainers.rl import PolicyTrainer

        trainer = PolicyTrainer(
            model=ActorCritic(policy, critic, reference), args=about, task=task, problems=problems, held_out=[],
            tokenizer=tokenizer, step_format=step_format, scorer=None, transforms=[],
        )  # fmt: skip

        def work() -> Work:
            trainer.train()
            return Work(units=steps, extra={"sampled tokens": int(trainer.state.num_input_tokens_seen)})

        work()  # to warm up
        return work
    plain = Plain(about, policy, critic, reference, tokenizer, step_format, task)

    def separate() -> Work:
        plain.sampled = 0
        for rollout in range(args.rollouts):
            plain.rollout(problems[rollout * args.prompts : (rollout + 1) * args.prompts])
        return Work(units=steps, extra={"sampled tokens": plain.sampled})

    separate()  # to warm up
    return separate


class Plain:
    """PPO as it is written down without thought of cost."""

    def __init__(
        self, args: Any, policy: Any, critic: Any, reference: Any, tokenizer: Any, step_format: Any, task: Any
    ) -> None:
        import torch

        self.args, self.policy, self.critic, self.reference = args, policy, critic, reference
        self.tokenizer, self.step_format, self.task, self.sampled = tokenizer, step_format, task, 0
        self.optimizer = torch.optim.AdamW([*policy.parameters(), *critic.parameters()], lr=args.learning_rate)

    def read(self, ids: Any, attention: Any, *, all_models: bool) -> dict[str, Any]:
        """Log-probabilities, values and, for a rollout, entropies and the reference's: one forward of each model."""
        import torch

        inputs = {"input_ids": ids, "attention_mask": attention, "use_cache": False}
        logits = self.policy(**inputs).logits[:, :-1].float()
        found = {"logp": logits.log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)}
        found["values"] = self.critic(**inputs).logits.float().squeeze(-1)[:, :-1]
        if all_models:
            found["entropy"] = torch.distributions.Categorical(logits=logits).entropy()
            scores = self.reference(**inputs).logits[:, :-1].float()
            found["ref_logp"] = scores.log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
        return found

    def rollout(self, problems: Any) -> None:
        import torch

        from stepladder.trainers import rewards, rl_math

        args, tokenizer = self.args, self.tokenizer
        prompts = [
            self.step_format.encode_prompt(tokenizer, one.prompt) for one in problems for _ in range(args.samples)
        ]
        width = max(map(len, prompts))
        ids = torch.full((len(prompts), width), tokenizer.pad_token_id)
        attention = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, width - len(prompt) :], attention[row, width - len(prompt) :] = torch.tensor(prompt), 1
        self.policy.train(False)
        with torch.no_grad():
            ids = self.policy.generate(
                input_ids=ids, attention_mask=attention, do_sample=True, top_k=0, max_new_tokens=args.max_new_tokens,
                pad_token_id=tokenizer.pad_token_id,
            )  # fmt: skip
        self.policy.train()
        written = ids[:, width:]
        ended = (written == tokenizer.eos_token_id).int()
        real = (ended.cumsum(1) - ended) == 0
        self.sampled += int(real.sum())
        attention = torch.cat([attention, real.long()], 1)
        mask = torch.cat([torch.zeros(len(ids), width - 1, dtype=torch.bool), real], 1)
        outcome = torch.zeros(mask.shape)
        for row, (answer, problem) in enumerate(
            zip(written, [p for p in problems for _ in range(args.samples)], strict=True)
        ):
            text = tokenizer.decode(answer[real[row]], skip_special_tokens=True)
            last = int(mask[row].nonzero()[-1])
            outcome[row, last] = rewards.outcome_reward(self.task.verify(problem, text), args.partial_reward)
        size = args.per_device_train_batch_size
        with torch.no_grad():
            parts = [
                self.read(ids[i : i + size], attention[i : i + size], all_models=True) for i in range(0, len(ids), size)
            ]
        old = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        reward = outcome - args.kl_coefficient * torch.where(mask, old["logp"] - old["ref_logp"], 0.0)
        advantages, returns = rl_math.gae(reward, old["values"], mask, args.gamma, args.lam)
        advantages = rl_math.whiten(advantages, mask)
        for _ in range(args.update_epochs):
            for start in range(0, len(ids), args.share):
                for i in range(start, start + args.share, size):
                    part = slice(i, i + size)
                    now = self.read(ids[part], attention[part], all_models=False)
                    ratio = rl_math.log_ratio(now["logp"], old["logp"][part], mask[part], "token")
                    loss, _ = rl_math.clipped_policy_loss(
                        ratio, advantages[part], mask[part], args.clip_low, args.clip_high
                    )
                    value = rl_math.clipped_value_loss(
                        now["values"], old["values"][part], returns[part], mask[part], args.value_clip
                    )
                    (rl_math.reduce_loss(loss + value, mask[part], "sequence") / args.share).backward()
                torch.nn.utils.clip_grad_norm_([*self.policy.parameters(), *self.critic.parameters()], 1.0)
                self.optimizer.step()
                self.optimizer.zero_grad()


if __name__ == "__main__":
    bench(
        Question(
            "ppo", "PPO, one rollout and its updates", "seconds an optimiser step", ARMS,
            targets={"separate forwards": 1.5}, less_is_better=True,
        ),
        prepare, policy="", task=CHAIN, prompts=8, samples=4, rollouts=2, batch=8, max_new_tokens=64,
        dtype="float32",
    )  # fmt: skip
