"""Seeds, files that are never half written, JSON with errors that name the line, fingerprints."""

from __future__ import annotations

import gzip
import hashlib
import json
import os

import pytest

from stepladder import basics
from stepladder.basics import (
    UserError,
    canonical_json,
    fingerprint,
    fingerprint_path,
    fold_seed,
    make_folder,
    read_json,
    read_jsonl,
    write_atomic,
    write_json,
)


def test_fold_seed_is_the_same_on_every_machine():
    # The first 8 bytes of SHA-256 of the text of the tuple, without their last bit.
    assert fold_seed(0) == int(hashlib.sha256(b"(0,)").hexdigest()[:16], 16) // 2
    assert fold_seed(0) == 5254295370254170289
    assert fold_seed(7, "chain/test/00003", "rollout", 2) == 7264758810589338867


def test_fold_seed_tells_meanings_apart():
    seeds = [
        fold_seed(0, "a", "b"),
        fold_seed(0, "ab"),
        fold_seed(0, "a", 1),
        fold_seed(0, "a", "1"),
        fold_seed(1, "ab"),
    ]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_canonical_json_ignores_the_order_of_keys():
    assert canonical_json({"b": 1, "a": [True, None, "é"]}) == '{"a":[true,null,"é"],"b":1}'
    assert fingerprint({"b": 1, "a": 2}) == fingerprint({"a": 2, "b": 1}) != fingerprint({"a": 2, "b": 2})


def test_write_atomic_leaves_the_old_file_when_the_write_fails(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    write_atomic(path, "old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(basics.os, "fsync", full)
    with pytest.raises(UserError, match="No space left on device"):
        write_atomic(path, "new")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.json"]  # nothing temporary stays behind


def test_write_atomic_leaves_the_old_file_when_it_is_interrupted(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    write_atomic(path, "old")

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(basics.os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_atomic(path, "new")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.json"]


def test_write_atomic_makes_folders_and_takes_bytes(tmp_path):
    write_atomic(tmp_path / "x" / "y" / "z.bin", b"\x00\xff")
    assert (tmp_path / "x" / "y" / "z.bin").read_bytes() == b"\x00\xff"


def test_a_folder_that_cannot_be_made_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write to the folder"):
        make_folder(tmp_path / "file" / "below")
    with pytest.raises(UserError, match="cannot write"):
        write_atomic(tmp_path / "file" / "below", "text")


def test_json_round_trip_and_errors(tmp_path):
    write_json(tmp_path / "a.json", {"é": [1, 0.5, None]})
    assert read_json(tmp_path / "a.json") == {"é": [1, 0.5, None]}
    (tmp_path / "b.json").write_text("{")
    (tmp_path / "c.json").write_bytes(b"\xff\xfe{}")
    for name, message in [("nothing.json", "no such file"), ("b.json", "not valid JSON"), ("c.json", "not valid JSON")]:
        with pytest.raises(UserError, match=message):
            read_json(tmp_path / name)
    with pytest.raises(UserError, match="cannot be read"):
        read_json(tmp_path)


def lines_with(broken: str) -> str:
    return "".join(broken + "\n" if i == 17 else json.dumps({"i": i}) + "\n" for i in range(1, 21))


@pytest.mark.parametrize(
    ("broken", "message"),
    [('{"i": 17', "line 17: not valid JSON"), ("[17]", "line 17: expected a JSON object, found list")],
)
def test_a_broken_line_is_named(tmp_path, broken, message):
    path = tmp_path / "a.jsonl"
    path.write_text(lines_with(broken))
    read = []
    with pytest.raises(UserError, match=message):
        read.extend(number for number, _ in read_jsonl(path))
    with gzip.open(tmp_path / "a.jsonl.gz", "wt") as file:
        file.write(lines_with(broken))
    with pytest.raises(UserError, match=message):
        list(read_jsonl(tmp_path / "a.jsonl.gz"))


def test_lines_that_are_no_text_are_one_sentence(tmp_path):
    good = b"".join(json.dumps({"i": i}).encode() + b"\n" for i in range(1, 17))
    (tmp_path / "a.jsonl").write_bytes(good + b'{"i": "\xff"}\n')
    with pytest.raises(UserError, match=r"a\.jsonl, line 17: not UTF-8 text"):
        list(read_jsonl(tmp_path / "a.jsonl"))
    (tmp_path / "b.jsonl.gz").write_bytes(b"this was never compressed")
    with pytest.raises(UserError, match=r"b\.jsonl\.gz"):
        list(read_jsonl(tmp_path / "b.jsonl.gz"))
    whole = gzip.compress(good)
    (tmp_path / "c.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"c\.jsonl\.gz"):
        list(read_jsonl(tmp_path / "c.jsonl.gz"))


def test_blank_lines_are_skipped_but_counted(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"i": 1}\n\n  \n{"i": 4}')
    assert list(read_jsonl(path)) == [(1, {"i": 1}), (4, {"i": 4})]
    with pytest.raises(UserError, match="no such file"):
        list(read_jsonl(tmp_path / "b.jsonl"))


def test_fingerprint_of_files_and_folders(tmp_path, monkeypatch):
    one, two = tmp_path / "one", tmp_path / "two"
    for folder in (one, two):
        write_atomic(folder / "a" / "x.txt", "hello")
        write_atomic(folder / "y.txt", "there")
    assert fingerprint_path(one / "y.txt") == hashlib.sha256(b"there").hexdigest()[:16]
    assert fingerprint_path(one) == fingerprint_path(two)
    write_atomic(two / "a" / "x.txt", "hellO")
    assert fingerprint_path(one) != fingerprint_path(two)
    write_atomic(two / "a" / "x.txt", "hello")
    (two / "a" / "x.txt").rename(two / "a" / "w.txt")
    assert fingerprint_path(one) != fingerprint_path(two)

    # Of a big file size and both ends count.
    monkeypatch.setattr(basics, "_WHOLE_FILE_BYTES", 10)
    big = tmp_path / "big"
    content = bytearray(3 * 2**20)
    seen = set()
    for change in (None, 0, len(content) - 1):
        changed = bytearray(content)
        if change is not None:
            changed[change] = 1
        big.write_bytes(changed)
        seen.add(fingerprint_path(big))
    big.write_bytes(content + b"\0")
    seen.add(fingerprint_path(big))
    assert len(seen) == 4
