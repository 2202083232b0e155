"""Reward models of other projects, taken over as they are, with the step format that says how to read them."""

from __future__ import annotations

import shutil
from pathlib import Path

from ..basics import UserError, read_json, write_json
from .formats import CONVENTIONS, Given, foreign_format, read_config
from .loading import hub_folder, write_checkpoint
from .model_card import model_card
from .reward import RewardModel
from .step_format import StepFormat


def likely_format(path: str) -> str:
    """The convention that a checkpoint's architecture tells, or "" (a plain language model may follow two of them)."""
    names = read_config(path).architectures or [""]
    for ending, name in (
        ("ForProcessRewardModel", "qwen-prm"),
        ("ForPrmModel", "skywork"),
        ("ForTokenClassification", "trl"),
        ("ForSequenceClassification", "seqcls"),
    ):
        if names[0].endswith(ending):
            return name
    return ""


def import_reward(path: str, name: str, out: str, given: Given | None = None) -> StepFormat:
    """Copies a foreign reward model to `out` with its step format and a model card; returns the step format.

    Weights stay as they are; code and pickled weights are left behind. The model is loaded once, so that a checkpoint without
    its head, or with a tag that its tokenizer does not know, is refused here.
    """
    if not name:
        name = likely_format(path)
        if not name:
            raise UserError(f"{path}: its architecture fits several formats; say --from {' or '.join(CONVENTIONS)}")
    step_format = foreign_format(path, name, given)
    reward = RewardModel.load(path, dtype="auto", device="cpu", format=step_format)
    reward.score([("What is 1 + 1?", ["1 + 1 = 2", "Answer: 2"])])
    source = Path(path) if Path(path).is_dir() else hub_folder(path)
    wanted = (
        "*.safetensors",
        "model.safetensors.index.json",
        "tokenizer*",
        "special_tokens_map.json",
        "added_tokens.json",
    )
    files = {file for pattern in (*wanted, "vocab*", "merges.txt", "*.jinja") for file in source.glob(pattern)}
    with write_checkpoint(out) as folder:
        for file in sorted(files):
            if file.suffix not in (".py", ".bin"):
                shutil.copyfile(file, folder / file.name)
        config = read_json(source / "config.json")
        config.pop("auto_map", None)  # names of remote code, which no one needs to read this folder
        write_json(folder / "config.json", config)
        step_format.save(folder)
        card = model_card(name, step_format, reward.tokenizer, reward.model.config, origin=path)
        (folder / "README.md").write_text(card, encoding="utf-8")
    return step_format
