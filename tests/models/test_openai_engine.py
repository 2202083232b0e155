"""The engine over HTTP, against a server made here that misbehaves on demand and against a real `transformers serve`."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch

from stepladder.basics import UserError, fold_seed
from stepladder.models.engine import Request, Sampling, StopReason
from stepladder.models.openai_engine import OpenAIEngine
from stepladder.models.openai_protocol import EXTENSIONS
from stepladder.models.transformers_engine import TransformersEngine


class Server:
    """A completions server whose samples a function writes: (prompt ids, seed) -> ids.

    `trouble` is asked before every reply and may send something else; it returns True when it did. Without `ids` it takes and
    gives only text, and without `vllm` it refuses unknown fields and cuts stop strings off.
    """

    def __init__(self, tokenizer: Any, write: Callable[[tuple[int, ...], int], list[int]], **options: Any) -> None:
        self.tokenizer, self.write = tokenizer, write
        self.ids, self.vllm = options.get("ids", True), options.get("vllm", True)
        self.context = options.get("context", 512)
        self.trouble: Callable[[Server, BaseHTTPRequestHandler], bool] = options.get("trouble", lambda *_: False)
        self.bodies: list[dict[str, Any]] = []
        self.answered: Counter[tuple[tuple[int, ...], int]] = Counter()
        self.posts = 0
        self.busy = self.most_busy = 0
        self.lock = threading.Lock()
        self.port = 0
        self.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def start(self) -> None:
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: Any) -> None: ...

            def do_GET(self) -> None:
                send(self, 200, {"data": [{"id": "served", "max_model_len": outer.context}]})

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                with outer.lock:
                    outer.posts += 1
                    outer.busy += 1
                    outer.most_busy = max(outer.most_busy, outer.busy)
                    outer.bodies.append(body)
                try:
                    if not outer.trouble(outer, self):
                        outer.reply(self, body)
                finally:
                    with outer.lock:
                        outer.busy -= 1

        class Http(ThreadingHTTPServer):
            request_queue_size = 128  # the default of 5 resets connections that come together

        self.http = Http(("127.0.0.1", self.port), Handler)
        self.port = self.http.server_address[1]
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()

    def die(self) -> None:
        self.http.shutdown()
        self.http.server_close()

    def reply(self, handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
        if self.path_missing(handler) or body["model"] != "served":
            return send(handler, 404, {"error": {"message": f"The model `{body['model']}` does not exist."}})
        if not self.vllm and set(body) & set(EXTENSIONS):
            return send(handler, 400, {"error": {"message": "Unrecognized request argument supplied: top_k"}})
        prompt = body["prompt"]
        if not self.ids and "logprobs" in body:
            return send(handler, 400, {"error": {"message": "logprobs are not supported"}})
        if not self.ids and not isinstance(prompt, str):
            return send(handler, 400, {"error": {"message": "prompt must be a string"}})
        prompt_ids = tuple(self.tokenizer(prompt)["input_ids"] if isinstance(prompt, str) else prompt)
        if len(prompt_ids) + body["max_tokens"] > self.context:
            message = f"This model's maximum context length is {self.context} tokens."
            return send(handler, 400, {"error": {"message": message}})
        ids = self.write(prompt_ids, body["seed"])
        finish, reason = "length", None
        for count in range(1, len(ids) + 1):
            text = self.tokenizer.decode(ids[:count])
            reason = next((s for s in body.get("stop", []) if s in text), None)
            if ids[count - 1] == self.tokenizer.eos_token_id or reason:
                ids, finish = ids[:count], "stop"
                break
        ids = ids[: body["max_tokens"]]
        text = self.tokenizer.decode(ids, skip_special_tokens=True)
        choice: dict[str, Any] = {"text": text, "finish_reason": finish}
        if self.vllm:
            choice["stop_reason"] = reason
        elif reason:
            choice["text"] = text[: text.index(reason)]
        if self.ids and body.get("return_token_ids"):
            choice["token_ids"] = ids
            choice["logprobs"] = {"tokens": [f"token_id:{i}" for i in ids], "token_logprobs": [-i / 10 for i in ids]}
        usage = {"prompt_tokens": len(prompt_ids), "completion_tokens": len(ids)}
        with self.lock:
            self.answered[prompt_ids, body["seed"]] += 1
        send(handler, 200, {"choices": [choice], "usage": usage})

    def path_missing(self, handler: BaseHTTPRequestHandler) -> bool:
        return handler.path != "/v1/completions"


def send(handler: BaseHTTPRequestHandler, status: int, body: Any, **headers: str) -> None:
    data = json.dumps(body).encode()
    with contextlib.suppress(OSError):
        handler.send_response(status)
        handler.send_header("content-type", "application/json")
        handler.send_header("content-length", str(len(data)))
        for name, value in headers.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.end_headers()
        handler.wfile.write(data)


@pytest.fixture
def server(lab_words: Any) -> Iterator[Callable[..., Server]]:
    made: list[Server] = []

    def make(**options: Any) -> Server:
        tokenizer = options.pop("tokenizer", lab_words)
        made.append(Server(tokenizer, options.pop("write", writer(lab_words)), **options))
        return made[-1]

    yield make
    for one in made:
        with contextlib.suppress(OSError):
            one.die()


@pytest.fixture(autouse=True)
def _fast_backoff(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tenth of the real waiting time."""
    real = threading.Event.wait
    monkeypatch.setattr(threading.Event, "wait", lambda self, timeout=None: real(self, timeout and timeout / 10))


