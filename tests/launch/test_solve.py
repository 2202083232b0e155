"""stepladder solve: the answer, the vote, the tree and the cost of one problem, for people and for machines."""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from stepladder import models
from stepladder.config import build
from stepladder.launch import solve as solve_module
from stepladder.launch.cli import _config, main
from stepladder.launch.options_search import STRATEGIES, UNGUIDED
from stepladder.launch.options_solve import Serve, Solve
from stepladder.launch.solve import solve
from stepladder.launch.solving import Solver
from stepladder.launch.tree_text import cut, plain, tree_lines
from stepladder.models.loading import load_tokenizer
from stepladder.models.reward import RewardModel, aggregate
from stepladder.models.step_format import StepFormat

POLICY = str(Path(models.__file__).parent / "lab_policy")
PROBLEM = "Start 3 ; + 5 ; * 2 ; - 4 ; + 6"  # 3, 1, 2, 5, 4 mod 7
SMALL: dict[str, dict[str, Any]] = {
    "beam": {"beams": 4, "width": 2}, "dvts": {"n": 4, "width": 2}, "mcts": {"simulations": 5, "width": 2},
    "tot_dfs": {"width": 2, "expansions": 4}, "revisions": {"n": 3},
}  # fmt: skip


@pytest.fixture(scope="module")
def prm(tmp_path_factory: pytest.TempPathFactory, tiny_scorer: Any) -> str:
    """A random process reward model for the lab's words."""
    folder = tmp_path_factory.mktemp("prm")
    words = load_tokenizer(POLICY)
    with torch.random.fork_rng():
        RewardModel(tiny_scorer(words), words, StepFormat.load(POLICY).for_reward("scalar", "hard")).save(folder)
    return str(folder)


def solved(capsys: Any, *arguments: str) -> Any:
    capsys.readouterr()
    main(["solve", PROBLEM, "--policy", "lab", "--device", "cpu", *arguments])
    out = capsys.readouterr().out
    return json.loads(out) if "--json" in arguments else out


# Corrections and GLoRe need critics and refiners, which tests/launch/test_corrections.py makes.
@pytest.mark.parametrize("strategy", [name for name in STRATEGIES if name not in ("corrections", "glore")])
def test_every_strategy_solves_a_problem(capsys, prm, strategy):
    settings = SMALL.get(strategy, {STRATEGIES[strategy][1]: 3})
    template = ["--revision_template", '"{attempts}{prompt}"', "--attempt_template", json.dumps("{attempt} \n")]
    more = template if strategy == "revisions" else []
    value = solved(capsys, "--reward", prm, "--strategy", strategy, "--settings", json.dumps(settings), "--json", *more)
    search = value["search"]
    final = search["finals"][search["chosen"]]
    assert (final["answer"], final["outcome"]) == (value["answer"], value["outcome"])
    assert search["gold"] == "4"
    for one in search["finals"]:
        assert one["outcome"] == ("right" if one["answer"] == "4" else "wrong" if one["answer"] else "unparseable")
    assert Counter(f["answer"] for f in search["finals"] if f["answer"]) == {
        v["answer"]: v["count"] for v in value["votes"]
    }
    assert value["cost"]["generated_tokens"] >= search["tokens"] > 0
    assert value["cost"]["reward_tokens"] > 0
    if strategy not in ("mcts", "revisions"):  # whose answers go by more than the score
        reward = RewardModel.load(prm)
        [scores] = reward.score([(search["prompt"], value["steps"])])
        assert final["score"] == pytest.approx(aggregate(scores, "last"), abs=1e-4)
        assert final["score"] == max(f["score"] for f in search["finals"])


def test_what_is_printed_is_what_was_found(capsys, prm):
    arguments = ("--reward", prm, "--settings", "{beams: 4, width: 2}", "--width", "60")
    value, out = solved(capsys, *arguments, "--json"), solved(capsys, *arguments)
    lines = out.splitlines()
    assert lines[0] == f"answer: {value['answer']}, {value['outcome']} (the reference is 4)"
    assert all(len(line) <= 60 for line in lines)
    for step in value["steps"]:
        assert f"  {step}" in lines
    for vote in value["votes"]:
        assert any(line.startswith(f"  {vote['answer']}  {vote['count']} of 4  sum of scores") for line in lines)
    nodes = value["search"]["nodes"]
    tree = lines[lines.index(PROBLEM) + 1 : -3]
    drawn = [line for line in tree if "─ " in line]
    assert len(drawn) == len(nodes) - 1
    marks = Counter(line.partition("─ ")[2][0] for line in drawn)
    status = Counter(node["status"] for node in nodes[1:])
    assert (marks["+"], marks["-"], marks["="] + 1, marks["*"]) == (
        status["kept"],
        status["pruned"],
        status["finished"],
        1,
    )
    assert f"{value['cost']['generated_tokens']:,} tokens sampled" in " ".join(lines[-2:])
    assert "tree" not in solved(capsys, *arguments, "--lines", "0")


