"""Options of the commands that read and write other projects' layouts of reward models."""

from __future__ import annotations

from dataclasses import dataclass

from ..config import option
from ..models.step_format import Aggregation

FORMATS = ("qwen-prm", "math-shepherd", "rlhflow", "trl", "skywork", "seqcls")


@dataclass
class Export:
    """Writes a reward model in the layout of another project, with a model card; its scores stay what they are."""

    to: str = option("", "the layout: " + ", ".join(FORMATS))
    out: str = option("", "folder to write")
    tag: str | None = option(
        None,
        "step tag of qwen-prm and math-shepherd, a token of its own; empty: the separator; null: as the layout has it",
    )
    good: str = option("+", "word for a good step, of math-shepherd and rlhflow")
    bad: str = option("-", "word for a bad step, of math-shepherd and rlhflow")
    bias: str = option("refuse", "a bias that the layout has no room for: refuse, or beside (in step_format.json)")
    check: bool = option(True, "read the written folder back and compare scores")


@dataclass
class Import:
    """Copies a reward model of another project with the step format that its layout needs."""

    format: str = option("", "the layout (--from): " + ", ".join(FORMATS) + "; empty: what the architecture tells")
    out: str = option("", "folder to write")
    separator: str | None = option(None, "the step tag or separator; null: as the layout has it")
    tail: str | None = option(None, "of math-shepherd: text between a tag and the next step")
    good: str = option("+", "word for a good step, of math-shepherd and rlhflow")
    bad: str = option("-", "word for a bad step, of math-shepherd and rlhflow")
    chat: bool | None = option(None, "use the tokenizer's chat template; null: as the layout has it")
    system: str | None = option(None, "system message of a chat; null: as the layout has it")
    prompt_template: str | None = option(None, "text around {prompt}; {bos} is the tokenizer's first token")
    label_kind: str | None = option(None, "what it was trained on: outcome, hard, soft, threshold, human or checker")
    aggregation: Aggregation | None = option(None, "how step scores become one number: last, min, prod or mean")
