"""One layout of prompts and steps as ids: nothing joined and tokenised again, and a file that says so."""

from __future__ import annotations

import dataclasses
import json
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stepladder.basics import UserError
from stepladder.models.step_format import ADVISED_AGGREGATION, LabelKind, StepFormat

TEMPLATE = (
    "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)


@pytest.fixture
def lines(merging_tokenizer) -> StepFormat:
    return StepFormat.for_policy(merging_tokenizer, "\n")


def test_separators_are_appended_as_ids_and_not_by_joining_strings(merging_tokenizer, lines):
    steps = ["2 + 2 = 4", "So it is."]
    encoded = lines.encode(merging_tokenizer, "What is 2 + 2?", steps)
    prompt = tuple(merging_tokenizer("What is 2 + 2?")["input_ids"])
    [newline] = lines.separator_ids
    assert encoded.ids[: encoded.prompt_length] == prompt
    assert encoded.root == len(prompt) - 1
    # Each step's own ids, then the separator.
    want = prompt
    ends = []
    for step in steps:
        want += (*merging_tokenizer(step)["input_ids"], newline)
        ends.append(len(want) - 1)
    assert encoded.ids == want
    assert encoded.step_ends == tuple(ends)
    assert all(encoded.ids[end] == newline for end in encoded.step_ends)
    # A joined text merges the separators with what stands before them: no separator is left to read a score at.
    joined = merging_tokenizer("".join(step + "\n" for step in steps))["input_ids"]
    assert newline not in joined
    assert tuple(joined) != encoded.ids[len(prompt) :]
    assert merging_tokenizer.decode(joined) == merging_tokenizer.decode(encoded.ids[len(prompt) :])


def test_separators_of_several_tokens_end_at_their_last(merging_tokenizer):
    step_format = StepFormat.for_policy(merging_tokenizer, " END\n")
    assert len(step_format.separator_ids) > 1
    encoded = step_format.encode(merging_tokenizer, "x", ["a", "b"])
    size = len(step_format.separator_ids)
    for end in encoded.step_ends:
        assert encoded.ids[end - size + 1 : end + 1] == step_format.separator_ids


@settings(max_examples=60, deadline=None)
@given(prompt=st.text(min_size=1, max_size=20), steps=st.lists(st.text(max_size=15), max_size=5))
def test_a_solution_that_grows_keeps_the_ids_it_had(merging_tokenizer, prompt, steps):
    prompt = prompt.encode("utf-8", "ignore").decode() or "x"
    steps = [step.encode("utf-8", "ignore").decode() for step in steps]
    step_format = StepFormat.for_policy(merging_tokenizer, "\n")
    whole = step_format.encode(merging_tokenizer, prompt, steps)
    for length in range(len(steps) + 1):
        part = step_format.encode(merging_tokenizer, prompt, steps[:length])
        assert part.ids == whole.ids[: len(part.ids)]
        assert part.step_ends == whole.step_ends[:length]
        assert len(part.ids) == (part.step_ends[-1] + 1 if length else part.prompt_length)


def test_an_end_of_sequence_that_a_tokenizer_adds_is_not_part_of_the_prompt(merging_tokenizer, lines):
    class Closing:
        eos_token_id = 1

        def __call__(self, text, **_):
            return {"input_ids": [*merging_tokenizer(text)["input_ids"], 1]}

    assert lines.encode_prompt(Closing(), "ab") == tuple(merging_tokenizer("ab")["input_ids"])


def test_the_template_and_the_chat_template(merging_tokenizer, lines):
    plain = dataclasses.replace(lines, prompt_template="Q: {prompt} {x}\nA:")
    assert merging_tokenizer.decode(plain.encode_prompt(merging_tokenizer, "1 {prompt}?")) == "Q: 1 {prompt}? {x}\nA:"
    chat = dataclasses.replace(lines, chat=True, system="Be brief.", prompt_template="Solve: {prompt}")
    with pytest.raises(UserError, match="has none: set chat: false"):
        chat.encode_prompt(merging_tokenizer, "x")
    merging_tokenizer.chat_template = TEMPLATE
    try:
        text = merging_tokenizer.decode(chat.encode_prompt(merging_tokenizer, "1 + 1"))
        assert text == "[system] Be brief.\n[user] Solve: 1 + 1\n[assistant] "
        silent = dataclasses.replace(chat, system=None)
        assert merging_tokenizer.decode(silent.encode_prompt(merging_tokenizer, "1")).startswith("[user] Solve: 1\n")
    finally:
        merging_tokenizer.chat_template = None


def test_saved_and_loaded_formats_are_equal(tmp_path, lines):
    for one in (
        lines,
        dataclasses.replace(lines, chat=True, system="é\n", prompt_template="{prompt}\n"),
        lines.for_reward("two_class", "soft"),
        lines.for_reward("scalar", "human"),
    ):
        one.save(tmp_path)
        assert StepFormat.load(tmp_path) == one
    assert isinstance(StepFormat.load(tmp_path).separator_ids, tuple)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"head": "three_class"}, "head must be one of none, two_class, scalar, .*found 'three_class'"),
        ({"head": "two_class", "positive_class": None}, "needs positive_class 0 or 1"),
        ({"head": "two_class", "positive_class": 2}, "needs positive_class 0 or 1, found 2"),
        ({"label_kind": "warm"}, "label_kind must be one of"),
        ({"aggregation": "max"}, "aggregation must be one of last, min, prod, mean, found 'max'"),
        ({"separator_ids": []}, "separator_ids is empty"),
        ({"separator_ids": 5}, "separator_ids"),
        ({"separator_ids": "\n"}, "separator_ids must be token ids"),
        ({"separator_ids": [1.5]}, "separator_ids must be token ids"),
        ({"prompt_template": "no place"}, "prompt_template must contain {prompt}"),
        ({"prompt_template": 3}, "prompt_template"),
        ({"arrangement": "rows"}, "arrangement must be one of steps, text, turns, answer, found 'rows'"),
        ({"head": "label_tokens", "positive_class": 0}, "a label_tokens head needs two label_ids"),
        ({"head": "label_tokens", "positive_class": 0, "label_ids": [3, 3]}, "needs two label_ids"),
        ({"head": "mlp_two_class"}, "needs positive_class 0 or 1, found None"),
        ({"label_ids": "+-"}, "label_ids must be token ids"),
        ({"tail": "\n"}, "tail belongs to the arrangement text"),
        ({"arrangement": "turns", "separator_ids": []}, "needs an answer"),
        ({"answer": "+"}, "needs an answer, found"),
        ({"sep": "\n"}, "not a step format"),
    ],
)
def test_a_broken_file_is_one_sentence(tmp_path, lines, change, message):
    record = {**dataclasses.asdict(lines), **change}
    (tmp_path / "step_format.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match=message) as raised:
        StepFormat.load(tmp_path)
    assert str(tmp_path / "step_format.json") in str(raised.value)


def test_files_of_our_own_models_hold_what_older_versions_know(tmp_path, lines):
    lines.for_reward("two_class", "soft").save(tmp_path)
    record = json.loads((tmp_path / "step_format.json").read_text())
    assert list(record) == [
        "separator", "separator_ids", "prompt_template", "chat", "system", "head", "positive_class", "label_kind",
        "aggregation", "version",
    ]  # fmt: skip
    foreign = dataclasses.replace(
        lines, arrangement="text", tail="\n", head="label_tokens", positive_class=0, label_ids=(7, 9), offset=-0.25
    )
    foreign.save(tmp_path)
    assert StepFormat.load(tmp_path) == foreign
    assert set(json.loads((tmp_path / "step_format.json").read_text())) - set(record) == {
        "arrangement", "tail", "label_ids", "offset",
    }  # fmt: skip
    trained = foreign.for_reward("scalar", "soft")  # a head of our own on that layout
    assert (trained.label_ids, trained.offset, trained.arrangement, trained.classes) == ((), 0.0, "text", 1)
    assert foreign.classes == 2
    assert foreign.layout() != lines.layout()


def test_a_text_is_tokenised_whole_and_its_tags_are_found_by_their_place(merging_tokenizer):
    [newline] = merging_tokenizer("\n")["input_ids"]
    whole = StepFormat("\n", (newline,), prompt_template="{prompt} ", arrangement="text", tail="then ")
    encoded = whole.encode(merging_tokenizer, "a\nb", ["So it is 3", "x"])
    text = "a\nb So it is 3\nthen x\nthen "
    assert encoded.ids == tuple(merging_tokenizer(text)["input_ids"])
    assert merging_tokenizer.decode(encoded.ids[: encoded.prompt_length]) == "a\nb "
    said = [merging_tokenizer.decode(encoded.ids[: end + 1]) for end in encoded.step_ends]
    assert said == ["a\nb So it is 3\n", "a\nb So it is 3\nthen x\n"]  # not the newline of the problem
    with pytest.raises(UserError, match="merges the step tag"):
        whole.encode(merging_tokenizer, "a", ["2 + 2 = 4"])  # "4\n" is one token


def test_turns_are_read_at_the_token_that_predicts_the_answer(merging_tokenizer):
    turns = StepFormat("", (), prompt_template="{prompt} ", chat=True, system="s", arrangement="turns", answer="+")
    merging_tokenizer.chat_template = TEMPLATE
    try:
        encoded = turns.encode(merging_tokenizer, "Q", ["one", "two"])
        whole = "[system] s\n[user] Q one\n[assistant] +\n[user] two\n[assistant] +\n"
        assert encoded.ids == tuple(merging_tokenizer(whole)["input_ids"])
        said = [merging_tokenizer.decode(encoded.ids[: end + 1]) for end in encoded.step_ends]
        assert said == [whole.split("+")[0], "+".join(whole.split("+")[:2])]
        assert merging_tokenizer.decode(encoded.ids[: encoded.prompt_length]).endswith("[user] Q ")
        assert encoded.read_at == encoded.step_ends
        [root, steps] = turns.encode_all(merging_tokenizer, [("Q", ["one", "two"])], root=True)[0]
        assert merging_tokenizer.decode(root.ids) == "[system] s\n[user] Q\n[assistant] "
        assert root.read_at == (len(root.ids) - 1,)
        assert steps == encoded
        assert turns.encode_all(merging_tokenizer, [("Q", ["one", "two"])], root=False) == [[encoded]]
        # A template that writes earlier turns otherwise than the last one has no fixed ids.
        merging_tokenizer.chat_template = TEMPLATE.replace("{{ m['content'] }}", "{{ loop.length }}{{ m['content'] }}")
        with pytest.raises(UserError, match="changes turns that were written before"):
            turns.encode(merging_tokenizer, "Q", ["one", "two"])
    finally:
        merging_tokenizer.chat_template = None


def test_an_answer_is_read_whole_once_for_each_prefix(merging_tokenizer):
    answer = StepFormat("\n", (), arrangement="answer", prompt_template="{prompt}: ")
    for root, texts in ((False, ["Q: a", "Q: a\nb"]), (True, ["Q: ", "Q: a", "Q: a\nb"])):
        [parts] = answer.encode_all(merging_tokenizer, [("Q", ["a", "b"])], root=root)
        assert [merging_tokenizer.decode(one.ids) for one in parts] == texts
        assert [one.read_at for one in parts] == [(len(one.ids) - 1,) for one in parts]
    with pytest.raises(UserError, match="it has no positions of single steps"):
        answer.encode(merging_tokenizer, "Q", ["a"])


def test_a_missing_or_foreign_file_is_one_sentence(tmp_path):
    with pytest.raises(UserError, match="no such file; a model used by Stepladder has its step format beside it"):
        StepFormat.load(tmp_path)
    for text, message in [("{", "not valid JSON"), ("[1]", "not a step format"), ("{}", "not a step format")]:
        (tmp_path / "step_format.json").write_text(text)
        with pytest.raises(UserError, match=message):
            StepFormat.load(tmp_path)
    (tmp_path / "step_format.json").write_text('{"separator_ids": [1]}')
    with pytest.raises(UserError, match="separator"):
        StepFormat.load(tmp_path)


def test_reward_formats_keep_the_layout_and_advise_an_aggregation(lines):
    soft, human = lines.for_reward("two_class", "soft"), lines.for_reward("scalar", "human")
    assert (soft.positive_class, soft.aggregation) == (1, "last")
    assert (human.positive_class, human.aggregation) == (None, "min")
    assert soft.layout() == human.layout() == lines.layout()
    assert dataclasses.replace(lines, separator_ids=(9,)).layout() != lines.layout()
    assert set(ADVISED_AGGREGATION) == set(get_args(LabelKind))


def test_a_separator_without_tokens_is_refused(lab_words):
    with pytest.raises(UserError, match="no token for the step separator ' '"):
        StepFormat.for_policy(lab_words, " ")
