"""What a result cost: tokens, FLOPs and seconds, so that comparisons are made at equal cost."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields


@dataclass
class Ledger:
    """Counts of work done. FLOPs are 2 x parameters x tokens, forward only (arXiv:2001.08361, section 2.1)."""

    generated_tokens: int = 0  # sampled by a policy
    prefilled_tokens: int = 0  # encoded by a policy before it samples, each shared prefix once
    reward_tokens: int = 0  # encoded by a reward model
    policy_calls: int = 0  # samples asked of a policy
    flops: float = 0.0
    seconds: float = 0.0

    def add_policy(self, parameters: int, *, generated: int = 0, prefilled: int = 0, calls: int = 0) -> None:
        self.generated_tokens += generated
        self.prefilled_tokens += prefilled
        self.policy_calls += calls
        self.flops += 2.0 * parameters * (generated + prefilled)

    def add_reward(self, parameters: int, tokens: int) -> None:
        self.reward_tokens += tokens
        self.flops += 2.0 * parameters * tokens

    @contextlib.contextmanager
    def timed(self) -> Iterator[None]:
        """Adds the wall-clock seconds of the block."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds += time.perf_counter() - start

    def __add__(self, other: Ledger) -> Ledger:
        return Ledger(**{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)})

    def __sub__(self, other: Ledger) -> Ledger:
        return Ledger(**{f.name: getattr(self, f.name) - getattr(other, f.name) for f in fields(self)})

    def copy(self) -> Ledger:
        return Ledger(**asdict(self))

    def to_json(self) -> dict[str, float]:
        return asdict(self)
