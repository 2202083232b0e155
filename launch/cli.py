"""The command `stepladder`. Nothing heavy is imported before a command needs it."""

from __future__ import annotations

import dataclasses
import errno
import os
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .. import __version__
from ..basics import UserError

GROUPS = ("data", "train", "search", "eval")
# What each command is called, and what it does; the stages of a group are those of launch/stages.py.
COMMANDS = (
    ("quickstart [--out DIR] [--seed N] [--from-scratch]", "the whole loop on the lab, in minutes on a CPU"),
    ("run RECIPE.yaml [--out DIR] [stage.key=value ...]", "the stages of a recipe; what is done is skipped"),
    (
        "plan RECIPE.yaml --gpus 8x80GB [--nodes N] [--key value]",
        "memory of each GPU, tokens and GPU-hours of a recipe",
    ),
    *((f"{group} STAGE --config FILE [--key value ...]", group) for group in GROUPS),
    ("solve PROBLEM --policy DIR [--reward DIR] [--key value]", "searches one problem: answer, vote, tree and cost"),
    ("serve --policy DIR [--reward DIR] [--key value ...]", "an OpenAI-compatible chat endpoint over a search"),
    ("claims run NAME [--out DIR] [--results DIR]", "puts a paper's claim to the test: all its seeds, one result file"),
    ("claims table [--results DIR] [--out FILE]", "the page of all claims from their result files; claims list: names"),
    (
        "export MODEL --to FORMAT --out DIR [--key value]",
        "a reward model in the layout of another project: qwen-prm, math-shepherd, rlhflow, trl, skywork, seqcls",
    ),
    ("import-reward DIR --from FORMAT --out DIR", "another project's reward model, with its step format"),
    ("import-gguf FILE --out DIR [--dtype bfloat16]", "a plain Hugging Face checkpoint from a GGUF file"),
)
_COLUMN = 55


