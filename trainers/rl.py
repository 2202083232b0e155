"""Policy gradients on a task's verifier: PPO with a critic (ReFT), RLOO and GRPO, with dense process rewards.

One pass of the trainer is one rollout and its updates, on one page: `PolicyTrainer.collect` samples, scores, computes advantages
and cuts micro-batches; `PolicyTrainer.loss_sum` is the loss. The arithmetic is in rl_math.py, its tensors in rl_batches.py, what a
response earns in rewards.py and step_judges.py, the models in actor_critic.py. Everything that a kill, several processes or LoRA
ask for is the Trainer's.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from ..basics import UserError, fold_seed, make_folder, write_atomic
from ..models.engine import Request, Sampling, StopReason
from ..models.loading import load_model, load_tokenizer
from ..models.step_format import StepFormat
from ..models.steps import cut_steps
from ..tasks.base import Problem, StepChecker, Task
from ..tasks.load import load_task
from . import rewards as earned
from . import rl_math
from .actor_critic import ActorCritic, TrainingEngine, vllm_engine
from .common import MetricsFile, StepladderTrainer, fit, merge_adapter, plain_class, run_trainer, start_model
from .examples import Examples, policy_format, report_counts
from .rl_arguments import RLArguments
from .rl_batches import add_advantages, cut, layout, micro_batches, problems_of
from .step_judges import StepJudge, step_judge

SAMPLES = "samples.jsonl"  # some responses of every rollout, to read


# --- the trainer -------------------------------------------------------------------------------------------------------


class Passes:
    """The trainer's data: one pass is one rollout, and yields its micro-batches for every update."""

    def __init__(self, trainer: PolicyTrainer) -> None:
        self.trainer, self.rollout = trainer, 0

    def __len__(self) -> int:
        return self.trainer.args.steps * self.trainer.args.gradient_accumulation_steps

    def set_epoch(self, epoch: int) -> None:
        self.rollout = epoch

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        args = self.trainer.args
        batches = self.trainer.collect(self.rollout)
        for update in range(args.update_epochs):
            generator = torch.Generator().manual_seed(fold_seed(args.seed, "order", self.rollout, update) % 2**62)
            for number in torch.randperm(len(batches), generator=generator).tolist():
                yield from batches[number]