def test_votes_choose_where_there_is_no_reward_model_or_they_are_asked_for(capsys, prm):
    value = solved(capsys, "--json", "--settings.n", "12")
    assert (value["choose"], value["search"]["strategy"]) == ("majority", "best_of_n")
    assert value["votes"][0]["answer"] == value["answer"]
    assert all(f["score"] is None for f in value["search"]["finals"])
    best = {}
    for choose in ("best", "weighted", "majority"):
        value = solved(
            capsys,
            "--json",
            "--reward",
            prm,
            "--strategy",
            "best_of_n",
            "--budget",
            "12",
            "--choose",
            choose,
            "--seed",
            "5",
        )
        finals, chosen = value["search"]["finals"], value["search"]["finals"][value["search"]["chosen"]]
        weights: dict[str, float] = {}
        for final in finals:
            if final["answer"] is not None:
                add = 1.0 if choose == "majority" else final["score"]
                weights[final["answer"]] = weights.get(final["answer"], 0.0) + add
        if choose == "best":
            assert chosen["score"] == max(f["score"] for f in finals)
        else:
            assert weights[chosen["answer"]] == max(weights.values())
            # Of the solutions with that answer, the best scored stands for it.
            assert chosen["score"] == max(f["score"] for f in finals if f["answer"] == chosen["answer"])
        best[choose] = chosen["sample"]
    assert len(set(best.values())) > 1


def test_a_free_text_has_answers_and_no_verdicts(tmp_path, merging_tokenizer, tiny_policy):
    with torch.random.fork_rng():
        tiny_policy(merging_tokenizer, context=200).save_pretrained(tmp_path / "free")
    merging_tokenizer.save_pretrained(tmp_path / "free")
    asked = {"policy": str(tmp_path / "free"), "device": "cpu", "settings": {"n": 3}, "max_new_tokens": 20}
    solver = Solver(build(Solve, asked, "solve"))
    assert solver.task.name == "free"
    [found], ledger = solver.solve([solver.ask("What is 1 + 1?")])
    assert [final["outcome"] for final in found.record["finals"]] == [None] * 3
    assert ledger.generated_tokens == found.record["tokens"] <= 60
    [known], _ = solver.solve([solver.ask("What is 1 + 1?", reference="2")])
    assert {final["outcome"] for final in known.record["finals"]} <= {"right", "wrong", "unparseable"}
    assert [row.token_ids for row in known.rows] == [row.token_ids for row in found.rows]
    told = solve(build(Solve, {**asked, "task": {"kind": "free", "answer_kind": "number"}}, "solve"), "x")
    assert "reference" not in told


def test_the_encoding_of_a_terminal_is_respected(prm, monkeypatch):
    class Old:
        encoding = "ascii"

    monkeypatch.setattr(solve_module.sys, "stdout", Old())
    out = solve(build(Solve, {"policy": "lab", "device": "cpu", "reward": prm, "settings": {"beams": 4}}, "x"), PROBLEM)
    assert out.isascii()
    assert "|- " in out


def record() -> dict[str, Any]:
    """A tree of a first step kept, one pruned, a solution under each of two second steps, and a pruned third."""
    node = lambda parent, steps, status, score=0.5: {
        "parent": parent, "steps": steps, "status": status, "score": score, "visits": 0, "value": None,
    }  # fmt: skip
    nodes = [
        node(-1, [], "kept", None), node(0, ["a"], "kept", 0.9), node(0, ["b"], "pruned", 0.1), node(1, ["c"], "kept"),
        node(1, ["d", "e"], "finished"), node(3, ["f\x1b[31m\n"], "finished", None), node(3, [], "pruned"),
    ]  # fmt: skip
    finals = [
        {"sample": 0, "node": 4, "score": 0.5, "answer": None, "outcome": "unparseable"},
        {"sample": 1, "node": 5, "score": 0.5, "answer": "7", "outcome": None},
    ]
    return {"nodes": nodes, "finals": finals, "chosen": 1, "prompt": "x", "gold": ""}


def test_a_tree_is_drawn_whole_then_without_what_was_pruned_then_the_way_alone():
    assert tree_lines(record()) == [
        "├─ + 0.90 a",
        "│  ├─ + 0.50 c",
        "│  │  ├─ * f�[31m  -> 7",
        "│  │  └─ - 0.50 (end)",
        "│  └─ = 0.50 d",
        "│        e  -> no answer unparseable",
        "└─ - 0.10 b",
    ]
    assert tree_lines(record(), boxes=False)[3:6] == [
        "|  |  `- - 0.50 (end)",
        "|  `- = 0.50 d",
        "|        e  -> no answer unparseable",
    ]
    assert tree_lines(record(), 7) == tree_lines(record())
    way = [
        "├─ + 0.90 a",
        "│  ├─ + 0.50 c",
        "│  │  ├─ * f�[31m  -> 7",
        "│  │  └─ ... 1 more",
        "│  └─ ... 1 more",
        "└─ ... 1 more",
    ]
    assert tree_lines(record(), 6) == way
    tall = record()  # a solution with many steps: without what is pruned the others still fit
    tall["nodes"] += [{**tall["nodes"][2], "steps": list("xyz")} for _ in range(3)]
    assert tree_lines(tall, 8) == [
        "├─ + 0.90 a",
        "│  ├─ + 0.50 c",
        "│  │  ├─ * f�[31m  -> 7",
        "│  │  └─ ... 1 more",
        "│  └─ = 0.50 d",
        "│        e  -> no answer unparseable",
        "└─ ... 4 more",
    ]
    assert tree_lines(record(), 3) == [*way[:2], "... 4 more lines"]


