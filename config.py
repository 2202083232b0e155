"""Configurations: dataclasses filled from YAML and overrides, where every mistake is one sentence that names the field."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import difflib
import enum
import re
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

from .basics import UserError

C = TypeVar("C")


class _Loader(yaml.SafeLoader):
    """YAML where a key given twice is an error instead of the first value silently lost, and only true and false are booleans
    (YAML 1.1 reads `save_strategy: no` as false)."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue  # `<<: *other` is meant to be overridden by the keys beside it
            key = self.construct_object(key_node, deep=deep)
            if isinstance(key, (str, int)) and key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is given twice", key_node.start_mark)
            seen.add(key if isinstance(key, (str, int)) else None)
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:bool"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|false|False)$"), list("tTfF"))


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file. Raises UserError for a missing file, broken YAML or anything but a mapping."""
    path = Path(path)
    try:
        value = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except FileNotFoundError:
        beside = [other.name for other in path.parent.glob(f"*{path.suffix}")]
        near = difflib.get_close_matches(path.name, beside, n=1, cutoff=0.6)
        hint = f"; did you mean {path.parent / near[0]}?" if near else ""
        raise UserError(f"{path}: no such file{hint}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise UserError(f"{path}{line}: not valid YAML ({getattr(error, 'problem', error)})") from None
    if not isinstance(value, dict):
        raise UserError(
            f"{path}: expected keys and values, found {'nothing' if value is None else type(value).__name__}"
        )
    return value


def unknown_key(key: str, known: Sequence[str], where: str, what: str = "key") -> UserError:
    """The error for an unknown key (or other `what`), with what is near: one spelt nearly so, else those with a word spelt so."""
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    if not near:
        words = {word for name in known for word in name.split("_")}
        close = {match for word in key.split("_") for match in difflib.get_close_matches(word, words, n=1, cutoff=0.75)}
        near = [name for name in known if close & set(name.split("_"))][:3]
    if near:
        hint = f"did you mean {' or '.join(near)}?"
    elif len(known) > 40:
        hint = f"`--help` of the stage's own command lists the {len(known)} known {what}s"
    else:
        hint = f"known {what}s are {', '.join(sorted(known))}"
    return UserError(f"{where}: unknown {what} {key!r}; {hint}")


def build(cls: type[C], values: Mapping[str, Any], where: str = "config") -> C:
    """A dataclass from a mapping. Raises UserError naming `where`, the key, what was found and what was expected."""
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}  # type: ignore[arg-type]
    made = {}
    for key, value in values.items():
        if key not in fields:
            raise unknown_key(str(key), list(fields), where)
        made[key] = coerce(value, hints[key], f"{where}: {key}")
    for name, field in fields.items():
        if name not in made and field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise UserError(f"{where}: {name} is missing ({field.metadata.get('help', 'it has no default')})")
    try:
        return cls(**made)
    except (ValueError, TypeError) as error:
        raise UserError(f"{where}: {error}") from error


def coerce(value: Any, hint: Any, where: str) -> Any:
    """`value` as the type `hint`. Only harmless changes are made: 1 -> 1.0, "1e-3" -> 0.001, a list -> a tuple."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        options = [a for a in args if a is not type(None)]
        errors = []
        for option in options:
            try:
                return coerce(value, option, where)
            except UserError as error:
                errors.append(error)
        if len(options) == 1:
            raise errors[0]
        raise UserError(f"{where} must be {' or '.join(_name(o) for o in options)}, found {_show(value)}")
    if origin is Literal:
        if value not in args:
            near = difflib.get_close_matches(str(value), [str(a) for a in args], n=1)
            hint_text = f" (did you mean {near[0]}?)" if near else ""
            names = ", ".join(str(a) or "nothing" for a in args)
            raise UserError(f"{where} must be one of {names}, found {value!r}{hint_text}")
        return value
    if origin in (list, tuple, Sequence) or hint in (list, tuple):
        if isinstance(value, str) or not isinstance(value, Sequence):
            raise UserError(f"{where} must be a list, found {_show(value)}")
        inner = args[0] if args else Any
        made = [coerce(item, inner, f"{where}[{i}]") for i, item in enumerate(value)]
        return made if origin is list or hint is list else tuple(made)
    if origin in (dict, Mapping) or hint is dict or (isinstance(origin, type) and issubclass(origin, Mapping)):
        if not isinstance(value, Mapping):
            raise UserError(f"{where} must be keys and values, found {_show(value)}")
        inner = args[1] if len(args) == 2 else Any
        return {key: coerce(item, inner, f"{where}.{key}") for key, item in value.items()}
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, Mapping):
            raise UserError(f"{where} must be keys and values, found {_show(value)}")
        return build(hint, value, where)  # type: ignore[arg-type]
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        try:
            return hint(value)
        except ValueError:
            names = ", ".join(str(m.value) for m in hint)
            raise UserError(f"{where} must be one of {names}, found {_show(value)}") from None
    if hint is bool:
        if isinstance(value, bool):
            return value
        raise UserError(f"{where} must be true or false, found {_show(value)}")
    if hint is float:
        # YAML 1.1 reads 1e-3 as text; people write it all the time.
        if isinstance(value, str):
            with contextlib.suppress(ValueError):
                value = float(value)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return float(value)
        raise UserError(f"{where} must be a number, found {_show(value)}")
    if hint is int:
        if isinstance(value, int) and not isinstance(value, bool):
            return value
        raise UserError(f"{where} must be a whole number, found {_show(value)}")
    if hint is str:
        if isinstance(value, str):
            return value
        raise UserError(f"{where} must be text, found {_show(value)}")
    if hint is Path:
        return Path(coerce(value, str, where))
    return value


