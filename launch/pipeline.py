"""Recipes: stages from YAML, each run once and skipped while its output is there and its inputs are unchanged.

A recipe reads

    seed: 0                       # goes to every stage that has the field and does not set it
    defaults: {task: {...}}       # likewise, for any field
    stages:
      solutions: {do: data.solutions, policy: "@policy", samples: 8}

where ``@policy`` is the folder of the stage `policy`, which must come before. Stages can be repeated: see `launch.rounds`.
"""

from __future__ import annotations

import dataclasses
import os
import platform
import sys
import time
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from .. import __version__
from ..basics import (
    UserError,
    canonical_json,
    fingerprint,
    fingerprint_path,
    make_folder,
    read_json,
    told_as_user_error,
    write_json,
)
from ..config import build, merge, read_yaml, unknown_key
from ..data_gen.store import ROWS_FILE
from .rounds import block_of, expand, is_block
from .stages import STAGES, config_class

DONE, STARTED = "done.json", "started.json"
# Where a stage runs does not change what it makes: these fields do not count as inputs.
NOT_INPUTS = {"shard", "output_dir", "device"}


def run_recipe(recipe: Mapping[str, Any], out: Path, where: str) -> None:
    """Runs the stages of a recipe that are not done, in order, in folders of `out`."""
    for key in recipe:
        if key not in ("name", "seed", "defaults", "stages", "about"):
            raise unknown_key(str(key), ["name", "seed", "defaults", "stages", "about"], where)
    planned = plan(recipe, out, where)
    make_folder(out)
    _write_manifest(recipe, out, where)
    fingerprints: dict[str, str] = {}
    for number, (name, (kind, config)) in enumerate(planned.items(), 1):
        folder = out / name
        inputs = _inputs(config, out, fingerprints)
        mark = fingerprint({"do": kind, "config": _counted(config, out), "inputs": inputs})
        fingerprints[name] = mark
        head = f"[{number}/{len(planned)}] {name}"
        if _is(folder / DONE, mark):
            print(f"{head}: already there, inputs unchanged", flush=True)
            continue
        if _holds_work(folder) and not _is(folder / STARTED, mark):
            print(
                f"{head}: its inputs or settings changed; what was there is kept in {_set_aside(folder).name}",
                flush=True,
            )
        make_folder(folder)
        write_json(folder / STARTED, {"fingerprint": mark})
        print(f"{head} ({kind})", flush=True)
        began = time.perf_counter()
        complete = STAGES[kind][1](_for_run(kind, config, folder, f"{where}, stage {name}"), folder)
        if complete is False:
            raise UserError(f"{folder}: other shards are not finished yet; run this again when they are")
        seconds = time.perf_counter() - began
        write_json(folder / DONE, {"fingerprint": mark, "do": kind, "inputs": inputs, "seconds": round(seconds, 3)})
        print(f"{head}: done in {seconds:.0f} s", flush=True)


def claim(folder: Path, kind: str, config: Any) -> None:
    """Marks a folder as that of one stage with these settings and inputs; raises UserError if it is that of others.

    Rows of other settings would else be taken for finished ones, or mixed with them.
    """
    values = dataclasses.asdict(config)
    mark = fingerprint({"do": kind, "config": _counted(values, folder), "inputs": _inputs(values, folder, {})})
    made = [folder / ROWS_FILE, *folder.glob("part-*.jsonl")]
    if (
        (folder / STARTED).is_file()
        and not _is(folder / STARTED, mark)
        and any(p.is_file() and p.stat().st_size for p in made)
    ):
        raise UserError(f"{folder}: holds rows of other settings or inputs; give another --out, or remove the folder")
    make_folder(folder)
    write_json(folder / STARTED, {"fingerprint": mark})


def plan(recipe: Mapping[str, Any], out: Path, where: str) -> dict[str, tuple[str, dict[str, Any]]]:
    """Stage name -> (kind, config values), every value checked before anything runs."""
    stages = recipe.get("stages")
    if not isinstance(stages, Mapping) or not stages:
        raise UserError(f"{where}: stages is missing: a recipe names its stages there")
    defaults = recipe.get("defaults") or {}
    if not isinstance(defaults, Mapping):
        raise UserError(f"{where}: defaults must be keys and values, found {defaults!r}")
    shared = {**defaults, **({"seed": recipe["seed"]} if "seed" in recipe else {})}
    planned: dict[str, tuple[str, dict[str, Any]]] = {}
    used: set[str] = set()
    seed = recipe.get("seed", 0)
    for name, values, round_seed in expand(stages, where, seed if isinstance(seed, int) else 0):
        here = f"{where}, stage {name}"
        if not isinstance(values, Mapping) or "do" not in values:
            raise UserError(f"{here}: do is missing: which of {', '.join(STAGES)} it runs")
        kind = values["do"]
        if kind not in STAGES:
            raise unknown_key(str(kind), list(STAGES), f"{here}: do", "kind")
        known = {f.name for f in dataclasses.fields(config_class(kind))}
        used |= set(shared) & known
        # Equal seeds would give the rounds of a policy that changed little nearly equal samples.
        given = shared if round_seed is None else {**shared, "seed": round_seed}
        config = merge({k: v for k, v in given.items() if k in known}, {k: v for k, v in values.items() if k != "do"})
        config = _resolve(config, out, list(planned), here)
        _for_run(kind, config, out / name, here)
        planned[name] = (kind, config)
    for key in shared:
        if key not in used:
            raise UserError(f"{where}: {key} is set for all stages, but no stage has a field of that name")
    return planned


