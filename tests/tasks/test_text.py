"""Problems from records: read whole, split by text without leaks, and every mistake told in one sentence."""

import gzip
import json
from collections import Counter
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from stepladder.basics import UserError
from stepladder.tasks.base import HasReference, Outcome, Task
from stepladder.tasks.records import field_value, read_choices, read_records
from stepladder.tasks.splits import draw_split, same_text
from stepladder.tasks.text import TextTask, gsm8k, math_problems, multiple_choice, word_problems

DATA = Path(__file__).parents[2].parent / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="the real data is not here")


def write_lines(path: Path, records) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(path)


def sums(count: int, start: int = 0):
    return [
        {"question": f"Problem {i}: what is {i} plus {2 * i}?", "answer": 3 * i} for i in range(start, start + count)
    ]


@pytest.fixture
def hundred(tmp_path):
    return write_lines(tmp_path / "sums.jsonl", sums(100))


def every_problem(task: TextTask):
    return [problem for split in task.split_names for problem in task.problems(split)]


# --- reading -----------------------------------------------------------------------------------------------------------


def test_every_record_becomes_one_problem_with_a_stable_id(hundred):
    task = TextTask(name="sums", path=hundred)
    assert isinstance(task, Task)
    assert isinstance(task, HasReference)
    problems = {problem.id: problem for problem in every_problem(task)}
    assert sorted(problems) == [f"sums/{i:05d}" for i in range(100)]
    assert problems["sums/00007"].prompt == "Problem 7: what is 7 plus 14?"
    assert problems["sums/00007"].answer == "21"
    assert task.verify(problems["sums/00007"], "It is 21.").right
    assert task.verify(problems["sums/00007"], "It is 22.").outcome is Outcome.WRONG
    assert task.reference_steps(problems["sums/00007"]) is None
    assert task.dropped == {}


def test_all_file_formats_give_the_same_problems(tmp_path, hundred):
    records = sums(100)
    (tmp_path / "a.json").write_text(json.dumps(records))
    (tmp_path / "b.json").write_text(json.dumps({"canary": "x", "examples": records}))
    with gzip.open(tmp_path / "c.jsonl.gz", "wt") as file:
        file.write("\n\n".join(map(json.dumps, records)))
    with gzip.open(tmp_path / "d.json.gz", "wt") as file:
        json.dump(records, file)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "e.parquet")
    want = every_problem(TextTask(path=hundred))
    for name, key in (("a.json", ""), ("b.json", "examples"), ("c.jsonl.gz", ""), ("d.json.gz", ""), ("e.parquet", "")):
        assert every_problem(TextTask(path=str(tmp_path / name), records_key=key)) == want, name


def test_a_hub_id_is_loaded_with_its_config_and_split(monkeypatch):
    import datasets

    asked = []

    def load_dataset(name, config, *, split):
        asked.append((name, config, split))
        return sums(20)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    TextTask(path="owner/name:main:train+test").problems("train")
    TextTask(path="owner/name").problems("train")
    TextTask(path="owner/name::test").problems("train")
    assert asked == [("owner/name", "main", "train+test"), ("owner/name", None, "train"), ("owner/name", None, "test")]


def test_a_hub_that_cannot_be_reached_is_one_sentence(monkeypatch):
    import datasets

    def load_dataset(name, config, *, split):
        raise ConnectionError("Couldn't reach the Hub\nand a long story")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(
        UserError, match=r"owner/name: no such file, and the hub gave no such data set .Couldn't reach the Hub.$"
    ):
        TextTask(path="owner/name").problems("train")


