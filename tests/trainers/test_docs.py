"""The pages of the trainers: their examples run, and they name every option."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
import yaml

from stepladder.trainers.arguments import StepladderArguments
from stepladder.trainers.dpo import DPOArguments
from stepladder.trainers.orm import ORMArguments
from stepladder.trainers.prm import PRMArguments
from stepladder.trainers.ranking import RankingArguments
from stepladder.trainers.reward import RewardArguments
from stepladder.trainers.sft import SFTArguments
from stepladder.trainers.value import ValueArguments

DOCS = Path(__file__).parents[2] / "docs"


def page(kind: str) -> str:
    return (DOCS / f"{kind}.md").read_text()


@pytest.mark.parametrize("kind", ["prm", "orm", "sft", "dpo"])
def test_the_example_trains(settings, train, starter, tmp_path, kind):
    [block] = re.findall(r"```yaml\n(.*?)```", page(kind), re.DOTALL)
    values = settings(kind)
    small = {name: values[name] for name in ("model", "rows", "output_dir")}
    path = tmp_path / "example.yaml"
    path.write_text("".join(f"{line}\n" for line in block.splitlines() if line.split(":")[0] not in small))
    assert set(yaml.safe_load(block)) - set(yaml.safe_load(path.read_text())) == set(small)
    path.write_text(path.read_text() + yaml.safe_dump(small))
    ended = starter(f"stepladder.trainers.{kind}", "--config", str(path), "--num_train_epochs", "1")
    assert ended.status == 0, ended.err
    assert Path(values["output_dir"], "model.safetensors").exists()


PAGES = [
    ("prm", PRMArguments),
    ("orm", ORMArguments),
    ("sft", SFTArguments),
    ("dpo", DPOArguments),
    ("tree_plv", RankingArguments),
    ("alphamath", ValueArguments),
]


@pytest.mark.parametrize(("kind", "config"), PAGES)
def test_every_option_is_in_the_page_with_its_default(kind, config):
    classes = [c for c in (config, RewardArguments) if issubclass(config, c)]
    own = {name for c in classes for name in vars(c).get("__annotations__", {}) if name != "args"}
    rows = {line.split("|")[1].strip(" `"): line for line in page(kind).splitlines() if line.startswith("| `")}
    for field in dataclasses.fields(config):
        if field.name in own:
            assert field.name in rows, f"docs/{kind}.md says nothing of {field.name}"
            default = field.default if field.default is not dataclasses.MISSING else ""
            default = "null" if default is None else default
            shown = str(default).lower() if isinstance(default, bool) else str(default).replace("\n", '"\\n"')
            assert rows[field.name].split("|")[2].strip(" `").replace('""', "") == shown


def test_what_all_trainers_share_is_on_one_page():
    for name in set(vars(StepladderArguments)["__annotations__"]):
        assert f"`{name}`" in page("sft") or f"`{name}:" in page("sft") or name == "remove_unused_columns", name
