"""Tasks are built from plain configs, and a mistake in one names the field and the nearest known one."""

import json
import re
from pathlib import Path

import pytest
import yaml

from stepladder.basics import UserError
from stepladder.tasks.base import HasReference, StepChecker, Task
from stepladder.tasks.gym import GymTask
from stepladder.tasks.load import KINDS, load_task
from stepladder.tasks.text import TextTask

DOCS = Path(__file__).parents[2] / "docs" / "tasks.md"


def test_the_lab_is_loaded_with_its_fields():
    task = load_task({"kind": "chain", "p": 7, "min_steps": 2, "max_steps": 3, "sizes": {"train": 5, "test": 3}})
    assert isinstance(task, Task)
    assert isinstance(task, StepChecker)
    assert isinstance(task, HasReference)
    assert len(task.problems("train")) == 5


def test_text_and_presets_are_loaded(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"q": f"{i} + 1?", "a": i + 1}) + "\n" for i in range(40)))
    task = load_task({"kind": "text", "name": "mine", "path": str(path), "prompt_field": "q", "answer_field": "a"})
    assert isinstance(task, Task)
    assert isinstance(task, TextTask)
    assert task.name == "mine"
    assert task.problems("train")[0].id.startswith("mine/")
    other = load_task({"kind": "gsm8k", "train": str(path), "test": str(path), "timeout": 2, "step_separator": "\n\n"})
    assert isinstance(other, TextTask)
    assert (other.timeout, other.step_separator, other.answer_pattern) == (2.0, "\n\n", r"####[ \t]*(.+)")
    for kind in ("math", "word_problems", "multiple_choice"):
        assert isinstance(load_task({"kind": kind}), TextTask), "hub ids are the default and nothing is read yet"
    assert list(load_task({"kind": "word_problems", "svamp": ""}).sources) == ["multiarith", "singleeq", "addsub"]
    assert load_task({"kind": "math", "sources": {"a": str(path)}}).sources == {"a": str(path)}


def test_reasoning_gym_is_loaded():
    task = load_task(
        {"kind": "reasoning_gym", "dataset": "chain_sum", "options": {"min_terms": 3}, "sizes": {"test": 2}}
    )
    assert isinstance(task, GymTask)
    assert task.name == "reasoning_gym/chain_sum"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"kind": "chian"}, "task: unknown kind 'chian'; did you mean chain?"),
        ({"kind": "zzz"}, f"task: unknown kind 'zzz'; known kinds are {', '.join(sorted(KINDS))}"),
        ({}, "task: kind is missing; known kinds are chain, text"),
        ("chain", "task must be keys and values, found 'chain'"),
        ({"kind": "chain", "max_step": 3}, "task chain: unknown key 'max_step'; did you mean max_steps?"),
        ({"kind": "chain", "p": "eleven"}, "task chain: p must be a whole number, found 'eleven' (str)"),
        ({"kind": "chain", "p": 1}, "task chain: p must"),
        ({"kind": "text"}, "task text: give either path"),
        ({"kind": "text", "path": "a", "answer_kind": "numbr"}, "did you mean number?"),
        (
            {"kind": "text", "path": "a", "promt_field": "q"},
            "task text: unknown key 'promt_field'; did you mean prompt_field?",
        ),
        (
            {"kind": "text", "path": "a", "splits": {"train": "x"}},
            "task text: splits.train must be a number, found 'x' (str)",
        ),
        (
            {"kind": "text", "sources": {"a": {"pth": "b"}}},
            "task text: sources.a: unknown key 'pth'; did you mean path?",
        ),
        ({"kind": "gsm8k", "trian": "x"}, "task gsm8k: unknown key 'trian'; did you mean train?"),
        ({"kind": "gsm8k", "train": 3}, "task gsm8k: train must be text, found 3 (int)"),
        ({"kind": "math", "timeout": "long"}, "task math: timeout must be a number, found 'long' (str)"),
        ({"kind": "math", "splits": {"train": 0.5}}, "task math: the shares of splits must add up to 1"),
        ({"kind": "word_problems", "overrides": {}}, "task word_problems: unknown key 'overrides'"),
        ({"kind": "reasoning_gym"}, "task reasoning_gym: dataset is missing"),
        ({"kind": "reasoning_gym", "dataset": "ab", "sizes": {"test": 1.5}}, "sizes.test must be a whole number"),
    ],
)
def test_a_mistake_is_one_sentence_that_names_it(config, message):
    with pytest.raises(UserError) as caught:
        load_task(config)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_every_example_in_the_docs_loads():
    examples = re.findall(r"```yaml\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL)
    assert len(examples) >= 5
    kinds = {
        load_task(yaml.safe_load(example)["task"]) and yaml.safe_load(example)["task"]["kind"] for example in examples
    }
    assert kinds == set(KINDS)