def check_choices(config: Any) -> None:
    """Raises ValueError for a field that is none of its choices: for configs that are made without `build` too."""
    for name, hint in typing.get_type_hints(type(config)).items():
        if typing.get_origin(hint) is Literal and hasattr(config, name):
            try:
                coerce(getattr(config, name), hint, name)
            except UserError as error:
                raise ValueError(str(error)) from None


def at_least(config: Any, least: int, *names: str) -> None:
    """Raises ValueError if one of the fields is less than `least`."""
    for name in names:
        if getattr(config, name) < least:
            raise ValueError(f"{name} must be {least} or more, found {getattr(config, name)}")


def _name(hint: Any) -> str:
    return {int: "a whole number", float: "a number", str: "text", bool: "true or false"}.get(
        hint, getattr(hint, "__name__", str(hint))
    )


def _show(value: Any) -> str:
    return f"{value!r} ({type(value).__name__})" if value is not None else "nothing"


# --- command lines -----------------------------------------------------------------------------------------------------


def parse_overrides(tokens: Sequence[str]) -> dict[str, Any]:
    """``--key value``, ``--key=value`` and ``key=value`` tokens as nested keys; values are read as YAML, dots nest."""
    pairs: list[tuple[str, str]] = []
    rest = list(tokens)
    while rest:
        token = rest.pop(0)
        name = token.removeprefix("--")
        if "=" in name:
            key, value = name.split("=", 1)
        elif token.startswith("--") and rest and not rest[0].startswith("--"):
            key, value = name, rest.pop(0)
        elif token.startswith("--"):
            key, value = name, "true"
        else:
            raise UserError(f"expected --key value or key=value, found {token!r}")
        pairs.append((key.replace("-", "_"), value))
    values: dict[str, Any] = {}
    for key, text in pairs:
        try:
            value = yaml.load(text, Loader=_Loader)
        except yaml.YAMLError:
            value = text
        set_nested(values, key, value)
    return values


def set_nested(values: dict[str, Any], dotted: str, value: Any) -> None:
    """Sets values["a"]["b"] for the key "a.b", making what is missing on the way."""
    *path, last = dotted.split(".")
    for part in path:
        inner = values.setdefault(part, {})
        if not isinstance(inner, dict):
            raise UserError(f"cannot set {dotted}: {part} is {_show(inner)}, not keys and values")
        values = inner
    values[last] = value


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with the values of `over`; mappings are merged, everything else is replaced."""
    made = dict(base)
    for key, value in over.items():
        old = made.get(key)
        made[key] = merge(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return made


def from_command_line(cls: type[C], argv: Sequence[str], prog: str) -> C:
    """The config `cls` from ``--config FILE`` and ``--key value`` overrides; ``--help`` lists every field of our own."""
    parser = argparse.ArgumentParser(prog=prog, add_help=False, allow_abbrev=False)
    parser.add_argument("--config")
    parser.add_argument("-h", "--help", action="store_true")
    known, rest = parser.parse_known_args(list(argv))
    if known.help:
        print(describe(cls, prog))
        raise SystemExit(0)
    values = read_yaml(known.config) if known.config else {}
    return build(cls, merge(values, parse_overrides(rest)), known.config or prog)


def describe(cls: type, prog: str) -> str:
    """Help text: the class's first line, then one line a field with its default and sentence.

    Fields inherited from transformers' TrainingArguments are named in one line: they have their own documentation.
    """
    own = [f for f in dataclasses.fields(cls) if "help" in f.metadata and f.metadata.get("ours", True)]
    names_of_classes = [c.__name__ for c in cls.__mro__]
    inherited = "TrainingArguments" in names_of_classes
    if inherited:
        # Not by the module's name: of a class in a program started with `python -m` that is __main__.
        ours = cls.__mro__[: names_of_classes.index("TrainingArguments")]
        names = {n for c in ours for n in vars(c).get("__annotations__", {})}
        own = [f for f in own if f.name in names]
    lines = [f"usage: {prog} --config FILE [--key value ...]", "", (cls.__doc__ or "").strip().splitlines()[0], ""]
    for field in own:
        if field.default is not dataclasses.MISSING:
            default = repr(field.default)
        elif field.default_factory is not dataclasses.MISSING:
            default = repr(field.default_factory())
        else:
            default = "required"
        lines.append(f"  {field.name} ({default}): {field.metadata['help']}")
    if inherited:
        lines.append(
            "  ... and every field of transformers.TrainingArguments (learning_rate, num_train_epochs, report_to ...)"
        )
    return "\n".join(lines)


def option(default: Any, help: str) -> Any:
    """A dataclass field with a default and one sentence of help; lists and mappings are copied for each config."""
    if isinstance(default, (list, dict)):
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata={"help": help})
    return dataclasses.field(default=default, metadata={"help": help})
