"""`stepladder serve`: a search behind an OpenAI-compatible chat endpoint, on the standard library's HTTP server.

Each connection has a thread, which reads the request, waits and answers. One more thread searches: it takes the requests that
wait and ask for the same settings, up to a batch, and searches them together. Nothing joins a search that has begun.
"""

from __future__ import annotations

import contextlib
import hmac
import json
import math
import os
import select
import signal
import socket
import sys
import threading
import time
import traceback
import uuid
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from ..basics import UserError
from .chat_protocol import Chat, Refused, Reply, parse_chat
from .options_solve import Serve
from .solving import Asked, Solved, Solver, Stopped, TooLong, Ways

API_KEY = "STEPLADDER_API_KEY"  # the environment variable whose value requests must bring, if it is set
_IDLE = 30.0  # seconds that a client may take to send something, or to read it
_KEEP_ALIVE = 10.0  # seconds between signs of life in a stream that waits
_SPARE_CONNECTIONS = (
    64  # beyond those that wait or are searched: for health checks, and to tell others that all is full
)
_DRAINED = 8 * 2**20  # most bytes of a refused body that are read, so that the client gets to read the refusal


@dataclass(eq=False)
class Job:
    """A request that waits for its search. Whoever ends it sets `done`."""

    asked: Asked
    ways: Ways
    deadline: float
    done: threading.Event = field(default_factory=threading.Event)
    solved: Solved | None = None
    batch: dict[str, Any] = field(default_factory=dict)
    error: Refused | None = None
    gone: bool = False  # nobody waits for it any more

    @property
    def wanted(self) -> bool:
        return not self.gone and not self.done.is_set() and time.monotonic() < self.deadline

    def fail(self, error: Refused) -> None:
        """Ends it without an answer, if it has not ended."""
        if not self.done.is_set():
            self.error = error
            self.done.set()


class Desk:
    """Where requests wait for the one thread that searches."""

    def __init__(self, solver: Solver, batch: int, queue: int) -> None:
        self.solver, self.batch, self.queue = solver, batch, queue
        self.waiting: deque[Job] = deque()
        self.running: list[Job] = []
        self.stopping = False
        self._changed = threading.Condition()
        self._seconds = 1.0  # of a batch, a running mean
        self.thread = threading.Thread(target=self._work, name="search", daemon=True)
        self.thread.start()

    def submit(self, job: Job) -> None:
        """Queues a job. Raises Refused when too many wait, or the server stops."""
        with self._changed:
            if self.stopping:
                raise Refused(503, "The server is stopping.", code="stopping", retry_after=5)
            self._drop()
            if len(self.waiting) >= self.queue:
                batches = (len(self.waiting) + len(self.running)) / self.batch
                after = min(600, max(1, math.ceil(batches * self._seconds)))
                message = f"{len(self.waiting)} requests are waiting, and no more may; try again in {after} seconds."
                raise Refused(429, message, code="queue_full", retry_after=after)
            self.waiting.append(job)
            self._changed.notify_all()

    def stop(self, grace: float) -> None:
        """Refuses new jobs, ends those that were accepted, within `grace` seconds, and then the thread."""
        end = time.monotonic() + grace
        with self._changed:
            self.stopping = True
            self._changed.notify_all()
            while (self.waiting or self.running) and time.monotonic() < end:
                self._changed.wait(min(0.2, max(end - time.monotonic(), 0.01)))
            for job in (*self.waiting, *self.running):
                job.fail(Refused(503, "The server stopped before the search had ended.", code="stopping"))
            self.waiting.clear()
        self.thread.join(5.0)

    def _drop(self) -> None:
        """Forgets those that wait for nobody."""
        for job in [job for job in self.waiting if not job.wanted]:
            self.waiting.remove(job)

    def _take(self) -> list[Job]:
        """The next jobs to search together: the first that waits, and others that ask for the same; none at the end."""
        with self._changed:
            while True:
                self._drop()
                if self.waiting:
                    ways = self.waiting[0].ways
                    self.running = [job for job in self.waiting if job.ways == ways][: self.batch]
                    for job in self.running:
                        self.waiting.remove(job)
                    return self.running
                if self.stopping:
                    return []
                self._changed.wait(1.0)

    def _work(self) -> None:
        while jobs := self._take():
            start = time.monotonic()
            self._search(jobs)
            with self._changed:
                self._seconds += 0.3 * (time.monotonic() - start - self._seconds)
                self.running = []
                self._changed.notify_all()

    def _search(self, jobs: Sequence[Job]) -> None:
        try:
            found, ledger = self.solver.solve(
                [job.asked for job in jobs], jobs[0].ways, goes_on=lambda: any(job.wanted for job in jobs)
            )
        except Stopped:
            for job in jobs:
                job.fail(Refused(504, "The search took longer than a request may.", code="timeout"))
        except Exception as error:
            if len(jobs) > 1:  # one of them must not cost the others their answer
                for job in jobs:
                    self._search([job])
                return
            if not isinstance(error, UserError):
                traceback.print_exc()
            told = str(error) if isinstance(error, UserError) else "The search failed; the server's log says why."
            jobs[0].fail(Refused(500, told, code="search_failed"))
        else:
            for job, solved in zip(jobs, found, strict=True):
                job.batch = {"problems": len(jobs), **ledger.to_json()}
                job.solved = solved
                job.done.set()


