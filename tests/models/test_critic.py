"""Critics: what they are asked, how their verdicts are read, and how votes become an index and step scores."""

from __future__ import annotations

import pytest

from stepladder.basics import UserError
from stepladder.models.critic import (
    Critic,
    EngineWriter,
    critic_prompt,
    majority_index,
    read_index,
    unreadable,
    vote_scores,
)
from stepladder.models.engine import Sampling
from stepladder.models.judges import ErrorFinder, StepScorer, load_judge
from stepladder.models.ledger import Ledger
from stepladder.models.step_format import StepFormat
from stepladder.models.step_metrics import predicted_first_error


def test_the_prompt_numbers_the_paragraphs_from_0():
    text = critic_prompt("What is {paragraphs}?", ["first", "second {problem}"])
    assert "What is {paragraphs}?" in text  # a problem that looks like a field stays as it is
    assert "<paragraph_0>\nfirst\n</paragraph_0>\n\n<paragraph_1>\nsecond {problem}\n</paragraph_1>" in text
    assert "\\boxed{}" in text
    assert critic_prompt("p", ["s"], "{problem}|{paragraphs}") == "p|<paragraph_0>\ns\n</paragraph_0>"


@pytest.mark.parametrize(
    ("text", "index"),
    [
        ("so \\boxed{1}", 1),
        ("\\boxed{-1}", -1),
        ("\\boxed{0} no, \\boxed{ 2 }.", 2),  # the last one counts
        ("\\boxed{1} or rather \\boxed{none}", None),
        ("\\boxed{}", None),
        ("paragraph 1", None),
        ("", None),
        ("\\boxed{3}", None),  # three steps: there is no step 3
        ("\\boxed{-2}", None),
        ("\\boxed{1.0}", None),
        ("\\boxed{" + "9" * 30 + "}", None),
    ],
)
def test_the_last_boxed_integer_is_the_verdict(text, index):
    assert read_index(text, 3) == index


def test_votes():
    assert majority_index([2, None, 1, 1]) == 1
    assert majority_index([2, 1]) == 2  # a tie: the first named
    assert majority_index([-1, 3, -1]) == -1
    assert majority_index([None, None]) is None
    assert majority_index([]) is None
    assert unreadable([[None, 1], [None], []]) == 2


def test_scores_from_votes():
    # -1 says that every step is right; 1 that step 0 is.
    assert vote_scores([-1, 1, None, 0], 3) == pytest.approx([2 / 3, 1 / 3, 1 / 3])
    assert vote_scores([None], 2) == [0.5, 0.5]
    assert vote_scores([-1], 0) == []
    for vote in (-1, 0, 1, 2):  # one vote comes back through a threshold
        assert predicted_first_error(vote_scores([vote], 3)) == vote


class Written:
    """Answers by a function of (prompt, seed); keeps what it was asked."""

    def __init__(self, answer):
        self.answer, self.ledger, self.asked = answer, Ledger(), []

    def write(self, prompts, seeds):
        self.asked += list(zip(prompts, seeds, strict=True))
        return [[self.answer(p, s) for s in own] for p, own in zip(prompts, seeds, strict=True)]


def test_a_critic_votes_with_seeds_that_belong_to_the_solution():
    writer = Written(lambda prompt, seed: f"\\boxed{{{seed % 2}}}" if "odd" in prompt else "no idea")
    critic = Critic(writer, name="c", samples=4, seed=7)
    one, two = ("p", ["odd", "b"]), ("p", ["even"])
    both = critic.votes([one, two])
    assert [len(own) for own in both] == [4, 4]
    assert both[1] == [None] * 4
    assert critic.votes([two, one]) == both[::-1]
    assert len({s for _, own in writer.asked[:2] for s in own}) == 8
    assert critic.score([one]) == [vote_scores(both[0], 2)]
    assert isinstance(critic, ErrorFinder)
    assert isinstance(critic, StepScorer)
    with pytest.raises(UserError, match=r"must contain \{paragraphs\}"):
        Critic(writer, name="c", prompt="{problem}?")


def test_a_critic_over_an_engine(lab_words, fake_engine):
    answer = lab_words("Answer: 1")["input_ids"]
    engine = fake_engine(lab_words, lambda prefix, seed: [*answer, lab_words.eos_token_id], context=50)
    writer = EngineWriter(engine, StepFormat.for_policy(lab_words, "\n"), Sampling(8, 0.0))
    short, long = "Start 1", " ".join(["1"] * 60)
    assert writer.write([short, long], [[1, 2], [3]]) == [["Answer: 1"] * 2, [""]]
    assert writer.unanswered == 1
    assert engine.asked[0].prefix == tuple(lab_words("Start 1")["input_ids"])


def test_an_unknown_kind_is_told():
    with pytest.raises(UserError, match="kind must be one of prm, critic, served_prm, served_critic, found 'oracle'"):
        load_judge("oracle", "m")
