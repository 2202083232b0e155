"""Where rows lie: append-only parts while they are made, one parquet file when finished.

Work is cut into numbered units whose content depends on nothing but the unit. A process appends a unit's rows and then one
commit line in a single write; a unit without its commit line (a kill, a torn last line, a full disk) is made again. So a
finished folder is the same, byte for byte, however often the work was interrupted and over however many processes it ran.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

from ..basics import UserError, canonical_json, make_folder, read_json, read_jsonl, told_as_user_error, write_json
from ..models.ledger import Ledger
from .rows import R, from_record, to_record

ROWS_FILE = "rows.parquet"
ABOUT_FILE = "rows.json"  # row type, counts, what was dropped and what it cost

U = TypeVar("U")


@dataclass
class UnitResult(Generic[R]):
    """What one unit of work gave: rows, what was dropped and why, what it cost, and what else was counted on the way."""

    rows: list[R]
    dropped: Counter[str] = field(default_factory=Counter)
    ledger: Ledger = field(default_factory=Ledger)
    counts: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class Shard:
    """This process's share of the units: those whose number is `index` modulo `count`."""

    index: int = 0
    count: int = 1

    @classmethod
    def parse(cls, text: str) -> Shard:
        """The shard in "i/n" with 0 <= i < n; an empty text takes RANK and WORLD_SIZE, as `accelerate launch` sets them."""
        if not text:
            return cls(int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")))
        try:
            index, count = (int(part) for part in text.split("/"))
            if not 0 <= index < count:
                raise ValueError
        except ValueError:
            raise UserError(f"shard must be i/n with 0 <= i < n, for example 0/4, found {text!r}") from None
        return cls(index, count)


def make_rows(
    folder: str | Path,
    row_type: type[R],
    units: Sequence[U],
    work: Callable[[U], UnitResult[R]],
    *,
    shard: Shard = Shard(),
    progress: str = "",
) -> bool:
    """Makes the rows of every unit that is not committed yet; True when all units, of all shards, are done.

    The process that finds all units committed joins them, in the order of the units, into rows.parquet.
    """
    folder = make_folder(folder)
    if _finished(folder):
        return True
    mine = [i for i in range(len(units)) if i % shard.count == shard.index]
    done = committed_units(folder)
    # Another process may have joined the rows and removed the parts between the first look and the second.
    if _finished(folder):
        return True
    todo = [i for i in mine if i not in done]
    part = folder / f"part-{shard.index:05d}-of-{shard.count:05d}.jsonl"
    from tqdm import tqdm

    if todo:
        _append(part, b"")  # a folder that cannot be written is told before any work is done
    # The bar ends its line before an error is told.
    with tqdm(
        total=len(mine),
        initial=len(mine) - len(todo),
        desc=progress,
        unit="unit",
        disable=not progress,
        mininterval=0.5,
    ) as bar:
        for index in todo:
            result = work(units[index])
            lines = [canonical_json({"unit": index, "row": to_record(row)}) for row in result.rows]
            commit = {
                "unit": index,
                "rows": len(lines),
                "dropped": dict(result.dropped),
                "ledger": result.ledger.to_json(),
                "counts": dict(result.counts),
            }
            _append(part, "".join(line + "\n" for line in [*lines, canonical_json(commit)]).encode())
            bar.update()
    return _finish(folder, row_type, len(units))


def _finished(folder: Path) -> bool:
    return (folder / ROWS_FILE).is_file() and (folder / ABOUT_FILE).is_file()


def _append(part: Path, data: bytes) -> None:
    """Appends in a single write, on a line of its own if a torn line ends the file."""
    with told_as_user_error(f"write to {part}"), part.open("a+b") as file:
        if file.seek(0, os.SEEK_END):
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                data = b"\n" + data
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _part_lines(folder: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    for part in sorted(folder.glob("part-*.jsonl")):
        try:
            file = part.open("rb")
        except FileNotFoundError:
            continue  # another process has joined the rows and removes the parts
        with file:
            for line in file:
                try:
                    record = json.loads(line)
                except ValueError:
                    continue  # a torn line: its unit has no commit line behind it and is made again
                if isinstance(record, dict) and "unit" in record:
                    yield part, record


def committed_units(folder: Path) -> dict[int, dict[str, Any]]:
    """The commit record of every finished unit in the parts of `folder`."""
    return {record["unit"]: record for _, record in _part_lines(folder) if "rows" in record}


def _finish(folder: Path, row_type: type[R], units: int) -> bool:
    """Joins the parts into rows.parquet in the order of the units, if all are there; True if the rows are finished.

    Of a unit made twice the first whole copy counts.
    """
    if not committed_units(folder).keys() >= set(range(units)):
        return _finished(folder)
    rows_of: dict[int, list[dict[str, Any]]] = {}
    commits: dict[int, dict[str, Any]] = {}
    pending: dict[tuple[Path, int], list[dict[str, Any]]] = {}
    for part, record in _part_lines(folder):
        unit, key = record["unit"], (part, record["unit"])
        if "row" in record:
            pending.setdefault(key, []).append(record["row"])
        else:
            # Rows of a torn earlier try may stand before these; the commit line says how many belong to it.
            rows = pending.pop(key, [])
            rows_of.setdefault(unit, rows[len(rows) - record["rows"] :])
            commits.setdefault(unit, record)
    if not commits.keys() >= set(range(units)):
        return _finished(folder)
    dropped: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    ledger = Ledger()
    for unit in range(units):
        dropped.update(commits[unit]["dropped"])
        counts.update(commits[unit].get("counts", {}))
        ledger = ledger + Ledger(**commits[unit]["ledger"])
    finished = [from_record(row_type, r, f"{folder}, unit {u}") for u in range(units) for r in rows_of[u]]
    write_rows(folder, finished, dropped=dropped, ledger=ledger, counts=counts)
    for part in folder.glob("part-*.jsonl"):
        part.unlink(missing_ok=True)
    return True


def write_rows(
    folder: str | Path,
    rows: Sequence[R],
    *,
    dropped: Mapping[str, int] | None = None,
    ledger: Ledger | None = None,
    counts: Mapping[str, int] | None = None,
) -> None:
    """Writes rows.parquet and, last, rows.json, each whole or not at all. Raises UserError if there is no row."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder = make_folder(folder)
    if not rows:
        why = ", ".join(f"{n} dropped: {reason}" for reason, n in (dropped or {}).items()) or "nothing came in"
        raise UserError(f"{folder}: no row is left ({why})")
    table = pa.Table.from_pylist([to_record(row) for row in rows], schema=arrow_schema(type(rows[0])))
    temporary = folder / f".{ROWS_FILE}.{os.getpid()}"
    with told_as_user_error(f"write {folder / ROWS_FILE}"):
        pq.write_table(table, temporary, compression="zstd")
        os.replace(temporary, folder / ROWS_FILE)
    about = {
        "row_type": type(rows[0]).__name__,
        "rows": len(rows),
        "dropped": dict(sorted((dropped or {}).items())),
        "ledger": (ledger or Ledger()).to_json(),
        **({"counts": dict(sorted(counts.items()))} if counts else {}),
    }
    write_json(folder / ABOUT_FILE, about)


def read_about(folder: str | Path) -> dict[str, Any]:
    """Row type, counts, what was dropped and the ledger of a finished folder of rows."""
    return read_json(Path(folder) / ABOUT_FILE)


def read_rows(path: str | Path, row_type: type[R]) -> list[R]:
    """Rows from a finished folder, a parquet file or a JSON Lines file. Raises UserError naming the file and the line."""
    path = Path(path)
    if path.is_dir():
        if not (path / ROWS_FILE).is_file():
            raise UserError(
                f"{path}: no finished rows here ({ROWS_FILE} is missing); run the stage that makes them first"
            )
        path = path / ROWS_FILE
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    if path.suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            records = pq.read_table(path).to_pylist()
        except (pa.ArrowInvalid, OSError) as error:
            raise UserError(f"{path}: not a readable parquet file ({str(error).splitlines()[0]})") from None
        rows = [from_record(row_type, r, f"{path}, row {i}") for i, r in enumerate(records)]
    else:
        rows = [from_record(row_type, r, f"{path}, line {number}") for number, r in read_jsonl(path)]
    if not rows:
        raise UserError(f"{path}: the data set is empty")
    return rows


def arrow_schema(row_type: type) -> Any:
    """The parquet schema of a row type, derived from its fields, so that empty lists and nulls keep their types."""
    import dataclasses
    import typing

    import pyarrow as pa

    def arrow(hint: Any) -> Any:
        origin, args = typing.get_origin(hint), typing.get_args(hint)
        if dataclasses.is_dataclass(hint):
            return pa.struct([pa.field(n, arrow(h)) for n, h in typing.get_type_hints(hint).items()])
        if origin is tuple:
            return pa.list_(arrow(args[0]))
        if origin is typing.Literal:
            return pa.string()
        if args:  # X | None
            return arrow(next(a for a in args if a is not type(None)))
        return {str: pa.string(), int: pa.int64(), float: pa.float64(), bool: pa.bool_()}[hint]

    return pa.schema([pa.field(n, arrow(h)) for n, h in typing.get_type_hints(row_type).items()])
