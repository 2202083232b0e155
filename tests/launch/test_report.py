"""report.html: it asks nothing of the network, model text stays text, and no number is lost."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from stepladder.basics import UserError
from stepladder.launch.report import (
    calibration_section,
    costs_section,
    curves_section,
    pool_section,
    provenance_section,
    results_section,
    values_section,
    wilson,
    write_report,
    write_run_report,
)
from stepladder.launch.tables import short

EVIL = "</script><script>document.title='hacked'</script><img src=x onerror=\"document.title='hacked'\"> & {{body}}"


def record(arm: str, metric: str, value: float | None, ci: list[float] | None = None, **rest: Any) -> dict[str, Any]:
    known = {"n": 500, "tokens": 0, "flops": 0.0, "seconds": 0.0, "seed": 0, **rest}
    return {"arm": arm, "metric": metric, "value": value, "ci": ci, **known}


RECORDS = [
    record("base/greedy", "accuracy", 0.442, [0.398, 0.486], tokens=19806, flops=3.91e10, seconds=1.4),
    record("base/majority@16", "accuracy", 0.431, [0.389, 0.474], tokens=319046, flops=4.26e11, seconds=16.1),
    record("base/beam_prm", "accuracy", 0.613, [0.57, 0.655], tokens=320682, flops=1.07e12, seconds=80.1),
    record(
        "base/beam_prm", "accuracy_minus_majority", 0.182, [0.14, 0.223], tokens=320682, flops=1.07e12, seconds=80.1
    ),
    record("improved/greedy", "accuracy", 0.734, [0.694, 0.772], tokens=19938, flops=3.93e10, seconds=1.0),
    record("improved/greedy", "accuracy_minus_base", 0.292, [0.246, 0.338], tokens=19938, flops=3.93e10, seconds=1.0),
    record("prm", "step_auroc", 0.931, [0.911, 0.95], n=2000, flops=1.57e11, seconds=2.4),
    record("prm", "within_question_auroc", None, n=12),
    record("labels", "label_false_positive", 0.14, [0.131, 0.149], n=6535),
    record("labels", "label_false_positive_closed_form", 0.208, n=6535),
    record("labels", "label_false_negative_closed_form", 0.013, n=7822),
]
LEDGER = {
    "generated_tokens": 956680,
    "prefilled_tokens": 31500,
    "reward_tokens": 77,
    "policy_calls": 24000,
    "flops": 1.28e12,
    "seconds": 48.4,
}


def solution(number: int, policy: str = "base", step: str = "1 + 1 = 2", **rest: Any) -> dict[str, Any]:
    return {
        "problem_id": f"chain/test/{number:05d}",
        "prompt": "Start 1 ; + 1",
        "gold": "2",
        "policy": policy,
        "steps": [step] * 10,
        "scores": [0.9] * 10,
        "step_right": [True] * 10,
        "answer": "2",
        "outcome": "right",
        "selected_by": ["greedy"],
        **rest,
    }


SOLUTIONS = [solution(i, policy) for i in range(100) for policy in ("base", "improved")]
SOLUTIONS[0] = solution(
    0, step=EVIL, step_right=[True, False] * 5, scores=[0.9, float("nan")] * 5, outcome="wrong", answer=None
)
SOLUTIONS[1] = solution(0, policy="improved", step="half a pair \ud835", step_right=[None] * 10, prompt=EVIL)


def written(tmp_path: Path) -> str:
    """The page of a run in which every piece of text that a model or a user writes is hostile."""
    write_run_report(
        tmp_path / "report.html",
        EVIL,
        f"stepladder {EVIL}",
        {"config": {"seed": 3, "name": EVIL}, "stepladder": "0.1.0", "versions": {"torch": "2.13.0"}},
        [*RECORDS, record(f"base/{EVIL}", "accuracy", 0.5, [0.4, 0.6], tokens=5), record(EVIL, "auroc", 0.5)],
        {EVIL: [{"step": 10, "loss": 0.7, EVIL: 1}, {"step": 20, "loss": 0.6, "eval_loss": 0.65}]},
        {EVIL: LEDGER},
        {"solutions": SOLUTIONS, "calibration": {"scores": [0.1, 0.9, 0.8], "right": [False, True, True]}},
    )
    return (tmp_path / "report.html").read_text(encoding="utf-8")


class Page(HTMLParser):
    """Elements with their attributes, the text of scripts and styles, and the text that a reader sees."""

    VOID = ("meta", "link", "br", "img")

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.raw: list[tuple[dict[str, str | None], str]] = []
        self.text = self.title = ""
        self.feed(page)
        self.close()
        assert not self.open, "every element is closed"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes another element"

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("script", "style"):
            self.raw.append((self.elements[-1][1], data))
        elif self.open and self.open[-1] == "title" and "svg" not in self.open:
            self.title += data
        else:
            self.text += data + " "


def test_the_page_asks_nothing_of_the_network(tmp_path):
    page = Page(written(tmp_path))
    for tag, attributes in page.elements:
        assert tag not in ("iframe", "object", "embed", "base", "img", "image", "use")
        for name in ("src", "href", "srcset", "action", "poster", "data", "xlink:href"):
            value = attributes.get(name)
            assert value is None or value.startswith("#") or value == "data:,", (tag, name, value)
        assert not [name for name in attributes if name.startswith("on")]
    for attributes, text in page.raw:
        if attributes.get("type") != "application/json":
            assert not re.search(r"https?:|//[a-z]|url\(|@import|fetch\(|XMLHttp|import\(|innerHTML|eval", text)
    policies = [
        a["content"] for t, a in page.elements if t == "meta" and a.get("http-equiv") == "Content-Security-Policy"
    ]
    assert policies
    assert policies[0].startswith("default-src 'none'")


def test_hostile_text_stays_text(tmp_path):
    page = written(tmp_path)
    parsed = Page(page)
    assert [tag for tag, _ in parsed.elements].count("script") == 2  # the data and the page's own
    assert page.count("</script>") == 2
    assert "<img" not in page
    assert EVIL not in page
    assert page.count(html.escape(EVIL)) >= 6  # title, heading, command, arm, curve, stage
    assert page.count("<main>") == 1  # {{body}} in a title is not filled in


def test_solutions_travel_whole(tmp_path):
    data = next(
        text for attributes, text in Page(written(tmp_path)).raw if attributes.get("type") == "application/json"
    )
    found = json.loads(data, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert len(found) == len(SOLUTIONS) == 200
    assert found[0]["steps"] == [EVIL] * 10
    assert found[0]["scores"] == [0.9, None] * 5
    assert found[1] == SOLUTIONS[1]
    assert found[2:] == SOLUTIONS[2:]


def test_every_number_of_the_records_is_in_the_tables():
    text = Page(results_section(RECORDS)).text
    tables = text[text.index("How well each policy answers") :]
    percent = ("accuracy", "label_")
    for r in RECORDS:
        scale, digits = (100, 1) if r["metric"].startswith(percent) else (1, 3)
        numbers = [f"{v * scale:.{digits}f}" for v in [r["value"], *(r["ci"] or [])] if v is not None]
        costs = [f"{r['tokens']:,}"] if r["tokens"] else []
        costs += [short(r["flops"]), f"{r['seconds']:.1f}"] if r["flops"] else []
        for number in [*numbers, f"{r['n']:,}", *costs]:
            assert number in tables, (r["arm"], r["metric"], number)
    assert "undefined" in tables


def test_a_difference_whose_interval_leaves_out_0_is_bold():
    records = [
        record("base/greedy", "accuracy", 0.5, [0.4, 0.6]),
        record("base/beam", "accuracy_minus_majority", 0.2, [0.1, 0.3]),
        record("base/vote", "accuracy_minus_majority", 0.1, [-0.1, 0.3]),
    ]
    page = results_section(records)
    assert "<b>20.0</b><small>[10.0, 30.0]</small>" in page
    assert "10.0<small>[-10.0, 30.0]</small>" in page
    assert page.count("<b>") == 1  # an accuracy is never bold


def test_results_of_one_policy_or_of_a_reward_model_alone():
    assert results_section([]) == ""
    alone = results_section([record("prm", "step_auroc", 0.9)])
    assert "0.900" in alone
    assert "How well" not in alone
    assert "<figure" not in alone
    # No interval, no cost, a value that could not be computed: the tables say so and the plots leave it out.
    one = results_section([record("base/greedy", "accuracy", 0.5), record("base/beam", "accuracy", None)])
    assert "50.0" in one
    assert "undefined" in one
    assert "Accuracy over what it cost" not in one


def test_curves_leave_out_what_is_not_finite_and_say_so():
    lines = [
        {"step": 1, "loss": 0.7},
        {"step": 2, "loss": float("nan")},
        {"step": 3, "loss": 0.5},
        {"step": 3, "train_runtime": 9.0},
    ]
    page = curves_section({"prm": lines})
    assert "1 values are not finite" in page
    assert "loss from 0.7 to 0.5" in page
    assert "nan" not in page
    assert curves_section({"prm": [], "orm": [{"step": 1, "grad_norm": 1.0}]}) == ""
    # One point, and a line that is flat: no range to divide by.
    assert "<svg" in curves_section(
        {"a": [{"step": 1, "loss": 0.0}], "b": [{"step": s, "accuracy": 1.0} for s in (1, 2)]}
    )


def test_calibration_counts_what_it_cannot_use():
    scores: list[float | None] = [0.05, 0.95, 0.97, None, 1.2, 0.5]
    page = calibration_section({"scores": scores, "right": [False, True, True, True, True, None]})
    assert "right steps, 3" in page
    assert "wrong steps, 1" in page
    assert "4 steps of" in page
    assert "2 steps have no score or no verdict" in page
    assert calibration_section(None) == calibration_section({"scores": [], "right": []}) == ""


def test_wilson_interval():
    # 8 of 10: centre (0.8 + z²/20) / (1 + z²/10), the textbook's (0.490, 0.943).
    assert wilson(8, 10) == pytest.approx((0.8, 0.4902, 0.9433), abs=1e-4)
    assert wilson(0, 5)[1] == pytest.approx(0)
    assert wilson(5, 5)[2] == pytest.approx(1)


def test_costs_are_summed_and_provenance_is_flat():
    text = Page(costs_section({"solutions": LEDGER, "more": LEDGER})).text
    assert "956,680" in text
    assert "1,913,360" in text
    assert "2.56T" in text
    assert "96.8" in text
    manifest = {"config": {"seed": 3, "stages": {"a": {"do": "x"}}}, "versions": {"torch": "2.13"}, "device": "cpu"}
    text = Page(provenance_section(manifest)).text
    for words in ("seed", "3", "versions: torch", "2.13", "device", "cpu", "do: x"):
        assert words in text
    assert costs_section({}) == provenance_section({}) == ""


def test_a_page_of_other_sections(tmp_path):
    sections = [("A tree", "<p>one</p>"), ("Nothing", ""), ("A tree", "<p>two</p>")]
    write_report(tmp_path / "new" / "tree.html", "Trees", sections, intro="<p>hello</p>")
    page = (tmp_path / "new" / "tree.html").read_text(encoding="utf-8")
    ids = [a["id"] for _, a in Page(page).elements if "id" in a]
    assert len(ids) == len(set(ids)) == 2
    assert "Nothing" not in page
    assert "<p>hello</p>" in page
    assert all(f'href="#{i}"' in page for i in ids)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        write_report(tmp_path / "file" / "report.html", "Trees", sections)


def test_the_page_has_headings_names_and_marks_that_are_not_colour_alone(tmp_path):
    page = Page(written(tmp_path))
    tags = [tag for tag, _ in page.elements]
    assert tags.count("h1") == 1
    assert tags.count("main") == 1
    assert "nav" in tags
    assert dict(page.elements)["html"]["lang"] == "en"
    for tag, attributes in page.elements:
        if tag == "svg" and attributes.get("role") == "img":
            assert attributes["aria-label"]
        if attributes.get("role") == "region":
            assert attributes["aria-label"]
            assert attributes["tabindex"] == "0"
    script = page.raw[-1][1]
    assert "✓" in script
    assert "✗" in script
    assert "first error" in script
    assert "unseen" in script


def test_the_same_run_gives_the_same_bytes(tmp_path):
    assert written(tmp_path) == written(tmp_path)


@pytest.mark.skipif(not shutil.which("chromium"), reason="no chromium here")
def test_a_browser_shows_the_solutions_and_runs_none_of_them(tmp_path):
    # Chromium shows half a surrogate pair, but falls over when it prints the document as UTF-8.
    source = written(tmp_path).replace("\\ud835", "x")
    first = shown(tmp_path, source)
    names = [a.get("class") for _, a in first.elements]
    assert names.count("card") == 2  # base and improved
    assert names.count("step") == 20
    assert names.count("first") == 1
    assert [t for t, _ in first.elements].count("option") == 4 + 100
    for count in ("all problems (100)", "some right, some not (1)", "some arm is right (100)", "no arm is right (0)"):
        assert count in first.text
    assert first.title == EVIL  # no script of a model's has changed it
    assert "img" not in [t for t, _ in first.elements]
    cards = first.text.split("by the arms it names.")[1]
    # Ten scores of 0.90 in one card and five in the other, whose other five are no numbers.
    assert cards.count("0.90") == 15
    assert cards.count("–") == 5
    assert "1 of 100; 1 of 2 solutions right" in first.text

    click = "<script>document.querySelector('.next').click()</script>"
    assert "2 of 100; 2 of 2 solutions right" in shown(tmp_path, source + click).text
    choose = "const f = document.querySelector('.filter'); f.value = 'NAME'; f.onchange()"
    for name, want in (("disagree", "1 of 1; 1 of 2 solutions right"), ("wrong", "No problem of this kind.")):
        assert want in shown(tmp_path, source + f"<script>{choose.replace('NAME', name)}</script>").text


def shown(tmp_path: Path, source: str) -> Page:
    """The page as a browser has it after its scripts ran."""
    (tmp_path / "shown.html").write_text(source, encoding="utf-8")
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    quiet = f"--disable-component-update --disable-sync --user-data-dir={tmp_path / 'profile'} --dump-dom"
    command = ["chromium", *flags.split(), *quiet.split(), f"file://{tmp_path / 'shown.html'}"]
    return Page(subprocess.run(command, capture_output=True, text=True, timeout=90, check=True).stdout)


def test_curves_over_samples_are_drawn_for_each_model_and_kept_in_tables():
    arms = ("pass", "majority", "best_prm_min", "weighted_prm_min", "best_orm_last")
    records = [
        record(f"pool/{arm}", f"accuracy@{k}", (10 * a + k) / 100, [0.01, 0.5])
        for a, arm in enumerate(arms)
        for k in (1, 4)
    ]
    records.append(record("pool/best_prm_min", "minus_majority@4", 0.1, [0.05, 0.2]))
    page = Page(pool_section(records))
    assert page.text.count("accuracy, %") == 2  # a panel for prm_min and one for orm_last
    assert "prm_min" in page.text
    for a in range(len(arms)):
        assert f"{10 * a + 4}.0" in page.text
    assert "<b>10.0</b>" in pool_section(records)
    assert "best-of-k from 21.0 to 24.0" in pool_section(records)
    assert pool_section(RECORDS) == ""
    # Without a model the two curves that need none are drawn.
    assert "majority@k from 11.0 to 14.0" in pool_section(records[:4])


def test_exact_values_are_drawn_beside_scores():
    drawn = values_section({"prm": [(0.2, 0.3, 5), (0.9, 0.7, 2)], "none": []})
    assert drawn.count("<h4>") == 1
    assert values_section(None) == values_section({}) == ""
