"""Options of the stages that search."""

from __future__ import annotations

from dataclasses import dataclass

from ..config import option
from .options import WithPolicy, at_least


@dataclass
class Beam(WithPolicy):
    """PRM beam search (Solution rows, one a finished solution)."""

    split: str = option("test", "the split of the task")
    reward: str = option("", "the reward model that guides the search")
    reward_dtype: str = option("float32", "precision of the reward model")
    aggregation: str = option("", "how step scores become one: last, min, prod, mean; empty takes the advised one")
    beams: int = option(16, "finished solutions of each problem")
    width: int = option(4, "children of each kept prefix")
    max_depth: int = option(40, "most steps of a solution")

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 1, "max_depth")
        if not 1 <= self.width <= self.beams:
            raise ValueError(f"1 <= width <= beams must hold, found width {self.width} and beams {self.beams}")