def writer(tokenizer: Any) -> Callable[[tuple[int, ...], int], list[int]]:
    """Writes 3 to 9 numbers that depend on prompt and seed, ending in EOS for half of the seeds."""

    def write(prompt: tuple[int, ...], seed: int) -> list[int]:
        numbers = tokenizer.convert_tokens_to_ids([str(i) for i in range(10)])
        ids = [numbers[fold_seed(seed, *prompt, i) % 10] for i in range(3 + seed % 7)]
        return [*ids, tokenizer.eos_token_id] if seed % 2 else ids

    return write


def requests_of(tokenizer: Any, problems: int = 5, samples: int = 8) -> list[Request]:
    """Prompts of different lengths, each sample with a seed as large as real ones are."""
    texts = ["Start " + " ; + 1 = ".join(str(n) for n in range(2 + p)) for p in range(problems)]
    return [Request(tuple(tokenizer(t)["input_ids"]), tuple(fold_seed(7, t, i) for i in range(samples))) for t in texts]


def expected(engine: OpenAIEngine, asked: list[Request], server: Server) -> None:
    """Asserts that every sample is what the server writes for its prompt and seed: nothing lost, nothing twice, in order."""
    found = engine.generate(asked, Sampling(16))
    assert [[s.ids for s in samples] for samples in found] == [
        [tuple(server.write(r.prefix, seed)) for seed in r.seeds] for r in asked
    ]
    total = sum(len(r.seeds) for r in asked)
    assert engine.ledger.policy_calls == total
    assert engine.ledger.generated_tokens == sum(len(s.ids) for samples in found for s in samples)
    assert engine.ledger.prefilled_tokens == sum(len(r.prefix) for r in asked)  # each shared prefix once


def test_samples_come_in_order_with_their_seeds_ids_and_logprobs(server: Any, lab_words: Any) -> None:
    served = server()
    asked = requests_of(lab_words)
    engine = OpenAIEngine(served.url, "served", lab_words, concurrency=4, parameters=10)
    expected(engine, asked, served)
    assert served.answered == {(r.prefix, seed): 1 for r in asked for seed in r.seeds}
    assert {b["n"] for b in served.bodies} == {1}
    assert {(tuple(b["prompt"]), b["seed"]) for b in served.bodies} == set(served.answered)
    assert 1 < served.most_busy <= 4
    assert engine.ledger.flops == 2 * 10 * (engine.ledger.generated_tokens + engine.ledger.prefilled_tokens)
    assert not engine.counts
    sample = engine.generate(asked[:1], Sampling(16))[0][0]
    assert sample.logprobs == tuple(-i / 10 for i in sample.ids)
    for samples in engine.generate(asked, Sampling(16)):
        assert all((s.stop is StopReason.EOS) == (s.ids[-1] == lab_words.eos_token_id) for s in samples)