class Server(ThreadingHTTPServer):
    """The HTTP server of one solver."""

    daemon_threads = True
    block_on_close = False
    request_queue_size = 128  # the default of 5 resets connections that come together

    def __init__(self, config: Serve, solver: Solver) -> None:
        self.config, self.solver = config, solver
        self.key = os.environ.get(API_KEY, "")
        self.created = int(time.time())
        self.places = threading.BoundedSemaphore(config.queue + config.batch + _SPARE_CONNECTIONS)
        self.busy = 0  # requests that are being read, searched or answered
        self.lock = threading.Lock()
        self.address_family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
        try:
            super().__init__((config.host, config.port), Handler)
        except OSError as error:
            raise UserError(f"cannot listen on {config.host}:{config.port} ({error.strerror or error})") from None
        self.desk = Desk(solver, config.batch, config.queue)

    @property
    def url(self) -> str:
        host = f"[{self.config.host}]" if ":" in self.config.host else self.config.host
        return f"http://{host}:{self.server_address[1]}/v1"

    def server_bind(self) -> None:
        # HTTPServer asks for the host's full name here, which can wait for a name server.
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = self.config.host, self.server_address[1]

    def process_request(self, request: Any, client_address: Any) -> None:
        if self.places.acquire(blocking=False):
            super().process_request(request, client_address)
            return
        body = json.dumps(Refused(429, "Too many connections.", code="too_many_connections").body()).encode()
        head = "HTTP/1.1 429 Too Many Requests\r\nContent-Type: application/json\r\nRetry-After: 1\r\nConnection: close\r\n"
        with contextlib.suppress(OSError):
            request.settimeout(1.0)
            request.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self.places.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is no error of the server's."""
        if not isinstance(sys.exc_info()[1], (ConnectionError, TimeoutError)):
            traceback.print_exc()

    def stop(self) -> None:
        """Finishes what was accepted and refuses what is new, then closes."""
        end = time.monotonic() + self.config.grace
        self.desk.stop(self.config.grace)
        # What was found must still be sent.
        while self.busy and time.monotonic() < end + 5:
            time.sleep(0.02)
        self.shutdown()
        self.server_close()


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    server: Server
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "stepladder", ""
    timeout = _IDLE

    def do_GET(self) -> None:
        with self._answering():
            config, path = self.server.config, self.path.partition("?")[0]
            if path == "/health":
                desk = self.server.desk
                state = {"status": "stopping" if desk.stopping else "ok", "waiting": len(desk.waiting)}
                self._send(503 if desk.stopping else 200, {**state, "running": len(desk.running)})
                return
            self._check_key()
            model = {
                "id": config.name, "object": "model", "created": self.server.created, "owned_by": "stepladder",
                "search": {
                    "strategy": config.strategy, "settings": config.settings, "choose": config.choose,
                    "budget": config.own_budget, "max_budget": config.max_budget, "max_tokens": config.max_new_tokens,
                },
            }  # fmt: skip
            if path == "/v1/models":
                self._send(200, {"object": "list", "data": [model]})
            elif path == f"/v1/models/{config.name}":
                self._send(200, model)
            elif path == "/v1/chat/completions":
                raise Refused(405, "This address takes POST.", code="method_not_allowed")
            else:
                raise Refused(404, "No such address; there are /v1/chat/completions, /v1/models and /health.")

    def do_POST(self) -> None:
        with self._answering():
            raw = self._body()
            if self.path.partition("?")[0] != "/v1/chat/completions":
                raise Refused(404, "No such address; requests go to /v1/chat/completions.")
            self._check_key()
            kind = self.headers.get("Content-Type", "").partition(";")[0].strip().lower()
            if kind != "application/json":  # what a page of another site may send without asking has another type
                raise Refused(415, "The Content-Type must be application/json.", code="unsupported_media_type")
            chat = parse_chat(raw, self.server.config.name)
            job = self._job(chat)
            self.server.desk.submit(job)
            self._answer(chat, job)

    # --- reading

    def _check_key(self) -> None:
        key, given = self.server.key, self.headers.get("Authorization", "")
        if key and not hmac.compare_digest(given.encode(), f"Bearer {key}".encode()):
            raise Refused(401, "The API key is missing or wrong.", code="invalid_api_key")

    def _body(self) -> bytes:
        length = self.headers.get("Content-Length", "")
        if self.headers.get("Transfer-Encoding") or not length:
            self.close_connection = True
            raise Refused(411, "The Content-Length is missing.", code="length_required")
        if not (length.isascii() and length.isdecimal() and len(length) < 20):
            self.close_connection = True
            raise Refused(400, "The Content-Length must be a number.")
        size = int(length)
        if size > self.server.config.max_body:
            self.close_connection = True
            left = min(size, _DRAINED)
            while left and (block := self.rfile.read(min(left, 65536))):
                left -= len(block)
            message = f"The body has {size} bytes; {self.server.config.max_body} are allowed."
            raise Refused(413, message, code="body_too_large")
        raw = self.rfile.read(size)
        if len(raw) < size:
            raise ConnectionAbortedError("the client went away")
        return raw

    def _job(self, chat: Chat) -> Job:
        """The search that a request asks for. Raises Refused."""
        config, solver = self.server.config, self.server.solver
        own = solver.ways
        budget = own.budget if chat.budget is None else chat.budget
        if budget > config.max_budget:
            told = f"budget must be {config.max_budget} or less, found {budget}."
            raise Refused(400, told, param="budget", code="invalid_value")
        if budget != own.budget:
            try:
                config.settings_for(budget)
            except ValueError as error:
                raise Refused(400, f"{error}.", param="budget", code="invalid_value") from None
        ways = Ways(
            budget=budget,
            max_new_tokens=min(chat.max_tokens or own.max_new_tokens, own.max_new_tokens),
            temperature=own.temperature if chat.temperature is None else chat.temperature,
            top_p=own.top_p if chat.top_p is None else chat.top_p,
            system=chat.system,
        )
        try:
            asked = solver.ask(chat.prompt, seed=config.seed if chat.seed is None else chat.seed, system=chat.system)
        except TooLong as error:
            raise Refused(400, f"{error}.", param="messages", code="context_length_exceeded") from None
        except UserError as error:
            raise Refused(400, f"{error}.", param="messages", code="invalid_value") from None
        most, found = config.max_prompt_tokens, len(asked.root.ids)
        if most and found > most:
            message = f"The prompt has {found} tokens; {most} are allowed."
            raise Refused(400, message, param="messages", code="context_length_exceeded")
        return Job(asked, ways, time.monotonic() + config.timeout)

    # --- answering

    @contextlib.contextmanager
    def _answering(self) -> Iterator[None]:
        """Counts the request as busy, and sends what it is refused with."""
        with self.server.lock:
            self.server.busy += 1
        try:
            yield
        except Refused as refused:
            more = {"Retry-After": str(refused.retry_after)} if refused.retry_after else {}
            self._send(refused.status, refused.body(), more)
        finally:
            with self.server.lock:
                self.server.busy -= 1

    def _answer(self, chat: Chat, job: Job) -> None:
        begun, spoke = False, time.monotonic()
        while not job.done.wait(0.25):
            if time.monotonic() >= job.deadline:
                job.fail(Refused(504, "The search took longer than a request may.", code="timeout"))
            elif self._client_is_gone():
                job.gone = True
                self.close_connection = True
                return
            elif chat.stream and time.monotonic() - spoke > _KEEP_ALIVE:
                begun = begun or self._begin_stream()
                self.wfile.write(b": searching\n\n")
                spoke = time.monotonic()
        if job.error is not None or job.solved is None:
            error = job.error or Refused(500, "The search failed.")
            if not begun:
                raise error
            self._event(json.dumps(error.body()))
            return
        config = self.server.config
        reply = Reply(
            f"chatcmpl-{uuid.uuid4().hex}", int(time.time()), config.name, chat, job.solved, job.ways, job.batch
        )
        if not chat.stream:
            self._send(200, reply.body())
            return
        if not begun:
            self._begin_stream()
        for chunk in reply.chunks(self.server.solver.task.step_separator):
            self._event(json.dumps(chunk))
        self._event("[DONE]")

    def _client_is_gone(self) -> bool:
        try:
            readable, _, _ = select.select([self.connection], [], [], 0)
            return bool(readable) and not self.connection.recv(1, socket.MSG_PEEK)
        except (OSError, ValueError):
            return True

    def _begin_stream(self) -> bool:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream; charset=utf-8")
        self.send_header("Cache-Control", "no-cache")
        self.send_header("Connection", "close")
        self.end_headers()
        self.close_connection = True
        return True

    def _event(self, data: str) -> None:
        self.wfile.write(f"data: {data}\n\n".encode())

    def _send(self, status: int, value: Any, more: dict[str, str] | None = None) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        if self.close_connection or self.server.desk.stopping:
            self.close_connection = True
            self.send_header("Connection", "close")
        for name, text in (more or {}).items():
            self.send_header(name, text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """What the HTTP parser refuses, as JSON too."""
        self.close_connection = True
        self._send(code, Refused(code, f"{message or self.responses.get(code, ('',))[0]}.").body())

    def log_request(self, code: Any = "-", size: Any = "-") -> None:
        if not getattr(self, "path", "").startswith("/health"):
            super().log_request(code, size)


def serve(config: Serve) -> None:
    """Serves until SIGTERM or SIGINT; what was accepted by then is finished. A second signal ends at once."""
    solver = Solver(config)
    server = Server(config, solver)
    stop = threading.Event()
    ours = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def asked_to_stop(number: int, frame: Any) -> None:
        for other in ours:
            signal.signal(other, signal.SIG_DFL)
        stop.set()

    for number in ours:
        signal.signal(number, asked_to_stop)
    threading.Thread(target=server.serve_forever, args=(0.05,), name="http", daemon=True).start()
    print(f"serving {config.name} at {server.url}", flush=True)
    told = ", ".join(f"{key} {value}" for key, value in config.settings.items())
    print(
        f"{config.strategy} ({told or 'its own settings'}), a budget of {config.own_budget}, {config.max_budget} at most; "
        f"stop with SIGTERM or Ctrl-C",
        flush=True,
    )
    while not stop.wait(1.0):
        pass
    print("stopping: finishing what was accepted", flush=True)
    server.stop()
    print("stopped", flush=True)
