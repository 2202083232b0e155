"""The search trees of a report: what is packed, how much, and what a browser makes of it by mouse and by keyboard."""

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
from stepladder.launch.make_report import make_report
from stepladder.launch.options_eval import Report
from stepladder.launch.report import write_report
from stepladder.launch.report_trees import ROOM, pack, trees_section

EVIL = (
    "</script><script>document.title='hacked'</script><img src=x onerror=\"document.title='hacked'\"> {{body}} \ud835"
)


def node(parent: int, *steps: str, status: str = "kept", score: float | None = 0.5, **rest: Any) -> dict[str, Any]:
    known = {"done": False, "tokens": 4, "logprob": -1.0, "visits": 0, "value": None, "prior": None}
    return {"parent": parent, "steps": list(steps), "score": score, "status": status, **known, **rest}


def record(number: int = 0, *, right: bool = True, nodes: Any = None, **rest: Any) -> dict[str, Any]:
    """Two first steps, one pruned; below the other a finished solution, a pruned step, and a kept one with an end."""
    drawn = [
        node(-1, score=None), node(0, "1 + 1 = 2", score=0.9), node(0, "1 + 1 = 3", status="pruned", score=0.2),
        node(1, "2 * 2 = 4", "Answer: 4", status="finished", score=0.81234567, visits=3, value=0.5),
        node(1, "2 * 2 = 4", score=0.6), node(1, "2 * 2 = 4", status="pruned", score=float("nan")),
        node(4, "Answer: 5", status="finished", score=0.7),
    ]  # fmt: skip
    outcome = ("right", "wrong") if right else ("wrong", "right")
    finals = [
        {"sample": 0, "node": 3, "score": 0.81234567, "answer": "4", "outcome": outcome[0]},
        {"sample": 1, "node": 6, "score": 0.7, "answer": "5", "outcome": outcome[1]},
    ]
    return {
        "problem_id": f"chain/test/{number:05d}", "prompt": "Start 1 ; + 1 ; * 2 \n", "gold": "4" if right else "5",
        "strategy": "beam", "finals": finals, "chosen": 0, "depth": 2, "rounds": 2, "tokens": 24, "curves": {},
        "nodes": drawn if nodes is None else nodes, **rest,
    }  # fmt: skip