def test_what_is_sent_leaves_no_sampling_default_to_the_server(server: Any, lab_words: Any) -> None:
    served = server()
    asked = [Request((5, 16), (3,))]
    OpenAIEngine(served.url, "served", lab_words).generate(
        asked, Sampling(9, temperature=0.7, top_p=0.9, top_k=20, stop=("\n",))
    )
    assert served.bodies == [
        {
            "model": "served", "prompt": [5, 16], "seed": 3, "max_tokens": 9, "n": 1, "temperature": 0.7, "top_p": 0.9,
            "top_k": 20, "min_p": 0.0, "repetition_penalty": 1.0, "stop": ["\n"], "logprobs": 1, "add_special_tokens": False,
            "return_token_ids": True, "return_tokens_as_token_ids": True, "include_stop_str_in_output": True,
            "skip_special_tokens": False, "spaces_between_special_tokens": False,
        }
    ]  # fmt: skip


def test_logprobs_of_another_distribution_are_not_passed_off(server: Any, lab_words: Any, caplog: Any) -> None:
    served, asked = server(), [Request((5, 16), (3,))]
    engine = OpenAIEngine(served.url, "served", lab_words)
    for sampling, known in [
        (Sampling(9), True),
        (Sampling(9, temperature=0), True),
        (Sampling(9, temperature=0.7), False),
        (Sampling(9, top_p=0.9), False),
        (Sampling(9, top_k=5), False),
    ]:
        sample = engine.generate(asked, sampling)[0][0]
        assert len(sample.logprobs) == len(sample.ids) > 0
        assert all(math.isnan(v) != known for v in sample.logprobs)
    assert engine.counts["logprobs_missing"] == 3
    assert sum("log-probabilities" in r.message for r in caplog.records) == 1
    told = OpenAIEngine(served.url, "served", lab_words, processed_logprobs=True)
    assert not any(math.isnan(v) for v in told.generate(asked, Sampling(9, temperature=0.7))[0][0].logprobs)


def test_errors_that_pass_lose_and_repeat_nothing(server: Any, lab_words: Any) -> None:
    def trouble(one: Server, handler: BaseHTTPRequestHandler) -> bool:
        kind = fold_seed(1, one.posts) % 8
        if kind == 0:
            send(handler, 500, {"error": {"message": "out of memory"}})
        elif kind == 1:
            send(handler, 429, {"error": {"message": "slow down"}}, retry_after="0.1")
        elif kind == 2:  # half an answer
            handler.wfile.write(
                b'HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 999\r\n\r\n{"choi'
            )
        elif kind == 3 and one.posts > 1:  # an answer of something else
            send(handler, 200, {"choices": []})
        return kind < 3 or (kind == 3 and one.posts > 1)

    served = server(trouble=trouble)
    engine = OpenAIEngine(served.url, "served", lab_words, retries=30)
    asked = requests_of(lab_words)
    expected(engine, asked, served)
    assert served.answered == {(r.prefix, seed): 1 for r in asked for seed in r.seeds}
    assert engine.counts["retries"] == served.posts - 40 > 10


def test_a_server_that_dies_and_returns_on_its_port(server: Any, lab_words: Any) -> None:
    returned = threading.Event()

    def come_back(one: Server) -> None:
        one.die()
        time.sleep(0.5)
        one.start()
        returned.set()

    def trouble(one: Server, handler: BaseHTTPRequestHandler) -> bool:
        if one.posts < 13 or returned.is_set():
            return False
        if one.posts == 13:
            threading.Thread(target=come_back, args=(one,)).start()
        return True  # the connection closes without a word

    served = server(trouble=trouble)
    engine = OpenAIEngine(served.url, "served", lab_words, concurrency=6)
    asked = requests_of(lab_words)
    expected(engine, asked, served)
    assert returned.is_set()
    assert served.answered == {(r.prefix, seed): 1 for r in asked for seed in r.seeds}


def test_a_server_that_stays_away_ends_in_one_sentence(server: Any, lab_words: Any) -> None:
    def trouble(one: Server, handler: BaseHTTPRequestHandler) -> bool:
        if one.posts == 5:
            threading.Thread(target=one.die).start()
        return one.posts >= 5

    served = server(trouble=trouble)
    engine = OpenAIEngine(served.url, "served", lab_words, concurrency=2, retries=2)
    with pytest.raises(UserError, match=r"no usable answer from the server after 3 tries"):
        engine.generate(requests_of(lab_words), Sampling(16))
    assert engine.ledger.policy_calls == 4  # what was answered was paid for


