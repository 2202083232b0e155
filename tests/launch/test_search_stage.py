"""search.run and search.beam: rows, records and trees of every strategy, over kills and shards; mistakes in one sentence."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from stepladder import models
from stepladder.basics import UserError, read_json
from stepladder.data_gen.rows import Solution, Tree
from stepladder.data_gen.searched import read_searches, tree_row
from stepladder.data_gen.store import read_about, read_rows
from stepladder.data_gen.tree_rows import children_of, path_to, steps_of, value_paths
from stepladder.launch import making_search
from stepladder.launch.cli import main
from stepladder.launch.options_search import STRATEGIES, Beam, Search
from stepladder.models.loading import load_tokenizer
from stepladder.models.reward import RewardModel
from stepladder.models.simulated import Errors
from stepladder.models.step_format import StepFormat

POLICY = str(Path(models.__file__).parent / "lab_policy")
TASK = {"kind": "chain", "p": 7, "min_steps": 4, "max_steps": 5, "sizes": {"test": 8}}
SMALL: dict[str, dict[str, Any]] = {
    "best_of_n": {"n": 3},
    "step_best_of_n": {"n": 2},
    "beam": {"beams": 4, "width": 2},
    "dvts": {"n": 4, "width": 2},
    "particles": {"n": 4, "resampling": "systematic"},
    "rebase": {"n": 4},
    "step_beam": {"beams": 2, "width": 2},
    "mcts": {"simulations": 6, "width": 2},
    "tot_bfs": {"beams": 2, "width": 2},
    "tot_dfs": {"width": 2, "threshold": 0.1, "expansions": 5},
    "revisions": {"n": 4, "chains": 2},
    "corrections": {"n": 2, "turns": 3},
    "glore": {"n": 2},
}


@pytest.fixture(scope="module")
def prm(tmp_path_factory: pytest.TempPathFactory, tiny_scorer: Any) -> str:
    """A random process reward model for the lab's words."""
    folder = tmp_path_factory.mktemp("prm")
    words = load_tokenizer(POLICY)
    step_format = StepFormat.load(POLICY).for_reward("scalar", "hard")
    with torch.random.fork_rng():
        RewardModel(tiny_scorer(words), words, step_format).save(folder)
    return str(folder)


def searched(out: Path, prm: str, strategy: str, *more: str, settings: Any = None) -> Path:
    settings = SMALL[strategy] if settings is None else settings
    main([
        "search", "run", "--out", str(out), "--task", json.dumps(TASK), "--policy", POLICY, "--reward", f"'{prm}'",
        "--strategy", strategy, "--settings", json.dumps(settings), "--max_new_tokens", "64", "--unit_problems", "3",
        "--device", "cpu", *more,
    ])  # fmt: skip
    return out


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy_writes_rows_and_what_it_searched(tmp_path, prm, strategy, capsys):
    template = ("--revision_template", '"{attempts}{prompt}"', "--attempt_template", json.dumps("{attempt} \n"))
    # One turn each, so that the shipped policy, which has no chat template, can be asked.
    criticised = ("--critic", "self", "--wording", "reflexion", "--critic_max_new_tokens", "9")
    refined = ("--global_refiner", POLICY, "--local_refiner", POLICY, "--locator", "random", "--wording", "reflexion")
    own = {"revisions": template, "corrections": criticised, "glore": refined}.get(strategy, ())
    out = searched(tmp_path / "out", prm, strategy, "--trees", "2", *own)
    rows = read_rows(out, Solution)
    records = list(read_searches(out))
    assert [r["problem_id"] for r in records] == list(dict.fromkeys(row.problem_id for row in rows))
    assert len(records) == 8
    for place, record in enumerate(records):
        mine = [row for row in rows if row.problem_id == record["problem_id"]]
        assert [f["sample"] for f in record["finals"]] == [row.sample for row in mine] == list(range(len(mine)))
        assert [f["outcome"] for f in record["finals"]] == [row.outcome for row in mine]
        assert record["finals"][record["chosen"]]["score"] is not None
        assert (record["nodes"] is not None) == (place < 2)
        if record["nodes"]:
            for final, row in zip(record["finals"], mine, strict=True):
                node, steps = final["node"], []
                # The parent of an attempt is what came before it; a local refinement adds to the beginning of its draft.
                alone = strategy in ("revisions", "corrections", "glore")
                local = record["nodes"][node].get("role") == "local"
                while node > 0:
                    steps[:0] = record["nodes"][node]["steps"]
                    node = 0 if alone else record["nodes"][node]["parent"]
                assert tuple(steps) == (row.steps[len(row.steps) - len(steps) :] if local else row.steps)
    about = read_about(out)
    assert about["ledger"]["generated_tokens"] >= sum(record["tokens"] for record in records) > 0
    assert about["ledger"]["reward_tokens"] > 0
    assert read_json(out / "search.json")["settings"] == SMALL[strategy]
    assert not list(out.glob("search-*.jsonl"))
    assert all(row.step_ends and row.step_ends[-1] <= len(row.token_ids) for row in rows if row.steps)
    # The same command again does nothing.
    before = (out / "rows.parquet").read_bytes()
    searched(out, prm, strategy, "--trees", "2", *own)
    assert (out / "rows.parquet").read_bytes() == before


