"""What stands below every folder: the user's mistakes, seeds, files that are never half written, fingerprints."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import tempfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any


class UserError(Exception):
    """A mistake of the user's, told in one sentence. The command line prints it without a traceback and exits with 2."""


def fold_seed(seed: int, *keys: int | str) -> int:
    """Child seed in [0, 2**63) for a meaning such as (problem, depth, rollout); equal on every machine and Python."""
    return int.from_bytes(hashlib.sha256(repr((seed, *keys)).encode()).digest()[:8], "big") >> 1


def canonical_json(value: Any) -> str:
    """JSON with sorted keys and no spaces: equal values give equal text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, default=str)


def fingerprint(value: Any) -> str:
    """The first 16 hexadecimal digits of the SHA-256 of `value` as canonical JSON."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()[:16]


# Hashing every byte of a 70-gigabyte checkpoint would cost minutes at each start; a change that keeps the size and both
# ends of a file over 64 MiB goes unseen.
_WHOLE_FILE_BYTES = 64 * 2**20


def fingerprint_path(path: str | Path, leave_out: Path | None = None) -> str:
    """Fingerprint of a file's content, or of every file below a folder, without those below `leave_out`.

    Of a file over 64 MiB only size and both ends count.
    """
    path = Path(path)
    if path.is_dir():
        skipped = leave_out.resolve() if leave_out is not None else None
        inner = sorted(p for p in path.rglob("*") if p.is_file() and skipped not in p.resolve().parents)
        return fingerprint([[p.relative_to(path).as_posix(), fingerprint_path(p)] for p in inner])
    digest, size = hashlib.sha256(), path.stat().st_size
    with path.open("rb") as file:
        if size <= _WHOLE_FILE_BYTES:
            while block := file.read(2**20):
                digest.update(block)
        else:
            digest.update(str(size).encode() + file.read(2**20))
            file.seek(-(2**20), os.SEEK_END)
            digest.update(file.read())
    return digest.hexdigest()[:16]


@contextlib.contextmanager
def told_as_user_error(doing: str) -> Iterator[None]:
    """Turns an operating-system refusal (full disk, no permission, missing folder) into one `UserError` sentence."""
    try:
        yield
    except OSError as error:
        where = f" {error.filename}" if error.filename else ""
        raise UserError(f"cannot {doing}:{where} {error.strerror or error}") from error


def make_folder(path: str | Path) -> Path:
    """The folder `path`, made with its parents if it is missing."""
    path = Path(path)
    with told_as_user_error(f"write to the folder {path}"):
        path.mkdir(parents=True, exist_ok=True)
    return path


def write_atomic(path: str | Path, content: str | bytes) -> None:
    """Writes the whole file or leaves it as it was: a kill or a full disk never leaves half of it."""
    path = Path(path)
    data = content.encode() if isinstance(content, str) else content
    with told_as_user_error(f"write {path}"):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(name, 0o644)
            os.replace(name, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(name)
            raise


def write_json(path: str | Path, value: Any) -> None:
    """Writes `value` as indented JSON, whole or not at all."""
    write_atomic(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def read_json(path: str | Path) -> Any:
    """The value in a JSON file. Raises UserError for a missing file or broken JSON."""
    path = Path(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid JSON ({error})") from None


def read_jsonl(path: str | Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields (line number from 1, record) of a JSON Lines file, gzipped or not; blank lines are skipped.

    Raises UserError naming the line if one is not a JSON object.
    """
    import gzip

    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    # Lines are cut before they are decoded, so that the line with a broken character can be named.
    opened = gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb")
    number = 0
    with opened as file:
        try:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                try:
                    record = json.loads(line.decode())
                except UnicodeDecodeError as error:
                    raise UserError(f"{path}, line {number}: not UTF-8 text ({error.reason})") from None
                except json.JSONDecodeError as error:
                    raise UserError(
                        f"{path}, line {number}: not valid JSON ({error.msg} at column {error.colno})"
                    ) from None
                if not isinstance(record, dict):
                    raise UserError(f"{path}, line {number}: expected a JSON object, found {type(record).__name__}")
                yield number, record
        except (OSError, EOFError, zlib.error) as error:
            raise UserError(f"{path}: cannot be read after line {number} ({error})") from None


def finite(value: Any) -> Any:
    """The value with null for every number that JSON cannot write."""
    if isinstance(value, Mapping):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
