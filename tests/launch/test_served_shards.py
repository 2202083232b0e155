"""Two processes make one set of rows from one model that a local OpenAI-compatible server serves, which dies once and returns."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from stepladder.data_gen.rows import Solution
from stepladder.data_gen.store import read_rows
from stepladder.launch import stages
from stepladder.launch.cli import main
from stepladder.models.engine import Request, Sampling
from stepladder.models.loading import load_engine

pytestmark = pytest.mark.launch
LAB = str(Path(stages.__file__).parents[1] / "models" / "lab_policy")
PROBLEMS, SAMPLES = 24, 2


class Served:
    """The lab policy behind `/v1/completions`, one request at a time, so that no batch can round a sample another way."""

    def __init__(self, dies_at: int) -> None:
        self.engine = load_engine(LAB, device="cpu")
        self.lock, self.posts, self.dies_at = threading.Lock(), 0, dies_at
        self.returned = threading.Event()
        self.answered: Counter[tuple[tuple[int, ...], int]] = Counter()
        self.port = 0
        self.start()

    def start(self) -> None:
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: Any) -> None: ...

            def do_GET(self) -> None:
                outer.send(self, {"data": [{"id": LAB, "max_model_len": 512}]})

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                with outer.lock:
                    outer.posts += 1
                    if outer.posts == outer.dies_at:
                        threading.Thread(target=outer.die_and_return).start()
                    if outer.posts >= outer.dies_at and not outer.returned.is_set():
                        return  # the connection closes without a word
                    answer = outer.complete(body)
                outer.send(self, answer)

        class Http(ThreadingHTTPServer):
            request_queue_size = 128

        self.http = Http(("127.0.0.1", self.port), Handler)
        self.port = self.http.server_address[1]
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()

    def die_and_return(self) -> None:
        self.stop()
        time.sleep(0.5)
        self.start()
        self.returned.set()

    def stop(self) -> None:
        self.http.shutdown()
        self.http.server_close()

    def complete(self, body: dict[str, Any]) -> dict[str, Any]:
        prompt = tuple(body["prompt"])
        sampling = Sampling(body["max_tokens"], body["temperature"])
        sample = self.engine.generate([Request(prompt, (body["seed"],))], sampling)[0][0]
        self.answered[prompt, body["seed"]] += 1
        choice: dict[str, Any] = {
            "text": self.engine.tokenizer.decode(sample.ids, skip_special_tokens=True),
            "finish_reason": "stop" if sample.stop.value == "eos" else "length", "stop_reason": None,
            "token_ids": list(sample.ids),
            "logprobs": {"tokens": [f"token_id:{i}" for i in sample.ids], "token_logprobs": list(sample.logprobs)},
        }  # fmt: skip
        return {"choices": [choice], "usage": {"prompt_tokens": len(prompt), "completion_tokens": len(sample.ids)}}

    def send(self, handler: BaseHTTPRequestHandler, body: Any) -> None:
        data = json.dumps(body).encode()
        with contextlib.suppress(OSError):
            handler.send_response(200)
            handler.send_header("content-type", "application/json")
            handler.send_header("content-length", str(len(data)))
            handler.end_headers()
            handler.wfile.write(data)


@pytest.fixture
def served() -> Iterator[Served]:
    one = Served(dies_at=20)
    yield one
    with contextlib.suppress(OSError):
        one.stop()


def arguments(port: int, out: Path, shard: str) -> list[str]:
    task = "{kind: chain, p: 7, min_steps: 3, max_steps: 6, sizes: {train: 60, dev: 10, test: 20}}"
    return [
        "data", "solutions", "--policy", LAB, "--backend", "openai", "--base_url", f"http://127.0.0.1:{port}/v1", "--task", task,
        "--limit", str(PROBLEMS), "--samples", str(SAMPLES), "--unit_problems", "4", "--max_new_tokens", "24", "--batch_size", "4",
        "--shard", shard, "--out", str(out),
    ]  # fmt: skip


def test_two_processes_at_one_server_that_dies_and_returns(served: Served, tmp_path: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "WORLD_SIZE": "1", "RANK": "0"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "stepladder.launch.cli", *arguments(served.port, tmp_path / "both", f"{i}/2")],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment,
        )
        for i in range(2)
    ]  # fmt: skip
    told = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], told
    assert served.returned.is_set()
    rows = read_rows(tmp_path / "both", Solution)
    keys = Counter((row.problem_id, row.sample) for row in rows)
    assert len(keys) == PROBLEMS * SAMPLES  # nothing lost
    assert set(keys.values()) == {1}  # nothing twice
    assert all(row.token_ids for row in rows)
    answers = served.answered.copy()
    main(arguments(served.port, tmp_path / "alone", "0/1"))
    assert served.answered == {key: count + 1 for key, count in answers.items()}  # the same was asked for
    # Byte for byte what one process makes at a server that stays.
    assert (tmp_path / "both" / "rows.parquet").read_bytes() == (tmp_path / "alone" / "rows.parquet").read_bytes()


# --- the script that starts a server on each machine -------------------------------------------------------------------------

STAND_INS = {
    "vllm": 'echo "vllm $*" >> "$LOG"; touch "$UP"; if [ ! -e "$LOG.once" ] && [ -n "$DIES" ]; then touch "$LOG.once"; exit 1; fi\n'
    'echo $$ > "$LOG.server"; exec sleep 60',
    "curl": 'if [ -e "$UP" ]; then exit 0; else exit 22; fi',
    "stepladder": 'sleep 0.3; echo "stepladder $*" >> "$LOG"; exit "${STATUS:-0}"',
}  # fmt: skip


def served_data(tmp_path: Path, **given: str) -> tuple[int, list[str], str]:
    """(exit status, commands that were run, what was said) of served_data.sh with stand-ins for what it calls."""
    for name, text in STAND_INS.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    environment = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}", "LOG": str(tmp_path / "log"), "UP": str(tmp_path / "up"), "DIES": "",
        "SLURM_ARRAY_TASK_ID": "1", "SLURM_ARRAY_TASK_COUNT": "4", "SLURM_JOB_ID": "77", "SLURM_GPUS_ON_NODE": "8",
        "WAIT_SECONDS": "0.05", "RESTART_SECONDS": "0.05", "MODEL": "some/model", **given,
    }  # fmt: skip
    script = Path(stages.__file__).parent / "slurm" / "served_data.sh"
    ended = subprocess.run(
        ["bash", str(script), "solutions", "--out", "rows"], env=environment, capture_output=True, text=True, timeout=30
    )
    log = tmp_path / "log"
    return ended.returncode, log.read_text().splitlines() if log.exists() else [], ended.stderr


def still_serving(folder: Path) -> bool:
    """Whether the stand-in of the server runs still."""
    process = (folder / "log.server").read_text().strip()
    return Path("/proc", process).exists() and "sleep" in Path("/proc", process, "cmdline").read_text()


def test_a_machine_serves_its_model_and_makes_its_shard(tmp_path: Path) -> None:
    status, called, said = served_data(tmp_path, TENSOR_PARALLEL="2")
    assert status == 0, said
    assert called == [
        "vllm serve some/model --port 20078 --tensor-parallel-size 2 --data-parallel-size 4",
        "stepladder data solutions --out rows --policy some/model --backend openai "
        "--base_url http://127.0.0.1:20078/v1 --shard 1/4",
    ]
    time.sleep(0.2)
    assert not still_serving(tmp_path)


def test_a_server_that_ends_is_started_again(tmp_path: Path) -> None:
    status, called, said = served_data(tmp_path, DIES="yes")
    assert status == 0, said
    assert sum(line.startswith("vllm") for line in called) == 2
    assert "it is started again" in said


def test_a_failure_of_the_stage_is_that_of_the_task(tmp_path: Path) -> None:
    assert served_data(tmp_path, STATUS="2")[0] == 2
    status, _, said = served_data(tmp_path, MODEL="")
    assert status != 0
    assert "which model is served" in said