def test_a_silent_server_does_not_hold_up_the_end_of_the_process(server: Any, lab_words: Any, tmp_path: Path) -> None:
    silent = threading.Event()

    def trouble(one: Server, handler: BaseHTTPRequestHandler) -> bool:
        if one.posts > 1:
            silent.wait(600)
        return one.posts > 1

    served = server(trouble=trouble)
    script = (
        # A shell that started the tests in the background has left the signal ignored.
        "import signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from stepladder.models.engine import Request, Sampling\n"
        "from stepladder.models.openai_engine import OpenAIEngine\n"
        "class Tokenizer:\n"
        "    model_max_length, bos_token_id, eos_token_id, eos_token, all_special_ids = 99, None, 2, '<eos>', [2]\n"
        "    def decode(self, ids): return ''\n"
        "    def __call__(self, text, **_): return {'input_ids': []}\n"
        f"engine = OpenAIEngine({served.url!r}, 'served', Tokenizer())\n"
        "try:\n    engine.generate([Request((5, 16), (1, 2, 3, 4))], Sampling(4))\n"
        "except KeyboardInterrupt:\n    print('interrupted')\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path
    )
    try:
        for _ in range(2400):
            if served.posts >= 4:  # one alone, then the other three at once
                break
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=120)  # the server stays silent for ten minutes
    finally:
        process.kill()
        silent.set()
    assert (process.returncode, out.strip()) == (0, "interrupted"), err


def test_first_contact_says_what_is_wrong(server: Any, lab_words: Any) -> None:
    asked = [Request((5, 16), (1,))]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        nobody = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
        with pytest.raises(UserError, match="no server answers"):
            OpenAIEngine(nobody, "served", lab_words).generate(asked, Sampling(4))
    with pytest.raises(UserError, match=r"`other` does not exist.*does not list the model other, but served"):
        OpenAIEngine(server().url, "other", lab_words).generate(asked, Sampling(4))
    denied = server(trouble=lambda _, handler: not send(handler, 401, {"error": {"message": "no"}}))
    with pytest.raises(UserError, match="refuses the API key"):
        OpenAIEngine(denied.url, "served", lab_words).generate(asked, Sampling(4))
    no_path = server(trouble=lambda _, handler: not send(handler, 404, {"detail": "Not Found"}))
    with pytest.raises(UserError, match="has no /completions; check the address, or try api: chat"):
        OpenAIEngine(no_path.url, "served", lab_words).generate(asked, Sampling(4))
    website = server(trouble=lambda _, handler: not send(handler, 200, "welcome"))
    with pytest.raises(UserError, match="no usable answer from the server after 1 tries"):
        OpenAIEngine(website.url, "served", lab_words).generate(asked, Sampling(4))
    for url in ("", "localhost:8000", "ftp://host/v1"):
        with pytest.raises(UserError, match="base_url must look like"):
            OpenAIEngine(url, "served", lab_words)
    assert OpenAIEngine("http://host:1", "served", lab_words).base_url == "http://host:1/v1"
    # Nothing to ask: no server is needed.
    assert OpenAIEngine(nobody, "served", lab_words).generate([Request((5,), ())], Sampling(4)) == [[]]


def test_a_server_of_text_only(server: Any, lab_words: Any, caplog: Any) -> None:
    served = server(ids=False, vllm=False)
    engine = OpenAIEngine(served.url, "served", lab_words)
    asked = requests_of(lab_words)
    expected(engine, asked, served)  # the lab's tokenizer loses nothing on the way
    assert served.bodies[-1].keys() == {"model", "max_tokens", "seed", "prompt", "n", "temperature", "top_p"}
    assert engine.counts == {"ids_from_text": 40, "logprobs_missing": 40}
    assert all(math.isnan(v) for v in engine.generate(asked[:1], Sampling(16))[0][0].logprobs)
    with pytest.raises(UserError, match="does not take top_k"):
        engine.generate(asked, Sampling(16, top_k=3))


