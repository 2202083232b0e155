"""Options of `stepladder plan`."""

from __future__ import annotations

from dataclasses import dataclass

from ..config import at_least, option


@dataclass
class Plan:
    """Says what a recipe needs before it runs: memory of each GPU by stage, tokens, and GPU-hours."""

    gpus: str = option("1x80GB", "the GPUs of one machine and the memory of each, for example 8x80GB")
    nodes: int = option(1, "machines")
    launch: str = option(
        "",
        "how training is spread: a file of launch/accelerate or its name without .yaml, or run (one process without mixed "
        "precision, as `stepladder run`); empty: one, multi_gpu or multi_node, by the number of GPUs",
    )
    model_config: str = option("", "config.json (or its folder) of the models that are hub ids and not folders here")
    rates: str = option(
        "", "a finished run of the recipe, however small: tokens and FLOP/s are taken from its ledgers and logs"
    )
    tflops: float = option(312.0, "without rates: TFLOP/s of a GPU in 16 bits, as its data sheet says (312: A100)")
    bandwidth: float = option(2.0, "without rates: TB/s of a GPU's memory (2.0: A100 80 GB)")
    train_use: float = option(0.4, "without rates: share of tflops that training reaches")
    read_use: float = option(0.4, "without rates: share of tflops that reading prompts and scoring reach")
    decode_use: float = option(0.3, "without rates: share of tflops and bandwidth that sampling reaches")
    prompt_tokens: float = option(0.0, "tokens of a prompt; 0: of rates, else counted in the task's prompts, else 128")
    solution_tokens: float = option(
        0.0, "tokens of a solution; 0: of rates, else max_new_tokens, the most there can be"
    )
    steps: float = option(8.0, "steps of a solution, where rates do not tell")
    right: float = option(0.5, "share of the solutions that are right, where rates do not tell")
    imported_rows: int = option(10000, "rows of an imported file without a limit")
    longest: int = option(0, "tokens of the longest row that is trained on; 0: max_length")
    json: bool = option(False, "print one JSON object for machines")

    def __post_init__(self) -> None:
        at_least(self, 1, "nodes", "imported_rows", "steps")
        at_least(self, 0, "prompt_tokens", "solution_tokens", "longest", "right")
        for name in ("tflops", "bandwidth", "train_use", "read_use", "decode_use"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be greater than 0, found {getattr(self, name)}")
        if self.right > 1:
            raise ValueError(f"right must lie in [0, 1], found {self.right}")