def test_field_expressions():
    record = {"Body": "Ann has 3 pens", "Question": "How many?", "q": {"stem": "Why?"}, "none": None, "a.b": 1, "n": 0}
    assert field_value("q.stem", record, "here") == "Why?"
    assert field_value("{Body!sentence} {Question}", record, "here") == "Ann has 3 pens. How many?"
    assert field_value("{Question!sentence}", record, "here") == "How many?"
    assert field_value("missing|q.stem|Body", record, "here") == "Why?"
    assert field_value("none|Body", record, "here") == "Ann has 3 pens"
    assert field_value("missing|", record, "here") is None
    assert field_value("a.b", record, "here") == 1
    assert field_value("n", record, "here") == 0
    with pytest.raises(
        UserError,
        match=r"here: field 'Qestion' is missing, found Body, Question, q, none, a.b, n; did you mean Question?",
    ):
        field_value("{Body} {Qestion}", record, "here")
    with pytest.raises(UserError, match=r"field 'q.stm' is missing, found stem; did you mean stem?"):
        field_value("q.stm", record, "here")
    with pytest.raises(UserError, match=r"field 'none' is empty \(null\)"):
        field_value("none", record, "here")


@pytest.mark.parametrize(
    "value",
    [
        ["12", "16", "18"],
        {"label": ["A", "B", "C"], "text": ["12", "16", "18"]},
        {"label": ["1", "2", "3"], "text": ["12", "16", "18"]},
        [{"label": "A", "text": "12"}, {"label": "B", "text": "16"}, {"label": "C", "text": "18"}],
        {"a": "12", "b": "16", "c": "18"},
        "a ) 12 , b ) 16 , c ) 18",
        "A: 12 \nB: 16 \nC: 18 ",
        "(A) 12 (B) 16 (C) 18",
        "['A)12', 'B)16', 'C)18']",
    ],
)
def test_every_form_of_choices_is_read(value):
    choices, labels = read_choices(value, "here")
    assert choices == {"A": "12", "B": "16", "C": "18"}
    assert list(labels.values()) == ["A", "B", "C"]


@pytest.mark.parametrize(
    ("gold", "letter"), [("b", "B"), ("(B)", "B"), (1, "B"), ("2", "B"), ("sixteen", "B"), ("A", "A")]
)
def test_the_reference_of_a_choice_is_a_label_an_index_or_its_text(tmp_path, gold, letter):
    labels = ["1", "2", "3"] if gold == "2" else ["A", "B", "C"]
    record = {
        "question": "Which?",
        "answer": gold,
        "options": {"label": labels, "text": ["twelve", "sixteen", "eighteen"]},
    }
    path = write_lines(tmp_path / "choice.jsonl", [record])
    task = TextTask(path=path, answer_kind="choice", choices_field="options", splits={"test": 1.0})
    (problem,) = task.problems("test")
    assert problem.answer == letter
    assert problem.prompt == "Which?\n(A) twelve\n(B) sixteen\n(C) eighteen"
    assert task.verify(problem, f"The answer is {letter}.").right
    assert task.verify(problem, "So the answer is eighteen.").outcome is Outcome.WRONG


# --- splits ------------------------------------------------------------------------------------------------------------


def test_a_problem_keeps_its_split_whatever_else_the_data_holds(tmp_path, hundred):
    first = TextTask(path=hundred)
    more = TextTask(path=write_lines(tmp_path / "more.jsonl", sums(300)[::-1]))
    for split in first.split_names:
        assert {p.prompt for p in first.problems(split)} <= {p.prompt for p in more.problems(split)}


def test_equal_problems_are_one_and_are_counted(tmp_path):
    records = sums(50) + [
        {"question": r["question"].upper().replace(" ", "  "), "answer": r["answer"]} for r in sums(20)
    ]
    records += [{"question": records[0]["question"], "answer": 5}]
    task = TextTask(path=write_lines(tmp_path / "a.jsonl", records))
    assert sorted(p.id for p in every_problem(task)) == [f"text/{i:05d}" for i in range(50)]
    assert task.dropped == {"duplicates": 20, "duplicates with another answer": 1}