@pytest.mark.parametrize("strategy", ["mcts", "particles"])
def test_a_killed_search_and_one_in_shards_write_the_same_bytes(tmp_path, prm, strategy, monkeypatch):
    whole = searched(tmp_path / "whole", prm, strategy)
    wanted = [(whole / name).read_bytes() for name in ("rows.parquet", "search.jsonl")]
    real = making_search.write_atomic
    calls: list[Path] = []

    def killed(path: Path, content: Any) -> None:
        real(path, content)
        calls.append(path)
        if len(calls) == 2:
            raise KeyboardInterrupt  # the tree of the second unit is there, its rows are not

    monkeypatch.setattr(making_search, "write_atomic", killed)
    with pytest.raises(SystemExit):
        searched(tmp_path / "killed", prm, strategy)
    monkeypatch.setattr(making_search, "write_atomic", real)
    assert not (tmp_path / "killed" / "rows.parquet").exists()
    searched(tmp_path / "killed", prm, strategy)
    for shard in ("1/2", "0/2"):
        searched(tmp_path / "shards", prm, strategy, "--shard", shard)
    for out in ("killed", "shards"):
        assert [(tmp_path / out / name).read_bytes() for name in ("rows.parquet", "search.jsonl")] == wanted


def test_beam_is_a_case_of_run(tmp_path, prm):
    run = searched(tmp_path / "run", prm, "beam")
    main([
        "search", "beam", "--out", str(tmp_path / "beam"), "--task", json.dumps(TASK), "--policy", POLICY, "--reward", prm,
        "--beams", "4", "--width", "2", "--max_new_tokens", "64", "--unit_problems", "3", "--device", "cpu",
    ])  # fmt: skip
    for name in ("rows.parquet", "search.jsonl"):
        assert (run / name).read_bytes() == (tmp_path / "beam" / name).read_bytes()
    shared = {f.name for f in dataclasses.fields(Beam)} - {"beams", "width", "max_depth"}
    assert shared <= {f.name for f in dataclasses.fields(Search)}  # nothing of it is lost


def test_the_reference_answer_is_out_of_reach(tmp_path, prm, monkeypatch):
    from stepladder.tasks.chain import ChainArith

    one = searched(tmp_path / "one", prm, "mcts")
    real = ChainArith.problems
    monkeypatch.setattr(
        ChainArith,
        "problems",
        lambda self, split: [dataclasses.replace(p, answer=str((int(p.answer) + 1) % 7)) for p in real(self, split)],
    )
    other = searched(tmp_path / "other", prm, "mcts")
    left, right = (read_rows(out, Solution) for out in (one, other))
    assert [row.token_ids for row in left] == [row.token_ids for row in right]
    assert [row.outcome for row in left] != [row.outcome for row in right]
    chosen = [[r["chosen"] for r in read_searches(out)] for out in (one, other)]
    assert chosen[0] == chosen[1]