def help_text() -> str:
    """What `stepladder --help` prints."""
    from .stages import names_of

    lines = ["usage: stepladder COMMAND ...", ""]
    for command, does in COMMANDS:
        told = ", ".join(names_of(does)) if does in GROUPS else does
        first, *rest = textwrap.wrap(told, 120 - _COLUMN, break_on_hyphens=False)
        lines.append(f"  {command}".ljust(_COLUMN) + first)
        lines += [" " * _COLUMN + line for line in rest]
    lines += [
        "",
        "`stepladder data solutions --help` lists the fields of a stage. A mistake of yours ends with one sentence and exit "
        "status 2.",
    ]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line; user errors end with one sentence on stderr and exit status 2."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        _dispatch(arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except BrokenPipeError:
        raise SystemExit(141) from None
    except Exception as error:
        if not (full := _refused_write(error)):
            raise
        print(f"error: cannot write: {full}; free some space, and the same command continues", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("\nstopped; the same command continues", file=sys.stderr)
        raise SystemExit(130) from None


def _refused_write(error: BaseException | None) -> str:
    """The operating system's words if an error comes of a full disk or a quota, else "".

    Libraries that write weights (safetensors, torch) raise classes of their own for it.
    """
    full = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    while error is not None:
        if isinstance(error, OSError) and error.errno in full:
            return f"{error.strerror}: {error.filename}" if error.filename else str(error.strerror)
        for number in full:
            if f"os error {number}" in str(error):
                return os.strerror(number)
        if "PytorchStreamWriter failed writing" in str(error):
            return "the file system took no more bytes"
        error = error.__cause__ or error.__context__
    return ""


def _dispatch(arguments: list[str]) -> None:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(help_text())
        return
    if arguments[0] == "--version":
        print(f"stepladder {__version__}")
        return
    command, rest = arguments[0], arguments[1:]
    if command in GROUPS:
        _stage(command, rest)
    elif command == "run":
        _run(rest)
    elif command == "plan":
        _plan(rest)
    elif command == "quickstart":
        _quickstart(rest)
    elif command == "solve":
        _solve(rest)
    elif command == "serve":
        _serve(rest)
    elif command == "claims":
        _claims(rest)
    elif command == "export":
        _export(rest)
    elif command == "import-reward":
        _import_reward(rest)
    elif command == "import-gguf":
        _import_gguf(rest)
    else:
        from ..config import unknown_key

        raise unknown_key(
            command,
            [
                *GROUPS,
                "run",
                "plan",
                "quickstart",
                "solve",
                "serve",
                "claims",
                "export",
                "import-reward",
                "import-gguf",
            ],
            "stepladder",
            "command",
        )


def _stage(group: str, rest: list[str]) -> None:
    from ..config import build, describe, merge, parse_overrides, read_yaml, unknown_key
    from .pipeline import claim
    from .stages import STAGES, config_class, names_of, summary

    names = names_of(group)
    if not rest or rest[0] in ("-h", "--help"):
        print(f"usage: stepladder {group} STAGE --config FILE [--out DIR] [--key value ...]\n\nstages:")
        for name in names:
            print(f"  {name:18s} {summary(f'{group}.{name}')}")
        return
    name, rest = rest[0], rest[1:]
    if name not in names:
        raise unknown_key(name, names, f"stepladder {group}", "stage")
    kind = f"{group}.{name}"
    if "-h" in rest or "--help" in rest:
        print(describe(config_class(kind), f"stepladder {group} {name}"))
        return
    values = parse_overrides(rest)
    config_file = values.pop("config", None)
    out = values.pop("out", None)
    if config_file is not None:
        values = merge(read_yaml(str(config_file)), values)
        in_file = values.pop("out", None)
        out = out or in_file
    fields = {field.name for field in dataclasses.fields(config_class(kind))}
    if "output_dir" in fields:
        if out:
            values["output_dir"] = str(out)
        out = values.get("output_dir")
    if not out:
        raise UserError(f"stepladder {group} {name}: --out DIR is missing: the folder that is filled")
    where = str(config_file or f"stepladder {group} {name}")
    config: Any = build(config_class(kind), values, where)
    if group in ("data", "search"):
        claim(Path(str(out)), kind, config)
    STAGES[kind][1](config, Path(str(out)))


def _split_out(rest: list[str], flags: Sequence[str] = ()) -> tuple[dict[str, str], list[str]]:
    """({--out, --seed ... that are ours}, everything else)."""
    ours: dict[str, str] = {}
    others: list[str] = []
    queue = list(rest)
    while queue:
        token = queue.pop(0)
        name, _, value = token.partition("=")
        if name in ("--out", "--seed", "--dtype", "--results"):
            if not value and not queue:
                raise UserError(f"{name} needs a value")
            ours[name] = value or queue.pop(0)
        elif token in flags:
            ours[token] = "true"
        else:
            others.append(token)
    return ours, others


def _run(rest: list[str]) -> None:
    from ..config import parse_overrides
    from .pipeline import load_recipe, run_recipe

    ours, others = _split_out(rest, ("-h", "--help"))
    if "-h" in ours or "--help" in ours:
        print("usage: stepladder run RECIPE.yaml [--out DIR] [--seed N] [stage.key=value ...]")
        return
    if not others or others[0].startswith("-") or "=" in others[0]:
        raise UserError("stepladder run needs a recipe: stepladder run RECIPE.yaml [--out DIR] [stage.key=value ...]")
    overrides = parse_overrides(others[1:])
    if "--seed" in ours:
        overrides["seed"] = _whole(ours["--seed"], "--seed")
    recipe = load_recipe(others[0], overrides)
    out = Path(ours.get("--out") or Path("runs") / str(recipe.get("name") or Path(others[0]).stem))
    run_recipe(recipe, out, others[0])


def _plan(rest: list[str]) -> None:
    import json

    from ..config import parse_overrides
    from .options_plan import Plan

    if not rest or {"-h", "--help"} & set(rest):
        from ..config import describe

        usage = "stepladder plan RECIPE.yaml --gpus 8x80GB [--nodes N]"
        print(describe(Plan, "stepladder plan").replace("stepladder plan --config FILE", usage, 1))
        return
    if rest[0].startswith("-") or "=" in rest[0]:
        raise UserError("stepladder plan needs a recipe first: stepladder plan RECIPE.yaml --gpus 8x80GB [--nodes N]")
    from ..config import build
    from .pipeline import load_recipe

    # Options are the command's own; everything else is an override of the recipe, as `stepladder run` takes it.
    names = {field.name for field in dataclasses.fields(Plan)}
    values = {key.replace("-", "_"): value for key, value in parse_overrides(rest[1:]).items()}
    given = build(Plan, {key: value for key, value in values.items() if key in names}, "stepladder plan")
    recipe = load_recipe(rest[0], {key: value for key, value in values.items() if key not in names})
    from .plan import plan_json, plan_text

    print(json.dumps(plan_json(recipe, rest[0], given), indent=1) if given.json else plan_text(recipe, rest[0], given))


def _quickstart(rest: list[str]) -> None:
    from ..config import parse_overrides
    from .pipeline import load_recipe, run_recipe

    ours, others = _split_out(rest, ("--from-scratch", "-h", "--help"))
    if "-h" in ours or "--help" in ours:
        print("usage: stepladder quickstart [--out DIR] [--seed N] [--from-scratch] [stage.key=value ...]")
        return
    path = Path(__file__).parent.parent / "recipes" / "quickstart.yaml"
    overrides = parse_overrides(others)
    if "--seed" in ours:
        overrides["seed"] = _whole(ours["--seed"], "--seed")
    recipe = load_recipe(path, overrides)
    if "--from-scratch" in ours:
        lab = load_recipe(path.with_name("lab_policy.yaml"), {})
        recipe["stages"] = {**lab["stages"], **{k: v for k, v in recipe["stages"].items() if k != "policy"}}
    run_recipe(recipe, Path(ours.get("--out") or "runs/quickstart"), "recipes/quickstart.yaml")


def _solve(rest: list[str]) -> None:
    from .options_solve import Solve

    usage = 'PROBLEM, or - for standard input, comes first: stepladder solve "Start 3 ; + 5 ; * 2" --policy lab'
    if not rest or {"-h", "--help"} & set(rest):
        _describe(Solve, "stepladder solve", "PROBLEM --policy DIR")
        return
    text, *options = rest
    if text.startswith("--"):
        raise UserError(f"stepladder solve: {usage}")
    config = _config(Solve, options, "stepladder solve")
    text = sys.stdin.read() if text == "-" else text
    from .solve import solve

    print(solve(config, text))


def _serve(rest: list[str]) -> None:
    from .options_solve import Serve

    if {"-h", "--help"} & set(rest):
        _describe(Serve, "stepladder serve", "--policy DIR")
        return
    config = _config(Serve, rest, "stepladder serve")
    from .serving import serve

    serve(config)


def _describe(cls: type, prog: str, arguments: str) -> None:
    from ..config import describe

    print(describe(cls, prog).replace(f"{prog} --config FILE", f"{prog} {arguments} [--config FILE]", 1))


def _config(cls: type, rest: list[str], prog: str) -> Any:
    """The options of a command: --config FILE and --key value over it."""
    from ..config import build, merge, parse_overrides, read_yaml

    values = parse_overrides(rest)
    config_file = values.pop("config", None)
    if config_file is not None:
        values = merge(read_yaml(str(config_file)), values)
    return build(cls, values, prog if config_file is None else str(config_file))


def _claims(rest: list[str]) -> None:
    from ..config import parse_overrides, unknown_key
    from .claims import claim_files, claims_table, run_claim

    ours, others = _split_out(rest, ("-h", "--help"))
    what, *names = others or [""]
    if "-h" in ours or "--help" in ours or not what:
        print("usage: stepladder claims list | run NAME [--out DIR] [--results DIR] [stage.key=value ...] | table")
        return
    results = Path(ours.get("--results") or "docs/claims")
    if what == "list":
        print("\n".join(claim_files()))
    elif what == "table":
        print(claims_table(results, Path(ours.get("--out") or results.with_suffix(".md"))))
    elif what == "run":
        if not names:
            raise UserError("stepladder claims run needs a NAME; `stepladder claims list` shows them")
        out = Path(ours.get("--out") or Path("runs") / "claims" / Path(names[0]).stem)
        run_claim(names[0], out, results, parse_overrides(names[1:]))
    else:
        raise unknown_key(what, ["list", "run", "table"], "stepladder claims", "command")


def _whole(text: str, name: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise UserError(f"{name} must be a whole number, found {text!r}") from None


def _folder_and_options(rest: list[str], cls: type, command: str, rename: dict[str, str]) -> tuple[str, Any] | None:
    """(the folder named first, the options behind it), or None after printing the help."""
    from ..config import build, describe, parse_overrides

    prog = f"stepladder {command}"
    if not rest or {"-h", "--help"} & set(rest):
        print(describe(cls, prog).replace("--config FILE", "DIR"))
        return None
    if rest[0].startswith("-"):
        raise UserError(f"{prog} needs the model's folder first: {prog} DIR --out DIR ...")
    values = parse_overrides(rest[1:])
    options: Any = build(cls, {rename.get(key, key): value for key, value in values.items()}, prog)
    if not options.out:
        raise UserError(f"{prog}: --out DIR is missing: the folder that is written")
    return rest[0], options


def _export(rest: list[str]) -> None:
    from .options_formats import Export

    given = _folder_and_options(rest, Export, "export", {})
    if given is None:
        return
    model, options = given
    from ..models.export import Wanted, export_reward

    wanted = Wanted(tag=options.tag, good=options.good, bad=options.bad, bias=options.bias, check=options.check)
    difference = export_reward(model, options.to, options.out, wanted)
    checked = f"; its scores differ by at most {difference:.1e}" if difference is not None else ", not checked"
    print(f"{options.out}: {model} as {options.to}{checked}")


def _import_reward(rest: list[str]) -> None:
    from .options_formats import Import

    given = _folder_and_options(rest, Import, "import-reward", {"from": "format"})
    if given is None:
        return
    model, options = given
    from ..models.formats import Given
    from ..models.import_reward import import_reward

    said = {field.name: getattr(options, field.name) for field in dataclasses.fields(Given)}
    found = import_reward(model, options.format, options.out, Given(**said))
    print(f"{options.out}: {found.head} head, {found.label_kind} labels, advised aggregation {found.aggregation}")


def _import_gguf(rest: list[str]) -> None:
    ours, others = _split_out(rest)
    if len(others) != 1 or "--out" not in ours:
        raise UserError("stepladder import-gguf needs FILE and --out DIR")
    from ..models.gguf import import_gguf

    import_gguf(others[0], ours["--out"], ours.get("--dtype", "bfloat16"))


if __name__ == "__main__":
    main()