class PolicyTrainer(StepladderTrainer):
    """Rollout -> rewards -> advantages -> losses."""

    args: RLArguments
    model: Any  # an ActorCritic

    def __init__(
        self, *, task: Task, problems: Sequence[Problem], held_out: Sequence[Problem], tokenizer: Any,
        step_format: StepFormat, scorer: StepJudge | None, transforms: Sequence[earned.RewardTransform], **kwargs: Any,
    ) -> None:  # fmt: skip
        self.task, self.problems, self.held_out, self.scorer = task, problems, held_out, scorer
        self.tokenizer, self.step_format, self.transforms = tokenizer, step_format, transforms
        self.engine: TrainingEngine | None = None
        self._shown = False
        self._judged: tuple[int, dict[str, float]] | None = None
        super().__init__(train_dataset=Examples([]), eval_dataset=held_out or None, **kwargs)

    def get_train_dataloader(self) -> Any:
        return Passes(self)

    # 1. Rollout, 2. rewards, 3. advantages, 4. micro-batches.

    def collect(self, number: int) -> list[list[dict[str, torch.Tensor]]]:
        """The micro-batches of rollout `number`, [mini-batch][micro-batch], with everything that the loss needs."""
        args = self.args
        rollouts = self.sample(number)
        rewards = self.reward(rollouts)
        batch = layout(rollouts, rewards, self.tokenizer.pad_token_id)
        batch = {name: value.to(args.device) for name, value in batch.items()}
        prompts = [len(rollout.prompt_ids) for rollout in rollouts]
        pieces = micro_batches(batch["width"].tolist(), args, prompts)
        self.look(batch, [rows for mini in pieces for rows in mini])
        add_advantages(batch, args, self.total)
        self.watch(number, rollouts, rewards, batch)
        batch["policy_weight"] = torch.full_like(batch["outcome"], float(number >= args.critic_warmup))
        if args.importance_cap:
            batch["policy_weight"] *= rl_math.importance_weight(
                batch["old_logp"], batch["engine_logp"], args.importance_cap
            )
        if args.mask_truncated:
            batch["mask"] = batch["mask"] & batch["finished"][:, None]
        return [[cut(batch, rows) for rows in mini] for mini in pieces]

    def sample(self, number: int) -> list[earned.Rollout]:
        """This process's responses: for each mini-batch its share of the problems, whole groups together.

        What is sampled depends on seed, rollout, problem and sample alone, and which responses make a mini-batch does not
        depend on the number of processes.
        """
        args = self.args
        picked = problems_of(number, args.prompts, len(self.problems), args.seed)
        groups = args.share // args.samples
        mine = [
            picked[(mini * args.world_size + args.process_index) * groups + i]
            for mini in range(args.minibatches)
            for i in range(groups)
        ]
        problems = [self.problems[index] for index in mine]
        seeds = [
            tuple(fold_seed(args.seed, "rollout", number, one.id, i) for i in range(args.samples)) for one in problems
        ]
        return self.generate(problems, seeds, args.temperature)

    def generate(
        self, problems: Sequence[Problem], seeds: Sequence[tuple[int, ...]], temperature: float
    ) -> list[earned.Rollout]:
        args = self.args
        if self.engine is None:
            vllm = None
            if args.backend == "vllm":
                vllm = vllm_engine(args.model, self.tokenizer, args.vllm_options)
            self.engine = TrainingEngine(self.model.policy, self.tokenizer, args.generation_batch, vllm)
        self.engine.refresh()
        prompts = [self.step_format.encode_prompt(self.tokenizer, one.prompt) for one in problems]
        found = self.engine.generate(
            [Request(ids, s) for ids, s in zip(prompts, seeds, strict=True)], Sampling(args.max_new_tokens, temperature)
        )
        rollouts = []
        for problem, prompt, samples in zip(problems, prompts, found, strict=True):
            for one in samples:
                text = self.tokenizer.decode(one.ids, skip_special_tokens=True)
                steps, ends = cut_steps(self.tokenizer, one.ids, self.task.step_separator)
                verdict = self.task.verify(problem, text)
                rollouts.append(
                    earned.Rollout(
                        problem,
                        prompt,
                        one.ids,
                        one.logprobs,
                        text,
                        steps,
                        ends,
                        one.stop is StopReason.LENGTH,
                        verdict,
                    )
                )
        return rollouts

    def reward(self, rollouts: Sequence[earned.Rollout]) -> list[earned.Reward]:
        """What each response earns, after all transforms."""
        args = self.args
        scores = self.scorer.score(rollouts) if self.scorer is not None else [[0.0]] * len(rollouts)
        found = []
        for rollout, one in zip(rollouts, scores, strict=True):
            steps, own = earned.step_reward(
                one, args.process_form, coefficient=args.process_coefficient, temperature=args.process_temperature,
                margin=args.process_margin, prover_k=args.prover_k,
            )  # fmt: skip
            outcome = args.outcome_weight * earned.outcome_reward(rollout.verdict, args.partial_reward)
            reward = earned.Reward(outcome, steps, own)
            for transform in self.transforms:
                reward = transform(rollout, reward)
            found.append(reward)
        return found

    @torch.no_grad()
    def look(self, batch: dict[str, torch.Tensor], pieces: Sequence[Sequence[int]]) -> None:
        """Adds log-probabilities, values and entropies of the policy as it sampled, in the very micro-batches of the updates:
        the first ratio is then exactly 1."""
        for rows in pieces:
            micro = cut(batch, rows)
            out = self.model_wrapped(
                micro["input_ids"],
                micro["attention_mask"],
                self.args.temperature,
                reference=self.args.reference,
                mask=micro["response"],
            )
            for name, values in out.items():
                name = {"logp": "old_logp"}.get(name, name)
                if name not in batch:
                    batch[name] = torch.zeros_like(batch["outcome"])
                batch[name][rows, : values.shape[1]] = values.float()

    def total(self, value: torch.Tensor) -> torch.Tensor:
        """The sum over all processes."""
        return self.accelerator.reduce(value) if self.args.world_size > 1 else value

    # 5. Losses.

    def count_items(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return rl_math.loss_items(batch["mask"], self.args.reduction_, self.args.max_new_tokens)

    def loss_sum(self, model: Any, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, float]]:
        args, mask = self.args, batch["mask"]
        out = model(
            batch["input_ids"],
            batch["attention_mask"],
            args.temperature,
            mask=batch["response"],
            entropy=bool(args.entropy_coefficient),
        )
        log_rho = rl_math.log_ratio(
            out["logp"], batch["old_logp"], mask, "sequence" if args.policy_loss == "gspo" else "token"
        )
        if args.policy_loss == "cispo":
            losses, clipped = rl_math.cispo_loss(out["logp"], log_rho, batch["advantages"], mask, args.clip_high)
        else:
            losses, clipped = rl_math.clipped_policy_loss(
                log_rho, batch["advantages"], mask, args.clip_low, args.clip_high
            )
        if "ref_logp" in batch and args.kl_in_ == "loss":
            losses = losses + args.kl_coefficient * rl_math.kl_estimate(
                out["logp"], batch["ref_logp"], args.kl_estimator_
            )
        if args.entropy_coefficient:
            losses = losses - args.entropy_coefficient * out["entropy"]
        losses = losses * batch["policy_weight"]
        metrics = {
            "clip_fraction": rl_math.masked_mean(clipped.float(), mask).item(),
            "policy_loss": rl_math.masked_mean(losses.detach(), mask).item(),
            "update_kl": rl_math.masked_mean(
                rl_math.kl_estimate(batch["old_logp"], out["logp"].detach(), "k3"), mask
            ).item(),
        }
        if "values" in out:
            value_losses = rl_math.clipped_value_loss(
                out["values"], batch["values"], batch["returns"], mask, args.value_clip
            )
            losses = losses + args.value_coefficient * value_losses
            metrics["value_loss"] = rl_math.masked_mean(value_losses.detach(), mask).item()
        return rl_math.reduce_loss(losses, mask, args.reduction_), metrics

    # What is watched.

    def watch(
        self,
        number: int,
        rollouts: Sequence[earned.Rollout],
        rewards: Sequence[earned.Reward],
        batch: dict[str, torch.Tensor],
    ) -> None:
        """Puts the rollout's numbers, means over all processes, beside the losses that come of it."""
        from accelerate.utils import gather_object

        args, mask = self.args, batch["mask"]
        summaries = [
            earned.summary(rollout, reward, self._flawed(rollout))
            for rollout, reward in zip(rollouts, rewards, strict=True)
        ]
        everyone = gather_object(summaries) if args.world_size > 1 else summaries
        found = earned.means(everyone)
        count = self.total(mask.sum().float())
        over = lambda values: (self.total(torch.where(mask, values, 0.0).sum()) / count).item()
        found["entropy"] = over(batch["entropy"])
        if "ref_logp" in batch:
            kl = torch.where(mask, batch["old_logp"] - batch["ref_logp"], 0.0).sum()
            found["kl"] = (self.total(kl) / (args.prompts * args.samples)).item()  # of whole responses, nats
        if "returns" in batch:
            found["explained_variance"] = rl_math.explained_variance(
                batch["values"], batch["returns"], mask, self.total
            )
            found["value"] = over(batch["values"])
        # What another engine, or another precision, makes of the same samples.
        found["engine_gap"] = over((batch["engine_logp"] - batch["old_logp"]).abs())
        if args.samples > 1:
            whole = batch["outcome"].sum(1).view(-1, args.samples)
            even = (whole == whole[:, :1]).all(1).float()
            found["even_groups"] = (self.total(even.sum()) / args.prompts).item()  # all earn the same: no signal
        # The Trainer keeps this number in its checkpoints and, unless asked, never touches it.
        self.state.num_input_tokens_seen += int(count.item())
        found["generated_tokens"] = float(self.state.num_input_tokens_seen)
        found["samples"] = float((number + 1) * args.prompts * args.samples)
        for name, value in found.items():
            if value == value:  # not NaN: explained variance of equal returns
                self._extra.setdefault(name, []).append(value)
        self._show(number, rollouts, rewards)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        # Running numbers are shown as they stand, not as the mean since the last line.
        for name in ("generated_tokens", "samples"):
            if name in self._extra:
                self._extra[name] = self._extra[name][-1:]
        super().log(logs, start_time)

    def _flawed(self, rollout: earned.Rollout) -> bool | None:
        if not isinstance(self.task, StepChecker):
            return None
        checks = self.task.check_steps(rollout.problem, rollout.steps)
        return not all(check.local_ok and check.on_track for check in checks)

    def _show(self, number: int, rollouts: Sequence[earned.Rollout], rewards: Sequence[earned.Reward]) -> None:
        if not self.is_world_process_zero() or not self.args.shown_samples:
            return
        shown = [
            {
                "rollout": number, "problem_id": one.problem.id, "prompt": one.problem.prompt, "text": one.text,
                "outcome": one.verdict.outcome.value, "reward": reward.outcome, "step_rewards": list(reward.steps or reward.own),
            }
            for one, reward in list(zip(rollouts, rewards, strict=True))[: self.args.shown_samples]
        ]  # fmt: skip
        path = Path(self.args.output_dir) / SAMPLES
        if not self._shown:
            # A kill may leave lines of rollouts that are made again, the last of them torn.
            lines = path.read_text().splitlines() if path.exists() else []
            kept = [line for line in lines if line.endswith("}") and json.loads(line)["rollout"] < number]
            write_atomic(path, "".join(line + "\n" for line in kept))
            self._shown = True
        with path.open("a") as file:
            file.write("".join(json.dumps(one) + "\n" for one in shown))
        if self.args.report_to and "wandb" in self.args.report_to:
            import wandb

            if wandb.run is not None:
                columns: list[Any] = list(shown[0])
                table = wandb.Table(columns=columns, data=[[str(one[c]) for c in columns] for one in shown])
                wandb.log({"samples": table}, commit=False)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Greedy accuracy and length on held-out problems, logged as eval_accuracy and eval_length."""
        from accelerate.utils import gather_object

        if self._judged and self._judged[0] == self.state.global_step:
            return self._judged[1]  # the Trainer evaluates after its last step, and `fit` once more
        mine = self.held_out[self.args.process_index :: self.args.world_size]
        # Where weights are split all processes must take part in gathering them, also one without a problem.
        rollouts = self.generate(mine, [(0,)] * len(mine), 0.0)
        found = [{"accuracy": float(one.verdict.right), "length": float(len(one.ids))} for one in rollouts]
        found = gather_object(found) if self.args.world_size > 1 else found
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in earned.means(found).items()}
        self._judged = (self.state.global_step, metrics)
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    # Models on disk.

    def create_optimizer(self, model: Any = None) -> Any:
        """As the parent's, with a learning rate of the critic's own."""
        if self.optimizer is None:
            decayed = set(self.get_decay_parameter_names(self.model))
            groups = []
            for part, rate in (("policy.", self.args.learning_rate), ("critic.", self._critic_rate())):
                for decay in (True, False):
                    chosen = [
                        p for n, p in self.model.named_parameters()
                        if n.startswith(part) and p.requires_grad and (n in decayed) == decay
                    ]  # fmt: skip
                    if chosen:
                        weight_decay = self.args.weight_decay if decay else 0.0
                        groups.append({"params": chosen, "lr": rate, "weight_decay": weight_decay})
            optimizer, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            self.optimizer = optimizer(groups, **options)
        return self.optimizer

    def _critic_rate(self) -> float:
        return self.args.critic_learning_rate or self.args.learning_rate

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """The policy as a plain checkpoint in `output_dir` and the critic as another in `output_dir`/critic, each with tokenizer
        and step format; with LoRA the adapters, in folders named `adapter`."""
        if not self.args.should_save:
            return
        folder = make_folder(output_dir or self.args.output_dir)
        state = self.model.state_dict() if state_dict is None else state_dict
        for name, place, step_format in (
            ("policy", folder, self.step_format),
            ("critic", folder / "critic", self.step_format.for_reward("scalar", "soft")),
        ):
            model = getattr(self.model, name)
            if model is None:
                continue
            part = {k.removeprefix(f"{name}."): v for k, v in state.items() if k.startswith(f"{name}.")}
            model.save_pretrained(place / "adapter" if self.args.lora_r else place, state_dict=part)
            self.tokenizer.save_pretrained(place)
            step_format.save(place)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        from safetensors.torch import load_file

        for name, place in (
            ("policy", Path(resume_from_checkpoint)),
            ("critic", Path(resume_from_checkpoint, "critic")),
        ):
            part = getattr(self.model, name)
            if part is None:
                continue
            if self.args.lora_r:
                from peft import set_peft_model_state_dict

                set_peft_model_state_dict(part, load_file(place / "adapter" / "adapter_model.safetensors"))
            else:
                part.load_state_dict(load_model(plain_class(part), str(place), dtype=self.args.dtype).state_dict())


# --- the stage ---------------------------------------------------------------------------------------------------------


def train(args: RLArguments, transforms: Sequence[earned.RewardTransform] = ()) -> dict[str, float]:
    """Trains a policy (and a critic) and writes their checkpoints; returns the final metrics.

    `transforms` change what each response earns, after those that the arguments ask for.
    """
    from transformers import AutoModelForCausalLM, AutoModelForTokenClassification

    tokenizer = load_tokenizer(args.model)
    step_format = policy_format(args, tokenizer, args.separator)
    task = load_task(args.task)
    if step_format.separator != task.step_separator:
        raise UserError(
            f"{args.model}: its step format ends a step with {step_format.separator!r}, "
            f"task {task.name} with {task.step_separator!r}"
        )
    policy = start_model(AutoModelForCausalLM, args)
    context = int(getattr(policy.config, "max_position_embeddings", 0) or 2**31)
    room = min(args.max_length, context) - args.max_new_tokens
    problems = _problems(task, args.split, args.limit, room, tokenizer, step_format)
    held_out: Sequence[Problem] = []
    if args.eval_problems:
        held_out = _problems(task, args.eval_split, args.eval_problems, room, tokenizer, step_format)
    critic = None
    if args.algorithm == "ppo":
        about = SimpleNamespace(**{**vars(args), "model": args.critic or args.model})
        critic = start_model(AutoModelForTokenClassification, about, num_labels=1, classifier_dropout=0.0)  # type: ignore[arg-type]
    reference = None
    if args.reference and not args.lora_r:
        reference = load_model(AutoModelForCausalLM, args.model, dtype=args.dtype)
    make_folder(args.output_dir)
    trainer = PolicyTrainer(
        model=ActorCritic(policy, critic, reference),
        args=args,
        task=task,
        problems=problems,
        held_out=held_out,
        tokenizer=tokenizer,
        step_format=step_format,
        scorer=step_judge(
            args.process_reward,
            task,
            dtype=args.process_dtype,
            device=str(args.device),
            false_positives=args.false_positives,
            seed=args.seed,
        ),
        transforms=[*_transforms(args), *transforms],
        callbacks=[MetricsFile(args.output_dir)],
    )
    metrics = fit(trainer, tokenizer, step_format)
    if args.lora_r and trainer.is_world_process_zero():
        out = Path(args.output_dir)
        for model, place, base in ((policy, out, args.model), (critic, out / "critic", args.critic or args.model)):
            if model is not None:
                about = SimpleNamespace(model=base, dtype=args.dtype, seed=args.seed)
                merge_adapter(about, plain_class(model.get_base_model()), place, model.get_base_model().config)  # type: ignore[arg-type]
    trainer.accelerator.wait_for_everyone()
    return metrics


def _problems(
    task: Task, split: str, limit: int, room: int, tokenizer: Any, step_format: StepFormat
) -> Sequence[Problem]:
    """The first `limit` problems of a split whose prompts have at most `room` tokens."""
    try:
        problems = task.problems(split)
    except ValueError as error:
        raise UserError(f"task {task.name}: {error}") from None
    problems = problems[:limit] if limit else problems
    kept = [one for one in problems if len(step_format.encode_prompt(tokenizer, one.prompt)) <= room]
    if len(kept) < len(problems):
        longer = len(problems) - len(kept)
        report_counts(f"task {task.name}, {split}", {"problems": len(kept), "left out: prompt too long": longer})
    if not kept:
        raise UserError(
            f"task {task.name}: no problem of split {split!r} is left: prompts may have max_length (or the model's context) "
            f"- max_new_tokens = {room} tokens"
        )
    return kept


def _transforms(args: RLArguments) -> list[earned.RewardTransform]:
    found = []
    if args.overlong_buffer:
        found.append(earned.overlong(args.max_new_tokens, args.overlong_buffer))
    if args.most_repetition < 1:
        found.append(earned.refuse_repetition(args.most_repetition))
    return found


if __name__ == "__main__":
    run_trainer(RLArguments, train, "stepladder.trainers.rl")