def test_progress_guides_and_value_chooses(tmp_path, prm):
    # Siblings are ranked alike by Q and by Q + alpha A: several parents must compete.
    settings = {"beams": 8, "width": 2, "max_depth": 12}
    plain = searched(tmp_path / "plain", prm, "beam", settings=settings)
    guided = searched(tmp_path / "guided", prm, "beam", "--alpha", "20", "--prover_k", "3", settings=settings)
    steps = [[row.steps for row in read_rows(out, Solution)] for out in (plain, guided)]
    assert steps[0] != steps[1]
    reward = RewardModel.load(prm)
    rows = read_rows(guided, Solution)
    scores = [final["score"] for record in read_searches(guided) for final in record["finals"]]
    assert scores == pytest.approx([s[-1] for s in reward.score([(r.prompt, r.steps) for r in rows])], abs=1e-4)


@pytest.fixture(scope="module")
def prover(tmp_path_factory: pytest.TempPathFactory, tiny_scorer: Any) -> str:
    """A reward model of its own for the prover."""
    folder = tmp_path_factory.mktemp("prover")
    words = load_tokenizer(POLICY)
    with torch.random.fork_rng():
        RewardModel(tiny_scorer(words, seed=3), words, StepFormat.load(POLICY).for_reward("scalar", "soft")).save(
            folder
        )
    return str(folder)


def test_a_prover_of_its_own_guides_and_is_paid_for(tmp_path, prm, prover, refused):
    settings = {"beams": 8, "width": 2, "max_depth": 12}
    own, theirs = ("--alpha", "20"), ("--alpha", "20", "--prover", f"'{prover}'")
    best_of_k = searched(tmp_path / "own", prm, "beam", *own, settings=settings)
    guided = searched(tmp_path / "theirs", prm, "beam", *theirs, settings=settings)
    steps = [[row.steps for row in read_rows(out, Solution)] for out in (best_of_k, guided)]
    assert steps[0] != steps[1]
    # A node's score is that of the two models together; a solution's is the first one's alone.
    q, mu = RewardModel.load(prm), RewardModel.load(prover)
    record = next(iter(read_searches(guided)))
    nodes, scored = record["nodes"], 0
    written = lambda i: [*written(nodes[i]["parent"]), *nodes[i]["steps"]] if i else []
    for i, node in enumerate(nodes):
        if i and node["status"] == "kept":
            prefix = [(record["prompt"], written(i))]
            [values], [provers] = q.score_with_root(prefix), mu.score_with_root(prefix)
            assert node["score"] == pytest.approx(values[-1] + 20 * (provers[-1] - provers[-2]), abs=1e-3)
            scored += 1
    assert scored
    assert read_json(guided / "search.json")["prover"] == prover
    assert read_about(guided)["ledger"]["reward_tokens"] > 1.5 * read_about(best_of_k)["ledger"]["reward_tokens"]
    again = ("search", "run", "--out", tmp_path / "x", "--policy", POLICY, "--task", json.dumps(TASK), "--reward", prm)
    assert "give alpha" in refused(*again, "--prover", prm)
    assert "guides already" in refused(*again, "--alpha", "1", "--prover", prm)


def test_unguided_searches_need_no_reward_model(tmp_path, refused):
    out = searched(tmp_path / "out", "", "best_of_n")
    assert {f["score"] for record in read_searches(out) for f in record["finals"]} == {0.0}
    assert read_about(out)["ledger"]["reward_tokens"] == 0
    told = refused("search", "run", "--out", tmp_path / "no", "--policy", POLICY, "--task", json.dumps(TASK))
    assert told.startswith("reward is missing")


