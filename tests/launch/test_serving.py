"""stepladder serve, by the official client and by hand: answers, usage, streams, limits, errors, and a stop in the middle."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from stepladder.basics import UserError
from stepladder.launch.chat_protocol import Refused, parse_chat
from stepladder.launch.options_solve import Serve
from stepladder.launch.serving import Server
from stepladder.launch.solving import Solver, Stopped

PROBLEM = "Start 3 ; + 5 ; * 2 ; - 4 ; + 6"
ASKED: dict[str, Any] = {"model": "lab", "messages": [{"role": "user", "content": PROBLEM}]}


# --- what a request says -------------------------------------------------------------------------------------------------


def refused(**change: Any) -> Refused:
    body = {k: v for k, v in {**ASKED, **change}.items() if v is not ...}
    with pytest.raises(Refused) as told:
        parse_chat(json.dumps(body).encode(), "lab")
    assert told.value.body()["error"].keys() == {"message", "type", "param", "code"}
    return told.value


@pytest.mark.parametrize(
    ("change", "status", "told"),
    [
        ({"messages": ...}, 400, "messages is missing"),
        ({"messages": []}, 400, "messages must be a list with a message"),
        ({"messages": ["x"]}, 400, "messages[0] must be an object"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, 400, "messages[0].role must be"),
        ({"messages": [{"role": "user", "content": 3}]}, 400, "messages[0].content must be text"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "may hold text only"),
        ({"messages": [{"role": "user", "content": " "}]}, 400, "empty problem"),
        ({"messages": 2 * ASKED["messages"]}, 400, "one user message, the problem, found 2"),
        ({"messages": [{"role": "system", "content": "x"}]}, 400, "found 0"),
        ({"model": ...}, 400, "model is missing"),
        ({"model": "gpt"}, 404, "this server has 'lab'"),
        ({"budgett": 3}, 400, "did you mean budget?"),
        ({"budget": 0}, 400, "budget must be a whole number of 1 or more"),
        ({"budget": True}, 400, "budget must be a whole number"),
        ({"max_tokens": 1.5}, 400, "max_tokens must be a whole number"),
        ({"temperature": 3}, 400, "temperature must be a number from 0 to 2"),
        ({"top_p": 0}, 400, "top_p must be"),
        ({"stream": 1}, 400, "stream must be true or false"),
        ({"stream_options": 1}, 400, "stream_options must be an object"),
        ({"n": 2}, 400, "n is not supported"),
        ({"stop": ["x"]}, 400, "stop is not supported"),
        ({"tools": [{}]}, 400, "tools is not supported"),
        ({"temperature": float("nan")}, 400, "NaN is no JSON number"),
    ],
)
def test_what_is_not_understood_is_told_with_its_field(change, status, told):
    error = refused(**change)
    assert error.status == status
    assert told in str(error)


def test_a_body_that_is_no_json_is_told():
    for raw in (b"{", b"\xff", b"[" * 100_000, b"3"):
        with pytest.raises(Refused, match="JSON") as told:
            parse_chat(raw, "lab")
        assert told.value.status == 400


def test_what_asks_for_nothing_is_taken():
    body = {
        **ASKED, "n": 1, "stop": None, "presence_penalty": 0.0, "user": "me", "temperature": 0, "max_tokens": 7,
        "messages": [
            {"role": "developer", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "1 +"}, {"type": "text", "text": " 1"}]},
        ],
    }  # fmt: skip
    chat = parse_chat(json.dumps(body).encode(), "lab")
    assert (chat.prompt, chat.system, chat.temperature, chat.max_tokens) == ("1 + 1", "Be brief.", 0.0, 7)
    assert (chat.budget, chat.seed, chat.stream, chat.tree) == (None, None, False, False)


# --- a server in this process, whose search is held up on demand ---------------------------------------------------------


@pytest.fixture(scope="module")
def solver() -> Solver:
    return Solver(Serve(policy="lab", device="cpu", settings={"n": 4}))


class Held:
    """A solver whose searches wait until they are let go; it notes who was searched with whom."""

    def __init__(self, solver: Solver) -> None:
        self.inner, self.batches, self.let_go, self.error = solver, [], threading.Event(), None
        self.task, self.ways, self.ask = solver.task, solver.ways, solver.ask

    def solve(self, asked: Any, ways: Any, goes_on: Any) -> Any:
        self.batches.append(len(asked))
        while not self.let_go.wait(0.01):
            if not goes_on():
                raise Stopped
        if self.error is not None and len(asked) != 1:
            raise self.error
        return self.inner.solve(asked, ways)


@contextlib.contextmanager
def serving(solver: Any, **options: Any) -> Iterator[Server]:
    server = Server(Serve(policy="lab", device="cpu", port=0, settings={"n": 4}, **options), solver)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.config.grace = 0.1
        server.stop()


def post(server: Server, body: Any = ASKED, **headers: str) -> tuple[int, dict[str, Any], dict[str, str]]:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    connection = http.client.HTTPConnection("127.0.0.1", server.server_address[1], timeout=30)
    try:
        connection.request("POST", "/v1/chat/completions", raw, {"Content-Type": "application/json", **headers})
        got = connection.getresponse()
        return got.status, json.loads(got.read()), dict(got.headers)
    finally:
        connection.close()


class Posts:
    """Requests at the same time, each in a thread."""

    def __init__(self) -> None:
        self.answers: list[tuple[int, dict[str, Any], dict[str, str]]] = []
        self.threads: list[threading.Thread] = []

    def start(self, server: Server, body: Any = ASKED) -> None:
        thread = threading.Thread(target=lambda: self.answers.append(post(server, body)))
        thread.start()
        self.threads.append(thread)

    def join(self) -> list[int]:
        for thread in self.threads:
            thread.join(30)
        return sorted(status for status, _, _ in self.answers)


def until(happens: Any) -> None:
    end = time.monotonic() + 20
    while not happens():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_requests_that_wait_are_searched_together_and_too_many_are_told_when_to_come_again(solver):
    held, posts = Held(solver), Posts()
    with serving(held, batch=2, queue=3) as server:
        posts.start(server)
        until(lambda: held.batches == [1])
        for number in range(3):
            posts.start(server, {**ASKED, "seed": number})
            until(lambda number=number: len(server.desk.waiting) == number + 1)
        status, told, headers = post(server)
        assert (status, told["error"]["code"]) == (429, "queue_full")
        assert 1 <= int(headers["Retry-After"]) <= 600
        held.let_go.set()
        assert posts.join() == [200] * 4
    assert held.batches == [1, 2, 1]
    sizes = [answer["usage"]["search"]["batch"]["problems"] for _, answer, _ in posts.answers]
    assert sorted(sizes) == [1, 1, 2, 2]


def test_other_settings_are_another_batch_and_neighbours_change_nothing(solver):
    held, posts = Held(solver), Posts()
    bodies = [{**ASKED, "seed": 1}, {**ASKED, "budget": 2}, {**ASKED, "seed": 2}, {**ASKED, "seed": 1, "tree": True}]
    with serving(held) as server:
        posts.start(server)
        until(lambda: held.batches == [1])
        for number, body in enumerate(bodies):
            posts.start(server, body)
            until(lambda number=number: len(server.desk.waiting) == number + 1)
        held.let_go.set()
        assert posts.join() == [200] * 5
        assert held.batches == [1, 3, 1]
        alone = post(server, bodies[3])[1]
    together = next(answer for _, answer, _ in posts.answers if "tree" in answer["search"])
    strip = lambda tree: [(n["parent"], n["steps"], n["status"], n["tokens"]) for n in tree["nodes"]]
    assert strip(alone["search"]["tree"]) == strip(together["search"]["tree"])
    assert alone["choices"] == together["choices"]
    budgets = sorted(answer["usage"]["search"]["solutions"] for _, answer, _ in posts.answers)
    assert budgets == [2, 4, 4, 4, 4]


def test_an_error_in_a_batch_costs_the_others_nothing(solver):
    held, posts = Held(solver), Posts()
    held.error = UserError("out of memory")
    with serving(held) as server:
        posts.start(server)
        until(lambda: held.batches == [1])
        for _ in range(2):
            posts.start(server)
        until(lambda: len(server.desk.waiting) == 2)
        held.let_go.set()
        assert posts.join() == [200] * 3
    assert held.batches == [1, 2, 1, 1]


def test_a_search_that_takes_too_long_is_given_up(solver, capsys):
    held = Held(solver)
    with serving(held, timeout=0.3) as server:
        status, told, _ = post(server)
        assert (status, told["error"]["code"]) == (504, "timeout")
        until(lambda: not server.desk.running)  # the search itself has stopped
        held.let_go.set()
        assert post(server)[0] == 200


def test_a_search_whose_client_left_is_given_up(solver):
    held = Held(solver)
    with serving(held) as server:
        with socket.create_connection(server.server_address[:2]) as client:
            raw = json.dumps(ASKED).encode()
            head = f"POST /v1/chat/completions HTTP/1.1\r\nContent-Type: application/json\r\nContent-Length: {len(raw)}\r\n\r\n"
            client.sendall(head.encode() + raw)
            until(lambda: held.batches == [1])
        until(lambda: not server.desk.running)
        assert not held.let_go.is_set()


def test_a_stream_that_waits_shows_signs_of_life_and_tells_its_error(solver, monkeypatch):
    monkeypatch.setattr("stepladder.launch.serving._KEEP_ALIVE", 0.1)
    held = Held(solver)
    with serving(held, timeout=0.8) as server:
        connection = http.client.HTTPConnection("127.0.0.1", server.server_address[1], timeout=30)
        connection.request(
            "POST",
            "/v1/chat/completions",
            json.dumps({**ASKED, "stream": True}).encode(),
            {"Content-Type": "application/json"},
        )
        lines = connection.getresponse().read().decode().split("\n\n")
    assert lines[0] == ": searching"
    assert json.loads(lines[-2].removeprefix("data: "))["error"]["code"] == "timeout"


def test_a_search_that_fails_does_not_show_its_inside(solver, capsys):
    held = Held(solver)
    held.let_go.set()
    held.inner = None  # what is called on it raises AttributeError
    with serving(held) as server:
        status, told, _ = post(server)
    assert (status, told["error"]["type"]) == (500, "server_error")
    assert "AttributeError" not in json.dumps(told)
    assert "AttributeError" in capsys.readouterr().err


def test_what_http_refuses_is_told_in_the_same_shape(solver, monkeypatch):
    with serving(solver, max_body=1000) as server:
        status, told, _ = post(server, {**ASKED, "user": "x" * 5000})
        assert (status, told["error"]["code"]) == (413, "body_too_large")
        assert post(server, **{"Content-Type": "text/plain"})[0] == 415
        assert post(server, b"{", **{"Content-Length": "x1"})[0] == 400
        assert post(server, **{"Transfer-Encoding": "chunked"})[0] == 411

        def said(request: bytes) -> str:
            with socket.create_connection(server.server_address[:2], timeout=20) as client:
                client.sendall(request)
                client.shutdown(socket.SHUT_WR)
                return b"".join(iter(lambda: client.recv(65536), b"")).decode()

        assert " 405 " in said(b"GET /v1/chat/completions HTTP/1.1\r\n\r\n")
        assert " 404 " in said(b"GET /elsewhere HTTP/1.1\r\n\r\n")
        assert " 501 " in said(b"BREW /v1/models HTTP/1.1\r\n\r\n")
        assert '"error"' in said(b"nonsense\r\n\r\n")
        assert said(b"POST /v1/chat/completions HTTP/1.1\r\nContent-Length: 50\r\n\r\n{") == ""  # it went away
        monkeypatch.setattr(server, "key", "secret")
        assert post(server)[0] == post(server, Authorization="Bearer wrong")[0] == 401
        assert post(server, Authorization="Bearer secret")[0] == 200
        assert " 401 " in said(b"GET /v1/models HTTP/1.1\r\n\r\n")
        assert " 200 " in said(b"GET /health HTTP/1.1\r\n\r\n")


def test_prompts_are_measured_and_connections_counted(solver, monkeypatch):
    with serving(solver, max_prompt_tokens=8) as server:
        status, told, _ = post(server)
        assert (status, told["error"]["code"]) == (400, "context_length_exceeded")
        assert told["error"]["message"] == "The prompt has 15 tokens; 8 are allowed."
        # The connection before gives its place back when its thread ends: not one of the new ones.
        until(lambda: server.places._value == server.places._initial_value)
        monkeypatch.setattr(server, "places", threading.BoundedSemaphore(1))
        with socket.create_connection(server.server_address[:2]):
            until(lambda: server.places._value == 0)
            # It is refused before it is read: a client that is still writing would find a closed door.
            with socket.create_connection(server.server_address[:2]) as refused:
                refused.settimeout(20)
                told = b"".join(iter(lambda: refused.recv(4096), b"")).decode()
            assert told.startswith("HTTP/1.1 429 ")
            assert json.loads(told.rpartition("\r\n")[2])["error"]["code"] == "too_many_connections"
    with serving(solver) as server:
        long = " ; ".join(["Start 3"] + ["+ 5"] * 300)
        status, told, _ = post(server, {**ASKED, "messages": [{"role": "user", "content": long}]})
        assert (status, told["error"]["code"]) == (400, "context_length_exceeded")
        status, told, _ = post(server, {**ASKED, "messages": [{"role": "user", "content": "What is 1 + 1?"}]})
        assert status == 400
        assert "expected a problem such as Start 3" in told["error"]["message"]
        status, told, _ = post(server, {**ASKED, "budget": 5})
        assert (status, told["error"]["param"]) == (400, "budget")
        system = [{"role": "system", "content": "x"}, *ASKED["messages"]]
        assert "no chat template" in post(server, {**ASKED, "messages": system})[1]["error"]["message"]
        assert (
            "half a surrogate"
            in post(server, {**ASKED, "messages": [{"role": "user", "content": "\ud800"}]})[1]["error"]["message"]
        )


# --- a real process and the official client ------------------------------------------------------------------------------


class Process:
    """`stepladder serve` on a free port."""

    def __init__(self, *arguments: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "stepladder", "serve", "--policy", "lab", "--port", "0", "--device", "cpu", *arguments],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        line = self.process.stdout.readline()
        found = re.search(r"at (http://127\.0\.0\.1:\d+/v1)", line)
        assert found, line + self.process.stderr.read()
        self.url = found[1]

    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=self.url, api_key="none", max_retries=0, timeout=60)


@pytest.fixture(scope="module")
def process() -> Iterator[Process]:
    started = Process("--settings", "{n: 8}", "--max_budget", "3000", "--max_body", "20000")
    yield started
    if started.process.poll() is None:
        started.process.kill()
    started.process.communicate()


def test_the_official_client_gets_an_answer_and_all_that_was_spent(process):
    client = process.client()
    [model] = client.models.list().data
    assert model.id == "lab"
    assert client.models.retrieve("lab").search["max_budget"] == 3000
    reply = client.chat.completions.create(**ASKED, extra_body={"budget": 16, "tree": True})
    [choice] = reply.choices
    assert choice.finish_reason == "stop"
    assert choice.message.role == "assistant"
    assert choice.message.content.strip().splitlines()[-1].strip() == f"Answer: {reply.search['answer']}"
    # Every token is accounted for, the chosen solution's from the tree.
    usage, tree = reply.usage, reply.search["tree"]
    assert usage.prompt_tokens == 3 + 3 * 4  # Start, a number and the line break; semicolon, sign and number
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert usage.search["generated_tokens"] == sum(node["tokens"] for node in tree["nodes"])
    final = tree["finals"][tree["chosen"]]
    assert usage.completion_tokens == tree["nodes"][final["node"]]["tokens"]
    assert usage.search["solutions"] == usage.search["budget"] == 16 == len(tree["finals"])
    assert usage.search["batch"]["generated_tokens"] == usage.search["generated_tokens"]
    assert usage.search["batch"]["flops"] > 0
    votes = [vote["count"] for vote in reply.search["votes"]]
    assert votes == sorted(votes, reverse=True)
    # The same request, the same answer; another seed, other samples.
    again = client.chat.completions.create(**ASKED, extra_body={"budget": 16, "tree": True})
    assert again.choices == reply.choices
    assert again.search == reply.search
    other = client.chat.completions.create(**ASKED, seed=5, extra_body={"budget": 16, "tree": True})
    assert other.search["tree"]["nodes"] != tree["nodes"]
    greedy = client.chat.completions.create(**ASKED, temperature=0, max_tokens=3, extra_body={"budget": 1})
    assert (greedy.choices[0].finish_reason, greedy.usage.completion_tokens) == ("length", 3)


def test_a_stream_gives_the_same_text_step_by_step(process):
    client = process.client()
    whole = client.chat.completions.create(**ASKED)
    stream = list(client.chat.completions.create(**ASKED, stream=True, stream_options={"include_usage": True}))
    pieces = [chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices]
    assert "".join(pieces) == whole.choices[0].message.content
    assert len([piece for piece in pieces if piece]) >= 3
    assert [c.choices[0].finish_reason for c in stream if c.choices][-1] == "stop"
    assert stream[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert stream[-1].usage.search["generated_tokens"] == whole.usage.search["generated_tokens"]
    assert all(chunk.usage is None for chunk in stream[:-1])
    assert stream[-2].search["answer"] == whole.search["answer"]
    assert len({chunk.id for chunk in stream}) == 1


def test_the_official_client_knows_the_errors(process):
    client = process.client()
    create = client.chat.completions.create
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        create(model="gpt", messages=ASKED["messages"])
    with pytest.raises(openai.BadRequestError, match="budget must be 3000 or less") as told:
        create(**ASKED, extra_body={"budget": 3001})
    assert told.value.param == "budget"
    with pytest.raises(openai.BadRequestError, match="n is not supported"):
        create(**ASKED, n=2)
    with pytest.raises(openai.APIStatusError) as told:
        create(**ASKED, user="x" * 30_000)
    assert told.value.status_code == 413


def test_sigterm_finishes_what_runs_and_refuses_what_is_new(process):
    client, found = process.client(), []
    long = threading.Thread(
        target=lambda: found.append(client.chat.completions.create(**ASKED, extra_body={"budget": 3000}))
    )
    long.start()
    host, port = process.url.removeprefix("http://").removesuffix("/v1").split(":")

    def health() -> dict[str, Any]:
        connection = http.client.HTTPConnection(host, int(port), timeout=20)
        connection.request("GET", "/health")
        got = connection.getresponse()
        return {"code": got.status, **json.loads(got.read())}

    until(lambda: health()["running"] == 1)
    assert not found
    process.process.send_signal(signal.SIGTERM)
    until(lambda: health()["status"] == "stopping")
    assert health()["code"] == 503
    with pytest.raises(openai.InternalServerError, match="stopping") as told:
        process.client().chat.completions.create(**ASKED)
    assert told.value.status_code == 503
    assert told.value.response.headers["Retry-After"]
    assert not found  # all of that while the long one still ran
    long.join(60)
    assert found[0].usage.search["solutions"] == 3000
    out, err = process.process.communicate(timeout=30)
    assert process.process.returncode == 0, err
    assert out.strip().endswith("stopped")
    assert "Traceback" not in err


def test_mistakes_are_told_before_anything_runs(tmp_path):
    from stepladder.config import build

    for values, told in (
        ({"port": 70000}, "port must be 65535 or less"),
        ({"max_budget": 4}, "max_budget 4 is less than n 16"),
        ({"timeout": 0.0}, "timeout must be more than 0"),
        ({"batch": 0}, "batch must be 1 or more"),
        ({"choose": "best"}, "there is no reward model"),
        ({"strategy": "beam"}, "reward is missing"),
        ({"strategy": "bean"}, "did you mean beam?"),
    ):
        with pytest.raises(UserError, match=re.escape(told)):
            build(Serve, {"policy": "lab", **values}, "stepladder serve")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(UserError, match="cannot listen on"):
            Server(Serve(policy="lab", port=taken.getsockname()[1]), None)