def data(section: str) -> Any:
    found = re.search(r'<script type="application/json" class="searches">(.*?)</script>', section, re.DOTALL)
    return json.loads(found[1], parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def test_a_packed_tree_holds_all_that_is_shown():
    tree = json.loads(pack(record()))
    steps = lambda packed: [tree["texts"][k] for k in packed[1]]
    for packed, whole in zip(tree["nodes"], record()["nodes"], strict=True):
        assert packed[0] == whole["parent"]
        assert steps(packed) == whole["steps"]
        assert ("kept", "pruned", "finished")[packed[3]] == whole["status"]
        assert packed[4] == whole["tokens"]
    assert [n[2] for n in tree["nodes"]] == [None, 0.9, 0.2, 0.8123, 0.6, None, 0.7]
    assert tree["nodes"][3][5:] == [3, 0.5]
    assert tree["finals"] == [[3, 0.8123, "4", "right"], [6, 0.7, "5", "wrong"]]
    assert len(tree["texts"]) == len(set(tree["texts"])) == 5
    # Zeros that no reward model gave are no scores.
    bare = record()
    for one in (*bare["nodes"], *bare["finals"]):
        one["score"] = 0.0
    assert {n[2] for n in json.loads(pack(bare))["nodes"]} == {None}


def test_searches_take_turns_until_the_room_is_full_and_the_rest_is_counted():
    size = len(pack(record()))
    large = record(2, nodes=[node(-1), *(node(0, f"step {i}") for i in range(500))])
    many = {
        "a": [record(i) if i != 2 else large for i in range(40)],
        "b": [record(i) for i in range(30)] + [{**record(30), "nodes": None}],
        "none": [{**record(), "nodes": None}],
    }
    section = trees_section(many, room=int(20.5 * size))
    a, b = data(section)
    assert [t["id"][-2:] for t in a["trees"]] == ["00", "01", *(f"{i:02d}" for i in range(3, 11))]
    assert [t["id"][-2:] for t in b["trees"]] == [f"{i:02d}" for i in range(10)]
    assert "a: 10 of 40 problems; b: 10 of 31 problems (30 have a tree)" in html.unescape(section)
    assert trees_section({"none": many["none"]}) == trees_section({}) == ""


def test_a_page_stays_small_whatever_was_searched(tmp_path):
    nodes = [node(-1), *(node(i // 3, f"a step of some length, number {i}", status="pruned") for i in range(2000))]
    finals = [{"sample": 0, "node": 1999, "score": 0.5, "answer": "1", "outcome": "right"}]
    searches = {name: (record(i, nodes=nodes, finals=finals) for i in range(25)) for name in "abc"}
    write_report(tmp_path / "page.html", "Trees", [("Search trees", trees_section(searches))])
    assert ROOM * 0.8 < (tmp_path / "page.html").stat().st_size < 2_000_000


def test_hostile_text_stays_text(tmp_path):
    evil = record(0, prompt=EVIL, gold=EVIL, problem_id=EVIL)
    evil["nodes"][1]["steps"], evil["finals"][0]["answer"], evil["finals"][0]["outcome"] = [EVIL], EVIL, EVIL
    write_report(tmp_path / "page.html", "Trees", [("Search trees", trees_section({EVIL: [evil]}))])
    page = (tmp_path / "page.html").read_text()
    assert page.count("</script>") == 2  # the data and the page's own
    assert "<img" not in page
    assert data(page)[0]["trees"][0]["prompt"] == EVIL
    assert data(page)[0]["name"] == EVIL


def made(run: Path, **options: Any) -> str:
    for name in ("answers", "report"):
        (run / name).mkdir(parents=True, exist_ok=True)
    write_json(run / "answers" / "results.json", [])
    write_json(run / "answers" / "details.json", {})
    make_report(Report(results=[str(run / "answers")], **options), run / "report")
    return (run / "report.html").read_text()


def test_the_report_of_a_run_shows_its_searches(tmp_path, capsys):
    run = tmp_path / "run"
    assert 'class="trees"' not in made(run)
    for name in ("beam", "beam.old-1", "mcts"):
        (run / name).mkdir()
        (run / name / "search.jsonl").write_text(json.dumps(record()) + "\n")
    assert [one["name"] for one in data(made(run))] == ["beam", "mcts"]
    assert [one["name"] for one in data(made(run, trees={"my search": str(run / "mcts")}))] == ["my search"]
    assert 'class="trees"' not in made(run, trees={})
    with pytest.raises(UserError, match="no such file; a finished `search` stage has one"):
        made(run, trees={"x": str(run / "answers")})


# --- in a browser --------------------------------------------------------------------------------------------------------

TOOLS = """
const q = n => document.querySelector(".trees ." + n), all = s => [...document.querySelectorAll(".tree " + s)];
const log = [], seen = () => all("li").map(li => li.dataset.node).join(" ");
const press = key => document.activeElement.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true, cancelable: true }));
const at = () => document.activeElement.dataset.node;
"""


def shown(tmp_path: Path, page: str, script: str) -> tuple[str, list[Any]]:
    """(the page, what the script logged) after a browser ran both."""
    end = "document.body.dataset.log = JSON.stringify(log);"
    (tmp_path / "shown.html").write_text(f"{page}<script>{TOOLS}{script}{end}</script>", encoding="utf-8")
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    quiet = f"--disable-component-update --disable-sync --user-data-dir={tmp_path / 'profile'} --dump-dom"
    command = ["chromium", *flags.split(), *quiet.split(), f"file://{tmp_path / 'shown.html'}"]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=90, check=True).stdout
    return dom, json.loads(html.unescape(re.search(r'data-log="([^"]*)"', dom)[1]))


@pytest.mark.skipif(not shutil.which("chromium"), reason="no chromium here")
def test_a_browser_shows_a_tree_and_its_keys_work(tmp_path):
    evil = record(2)
    evil["nodes"][1]["steps"] = [EVIL.replace("\ud835", "")]  # chromium falls over when it prints half a pair
    searches = {"first": [record(0), record(1, right=False), evil], "second": [record(0)]}
    write_report(tmp_path / "page.html", "Trees", [("Search trees", trees_section(searches))])
    script = """
    log.push(seen(), all('li[aria-expanded="true"]').length, all('[tabindex="0"]').map(li => li.dataset.node));
    log.push(all("li").map(li => li.getAttribute("aria-label")));
    all("li")[0].focus();
    for (const key of ["ArrowDown", "End", "ArrowUp", "ArrowUp", "ArrowRight", "ArrowRight", "ArrowLeft", "ArrowLeft",
        "ArrowLeft", "ArrowLeft", "ArrowRight", "Home"]) { press(key); log.push([key, at(), seen()]); }
    press("*"); log.push(seen());
    q("close").onclick(); log.push(seen()); q("open").onclick(); log.push(seen());
    q("pruned").click(); log.push(seen()); q("way").onclick(); log.push(seen()); q("pruned").click(); log.push(seen());
    document.querySelector('[data-node="4"] .row').click(); log.push(seen(), at());
    log.push(all('[tabindex="0"]').length, all("[role=tree], [role=group]").length);
    """
    dom, log = shown(tmp_path, (tmp_path / "page.html").read_text(), script)
    # At first the way to the chosen is open, and the chosen can be reached by tab.
    assert log[:3] == ["1 3 4 5 2", 1, ["3"]]
    assert log[3][:2] == [
        "1 + 1 = 2, score 0.90, on the way to the chosen",
        "2 * 2 = 4 / Answer: 4, score 0.81, 3 visits, value 0.50, finished, right, answer 4, chosen",
    ]
    assert log[3][4] == "1 + 1 = 3, score 0.20, pruned"
    assert log[3][3] == "2 * 2 = 4, pruned"  # its score is no number
    whole, closed, start = "1 3 4 6 5 2", "1 2", "1 3 4 5 2"
    assert log[4:16] == [
        ["ArrowDown", "3", start], ["End", "2", start], ["ArrowUp", "5", start], ["ArrowUp", "4", start],
        ["ArrowRight", "4", whole], ["ArrowRight", "6", whole], ["ArrowLeft", "4", whole], ["ArrowLeft", "4", start],
        ["ArrowLeft", "1", start], ["ArrowLeft", "1", closed], ["ArrowRight", "1", whole.replace(" 6", "")],
        ["Home", "1", start],
    ]  # fmt: skip
    assert log[16:] == [start, closed, whole, "1 3 4 6", "1 3 4", start, whole, "4", 1, 3]
    assert "1 of 3; 6 nodes, 2 pruned, 2 solutions, 24 tokens sampled" in dom
    assert "first (beam)" in dom


@pytest.mark.skipif(not shutil.which("chromium"), reason="no chromium here")
def test_a_browser_goes_through_problems_and_runs_nothing_of_theirs(tmp_path):
    evil = record(2)
    evil["nodes"][1]["steps"] = evil["nodes"][3]["steps"] = [EVIL.replace("\ud835", "")]
    free = record(3)
    for final in free["finals"]:
        final["outcome"] = None
    searches = {"first": [record(0), record(1, right=False), evil, free], "second": [record(0)]}
    write_report(tmp_path / "page.html", "Trees", [("Search trees", trees_section(searches))])
    script = """
    const state = () => [q("status").textContent.split(";")[0], q("problem").value, q("prompt").textContent.split("answer: ")[1]];
    log.push([...q("filter").options].map(o => o.textContent.match(/\\((\\d+)\\)/)[1]).join(" "));
    log.push(q("votes").textContent); q("next").click(); log.push(state());
    q("filter").value = "missed"; q("filter").onchange(); log.push(state(), q("next").disabled);
    q("filter").value = "all"; q("filter").onchange(); log.push(state());
    q("previous").click(); q("previous").click(); log.push(state());
    q("search").selectedIndex = 1; q("search").onchange(); q("filter").value = "wrong"; q("filter").onchange();
    log.push(q("prompt").textContent, all("li").length);
    q("search").selectedIndex = 0; q("filter").value = "all"; q("filter").onchange();
    q("problem").selectedIndex = 2; q("problem").onchange();
    """
    dom, log = shown(tmp_path, (tmp_path / "page.html").read_text(), script)
    assert log[0] == "4 2 2 1"
    assert log[1] == "answersolutionssum of scoresverdict410.81✓ rightchosen510.70✗ wrong"
    assert log[2] == ["2 of 4", "chain/test/00001", "5"]
    assert log[3:5] == [["1 of 1", "chain/test/00001", "5"], True]
    assert log[5] == ["2 of 4", "chain/test/00001", "5"]  # it stays at the problem
    assert log[6] == ["4 of 4", "chain/test/00003", "4"]
    assert log[7:] == ["No problem of this kind.", 0]
    assert "<title>Trees</title>" in dom
    assert "<img" not in dom
    assert html.escape("<img src=x", quote=False) in dom
