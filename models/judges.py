"""What judges steps: reward models that score them, and critics that name the first wrong one; in process or served."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

from ..basics import UserError
from .engine import Sampling
from .reward import StepScorer

KINDS = ("prm", "critic", "served_prm", "served_critic")


@runtime_checkable
class ErrorFinder(StepScorer, Protocol):
    """Names the first wrong step, in one or more samples."""

    def votes(self, solutions: Sequence[tuple[str, Sequence[str]]]) -> list[list[int | None]]:
        """Votes [B][samples]: 0-based index of the first wrong step, -1 for none, None for one that cannot be read."""
        ...


def load_judge(
    kind: str,
    model: str,
    *,
    dtype: str = "float32",
    backend: str = "transformers",
    base_url: str = "",
    layout: str = "",
    samples: int = 1,
    sampling: Sampling | None = None,
    batch_size: int = 64,
    prompt: str = "",
    seed: int = 0,
) -> StepScorer:
    """The judge of a kind: `prm` (a reward model's folder), `critic` (a language model that an engine runs), `served_critic` (a
    model behind a chat endpoint) or `served_prm` (behind vLLM's /pooling, laid out as `layout`, a folder, says).

    `samples`, `sampling`, `prompt` and `seed` are a critic's.
    """
    if kind == "prm":
        from .reward import RewardModel

        return RewardModel.load(model, dtype=dtype)
    if kind == "served_prm":
        from .served import ServedRewardModel

        return ServedRewardModel.load(base_url, model, layout or model, concurrency=min(batch_size, 64))
    from .critic import Critic, EngineWriter

    sampling = sampling or Sampling(2048, 0.0)
    if kind == "served_critic":
        from .served import ChatWriter

        writer: Any = ChatWriter(base_url, model, sampling, concurrency=min(batch_size, 64))
    elif kind == "critic":
        from .loading import load_engine, load_policy_format

        engine = load_engine(model, backend=backend, dtype=dtype, batch_size=batch_size, base_url=base_url)
        writer = EngineWriter(engine, load_policy_format(model, engine.tokenizer, "\n"), sampling)
    else:
        raise UserError(f"kind must be one of {', '.join(KINDS)}, found {kind!r}")
    return Critic(writer, name=model, samples=samples, prompt=prompt, seed=seed)