def _for_run(kind: str, config: Mapping[str, Any], folder: Path, where: str) -> Any:
    values = dict(config)
    if any(f.name == "output_dir" for f in dataclasses.fields(config_class(kind))):
        values.setdefault("output_dir", str(folder))
    return build(config_class(kind), values, where)


def _resolve(value: Any, out: Path, before: list[str], where: str) -> Any:
    """The value with every ``@stage`` or ``@stage/file`` replaced by the path it stands for."""
    if isinstance(value, Mapping):
        return {k: _resolve(v, out, before, where) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_resolve(v, out, before, where) for v in value]
    if isinstance(value, str) and value.startswith("@"):
        name, _, rest = value[1:].partition("/")
        if name not in before:
            raise unknown_key(f"@{name}", [f"@{b}" for b in before], where, "reference")
        return str(out / name / rest if rest else out / name)
    return value


def _texts(value: Any) -> list[str]:
    if isinstance(value, Mapping):
        return [t for v in value.values() for t in _texts(v)]
    if isinstance(value, (list, tuple)):
        return [t for v in value for t in _texts(v)]
    return [value] if isinstance(value, str) else []


def _inputs(config: Mapping[str, Any], out: Path, fingerprints: Mapping[str, str]) -> dict[str, str]:
    """What the stage reads: for stages of this run their fingerprint, for other paths that of the content."""
    found = {}
    for text in _texts({k: v for k, v in config.items() if k not in NOT_INPUTS}):
        path = Path(text)
        inside = path.relative_to(out) if text and out in path.parents else None
        # With the current folder as the run every relative text looks as if it were inside.
        if inside is not None and inside.parts[0] in fingerprints:
            found["@" + inside.as_posix()] = fingerprints[inside.parts[0]]
        elif ("/" in text or "." in text) and _exists(path):
            found[text] = fingerprint_path(path, leave_out=out)  # a run may lie in the folder of its data
    return found


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a prompt template is longer than any path may be
        return False


def _counted(config: Mapping[str, Any], out: Path) -> Any:
    """The settings that decide what is made; a run folder that was moved is still the same run."""
    text = canonical_json({k: v for k, v in config.items() if k not in NOT_INPUTS})
    return text.replace(f'"{out}/', '"@').replace(f'"{out}"', '"@"')


def _is(path: Path, mark: str) -> bool:
    return path.is_file() and read_json(path).get("fingerprint") == mark


def _holds_work(folder: Path) -> bool:
    # A kill right after a folder was made leaves it empty, or with the unfinished copy of its first file.
    return folder.exists() and any(not path.name.startswith(f".{STARTED}.") for path in folder.glob("*"))


def _set_aside(folder: Path) -> Path:
    number = 1
    while (target := folder.with_name(f"{folder.name}.old-{number}")).exists():
        number += 1
    with told_as_user_error(f"keep {folder} as {target.name}"):
        folder.rename(target)
    return target


def _write_manifest(recipe: Mapping[str, Any], out: Path, where: str) -> None:
    versions = {}
    for package in ("torch", "transformers", "trl", "accelerate", "datasets", "peft", "numpy"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "missing"
    write_json(
        out / "manifest.json",
        {
            "stepladder": __version__,
            "recipe": where,
            "config": recipe,
            "python": platform.python_version(),
            "platform": f"{platform.system()} {platform.machine()}, {os.cpu_count()} processors",
            "versions": versions,
            "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        },
    )


def load_recipe(path: str | Path, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe in a YAML file with ``key=value`` overrides: a stage's name is enough for its fields."""
    recipe = read_yaml(path)
    stages = recipe.get("stages") or {}
    lifted: dict[str, Any] = {}
    for key, value in overrides.items():
        if key in stages:
            lifted = merge(lifted, {"stages": {key: value}})
        elif (block := block_of(stages, key)) is not None:
            lifted = merge(lifted, {"stages": {block: {"stages": {key: value}}}})
        elif key in ("seed", "name", "defaults", "stages"):
            lifted = merge(lifted, {key: value})
        else:
            inside = [inner for values in stages.values() if is_block(values) for inner in values.get("stages") or {}]
            known = [*stages, *inside, "seed", "name", "defaults"]
            raise unknown_key(key, known, f"{path}: override")
    return merge(recipe, lifted)