def test_alike_problems_are_on_one_side(tmp_path):
    story = "On the {i} day of a long journey through the hills of {a} and {b} the old merchant {n} counted all {k} of his coins"
    records = []
    for i in range(60):
        base = story.format(i=i, a=f"land{i}", b=f"vale{i * 7}", n=f"name{i * 3}", k=i)
        records += [
            {"question": base + " again", "answer": i, "g": i},
            {"question": base + " at night", "answer": i, "g": i},
        ]
    path = write_lines(tmp_path / "a.jsonl", records)
    sides: dict[str, set[str]] = {}
    task = TextTask(path=path)
    for split in task.split_names:
        for problem in task.problems(split):
            sides.setdefault(problem.answer, set()).add(split)
    assert all(len(splits) == 1 for splits in sides.values())
    loose = TextTask(path=path, near_duplicates=0)
    straddling = [
        answer
        for answer in map(str, range(60))
        if sum(any(p.answer == answer for p in loose.problems(s)) for s in loose.split_names) > 1
    ]
    assert straddling, "without grouping some pairs do straddle: the test above could fail"


def test_sources_with_their_own_splits_and_training_loses_what_they_share(tmp_path):
    train = write_lines(tmp_path / "train.jsonl", sums(60))
    test = write_lines(tmp_path / "test.jsonl", sums(30, start=50))
    sources = {"a": {"path": train, "split": {"train": 0.8, "dev": 0.2}}, "b": {"path": test, "split": "test"}}
    for order in (["a", "b"], ["b", "a"]):
        task = TextTask(name="t", sources={name: sources[name] for name in order}, near_duplicates=0)
        assert sorted(task.split_names) == ["dev", "test", "train"]
        prompts = Counter(p.prompt for p in every_problem(task))
        assert len(prompts) == 80
        assert max(prompts.values()) == 1
        tested = {p.prompt for p in task.problems("test")}
        assert tested == {r["question"] for r in sums(30, start=50)}, "the benchmark stays whole"
        assert not tested & {p.prompt for p in task.problems("train")}
        assert sum(task.dropped.values()) == 10


def test_sources_may_name_their_fields_differently(tmp_path):
    a = write_lines(tmp_path / "a.jsonl", sums(10))
    b = write_lines(
        tmp_path / "b.jsonl", [{"ID": f"x{i}", "B": f"Body {i}", "Q": "How much?", "A": float(i)} for i in range(10)]
    )
    sources = {"a": a, "b": {"path": b, "prompt_field": "{B!sentence} {Q}", "answer_field": "A", "id_field": "ID"}}
    task = TextTask(name="both", sources=sources, splits={"all": 1.0})
    problems = {p.id: p for p in task.problems("all")}
    assert len(problems) == 20
    assert problems["both/b/x3"].prompt == "Body 3. How much?"
    assert problems["both/b/x3"].answer == "3"
    assert problems["both/b/x3"].meta == {"source": "b"}
    assert problems["both/a/00003"].meta == {"source": "a"}


def test_reference_solutions_are_split_and_cleaned(tmp_path):
    record = {"question": "?", "answer": "She has 4/2 = <<4/2=2>>2 left.\n\nThat is all.\n#### 2"}
    task = TextTask(
        path=write_lines(tmp_path / "a.jsonl", [record]),
        answer_pattern=r"####\s*(.+)",
        solution_field="answer",
        solution_drop="<<[^>]*>>",
        splits={"train": 1.0},
    )
    (problem,) = task.problems("train")
    assert problem.answer == "2"
    assert task.reference_steps(problem) == ["She has 4/2 = 2 left.", "That is all.", "#### 2"]


# --- bad input ---------------------------------------------------------------------------------------------------------


def failing(task: TextTask) -> str:
    with pytest.raises(UserError) as caught:
        task.problems("train")
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_a_missing_file_is_named(tmp_path):
    assert failing(TextTask(path=str(tmp_path / "no.jsonl"))) == f"{tmp_path}/no.jsonl: no such file"
    assert failing(TextTask(path="data/no.jsonl")) == "data/no.jsonl: no such file"
    assert "is a folder" in failing(TextTask(path=str(tmp_path)))


def test_a_broken_line_is_named(tmp_path):
    lines = [json.dumps(record) for record in sums(30)]
    lines[16] = lines[16][:-4]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    assert f"{tmp_path}/a.jsonl, line 17: not valid JSON" in failing(TextTask(path=str(tmp_path / "a.jsonl")))


