"""The stage that joins results into one table and one page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..basics import UserError, read_json, read_jsonl, write_json
from ..data_gen.rows import Dialogue
from ..data_gen.searched import SEARCH_FILE, read_searches
from ..data_gen.store import read_about, read_rows
from . import options_eval
from .evaluate import DETAILS, RESULTS


def make_report(config: options_eval.Report, out: Path) -> None:
    """One results.json and report.html beside the run's folders, and the table on the terminal."""
    from .report import write_run_report
    from .tables import format_table

    if not config.results:
        raise UserError("results is missing: folders of evaluation stages")
    records = [r for folder in config.results for r in read_json(Path(folder) / RESULTS)]
    details: dict[str, Any] = {}
    for folder in config.results:
        for name, found in read_json(Path(folder) / DETAILS).items():
            # Two evaluations of reward models may each bring arms of their own.
            details[name] = {**details[name], **found} if name in details and name == "values" else found
    curves = {name: _curve(Path(folder) / "metrics.jsonl") for name, folder in config.curves.items()}
    run = out.parent
    write_json(run / RESULTS, records)
    manifest = read_json(run / "manifest.json") if (run / "manifest.json").is_file() else {}
    costs = {}
    for path in sorted(run.glob("*/rows.json")):
        costs[path.parent.name] = read_json(path)["ledger"]
    trees = config.trees
    if trees is None:
        found = [path.parent for path in sorted(run.glob(f"*/{SEARCH_FILE}"))]
        trees = {folder.name: str(folder) for folder in found if ".old-" not in folder.name}
    dialogues = config.dialogues
    if dialogues is None:
        found = [path.parent for path in sorted(run.glob("*/rows.json")) if ".old-" not in path.parent.name]
        dialogues = {folder.name: str(folder) for folder in found if read_about(folder)["row_type"] == "Dialogue"}
    write_run_report(
        run / "report.html",
        config.title,
        config.command or manifest.get("command", ""),
        manifest,
        records,
        curves,
        costs,
        details,
        {name: read_searches(folder) for name, folder in trees.items()},
        {name: read_rows(folder, Dialogue) for name, folder in dialogues.items()},
    )
    print(format_table(records))
    print(f"\nresults: {run / RESULTS}\nreport:  {run / 'report.html'}")


def _curve(path: Path) -> list[dict[str, Any]]:
    return [line for _, line in read_jsonl(path)] if path.is_file() else []
