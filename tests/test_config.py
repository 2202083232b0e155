"""Configs from YAML and command lines: what is accepted, and that every mistake names the field."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml

from stepladder.basics import UserError
from stepladder.config import (
    build,
    coerce,
    describe,
    from_command_line,
    merge,
    option,
    parse_overrides,
    read_yaml,
    set_nested,
)


class Colour(enum.Enum):
    RED = "red"
    BLUE = "blue"


@dataclass
class Inner:
    rate: float = option(0.1, "a rate")
    names: tuple[str, ...] = option((), "names")


@dataclass
class Outer:
    """A config for tests."""

    folder: str = field(metadata={"help": "where it goes"})
    steps: int = option(10, "how many")
    learning_rate: float = option(1e-3, "how fast")
    fast: bool = option(False, "hurry")
    kind: Literal["hard", "soft"] = option("hard", "which labels")
    limit: int | None = option(None, "at most")
    sources: dict[str, str] = option({}, "name -> file")
    inner: Inner = field(default_factory=Inner, metadata={"help": "inside"})

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps must be 1 or more, found {self.steps}")


def test_a_config_is_built_with_its_types():
    made = build(
        Outer,
        {
            "folder": "x", "learning_rate": "1e-3", "steps": 3, "fast": True, "limit": 4,
            "sources": {"a": "b"}, "inner": {"rate": 1, "names": ["p", "q"]},
        },
    )  # fmt: skip
    assert made == Outer("x", 3, 1e-3, True, "hard", 4, {"a": "b"}, Inner(1.0, ("p", "q")))
    assert isinstance(made.inner.rate, float)
    assert Outer("x").sources is not Outer("x").sources


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"lerning_rate": 1}, "config: unknown key 'lerning_rate'; did you mean learning_rate?"),
        ({"zzz": 1}, "unknown key 'zzz'; known keys are fast, folder, inner, kind"),
        ({3: 1}, "unknown key '3'"),
        ({"learning_speed": 1}, r"unknown key 'learning_speed'; did you mean learning_rate\?"),
        ({"inner": {"rte": 1}}, "config: inner: unknown key 'rte'; did you mean rate?"),
        ({"steps": "ten"}, r"config: steps must be a whole number, found 'ten' \(str\)"),
        ({"steps": 1.5}, "steps must be a whole number, found 1.5"),
        ({"steps": True}, "steps must be a whole number, found True"),
        ({"learning_rate": "fast"}, "learning_rate must be a number, found 'fast'"),
        ({"learning_rate": True}, "learning_rate must be a number"),
        ({"fast": "yes"}, "fast must be true or false, found 'yes'"),
        ({"folder": 3}, "folder must be text, found 3"),
        ({"folder": None}, "folder must be text, found nothing"),
        ({"kind": "sift"}, r"kind must be one of hard, soft, found 'sift' \(did you mean soft\?\)"),
        ({"kind": ["soft"]}, "kind must be one of hard, soft"),
        ({"limit": "x"}, "limit must be a whole number"),
        ({"sources": ["a"]}, "sources must be keys and values"),
        ({"sources": {"a": 1}}, "sources.a must be text"),
        ({"inner": {"names": "p"}}, "inner: names must be a list, found 'p'"),
        ({"inner": {"names": ["p", 2]}}, r"inner: names\[1\] must be text"),
        ({"inner": 3}, "inner must be keys and values"),
        ({"steps": 0}, "config: steps must be 1 or more, found 0"),
    ],
)  # fmt: skip
def test_a_mistake_names_the_field_what_was_found_and_what_is_expected(values, message):
    with pytest.raises(UserError, match=message):
        build(Outer, {"folder": "x", **values})


def test_a_missing_field_is_named_with_its_help():
    with pytest.raises(UserError, match=r"my\.yaml: folder is missing \(where it goes\)"):
        build(Outer, {}, "my.yaml")


def test_coerce_of_other_types():
    assert coerce("red", Colour, "c") is Colour.RED
    with pytest.raises(UserError, match="c must be one of red, blue, found 'green'"):
        coerce("green", Colour, "c")
    assert coerce("a/b", Path, "p") == Path("a/b")
    assert coerce([1, 2], list[float], "l") == [1.0, 2.0]
    assert coerce({"a": 1}, Mapping[str, float], "m") == {"a": 1.0}
    assert coerce({"a": [1]}, Any, "x") == {"a": [1]}
    assert coerce(3, int | str, "u") == 3
    assert coerce("3", int | str, "u") == "3"
    with pytest.raises(UserError, match=r"u must be a whole number or text, found 1\.5"):
        coerce(1.5, int | str, "u")


def test_read_yaml(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("a: 1\nb: {c: [1, x]}\n")
    assert read_yaml(path) == {"a": 1, "b": {"c": [1, "x"]}}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3\n", r"a\.yaml, line 3: not valid YAML \(key 'a' is given twice\)"),
        ("x:\n  a: 1\n  a: 2\n", r"a\.yaml, line 3: not valid YAML \(key 'a' is given twice\)"),
        ("a: [1\nb: 2", r"a\.yaml, line 2: not valid YAML"),
        ("a:\n\t- 1", r"a\.yaml, line 2: not valid YAML"),
        ("", r"a\.yaml: expected keys and values, found nothing"),
        ("- 1\n- 2\n", r"a\.yaml: expected keys and values, found list"),
        ("a: !!python/object/apply:os.getcwd []", r"a\.yaml, line 1: not valid YAML"),
    ],
)
def test_broken_yaml_is_one_sentence(tmp_path, text, message):
    path = tmp_path / "a.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        read_yaml(path)


def test_a_misspelt_file_is_told_what_lies_beside_it(tmp_path):
    (tmp_path / "quickstart.yaml").write_text("name: quickstart\n")
    with pytest.raises(UserError, match=r"quickstrt\.yaml: no such file; did you mean .*/quickstart\.yaml\?"):
        read_yaml(tmp_path / "quickstrt.yaml")
    for lost in (tmp_path / "other.yaml", tmp_path / "nowhere" / "quickstart.yaml"):
        with pytest.raises(UserError, match=r"\.yaml: no such file$"):
            read_yaml(lost)


def test_yaml_that_is_no_file(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        read_yaml(tmp_path / "nothing.yaml")
    with pytest.raises(UserError, match="cannot be read"):
        read_yaml(tmp_path)
    (tmp_path / "bytes.yaml").write_bytes(b"a: \xff\xfe")
    with pytest.raises(UserError, match="cannot be read"):
        read_yaml(tmp_path / "bytes.yaml")


def test_overrides_nest_and_are_read_as_yaml():
    tokens = [
        "--a.b",
        "1",
        "--a.c=[1, 2]",
        "d=x y",
        "--flag",
        "--learning-rate",
        "1e-3",
        "--e",
        "-1",
        "--f=: [",
        "g=null",
        "h=",
    ]
    assert parse_overrides(tokens) == {
        "a": {"b": 1, "c": [1, 2]}, "d": "x y", "flag": True, "learning_rate": "1e-3", "e": -1, "f": ": [", "g": None, "h": None,
    }  # fmt: skip
    with pytest.raises(UserError, match="expected --key value or key=value, found 'stray'"):
        parse_overrides(["stray"])
    with pytest.raises(UserError, match=r"cannot set a\.b: a is 1"):
        parse_overrides(["a=1", "a.b=2"])


def test_merge_keeps_what_is_not_overridden_and_changes_neither():
    base, over = {"a": {"b": 1, "c": 2}, "d": [1]}, {"a": {"b": 5}, "d": [2], "e": 3}
    assert merge(base, over) == {"a": {"b": 5, "c": 2}, "d": [2], "e": 3}
    assert base == {"a": {"b": 1, "c": 2}, "d": [1]}
    values: dict[str, Any] = {}
    set_nested(values, "a.b.c", 1)
    assert values == {"a": {"b": {"c": 1}}}


def test_a_command_line_overrides_its_file(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text(yaml.safe_dump({"folder": "x", "steps": 3, "inner": {"rate": 0.5, "names": ["n"]}}))
    made = from_command_line(Outer, ["--config", str(path), "--steps", "4", "inner.rate=2e-2"], "prog")
    assert (made.folder, made.steps, made.inner) == ("x", 4, Inner(0.02, ("n",)))
    with pytest.raises(UserError, match=rf"{path}: unknown key 'step'; did you mean steps\?"):
        from_command_line(Outer, ["--config", str(path), "--step", "4"], "prog")
    with pytest.raises(UserError, match="prog: folder is missing"):
        from_command_line(Outer, [], "prog")


def test_help_lists_every_field(capsys):
    with pytest.raises(SystemExit) as stop:
        from_command_line(Outer, ["--help"], "prog")
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert shown.strip() == describe(Outer, "prog").strip()
    assert "folder (required): where it goes" in shown
    assert "steps (10): how many" in shown
    assert "A config for tests." in shown


def test_a_mapping_takes_the_keys_of_another_and_its_own_go_before(tmp_path):
    path = tmp_path / "merge.yaml"
    path.write_text("a: &a {x: 1, y: 2}\nb: {<<: *a, y: 3}\n")
    assert read_yaml(path) == {"a": {"x": 1, "y": 2}, "b": {"x": 1, "y": 3}}
    path.write_text("a: &a {x: 1}\nb: {<<: *a, y: 2, y: 3}\n")
    with pytest.raises(UserError, match="key 'y' is given twice"):
        read_yaml(path)