def test_broken_files_of_other_formats_are_named(tmp_path):
    for name, content in (
        ("a.json", b"[1, 2"),
        ("b.jsonl.gz", b"no gzip"),
        ("c.parquet", b"no parquet"),
        ("d.jsonl", b"\xff\xfe\x00"),
    ):
        (tmp_path / name).write_bytes(content)
        assert failing(TextTask(path=str(tmp_path / name))).startswith(str(tmp_path / name))
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(b'{"question": "a", "answer": 1}\n' * 500)[:-20])
    assert "cannot be read" in failing(TextTask(path=str(tmp_path / "cut.jsonl.gz")))


def test_an_empty_data_set_is_named(tmp_path):
    (tmp_path / "a.jsonl").write_text("\n\n")
    (tmp_path / "b.json").write_text("[]")
    for name in ("a.jsonl", "b.json"):
        assert failing(TextTask(path=str(tmp_path / name))) == f"{tmp_path}/{name}: the data set is empty"


def test_records_of_the_wrong_shape_are_named(tmp_path):
    (tmp_path / "a.json").write_text('{"examples": [1]}')
    assert "set records_key, for example to examples" in failing(TextTask(path=str(tmp_path / "a.json")))
    assert "record 1: expected an object, found int" in failing(
        TextTask(path=str(tmp_path / "a.json"), records_key="examples")
    )
    assert "did you mean examples?" in failing(TextTask(path=str(tmp_path / "a.json"), records_key="example"))


def test_a_missing_field_a_wrong_type_and_an_unusable_answer_are_named(tmp_path, hundred):
    assert failing(TextTask(path=hundred, prompt_field="qestion")) == (
        f"{hundred}, line 1: field 'qestion' is missing, found question, answer; did you mean question?"
    )
    listed = write_lines(tmp_path / "l.jsonl", [{"question": ["a"], "answer": [1]}])
    assert "field 'question' must be text, found list" in failing(TextTask(path=listed))
    assert "must be text or a number, found list" in failing(TextTask(path=listed, prompt_field="{question}"))
    words = write_lines(tmp_path / "w.jsonl", [*sums(2), {"question": "?", "answer": "many"}])
    assert "line 3: the reference answer 'many' is no answer of kind number" in failing(TextTask(path=words))
    assert "line 1: answer_pattern '####' finds nothing" in failing(TextTask(path=hundred, answer_pattern="####"))
    twice = write_lines(tmp_path / "t.jsonl", [{"question": f"{i}?", "answer": 1, "id": 7} for i in range(2)])
    assert f"the id 'text/7' was already given at {twice}, line 1" in failing(TextTask(path=twice, id_field="id"))


def test_unusable_records_can_be_dropped_and_are_counted(tmp_path):
    path = write_lines(
        tmp_path / "a.jsonl", [*sums(5), {"question": "?", "answer": "many"}, {"question": "?", "answer": None}]
    )
    task = TextTask(path=path, drop_unusable=True, splits={"train": 1.0})
    assert len(task.problems("train")) == 5
    assert task.dropped == {"without a usable answer": 2}


