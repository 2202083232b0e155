"""A real vLLM that follows a policy in training: its samples beside the transformers engine's, before and after its weights change.

    vllm-env/bin/python bench/vllm_weight_updates.py [--policy FOLDER] [--task TASK] [--problems 64] [--rollouts 3]

Run it in the environment that has vllm, with Stepladder and accelerate beside it. First both engines decode greedily from the
policy; then every weight of the transformers model is moved, vLLM is asked once more as it is, its weights are overwritten as the
online trainer does it, and both decode again. Last, PPO trains with `backend: vllm`: `gap` is the mean difference between what vLLM
says of its samples and what the weights in training say of them, in nats a token; the same without overwriting tells what it
would be if the weights did not arrive.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import yaml

CHAIN = "{kind: chain, p: 7, min_steps: 3, max_steps: 6, sizes: {train: 2000, dev: 64, test: 64}}"
OPTIONS = {"dtype": "float32", "enforce_eager": True}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", help="a policy's folder; left out: the one of the lab that Stepladder comes with")
    parser.add_argument("--task", default=CHAIN, help="the task whose problems are solved")
    parser.add_argument("--problems", type=int, default=64, help="how many are decoded greedily")
    parser.add_argument("--max-new-tokens", type=int, default=64, help="tokens a solution")
    parser.add_argument("--noise", type=float, default=0.3, help="weights are moved by so much of their own spread")
    parser.add_argument("--rollouts", type=int, default=3, help="rollouts of PPO, each with its updates")
    args = parser.parse_args()

    import torch
    from transformers import AutoModelForCausalLM

    from stepladder.models.loading import load_model, load_policy_format, load_tokenizer
    from stepladder.models.transformers_engine import TransformersEngine
    from stepladder.tasks.load import load_task
    from stepladder.trainers.actor_critic import TrainingEngine, vllm_engine

    if args.policy is None:
        args.policy = wider_lab_policy(tempfile.mkdtemp())
    task, tokenizer = load_task(yaml.safe_load(args.task)), load_tokenizer(args.policy)
    layout = load_policy_format(args.policy, tokenizer, task.step_separator)
    prompts = [layout.encode_prompt(tokenizer, one.prompt) for one in task.problems("test")[: args.problems]]
    model = load_model(AutoModelForCausalLM, args.policy)
    began = time.perf_counter()
    served = vllm_engine(args.policy, tokenizer, OPTIONS)
    print(
        f"vLLM {importlib.metadata.version(_distribution())}, {served.name}, {time.perf_counter() - began:.0f} s to start"
    )
    training = TrainingEngine(model, tokenizer, 256, served)
    plain = TransformersEngine(model, tokenizer)

    before = compare("as loaded", served, plain, prompts, args.max_new_tokens)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            noise = torch.randn(weight.shape, generator=generator) * args.noise
            weight.add_(noise * (weight.std() if weight.dim() > 1 else 1.0))
    compare("moved, vLLM as it was", served, plain, prompts, args.max_new_tokens)
    began = time.perf_counter()
    training.refresh()
    seconds = time.perf_counter() - began
    after = compare(f"moved, vLLM refreshed in {seconds:.2f} s", served, plain, prompts, args.max_new_tokens)
    changed = sum(a != b for a, b in zip(before, after, strict=True))
    print(f"the move changed {changed} of {len(prompts)} solutions")

    for told, silent in (("PPO with backend: vllm", False), ("the same, weights never sent", True)):
        # The engine is made once: vLLM gives its memory back only when its process ends.
        with patch("stepladder.trainers.rl.vllm_engine", lambda *_: served):
            training.model.load_state_dict(load_model(AutoModelForCausalLM, args.policy).state_dict())
            training.refresh()
            if silent:
                with patch.object(TrainingEngine, "refresh", lambda self: None):
                    lines = train(args)
            else:
                lines = train(args)
        print(f"{told}: " + "; ".join(f"step {s}: gap {gap:.1e}, reward {reward:.3f}" for s, gap, reward in lines))


def wider_lab_policy(folder: str, head_dim: int = 32) -> str:
    """Writes the lab's policy into `folder`, the same function with heads of another width: vLLM's CPU kernels know none of 28.

    Zeros are added to both halves that the rotary embedding pairs; its base and the scale of the queries make up for the width.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    import stepladder
    from stepladder.models.loading import load_model, load_policy_format, load_tokenizer

    source = str(Path(stepladder.__path__[0]) / "models" / "lab_policy")
    model, tokenizer = load_model(LlamaForCausalLM, source), load_tokenizer(source)
    was, heads = model.config.head_dim, model.config.num_attention_heads
    theta = model.config.rope_parameters["rope_theta"] ** (head_dim / was)
    told = {
        **model.config.to_dict(),
        "head_dim": head_dim,
        "rope_parameters": {"rope_type": "default", "rope_theta": theta},
    }
    wider = LlamaForCausalLM(LlamaConfig(**told))
    places = torch.arange(was // 2)
    places = torch.cat([places, places + head_dim // 2])
    weights = model.state_dict()
    for name, weight in weights.items():
        kind = name.split(".")[-2]
        if kind in ("q_proj", "k_proj", "v_proj"):
            padded = weight.new_zeros(heads, head_dim, weight.shape[1])
            padded[:, places] = weight.view(heads, was, -1) * ((head_dim / was) ** 0.5 if kind == "q_proj" else 1.0)
            weights[name] = padded.flatten(0, 1)
        elif kind == "o_proj":
            padded = weight.new_zeros(weight.shape[0], heads, head_dim)
            padded[:, :, places] = weight.view(-1, heads, was)
            weights[name] = padded.flatten(1)
    wider.load_state_dict(weights)
    ids = torch.randint(3, len(tokenizer), (4, 60), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(wider(ids).logits, model(ids).logits, atol=1e-4, rtol=1e-4)
    wider.generation_config = model.generation_config
    wider.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    load_policy_format(source, tokenizer, "\n").save(folder)
    return folder


def compare(told: str, served: Any, plain: Any, prompts: list[tuple[int, ...]], tokens: int) -> list[tuple[int, ...]]:
    """The greedy solutions of vLLM; prints how they and their log-probabilities compare with those of the transformers engine."""
    from stepladder.models.engine import Request, Sampling

    found = [
        [one[0] for one in engine.generate([Request(ids, (0,)) for ids in prompts], Sampling(tokens, temperature=0.0))]
        for engine in (served, plain)
    ]
    same = [(a, b) for a, b in zip(*found, strict=True) if a.ids == b.ids and a.stop == b.stop]
    gaps = [abs(x - y) for a, b in same for x, y in zip(a.logprobs, b.logprobs, strict=True)]
    worst = (
        f"log-probabilities of {len(gaps)} tokens within {max(gaps):.1e}" if gaps else "no log-probability to compare"
    )
    print(f"{told}: {len(same)} of {len(prompts)} greedy solutions equal, {worst}", flush=True)
    return [one.ids for one in found[0]]


def train(args: argparse.Namespace) -> list[tuple[int, float, float]]:
    """(optimiser step, engine gap, reward) of each rollout of a short PPO."""
    from stepladder.config import build
    from stepladder.trainers import rl

    with tempfile.TemporaryDirectory() as folder:
        values = {
            "model": args.policy, "output_dir": folder, "task": yaml.safe_load(args.task), "algorithm": "ppo",
            "backend": "vllm", "vllm_options": OPTIONS, "rollouts": args.rollouts, "prompts": 16, "samples": 2,
            "update_epochs": 1, "max_new_tokens": args.max_new_tokens, "per_device_train_batch_size": 16,
            "learning_rate": 1e-4, "lr_scheduler_type": "constant", "log_every": 1, "disable_tqdm": True, "use_cpu": True,
            "save_strategy": "no",
        }  # fmt: skip
        rl.train(build(rl.RLArguments, values))
        lines = [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["engine_gap"], line["reward"]) for line in lines if "engine_gap" in line]


def _distribution() -> str:
    names = importlib.metadata.packages_distributions().get("vllm", ["vllm"])
    return names[0]


if __name__ == "__main__":
    main()
