"""The pages of search: every strategy, setting and field with its default, and examples whose keys are known."""

from __future__ import annotations

import dataclasses
import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from stepladder.config import build
from stepladder.launch.options_search import STRATEGIES, Compare, ComparedArm, Search
from stepladder.launch.stages import config_class

DOCS = Path(__file__).parents[2] / "docs"


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy_is_in_the_table_with_its_settings(strategy):
    [row] = [line for line in (DOCS / "search.md").read_text().splitlines() if line.startswith(f"| `{strategy}` |")]
    settings = row.split("|")[5]
    function, budget = STRATEGIES[strategy]
    known = {
        name: parameter.default
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY and name != "seed"
    }
    shown = lambda v: {True: "true", False: "false", None: "null"}[v] if v is None or isinstance(v, bool) else str(v)
    assert dict(re.findall(r"`(\w+)` \(([^)]*)\)", settings)) == {name: shown(v) for name, v in known.items()}
    assert budget in known


@pytest.mark.parametrize(("page", "config"), [("search", Search), ("search_analysis", Compare)])
def test_every_field_is_named(page: str, config: Any):
    text = (DOCS / f"{page}.md").read_text()
    from stepladder.launch.options import WithPolicy

    own = {f.name for f in dataclasses.fields(config)} - {f.name for f in dataclasses.fields(WithPolicy)}
    if config is Compare:
        own |= {f.name for f in dataclasses.fields(ComparedArm)}
    assert not {name for name in own if f"`{name}`" not in text}


@pytest.mark.parametrize("page", ["search", "search_analysis", "pav"])
def test_examples_have_known_keys(page: str):
    blocks = re.findall(
        r"```yaml\n# stepladder (\w+) (\w+) .*?\n(.*?)```", (DOCS / f"{page}.md").read_text(), re.DOTALL
    )
    assert blocks
    for group, stage, text in blocks:
        assert build(config_class(f"{group}.{stage}"), yaml.safe_load(text), page)
