"""PRM beam search: scoring solutions that grow step by step, with what was encoded kept, and the whole text every step.

    python bench/growing_solution.py --steps 8                   # 16 and 32: --target 7 and 10
    python bench/growing_solution.py --policy FOLDER             # its weights in place of random ones

The search is search/beam.py, the scorer the one that `stepladder search` gives it: `RewardScorer` over a `RewardModel` with a
prefix cache, or without one. The reward model has SmolLM2-135M's configuration and a head on the last layer. The policy is none:
it writes random words, each of them one token, so that nothing but scoring takes time; weights and words make no difference to
that. Scores of both arms must agree to 1e-4 (float32), and with them what the searches keep.

Without padding, prompt and beams alike, the whole text costs about (T + 1) / 2 times as many tokens: see "tokens encoded".
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from measure import Question, Work, bench

ARMS = ("kept", "whole text")
OPTIONS = {
    "policy": "", "steps": 8, "step_tokens": 20, "prompt_tokens": 60, "problems": 1, "beams": 4, "width": 2, "layers": 30,
    "dtype": "float32", "target": 4.0,
}  # fmt: skip
# Of SmolLM2-135M, but for the number of layers.
SMOLLM2: dict[str, Any] = {
    "hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152,
    "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "tie_word_embeddings": True, "pad_token_id": 0,
}  # fmt: skip


def question(args: argparse.Namespace) -> Question:
    return Question(
        "growing_solution",
        f"PRM beam search, scoring {args.beams} beams that grow to {args.steps} steps, SmolLM2-135M",
        "steps scored a second",
        ARMS,
        {"whole text": args.target},
        dtype=args.dtype,
        tolerance=1e-4 if args.dtype == "float32" else 0.05,
    )


def prepare(arm: str, args: argparse.Namespace) -> Callable[[], Work]:
    """One beam search of each problem."""
    import torch
    from transformers import AutoModelForTokenClassification, LlamaConfig, LlamaForTokenClassification

    from stepladder.models.lab import lab_tokenizer
    from stepladder.models.loading import load_model
    from stepladder.models.prefix_cache import PrefixCache
    from stepladder.models.reward import RewardModel
    from stepladder.models.step_format import StepFormat
    from stepladder.search.adapters import RewardScorer
    from stepladder.search.base import State
    from stepladder.search.beam import beam_search

    torch.manual_seed(0)
    settings: dict[str, Any]
    if args.policy:
        settings = {"num_labels": 1, "classifier_dropout": 0.0}
        auto = AutoModelForTokenClassification
        model = load_model(auto, args.policy, dtype=args.dtype, settings=settings, new=("score",))
    else:
        settings = {**SMOLLM2, "num_hidden_layers": args.layers, "num_labels": 1, "classifier_dropout": 0.0}
        config = LlamaConfig(**settings)
        model = LlamaForTokenClassification(config).to(getattr(torch, args.dtype))
    tokenizer = lab_tokenizer(40_000)  # as many words: any id of the model's vocabulary
    step_format = StepFormat.for_policy(tokenizer, "\n").for_reward("scalar", "soft", "last")
    reward = RewardModel(model, tokenizer, step_format, name="prm")
    policy = RandomWords(args.steps, args.step_tokens)
    roots = [State(f"problem {i}", policy.words(i, args.prompt_tokens), (), 0) for i in range(args.problems)]
    scored: list[float] = []

    def score(states: Any) -> list[float]:
        found = RewardScorer(reward)(states)
        scored.extend(found)
        return found

    def work() -> Work:
        scored.clear()
        reward.cache = PrefixCache() if arm == "kept" else None
        before = reward.ledger.copy()
        beam_search(roots, policy, score, beams=args.beams, width=args.width, max_depth=args.steps + 1)
        spent = reward.ledger - before
        return Work(
            units=len(scored),
            tokens=spent.reward_tokens,
            flops=spent.flops,
            same=list(scored),
            extra={"tokens encoded": spent.reward_tokens, "least score": min(scored), "greatest": max(scored)},
        )

    policy.steps = 1
    work()  # to warm up
    policy.steps = args.steps
    return work


class RandomWords:
    """A policy without a model: steps of words drawn with the seed, so many steps a solution."""

    def __init__(self, steps: int, step_tokens: int) -> None:
        self.steps, self.step_tokens = steps, step_tokens

    def words(self, seed: int, count: int) -> str:
        import random

        return " ".join(str(random.Random(seed * 1000 + i).randrange(40_000)) for i in range(count))

    def expand(self, states: Any, seeds: Any) -> list[list[Any]]:
        """Children of each state, one step longer."""
        import dataclasses

        return [
            [
                dataclasses.replace(
                    state,
                    steps=(*state.steps, self.words(seed, self.step_tokens - 1)),  # and the separator
                    done=len(state.steps) + 1 == self.steps,
                )
                for seed in row
            ]
            for state, row in zip(states, seeds, strict=True)
        ]

    def finish(self, states: Any, seeds: Any) -> list[Any]:
        """No state is left to finish."""
        raise AssertionError("every solution ends before the search does")


if __name__ == "__main__":
    bench(question, prepare, **OPTIONS)