def test_text_is_cut_by_columns_and_steers_nothing():
    assert cut("abcdef", 6) == "abcdef"
    assert cut("abcdefg", 6) == "abc..."
    assert cut("数学数学", 8) == "数学数学"
    assert cut("数学数学", 7) == "数学..."
    assert plain("a\nb\t\x1b[2J\u202e\ud800") == "a b �[2J��"


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--policy", "lab"], "PROBLEM, or - for standard input, comes first"),
        (["x"], "policy is missing"),
        (["x", "--policy", "lab"], "expected a problem such as Start 3"),
        (["", "--policy", "lab"], "the problem is empty"),
        (["Start 3 ; + 9", "--policy", "lab"], "with numbers from 0 to 6, found '9'"),
        ([PROBLEM, "--policy", "lab", "--strategy", "mcts"], "reward is missing: mcts is guided by a reward model"),
        ([PROBLEM, "--policy", "lab", "--choose", "weighted"], "choose: weighted goes by scores"),
        ([PROBLEM, "--policy", "lab", "--choose", "vote"], "choose must be one of"),
        ([PROBLEM, "--policy", "lab", "--settings.m", "3"], "settings of best_of_n: unknown key 'm'"),
        ([PROBLEM, "--policy", "lab", "--polcy", "lab"], "did you mean policy?"),
        ([PROBLEM, "--policy", "./none"], "./none: no such model folder"),
        (["What is it?", "--policy", POLICY], "hold words that its tokenizer does not know"),
        ([PROBLEM + " ; + 1" * 300, "--policy", "lab"], "leaves no room for an answer"),
        ([PROBLEM, "--policy", "lab", "--lines", "-2"], "lines must be -1 or more"),
    ],
)
def test_mistakes_are_told_in_one_sentence(refused, arguments, told):
    assert told in refused("solve", *arguments)


def test_standard_input_and_unguided_strategies(capsys, monkeypatch):
    import io

    monkeypatch.setattr("sys.stdin", io.StringIO(PROBLEM + "\n"))
    main(["solve", "-", "--policy", "lab", "--device", "cpu", "--settings.n", "2"])
    assert capsys.readouterr().out.startswith("answer: ")
    assert set(UNGUIDED) == {"best_of_n", "revisions", "corrections"}


# --- the page ------------------------------------------------------------------------------------------------------------


def test_the_page_names_every_option_and_its_commands_are_valid():
    page = (Path(__file__).parents[2] / "docs" / "solve_and_serve.md").read_text()
    options = page[page.index("## Options") : page.index("## Functions")]
    names = {f.name for cls in (Solve, Serve) for f in dataclasses.fields(cls)}
    assert not {
        name for name in names if f"`{name}`" not in options and f"`{name}:" not in options and name != "base_url"
    }
    own = options[options.index("| of `solve`") :]
    rows = re.findall(r"^\| (`[^|]*) \| ([^|]*) \|", own, re.MULTILINE)
    defaults = {f.name: f.default for cls in (Solve, Serve) for f in dataclasses.fields(cls)}
    assert len(rows) == 9  # and `reference`, whose default is empty
    for names, values in rows:
        for name, value in zip(re.findall(r"`(\w+)`", names), values.split(", "), strict=True):
            if value and name not in ("name", "max_budget"):
                assert str(defaults[name]).lower().removesuffix(".0") == value, name
    commands = [shlex.split(line) for line in page.splitlines() if line.startswith("stepladder s")]
    assert len(commands) == 5
    for _, command, *rest in commands:
        if command == "solve":
            rest = rest[1:]
        rest = [argument for argument in rest if argument != "<" and argument != "problem.txt"]
        assert _config({"solve": Solve, "serve": Serve}[command], rest, command).strategy


def test_what_the_page_shows_is_what_is_printed(capsys):
    page = (Path(__file__).parents[2] / "docs" / "solve_and_serve.md").read_text()
    command = next(line for line in page.splitlines() if line.startswith("stepladder solve"))
    main([*shlex.split(command)[1:], "--device", "cpu", "--width", "120"])
    out = capsys.readouterr().out
    shown = page.split("and prints\n\n```\n")[1].split("```")[0]
    assert out.rpartition(";")[0] == shown.rpartition(";")[0]  # all but the seconds
