"""The dialogues of a report: what trains, what is masked, what a row says of itself, and how many are shown."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from stepladder.basics import UserError, write_json
from stepladder.data_gen.rows import Dialogue, Message, Source
from stepladder.data_gen.store import write_rows
from stepladder.launch.make_report import make_report
from stepladder.launch.options_eval import Report
from stepladder.launch.report import write_report
from stepladder.launch.report_dialogues import LONGEST, SHOWN, dialogues_section, evenly

EVIL = "</pre><script>document.title='hacked'</script><img src=x onerror=\"document.title='hacked'\">"


def row(number: int = 0, text: str = "1 + 1 = 3\nWait\n1 + 1 = 2", kind: str = "selfcorrect", **rest: Any) -> Dialogue:
    spans = rest.pop("spans", ((0, 10),))
    weight = rest.pop("weight", 1.0)
    messages = (Message("user", "1 + 1?"), Message("assistant", text, True, rest.pop("turn_weight", 1.0), spans))
    return Dialogue(f"p/{number}", kind, messages, json.dumps(rest), Source("policy", "engine", "task", 0), weight)


def test_what_trains_is_marked_and_what_is_masked_is_struck_through():
    section = dialogues_section({"rows": [row()]})
    assert "<s>1 + 1 = 3\n</s><mark>Wait\n1 + 1 = 2</mark>" in section
    assert '<span class="role">user</span><pre>1 + 1?</pre>' in section
    assert '<span class="role">assistant, trains</span>' in section
    # Spans that touch, lie apart or reach too far: nothing is lost or said twice.
    for spans in ((), ((2, 4), (4, 5)), ((0, 3), (7, 99)), ((-4, 2),), ((3, 3),)):
        shown = re.search(r"trains</span><pre>(.*?)</pre>", dialogues_section({"r": [row(spans=spans)]}), re.DOTALL)[1]
        assert html.unescape(re.sub(r"</?(?:s|mark)>", "", shown)) == row().messages[1].content
        masked = "".join(re.findall(r"<s>(.*?)</s>", shown, re.DOTALL))
        assert len(masked) == len({i for a, b in spans for i in range(max(a, 0), min(b, 24))})
    weighted = dialogues_section({"rows": [row(turn_weight=0.5)]})
    assert "assistant, trains with weight 0.5" in weighted


def test_what_a_row_says_of_itself():
    critique = row(
        kind="critique", correct=[False], wrong=True, first_error=0, source="RG3", error="slip", mark="exact",
        mc_success=0.25, mc_rollouts=8,
    )  # fmt: skip
    text = lambda one: html.unescape(re.sub(r"<[^>]+>", "", dialogues_section({"rows": [one]})))
    assert (
        "critique, p/0 · ✗ wrong · the critic calls it wrong · first error in step 1 · draft: RG3 · error: slip · "
        "critique: exact · 25% of 8 refinements right" in text(critique)
    )
    assert "cannot be read" in text(row(kind="critique", wrong=None))
    assert "refine, p/0 · ✗ wrong → ✓ right" in text(row(kind="refine", correct=[False, True]))
    assert "reward -1 · turn 2 · weight 0.0821" in text(row(reward=-1.0, turn=2, weight=0.0821))


def test_some_rows_stand_for_all_and_long_ones_are_counted():
    assert evenly(range(5), 12) == [0, 1, 2, 3, 4]
    assert evenly(range(100), 4) == [0, 25, 50, 75]
    section = dialogues_section({"a": [row(i) for i in range(300)], "b": [row(0), row(1, "x" * LONGEST)], "c": []})
    assert section.count("<summary>selfcorrect, p/") == SHOWN + 1
    assert f"<b>a</b>: {SHOWN} of 300 rows (selfcorrect)" in section
    assert "<b>b</b>: 1 of 2 rows (selfcorrect); 1 more are too long to be shown" in section
    assert "<b>c</b>" not in section
    assert dialogues_section({"c": []}) == dialogues_section({}) == ""


def test_the_report_of_a_run_shows_its_dialogues(tmp_path: Path, capsys: Any) -> None:
    run = tmp_path / "run"
    for name in ("answers", "report"):
        (run / name).mkdir(parents=True)
    write_json(run / "answers" / "results.json", [])
    write_json(run / "answers" / "details.json", {})

    def made(**options: Any) -> list[str]:
        make_report(Report(results=[str(run / "answers")], **options), run / "report")
        return re.findall(r"<summary><b>(.*?)</b>", (run / "report.html").read_text())

    assert made() == []
    write_rows(run / "learnt", [row(0), row(1)])
    (run / "learnt").rename(run / "learnt.old-1")
    write_rows(run / "critiques", [row(0, kind="critique")])
    assert made() == ["critiques"]
    assert made(dialogues={"mine": str(run / "learnt.old-1")}) == ["mine"]
    assert made(dialogues={}) == []
    with pytest.raises(UserError):
        made(dialogues={"x": str(run / "answers")})


@pytest.mark.skipif(not shutil.which("chromium"), reason="no chromium here")
def test_a_browser_shows_them_and_runs_nothing_of_theirs(tmp_path: Path) -> None:
    evil = row(7, EVIL, correct=[False, True], kind="refine", source=EVIL, spans=((3, 30),))
    write_report(tmp_path / "page.html", "Rows", [("Dialogues", dialogues_section({EVIL: [evil]}))])
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    command = ["chromium", *flags.split(), f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom"]
    dom = subprocess.run(
        [*command, f"file://{tmp_path / 'page.html'}"], capture_output=True, text=True, timeout=90, check=True
    ).stdout
    assert "<title>Rows</title>" in dom
    assert "<img" not in dom
    assert dom.count("<script>document.title") == 0
    assert "&lt;/pre&gt;" in re.sub(r"</?(?:s|mark)>", "", dom)