def test_a_simulated_reward_model_guides_by_the_checker(tmp_path, refused):
    """Without errors a beam of four finds what one sample seldom does; with every error liked it does not."""
    exact, turned = (
        searched(tmp_path / name, "", "beam", "--simulated", json.dumps(errors), settings={"beams": 8, "width": 8})
        for name, errors in (("exact", {"noise": 0.0}), ("turned", {"noise": 0.0, "liked": 1.0, "liked_margin": 9.0}))
    )
    chosen = [[r["finals"][r["chosen"]]["outcome"] == "right" for r in read_searches(out)] for out in (exact, turned)]
    assert sum(chosen[0]) >= 6
    assert sum(chosen[1]) < sum(chosen[0]) - 2
    about = read_json(exact / "search.json")
    assert about["simulated"] == {"margin": 1.5, "noise": 0.0, "liked": 0.0, "liked_margin": 2.0}
    assert about["parameters"]["reward"] == read_about(exact)["ledger"]["reward_tokens"] == 0
    run = ("search", "run", "--out", tmp_path / "no", "--policy", POLICY)
    assert "reward and simulated are two reward models" in refused(*run, "--reward", "x", "--simulated.noise", "1")
    loaded = making_search.Loaded(policy=(SimpleNamespace(tokenizer=None), None))  # type: ignore[arg-type]
    with pytest.raises(UserError, match="free has no exact step checker: a simulated reward model needs one"):
        making_search.searchers(Search(simulated=Errors()), SimpleNamespace(name="free"), (), loaded)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (["--strategy", "particles", "--alpha", "0.5"], "weighting odds needs scores in (0, 1)"),
        (["--simulated.liked", "2"], "liked must lie in [0, 1], found 2"),
        (["--strategy", "bean"], "search run: unknown strategy 'bean'; did you mean beam?"),
        (["--settings.beems", "4"], "search run: settings of beam: unknown key 'beems'; did you mean beams?"),
        (["--settings.beams", "4.5"], "beams must be a whole number, found 4.5"),
        (["--settings.width", "99"], "1 <= width <= beams must hold, found width 99 and beams 16"),
        (
            ["--strategy", "particles", "--settings.weighting", "odd"],
            "weighting must be one of score, odds, likelihood",
        ),
        (["--settings.seed", "4"], "settings of beam: unknown key 'seed'"),
        (["--aggregation", "max"], "aggregation must be one of nothing, last, min, prod, mean, found 'max'"),
        (["--prover_k", "0"], "prover_k must be 1 or more"),
        (
            ["--strategy", "tot_bfs", "--settings.select", "sample", "--alpha", "1"],
            "with alpha a score can be negative",
        ),
    ],
)
def test_mistakes_are_told_before_anything_runs(tmp_path, refused, settings, told):
    assert told in refused("search", "run", "--out", tmp_path / "out", *settings)
    assert not (tmp_path / "out").exists()


def test_a_folder_without_a_search_is_told(tmp_path):
    with pytest.raises(UserError, match="no such file; a finished `search` stage has one"):
        next(read_searches(tmp_path))
    (tmp_path / "search.jsonl").write_text('{"finals": []}\n{"x": 1}\n')
    with pytest.raises(UserError, match="line 2: not a record of a search"):
        list(read_searches(tmp_path))


def test_a_search_as_a_tree_row():
    """MCTS on a toy: visits and values are those of the search, and every node is one step."""
    import importlib.util

    spec = importlib.util.spec_from_file_location("toys", Path(__file__).parents[1] / "search" / "conftest.py")
    toys = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(toys)
    from stepladder.data_gen.rows import Source, from_record, to_record
    from stepladder.search.mcts import mcts
    from stepladder.tasks.base import Problem

    world = toys.Toy(depth=5)
    [found] = mcts([world.root()], world, world, simulations=4, width=2, max_depth=3)
    problem, source = Problem("x", "prompt of x", "1"), Source("p", "e", "t", 0)
    outcomes = dict.fromkeys(found.final_nodes, "right")
    tree = tree_row(found, problem, source, outcomes)
    assert from_record(Tree, json.loads(json.dumps(to_record(tree)))) == tree
    assert all(node.parent < i for i, node in enumerate(tree.nodes))
    ends = [i for i, node in enumerate(tree.nodes) if node.outcome == "right"]
    assert sorted(steps_of(tree, path_to(tree, i)) for i in ends) == sorted(s.steps for s in found.finals)
    assert sum(node.visits for node in tree.nodes) == sum(node.visits for node in found.nodes)
    assert tree.nodes[0].value == found.nodes[0].value
    assert sum(node.logprob for node in tree.nodes) == pytest.approx(sum(node.logprob for node in found.nodes))
    # Three searched levels and what a sample to the end adds at once.
    assert max(len(path_to(tree, i)) for i in ends) == 5
    paths = value_paths(tree)
    assert any(v is not None for _, values, _ in paths for v in values)
    assert len(children_of(tree)) == len(tree.nodes)
