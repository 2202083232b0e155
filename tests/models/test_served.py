"""Judges behind a server, against one made here on the loopback interface."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from stepladder.basics import UserError
from stepladder.models.critic import Critic
from stepladder.models.engine import Sampling
from stepladder.models.judges import StepScorer
from stepladder.models.served import ChatWriter, ServedRewardModel, Server
from stepladder.models.step_format import StepFormat


@contextlib.contextmanager
def serving(reply: Any) -> Iterator[tuple[str, list[tuple[str, dict[str, Any]]]]]:
    """(address, requests) of a server; `reply` maps (path, body) to (status, JSON)."""
    asked: list[tuple[str, dict[str, Any]]] = []

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: Any) -> None: ...

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            asked.append((self.path, body))
            status, value = reply(self.path, body)
            data = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()


def chat(text: str) -> dict[str, Any]:
    return {"choices": [{"message": {"content": text}}], "usage": {"completion_tokens": 3, "prompt_tokens": 20}}


def test_a_served_critic_asks_once_for_each_vote_and_counts_tokens():
    trouble = iter([503])  # passes: it is asked again

    def reply(path, body):
        if status := next(trouble, None):
            return status, {"error": {"message": "busy"}}
        return 200, chat(f"I think \\boxed{{{0 if 'bad' in body['messages'][0]['content'] else -1}}}")

    with serving(reply) as (url, asked):
        writer = ChatWriter(url, "judge", Sampling(100, 1.0, 0.9), retries=2)
        votes = Critic(writer, name="judge", samples=3, seed=1).votes([("p", ["bad"]), ("p", ["good"])])
    assert votes == [[0, 0, 0], [-1, -1, -1]]
    assert len(asked) == 7
    assert {path for path, _ in asked} == {"/v1/chat/completions"}
    bodies = [body for _, body in asked]
    assert len({b["seed"] for b in bodies}) == 6
    assert all((b["model"], b["temperature"], b["top_p"], b["max_tokens"]) == ("judge", 1.0, 0.9, 100) for b in bodies)
    assert (writer.ledger.generated_tokens, writer.ledger.prefilled_tokens, writer.ledger.policy_calls) == (18, 120, 6)


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        ((404, {"error": {"message": "no model of that name"}}), "refuses /chat/completions .status 404: no model"),
        ((200, {"choices": []}), "no message in the answer"),
        ((200, [1]), "expected a JSON object"),
    ],
)
def test_a_server_that_does_not_answer_as_it_should_is_one_sentence(answer, told):
    with serving(lambda *_: answer) as (url, _):
        writer = ChatWriter(url, "m", Sampling(5, 0.0), retries=0)
        with pytest.raises(UserError, match=told):
            writer.write(["p", "q"], [[1], [2]])


def test_an_address_that_is_none():
    with pytest.raises(UserError, match="must look like http"):
        Server("localhost")
    with pytest.raises(UserError, match="no server answers"):
        ChatWriter("http://127.0.0.1:9", "m", Sampling(5, 0.0), retries=0).write(["p"], [[1]])


@pytest.fixture
def layout(lab_words, tmp_path):
    """A folder with a tokenizer and the format of a two-class reward model."""
    lab_words.save_pretrained(tmp_path)
    StepFormat.for_policy(lab_words, "\n").for_reward("two_class", "hard").save(tmp_path)
    return str(tmp_path)


CASES = [
    ("Start 3 ; + 5", ["3 + 5 = 8", "Answer: 8"]),
    ("Start 1", ["Answer: 1"]),
    ("Start 1", ["Answer: 1"]),
    ("q", []),
]


@pytest.mark.parametrize("pooling", ["tokens", "steps"])
def test_step_scores_of_a_served_reward_model(layout, lab_words, pooling):
    newline = lab_words.convert_tokens_to_ids("\n")

    def reply(path, body):
        ids = body["input"]
        at = [i for i, token in enumerate(ids) if token == newline or pooling == "tokens"]
        return 200, {"data": [{"data": [[1 - i / 100, i / 100] for i in at]}]}  # p(right) is the place / 100

    with serving(reply) as (url, asked):
        model = ServedRewardModel.load(url + "/v1", "prm", layout)
        scores = model.score(CASES)
    step_format = StepFormat.load(layout)
    want = [[end / 100 for end in step_format.encode(lab_words, p, s).step_ends] for p, s in CASES]
    assert scores == [pytest.approx(one) for one in want]
    assert len(asked) == 2  # equal solutions are asked for once, and one without a step not at all
    assert all(path == "/pooling" and body["model"] == "prm" for path, body in asked)
    assert model.ledger.reward_tokens == sum(len(body["input"]) for _, body in asked)
    assert isinstance(model, StepScorer)


@pytest.mark.parametrize(
    ("data", "told"),
    [
        ([[0.1, 0.9]] * 3, "3 values for 5 tokens and 1 steps"),
        ([[0.3]], "a two_class head gives 2 values a step, found 1"),
        ([[-3.0, 4.0]], "expected probabilities, found 4 to 4"),
        (None, "no values in the answer"),
    ],
)
def test_values_that_are_no_step_scores_are_one_sentence(layout, data, told):
    with serving(lambda *_: (200, {"data": [{"data": data}]})) as (url, _), pytest.raises(UserError, match=told):
        ServedRewardModel.load(url, "prm", layout).score([("Start 1", ["Answer: 1"])])


def test_a_policy_is_no_served_reward_model(lab_words, tmp_path):
    lab_words.save_pretrained(tmp_path)
    StepFormat.for_policy(lab_words, "\n").save(tmp_path)
    with pytest.raises(UserError, match="it is a policy and not a reward model"):
        ServedRewardModel.load("http://127.0.0.1:9", "prm", str(tmp_path))