def test_an_unknown_or_empty_split_is_named(tmp_path, hundred):
    with pytest.raises(UserError, match=r"split must be one of train, dev, test, found 'tset' \(did you mean test\?\)"):
        TextTask(path=hundred).problems("tset")
    one = write_lines(tmp_path / "one.jsonl", sums(1))
    held = draw_split(same_text(sums(1)[0]["question"]), TextTask(path=one).splits)
    assert len(TextTask(path=one).problems(held)) == 1
    with pytest.raises(UserError, match="no problem fell into split"):
        TextTask(path=one).problems("dev" if held != "dev" else "test")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "give either path"),
        ({"path": "a", "sources": {"a": "b"}}, "give either path"),
        ({"path": "a", "answer_kind": "nmber"}, "answer_kind must be one of number, math, choice, text, found 'nmber'"),
        ({"path": "a", "splits": {"train": 0.5, "test": 0.4}}, "must add up to 1"),
        ({"path": "a", "splits": {"train": "most"}}, "must give each split a share"),
        ({"path": "a", "answer_pattern": "("}, "answer_pattern is no regular expression"),
        ({"path": "a", "timeout": 0}, "timeout must be more than 0"),
        ({"path": "a", "near_duplicates": 2}, "near_duplicates must lie between 0 and 1"),
        ({"sources": {"a": {"pth": "b"}}}, "sources.a: unknown key 'pth'; did you mean path?"),
        ({"sources": {"a": {"split": "train"}}}, "sources.a: path is missing"),
        ({"sources": {"a": 3}}, "sources.a must be a file, a hub id or keys and values, found 3"),
    ],
)
def test_a_config_that_cannot_hold_is_refused(fields, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(").replace("?", r"\?")):
        TextTask(**fields)


# --- real data ---------------------------------------------------------------------------------------------------------


@needs_data
def test_word_problems_are_merged_without_leaks():
    task = word_problems(str(DATA))
    problems = every_problem(task)
    assert Counter(p.meta["source"] for p in problems).keys() == {"multiarith", "singleeq", "addsub", "svamp"}
    assert len(problems) + sum(task.dropped.values()) == 600 + 508 + 395 + 1000
    assert max(Counter(same_text(p.prompt) for p in problems).values()) == 1
    assert 400 < len(task.problems("test")) < 550
    assert 1600 < len(task.problems("train")) < 1800
    shown = next(p for p in problems if p.id == "word_problems/svamp/00000")
    assert shown.prompt == (
        "Each pack of dvds costs 76 dollars. If there is a discount of 25 dollars on each pack. "
        "How much do you have to pay to buy each pack?"
    )
    assert shown.answer == "51"
    assert all(task.verify(p, f"So the answer is {p.answer}.").right for p in problems[:200])


@needs_data
def test_gsm8k_has_solutions_that_are_right():
    task = gsm8k(train=str(DATA / "gsm8k" / "train.jsonl"), test=str(DATA / "gsm8k" / "test.jsonl"), near_duplicates=0)
    test = task.problems("test")
    assert len(test) == 1019
    assert len(task.problems("train")) + len(task.problems("dev")) == 7473
    for problem in test:
        steps = task.reference_steps(problem)
        assert steps is not None
        assert "<<" not in "".join(steps)
        assert task.verify(problem, "\n".join(steps)).right


@needs_data
def test_math_reads_both_published_forms():
    task = math_problems(str(DATA / "math" / "test.jsonl"), near_duplicates=0)
    problem = task.problems("dev")[0]
    assert task.verify(problem, problem.meta["solution"]).right
    bare = math_problems(str(DATA / "math" / "problems_and_answers.jsonl"), near_duplicates=0)
    assert bare.reference_steps(bare.problems("dev")[0]) is None
    assert bare.dropped["without a usable answer"] == 2


@needs_data
@pytest.mark.parametrize(
    "file", ["commonsense_qa/train_rand_split.jsonl.gz", "mathqa/test.jsonl", "mr_ben/biology.jsonl"]
)
def test_multiple_choice_reads_the_published_forms(file):
    task = multiple_choice(str(DATA / file), near_duplicates=0)
    for problem in task.problems("dev")[:50]:
        assert len(problem.meta["choices"]) >= 4
        assert f"({problem.answer}) {problem.meta['choices'][problem.answer]}" in problem.prompt
        assert task.verify(problem, f"I choose ({problem.answer}).").right
        wrong = next(letter for letter in problem.meta["choices"] if letter != problem.answer)
        assert task.verify(problem, f"The answer is {wrong}").outcome is Outcome.WRONG


@needs_data
def test_records_under_a_key_and_gz_are_read_from_real_files():
    assert sum(1 for _ in read_records(str(DATA / "bbh" / "date_understanding.json"), "examples")) == 250
    assert sum(1 for _ in read_records(str(DATA / "humaneval" / "HumanEval.jsonl.gz"))) == 164
