"""Records from JSON, JSON Lines and parquet files or from the hub, and what a field expression finds in one of them."""

from __future__ import annotations

import difflib
import gzip
import json
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..basics import UserError, read_jsonl

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(?::[\w.-]*){0,1}(?::[\w.+%\[\]:-]*)?")
_FILE = re.compile(r".*\.(?:jsonl|json|ndjson|parquet|gz|csv|tsv|txt|yaml|zst)", re.IGNORECASE)
_PART = re.compile(r"\{([^{}]{1,100})\}")


class Unusable(UserError):
    """A record that cannot become a problem, for want of a usable answer rather than of a field."""


def read_records(source: str, key: str = "") -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yields (where it stands, record) of a file or of a hub data set, in order.

    Files: `.jsonl`, `.json` (a list; or records under `key` of an object) and these with `.gz`, and `.parquet`. Anything else
    of the form "owner/name", "owner/name:config" or "owner/name:config:split" is a data set on the hub (split "train" if none
    is given; "train+test" joins two). Raises UserError if it is missing, broken, empty or not made of records.
    """
    path = Path(source).expanduser()
    number = 0
    for number, (place, record) in enumerate(_read(path, source, key), 1):  # noqa: B007
        yield f"{source}, {place}", record
    if not number:
        raise UserError(f"{source}: the data set is empty")


def _read(path: Path, source: str, key: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    if path.is_dir():
        raise UserError(f"{source}: is a folder, expected a file (.jsonl, .json, .parquet, .gz) or a hub id")
    if path.is_file():
        try:
            if path.suffix == ".parquet":
                yield from _read_parquet(path)
            elif path.name.removesuffix(".gz").endswith(".json"):
                yield from _read_json(path, source, key)
            else:
                yield from ((f"line {line}", record) for line, record in read_jsonl(path))
        except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
            raise UserError(f"{source}: cannot be read ({error})") from None
    elif _FILE.fullmatch(source) or not _HUB_ID.fullmatch(source):
        raise UserError(f"{source}: no such file")
    else:
        yield from _read_hub(source)


def _read_parquet(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
        number = 0
        for batch in file.iter_batches():
            for record in batch.to_pylist():
                number += 1
                yield f"record {number}", record
    except pyarrow.ArrowException as error:
        raise UserError(f"{path}: not valid parquet ({str(error).splitlines()[0][:200]})") from None


def _read_json(path: Path, source: str, key: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    opened = gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8")
    with opened as file:
        try:
            value = json.load(file)
        except json.JSONDecodeError as error:
            hint = "; one record a line is JSON Lines, name it .jsonl" if error.msg == "Extra data" else ""
            raise UserError(
                f"{source}, line {error.lineno}: not valid JSON ({error.msg} at column {error.colno}){hint}"
            ) from None
    if isinstance(value, dict):
        lists = [name for name, inner in value.items() if isinstance(inner, list)]
        if not key:
            named = f"; set records_key, for example to {lists[0]}" if lists else ""
            raise UserError(f"{source}: expected a list of records, found an object{named}")
        if key not in value:
            raise UserError(f"{source}: {_missing(key, value)}")
        value = value[key]
    if not isinstance(value, list):
        raise UserError(f"{source}: expected a list of records, found {type(value).__name__}")
    for number, record in enumerate(value, 1):
        if not isinstance(record, dict):
            raise UserError(f"{source}, record {number}: expected an object, found {type(record).__name__}")
        yield f"record {number}", record


def _read_hub(source: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    name, config, split = (*source.split(":", 2), "", "")[:3]
    try:
        from datasets import load_dataset

        data = load_dataset(name, config or None, split=split or "train")
    except Exception as error:
        # The hub's client raises many unrelated classes for "cannot be reached", "no such data set" and "needs a login".
        line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"{source}: no such file, and the hub gave no such data set ({line[:200]})") from None
    for number, record in enumerate(data, 1):
        yield f"record {number}", record


# --- fields ------------------------------------------------------------------------------------------------------------


def field_value(expression: str, record: Mapping[str, Any], where: str) -> Any:
    """What a field expression finds in a record; None only if the expression ends in "|", which makes the field optional.

    An expression is a field ("question"), a path ("question.stem"), a template over such ("{Body} {Question}", white space
    folded; "{Body!sentence}" adds a full stop where none ends it), or alternatives of which the first that is there counts
    ("question|problem"). Raises UserError naming the missing field, those that there are, and the nearest.
    """
    alternatives = expression.split("|")
    empty = False
    for alternative in alternatives:
        if not alternative:
            return None
        parts = _PART.findall(alternative)
        found = [_lookup(part.partition("!")[0], record) for part in parts or [alternative]]
        if all(there and value is not None for there, value in found):
            if not parts:
                return found[0][1]
            texts = iter(_inserted(part, value) for part, (_, value) in zip(parts, found, strict=True))
            return " ".join(_PART.sub(lambda _, texts=texts: next(texts), alternative).split())  # type: ignore[misc]
        empty |= all(there for there, _ in found)
    if empty:
        raise Unusable(f"{where}: field {expression!r} is empty (null)")
    names = [
        name.partition("!")[0] for alternative in alternatives for name in (_PART.findall(alternative) or [alternative])
    ]
    missing = next(name for name in names if not _lookup(name, record)[0])
    raise UserError(f"{where}: {_missing(missing, record)}")


def _inserted(part: str, value: Any) -> str:
    text = str(value).strip()
    return text + "." if part.endswith("!sentence") and text and text[-1] not in ".?!:" else text


def _lookup(name: str, record: Mapping[str, Any]) -> tuple[bool, Any]:
    if name in record:
        return True, record[name]
    value: Any = record
    for part in name.split("."):
        if not isinstance(value, Mapping) or part not in value:
            return False, None
        value = value[part]
    return True, value


def _missing(name: str, record: Mapping[str, Any]) -> str:
    inner: Mapping[str, Any] = record
    *path, last = name.split(".")
    for part in path:
        value = inner.get(part)
        if not isinstance(value, Mapping):
            last = part
            break
        inner = value
    fields = [str(key) for key in inner]
    near = difflib.get_close_matches(last, fields, n=1, cutoff=0.6) or difflib.get_close_matches(
        last.lower(), fields, n=1, cutoff=0.4
    )
    found = f"found {', '.join(fields[:30]) or 'no fields'}"
    return f"field {name!r} is missing, {found}" + (f"; did you mean {near[0]}?" if near else "")


# --- choices -----------------------------------------------------------------------------------------------------------


def read_choices(value: Any, where: str) -> tuple[dict[str, str], dict[str, str]]:
    """({letter: text of the choice}, {label in the data: letter}) for the formats that data sets use.

    A list of texts; {"label": [...], "text": [...]}; a list of {"label", "text"}; {label: text}; or one text such as
    "a ) 12 , b ) 16" or lines "A: ...". Labels that are no letters ("1" to "4") are replaced by letters in their order.
    """
    pairs: list[tuple[str, str]] = []
    if isinstance(value, str):
        pairs = _split_choices(value)
    elif isinstance(value, Mapping) and {"label", "text"} <= set(value):
        pairs = [(str(label), str(text)) for label, text in zip(value["label"], value["text"], strict=False)]
    elif isinstance(value, Mapping):
        pairs = [(str(label), str(text)) for label, text in value.items()]
    elif isinstance(value, Sequence):
        for i, item in enumerate(value):
            if isinstance(item, Mapping):
                if not {"label", "text"} <= set(item):
                    raise UserError(f"{where}: a choice must have label and text, found {', '.join(map(str, item))}")
                pairs.append((str(item["label"]), str(item["text"])))
            else:
                pairs.append((chr(ord("A") + i), str(item)))
    else:
        raise UserError(f"{where}: choices must be a list, keys and values or text, found {type(value).__name__}")
    if not 2 <= len(pairs) <= 10:
        raise Unusable(f"{where}: expected 2 to 10 choices, found {len(pairs)}")
    labels = [label.strip("() .:").upper() for label, _ in pairs]
    in_order = [chr(ord("A") + i) for i in range(len(pairs))]
    letters = labels if set(labels) == set(in_order) else in_order
    choices = {letter: text.strip() for letter, (_, text) in zip(letters, pairs, strict=True)}
    return choices, dict(zip(labels, letters, strict=True))


def _split_choices(text: str) -> list[tuple[str, str]]:
    marks: list[tuple[str, int, int]] = []
    at = 0
    for letter in "ABCDEFGHIJ":
        mark = re.compile(rf"(?:^|(?<=[\s,;\[])|(?<=[\['\"]))\(?[{letter}{letter.lower()}]\s?[):.]\s?").search(text, at)
        if mark is None:
            break
        marks.append((letter, mark.start(), mark.end()))
        at = mark.end()
    ends = [start for _, start, _ in marks[1:]] + [len(text)]
    return [
        (letter, text[begin:end].strip(" ,;\n\t'\"[]")) for (letter, _, begin), end in zip(marks, ends, strict=True)
    ]