def test_prompts_that_text_cannot_carry_are_counted(server: Any, merging_tokenizer: Any, caplog: Any) -> None:
    apart = tuple(
        merging_tokenizer.convert_tokens_to_ids([".", "\u010a"])
    )  # the full stop and the newline, one token in text
    asked = [Request(apart, (2, 4)), Request(tuple(merging_tokenizer("So it is 4")["input_ids"]), (2,))]
    for ids in (True, False):
        served = server(tokenizer=merging_tokenizer, ids=ids, vllm=ids, write=lambda *_: [50])
        engine = OpenAIEngine(served.url, "served", merging_tokenizer)
        engine.generate(asked, Sampling(4))
        assert engine.counts["prompts_changed"] == (0 if ids else 1)
    assert sum("encodes a prompt to other tokens" in r.message for r in caplog.records) == 1


@pytest.mark.parametrize("vllm", [True, False])
def test_stop_strings_and_the_end_of_the_sequence_are_told_apart(server: Any, lab_words: Any, vllm: bool) -> None:
    newline, end = lab_words.convert_tokens_to_ids(["\n", "<eos>"])

    def write(prompt: tuple[int, ...], seed: int) -> list[int]:
        return {0: [15, 16, newline, 17, 18], 1: [15, 16, end], 2: [15] * 30, 3: [15, newline, 16, newline]}[seed]

    served = server(ids=vllm, vllm=vllm, write=write)
    engine = OpenAIEngine(served.url, "served", lab_words)
    found = engine.generate([Request((5, 16), (2, 0, 1, 3))], Sampling(5, stop=("\n",)))[0]
    assert [s.stop for s in found] == [StopReason.LENGTH, StopReason.STOP, StopReason.EOS, StopReason.STOP]
    assert [s.ids for s in found] == [(15,) * 5, (15, 16, newline), (15, 16, end), (15, newline)]
    if vllm:
        assert not engine.counts
    else:  # asked for again without stop strings, and every token of both is paid for
        assert engine.counts["asked_twice"] >= 1
        assert engine.ledger.generated_tokens > sum(len(s.ids) for s in found)


def test_prefixes_that_fill_the_context(server: Any, lab_words: Any) -> None:
    served = server(context=12, write=lambda prompt, seed: [15] * 50)
    asked = [Request((5,) * n, (1, 2)) for n in (11, 12, 13, 4, 0)]
    listed = OpenAIEngine(served.url, "served", lab_words)
    told = OpenAIEngine(served.url, "served", lab_words, context=400)  # wrong, and found out from the refusal
    for engine in (listed, told):
        found = engine.generate(asked, Sampling(6))
        assert engine.context == 12
        full = [(0, StopReason.CONTEXT)] * 2
        assert [[(len(s.ids), s.stop) for s in samples] for samples in found] == [
            [(1, StopReason.LENGTH)] * 2, full, full, [(6, StopReason.LENGTH)] * 2, full,
        ]  # fmt: skip


def test_chat_wants_bare_prompts(server: Any, lab_words: Any) -> None:
    served = server(trouble=lambda one, handler: not send(handler, 200, {
        "choices": [{"message": {"content": "3 + 4"}, "finish_reason": "stop"}], "usage": {"completion_tokens": 4}
    }))  # fmt: skip
    engine = OpenAIEngine(served.url, "served", lab_words, api="chat")
    sample = engine.generate([Request((1, *lab_words("Start 3")["input_ids"]), (1,))], Sampling(4))[0][0]
    assert sample.ids == (*lab_words("3 + 4")["input_ids"], lab_words.eos_token_id)
    assert sample.stop is StopReason.EOS
    assert served.bodies[0]["messages"] == [{"role": "user", "content": "Start 3"}]
    assert served.bodies[0]["logprobs"] is True
    with pytest.raises(UserError, match="special tokens such as those of a chat template"):
        engine.generate([Request((5, 2, 16), (1,))], Sampling(4))


# The real server


def start_serving(folder: Path, port: int, home: Path) -> subprocess.Popen[bytes]:
    """A running `transformers serve` pinned to the model in `folder`."""
    command = [sys.executable, "-c", "from transformers.cli.transformers import main; main()", "serve", str(folder)]
    process = subprocess.Popen(
        [*command, "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(home), "CUDA_VISIBLE_DEVICES": ""},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    return process


def wait_until_up(process: subprocess.Popen[bytes], port: int) -> None:
    for _ in range(600):
        assert process.poll() is None, "transformers serve ended"
        with contextlib.suppress(OSError):
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
            return
        time.sleep(0.2)
    raise AssertionError("transformers serve did not come up in two minutes")


def digits_policy(tokenizer: Any, make: Callable[..., Any]) -> Any:
    """A decoder that writes digits, newlines and ends, whose text gives back the ids that were sampled."""
    model = make(tokenizer, {})
    allowed = torch.tensor([*tokenizer.convert_tokens_to_ids(list("012356789")), tokenizer.eos_token_id])
    newline = tokenizer("\n")["input_ids"][0]
    noise = torch.Generator().manual_seed(0)
    with torch.no_grad():
        model.lm_head.weight.fill_(-10.0)
        model.lm_head.weight[allowed] = torch.randn(len(allowed), model.config.hidden_size, generator=noise) * 0.05
        model.lm_head.weight[newline] = 0.02
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    return model


def test_transformers_serve(merging_tokenizer: Any, markov_policy: Any, tmp_path: Path, monkeypatch: Any) -> None:
    model = digits_policy(merging_tokenizer, markov_policy)
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    merging_tokenizer.save_pretrained(folder)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}/v1"
    asked = [Request(tuple(merging_tokenizer(text)["input_ids"]), tuple(range(6))) for text in ("So it is 5", "the 8")]
    sampling = Sampling(8, stop=("\n",))
    process = start_serving(folder, port, tmp_path)
    try:
        wait_until_up(process, port)
        with pytest.raises(UserError, match="pinned to"):
            OpenAIEngine(url, "another", merging_tokenizer).generate(asked, sampling)
        engine = OpenAIEngine(url, str(folder), merging_tokenizer, context=64, retries=12)
        greedy = Sampling(8, temperature=0, stop=("\n",))
        embedded = TransformersEngine(model, merging_tokenizer).generate(asked, greedy)
        found = engine.generate([Request(r.prefix, (0,)) for r in asked], greedy)
        assert [(s.ids, s.stop) for (s,) in found] == [(samples[0].ids, samples[0].stop) for samples in embedded]

        first = engine.generate(asked, sampling)
        texts = [merging_tokenizer.decode(s.ids) for samples in first for s in samples]
        assert len(set(texts)) > 6, "seeds make no difference"
        assert set("".join(texts).replace("<eos>", "")) <= set("012356789\n")
        stops = {s.stop for samples in first for s in samples}
        assert {StopReason.STOP, StopReason.EOS} <= stops <= {*stops, StopReason.LENGTH}
        for sample in (s for samples in first for s in samples):
            text = merging_tokenizer.decode(sample.ids)
            assert (sample.stop is StopReason.STOP) == text.endswith("\n")
            assert (sample.stop is StopReason.EOS) == text.endswith("<eos>")
            assert len(sample.logprobs) == len(sample.ids)
            assert all(math.isnan(v) for v in sample.logprobs)
        assert "lengths_differ" not in engine.counts
        assert "prompts_changed" not in engine.counts

        # Killed while it answers and started again on its port: the same samples, each seed its own.
        monkeypatch.undo()  # real waiting times
        again: list[Any] = []
        post, posts, killed = engine._post, itertools.count(1), threading.Event()

        def kill() -> None:
            os.killpg(process.pid, signal.SIGKILL)
            killed.set()

        def post_and_kill(*arguments: Any) -> Any:
            if next(posts) == 8:
                threading.Timer(0.01, kill).start()
            return post(*arguments)

        monkeypatch.setattr(engine, "_post", post_and_kill)
        asking = threading.Thread(target=lambda: again.append(engine.generate(asked * 4, sampling)))
        asking.start()
        assert killed.wait(60)
        process.wait()
        assert asking.is_alive()  # with 40 requests left
        process = start_serving(folder, port, tmp_path)
        asking.join(120)
        assert engine.counts["retries"] >= 1
        assert [[(s.ids, s.stop) for s in samples] for samples in again[0]] == [
            [(s.ids, s.stop) for s in samples] for samples in first * 4
        ]
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
