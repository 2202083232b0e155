"""The engine over HTTP: any server that speaks OpenAI's protocol (vLLM, SGLang, llama.cpp, `transformers serve`)."""

from __future__ import annotations

import logging
import math
import os
import re
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, get_args
from urllib.parse import urlsplit

from ..basics import UserError
from .engine import Request, Sample, Sampling, StopReason
from .ledger import Ledger
from .openai_protocol import Api, Choice, Dialect, MalformedReply, Prompt

log = logging.getLogger(__name__)

_AGAIN = (408, 409, 425, 429)  # statuses that pass, as every 5xx may
_CONTEXT = re.compile(r"(?:maximum context length|context (?:length|size|window))\D{0,40}?(\d+)", re.IGNORECASE)

# What `OpenAIEngine.counts` counts, with the sentence that is logged the first time.
_NOTES = {
    "retries": "{url} failed ({detail}); asking again",
    "prompts_changed": "{url} takes text, not token ids, and encodes a prompt to other tokens than the step format gave",
    "ids_from_text": "{url} returns no token ids: samples are tokenised from their text, which need not give the ids sampled",
    "lengths_differ": "{url} sampled another number of tokens than tokenising its text gives",
    "logprobs_missing": "{url} gives no log-probabilities under the sampling distribution: they are NaN",
    "asked_twice": "{url} does not tell stop strings from the end of a sequence: samples are made longer and cut here",
}


class _Stopped(Exception):
    """Another request failed for good; this one is no longer wanted."""


@dataclass
class _Reply:
    """One answered request and the usage of every time it was asked."""

    choice: Choice
    usages: list[Mapping[str, Any]] = field(default_factory=list)
    stop_sent: bool = True  # False: the server knew of no stop strings, so that the text may run past one


class OpenAIEngine:
    """Samples from a model behind an OpenAI-compatible server, one request a sample so that each has its own seed.

    Up to `concurrency` requests run at once. Connection errors, timeouts and the statuses 408, 409, 425, 429 and 5xx are tried
    again up to `retries` times with exponential backoff. The first request finds out what the server takes: token ids as
    prompt (else the decoded text), vLLM's extensions, log-probabilities. `counts` says how often something was lost on the way.

    `api` "chat" is for servers without /completions. The decoded prefix becomes one user message, to which the server applies
    its own chat template: give bare prompts (`chat: false` in the step format) and ask for whole solutions, since a prefix that
    holds the beginning of an answer would be read as part of the question.

    `context` is taken from the server when it says, else from the tokenizer. `parameters` (of the model) are needed for FLOPs
    alone, and 0 leaves those at 0. `processed_logprobs`: the server's log-probabilities are those after temperature, top-k and
    top-p (vLLM: `--logprobs-mode processed_logprobs`). Without it they are returned for temperature 1 or 0 without filters only,
    else NaN.

    Raises UserError, when samples are first asked for, if the server cannot be reached, refuses the key or does not know the
    model; and later if it stays away for longer than all retries.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        tokenizer: Any,
        *,
        api: Api = "completions",
        name: str = "",
        concurrency: int = 16,
        retries: int = 8,
        timeout_s: float = 600.0,
        api_key: str | None = None,
        context: int | None = None,
        parameters: int = 0,
        processed_logprobs: bool = False,
        ledger: Ledger | None = None,
    ) -> None:
        try:
            import openai
        except ImportError:
            raise UserError("the openai backend needs the openai package: pip install 'stepladder[openai]'") from None
        if api not in get_args(Api):
            raise UserError(f"api must be one of {', '.join(get_args(Api))}, found {api!r}")
        if concurrency < 1 or retries < 0 or timeout_s <= 0:
            raise UserError(
                "concurrency must be 1 or more, retries 0 or more and timeout_s positive, "
                f"found {concurrency}, {retries} and {timeout_s}"
            )
        parts = urlsplit(base_url)
        if parts.scheme not in ("http", "https") or not parts.netloc:
            raise UserError(f"base_url must look like http://localhost:8000/v1, found {base_url!r}")
        self.base_url = base_url.rstrip("/") + ("" if parts.path.strip("/") else "/v1")
        self.model, self.tokenizer = model, tokenizer
        # The address is left out: a row must not change because the same server came back on another port.
        self.name = name or f"openai:{model}"
        self.ledger = ledger or Ledger()
        self.counts: Counter[str] = Counter()
        self.concurrency, self.retries, self.context = concurrency, retries, context
        self.parameters, self.processed_logprobs = parameters, processed_logprobs
        self._client = openai.OpenAI(
            base_url=self.base_url,
            api_key=api_key or os.environ.get("OPENAI_API_KEY") or "none",
            timeout=timeout_s,
            max_retries=0,
        )
        self._dialect = Dialect(api, token_ids=api == "completions")
        self._agreed = False  # the server has answered once: the dialect is settled
        self._withhold_stop = False
        self._served: list[str] | None = None  # the models it lists; None before the first contact
        self._lock = threading.Lock()

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[list[Sample]]:
        """Samples [len(requests)][len(request.seeds)], in the order asked."""
        results = [[Sample((), (), StopReason.CONTEXT)] * len(r.seeds) for r in requests]
        with self.ledger.timed():
            if self._served is None and any(r.seeds and r.prefix for r in requests):
                self._served = self._contact()
                if self.context is None and self.tokenizer.model_max_length < 10**9:
                    self.context = self.tokenizer.model_max_length
            asked = [row for row, r in enumerate(requests) if r.seeds and r.prefix and self._room(r.prefix) > 0]
            prompts = {row: self._prompt(requests[row].prefix) for row in asked}
            jobs = [(row, column) for row in asked for column in range(len(requests[row].seeds))]
            replies: dict[tuple[int, int], _Reply | None] = {}
            try:
                self._ask_all(jobs, requests, prompts, sampling, replies)
            finally:
                # Tokenizers do not like several threads, so that replies are read here; those before a failure count too.
                for row, column in jobs:
                    reply = replies.get((row, column))
                    if reply is not None:
                        results[row][column] = self._read(reply, sampling)
                        self._account(reply, prompts[row], results[row][column], first=column == 0)
        return results

    # Asking

    def _contact(self) -> list[str]:
        """The models that the server lists. Raises UserError when no server answers or it refuses the key."""
        import openai

        try:
            listed = self._client.get("/models", cast_to=object)
        except openai.APIConnectionError as error:
            raise UserError(f"{self.base_url}: no server answers ({_cause(error)})") from error
        except openai.APIStatusError as error:
            if error.status_code in (401, 403):
                raise self._refused(error.status_code, _message(error)) from error
            return []  # not every server has this list
        except (openai.OpenAIError, ValueError):
            return []
        entries = listed.get("data") if isinstance(listed, dict) else None
        models = [m for m in entries if isinstance(m, dict)] if isinstance(entries, list) else []
        for entry in models:
            if entry.get("id") == self.model and self.context is None and isinstance(entry.get("max_model_len"), int):
                self.context = entry["max_model_len"]
        return [str(m.get("id")) for m in models]

    def _ask_all(
        self,
        jobs: Sequence[tuple[int, int]],
        requests: Sequence[Request],
        prompts: Mapping[int, Prompt],
        sampling: Sampling,
        replies: dict[tuple[int, int], _Reply | None],
    ) -> None:
        """Fills `replies` for every (request, seed) of `jobs`."""
        stop = threading.Event()
        waiting, errors = iter(jobs), list[BaseException]()

        def ask_next() -> bool:
            with self._lock:
                job = next(waiting, None)
            if job is not None:
                row, column = job
                replies[job] = self._ask(prompts[row], requests[row].seeds[column], sampling, stop)
            return job is not None

        def work() -> None:
            try:
                while not stop.is_set() and ask_next():
                    pass
            except _Stopped:
                pass
            except BaseException as error:
                errors.append(error)
                stop.set()

        # The first request runs alone, to learn what the server takes.
        while not self._agreed and ask_next():
            pass
        # `transformers serve` sets one global seed when a request arrives: with two requests at once, a sample would depend on
        # which came first. It generates one at a time anyway.
        count = 1 if self._dialect.serve else min(self.concurrency, len(jobs) - len(replies))
        # Daemon threads, unlike those of concurrent.futures, are not waited for at exit: a server that never answers cannot
        # keep the process alive.
        threads = [threading.Thread(target=work, daemon=True, name=f"ask-{i}") for i in range(count)]
        try:
            for thread in threads:
                thread.start()
            for thread in threads:
                while thread.is_alive() and not stop.is_set():
                    thread.join(0.1)
        finally:
            stop.set()
        if errors:
            raise errors[0]

    def _ask(self, prompt: Prompt, seed: int, sampling: Sampling, stop: threading.Event) -> _Reply | None:
        """One answered sample, or None when the server says that the prefix fills the model's context."""
        import openai

        usages: list[Mapping[str, Any]] = []
        stop_sent = not self._withhold_stop
        while (room := self._room(prompt.ids)) > 0:
            body = self._dialect.body(
                self.model,
                prompt,
                seed,
                min(sampling.max_new_tokens, room),
                sampling,
                sampling.stop if stop_sent else (),
            )
            try:
                choice, usage = self._post(body, stop)
            except openai.APIStatusError as error:
                message = _message(error)
                limit = _CONTEXT.search(message)
                if limit and (self.context is None or int(limit[1]) < self.context):
                    self.context = int(limit[1])
                elif self._agreed or error.status_code not in (400, 422) or not self._dialect.step_down(message):
                    raise self._refused(error.status_code, message) from error
                continue
            self._agreed = True
            usages.append(usage)
            if not (stop_sent and not self._dialect.serve and choice.leaves_open(sampling.stop)):
                return _Reply(choice, usages, stop_sent)
            # Asked again without stop strings, a seeded sample is the same one, only longer.
            self._count("asked_twice")
            self._withhold_stop, stop_sent = True, False
        return None

    def _post(self, body: Mapping[str, Any], stop: threading.Event) -> tuple[Choice, Mapping[str, Any]]:
        """(choice, usage) of a request, tried again while the server may come back."""
        import openai

        path = "/completions" if self._dialect.api == "completions" else "/chat/completions"
        # What fails at the very first is more often set up wrong than about to come back: that is said soon.
        retries = self.retries if self._agreed else min(self.retries, 3)
        wait, detail = 0.0, ""
        for attempt in range(retries + 1):
            if attempt:
                self._count("retries", detail)
                if stop.wait(wait):
                    raise _Stopped
            wait = min(30.0, 0.5 * 2**attempt)
            try:
                return Choice.parse(self._client.post(path, cast_to=object, body=body))
            except openai.APIConnectionError as error:
                detail = _cause(error)
            except openai.APIStatusError as error:
                passing = error.status_code in _AGAIN or error.status_code >= 500
                if not passing or "insufficient_quota" in str(error.body):
                    raise
                detail = f"status {error.status_code}: {_message(error)}"
                asked = error.response.headers.get("retry-after", "")
                if re.fullmatch(r"\d+(\.\d+)?", asked):
                    wait = min(60.0, max(wait, float(asked)))
            except (openai.OpenAIError, ValueError, MalformedReply) as error:
                detail = f"not an answer: {error}"[:200]
                if not self._agreed:
                    break  # something else than such a server has this address
        raise UserError(
            f"{self.base_url}: no usable answer from the server after {attempt + 1} tries ({detail}){self._unlisted()}"
        )

    def _room(self, prefix: Sequence[int]) -> int:
        return 2**31 if self.context is None else self.context - len(prefix)

    def _prompt(self, prefix: tuple[int, ...]) -> Prompt:
        """The prefix with the text that a server, which adds its own special tokens to text, would encode to it."""
        bos = prefix[0] == self.tokenizer.bos_token_id
        if self._dialect.api == "chat":
            ids = prefix[1:] if bos else prefix
            if set(ids) & set(self.tokenizer.all_special_ids):
                raise UserError(
                    "api: chat needs bare prompts, but a prefix holds special tokens such as those of a chat template, which "
                    "the server would apply a second time; set chat: false in the step format, or use /completions"
                )
            return Prompt(prefix, self.tokenizer.decode(ids), True)
        if self._dialect.token_ids and self._agreed:
            return Prompt(prefix, "", True)
        texts = [self.tokenizer.decode(prefix)] + ([self.tokenizer.decode(prefix[1:])] if bos else [])
        for text in texts:
            if tuple(self.tokenizer(text)["input_ids"]) == prefix:
                return Prompt(prefix, text, True)
        return Prompt(prefix, texts[0], False)

    # Reading

    def _read(self, reply: _Reply, sampling: Sampling) -> Sample:
        """The sample in a reply."""
        choice, eos = reply.choice, self.tokenizer.eos_token_id
        stop = choice.stop_reason(sampling.stop, stop_sent=reply.stop_sent)
        cut = stop is StopReason.STOP and not reply.stop_sent
        if choice.ids is not None:
            ids, values = list(choice.ids), list(choice.logprobs)
            if cut:
                ids = ids[: self._first_stop(ids, sampling)]
        else:
            self._count("ids_from_text")
            text = choice.full_text(sampling.stop)
            if cut:
                text = text[: min(text.find(s) + len(s) for s in sampling.stop if s in text)]
            if stop is StopReason.EOS and self.tokenizer.eos_token:
                text = text.removesuffix(self.tokenizer.eos_token)
            ids = list(self.tokenizer(text, add_special_tokens=False)["input_ids"])
            # Log-probabilities belong to the tokens that were sampled: they are kept only where these are the same.
            same = choice.tokens[: len(ids)] == tuple(self.tokenizer.decode([i]) for i in ids)
            values = list(choice.logprobs) if same else []
            sampled = reply.usages[-1].get("completion_tokens")
            if isinstance(sampled, int) and not cut and sampled - len(ids) not in (0, stop is StopReason.EOS):
                self._count("lengths_differ")
        if stop is StopReason.EOS and eos is not None and (not ids or ids[-1] not in self.tokenizer.all_special_ids):
            ids.append(eos)
        plain = sampling.temperature == 0 or (sampling.temperature == 1 and sampling.top_p == 1 and not sampling.top_k)
        logprobs = [math.nan if v is None else float(v) for v in values[: len(ids)]]
        if not (plain or self.processed_logprobs) or len(logprobs) < len(ids) - (stop is StopReason.EOS):
            logprobs = []
        if len(logprobs) < len(ids):
            self._count("logprobs_missing")
            logprobs += [math.nan] * (len(ids) - len(logprobs))
        return Sample(tuple(ids), tuple(logprobs), stop)

    def _first_stop(self, ids: Sequence[int], sampling: Sampling) -> int:
        """How many ids it takes until their text contains a stop string."""
        for count in range(1, len(ids)):
            if any(s in self.tokenizer.decode(ids[:count]) for s in sampling.stop):
                return count
        return len(ids)

    def _account(self, reply: _Reply, prompt: Prompt, sample: Sample, *, first: bool) -> None:
        """Adds a reply to the ledger, by the server's own count where it gives one.

        A prefix counts once for all its samples, as a server with a prefix cache encodes it, unless the server reports what was
        cached or is known to have no such cache.
        """
        generated = prefilled = 0
        for number, usage in enumerate(reply.usages):
            generated += _whole(usage.get("completion_tokens"), len(sample.ids))
            read = _whole(usage.get("prompt_tokens"), len(prompt.ids))
            cached = _whole((usage.get("prompt_tokens_details") or {}).get("cached_tokens"), -1)
            if cached >= 0:
                prefilled += read - cached
            elif self._dialect.serve or (first and number == 0):
                prefilled += read
            changed = read != len(prompt.ids) or not (self._dialect.token_ids or prompt.exact)
            if first and number == 0 and changed and self._dialect.api == "completions":
                self._count("prompts_changed")
        self.ledger.add_policy(self.parameters, generated=generated, prefilled=prefilled, calls=1)

    def _count(self, what: str, detail: str = "") -> None:
        with self._lock:
            self.counts[what] += 1
            first = self.counts[what] == 1
        if first:
            log.warning(_NOTES[what].format(url=self.base_url, detail=detail))

    # Refusals

    def _unlisted(self) -> str:
        """What to add to an error if the server does not list the model; empty if it does or lists nothing."""
        if not self._served or self.model in self._served:
            return ""
        return f"; it does not list the model {self.model}, but {', '.join(self._served[:20])}"

    def _refused(self, status: int, message: str) -> UserError:
        if status in (401, 403):
            return UserError(f"{self.base_url}: the server refuses the API key (status {status}); set OPENAI_API_KEY")
        if status == 404 and "model" not in message.lower():
            path, other = (
                ("/completions", "chat") if self._dialect.api == "completions" else ("/chat/completions", "completions")
            )
            return UserError(f"{self.base_url}: the server has no {path}; check the address, or try api: {other}")
        return UserError(
            f"{self.base_url}: the server refuses the request (status {status}: {message}){self._unlisted()}"
        )


def _whole(value: Any, otherwise: int) -> int:
    return value if isinstance(value, int) else otherwise


def _message(error: Any) -> str:
    """The server's own words in an error status, in one line."""
    body = error.body
    while isinstance(body, dict):
        body = next((body[k] for k in ("message", "error", "detail") if body.get(k)), "") or str(body)
    return " ".join(str(body or error.message or "no message").split())[:300]


def _cause(error: BaseException) -> str:
    """What the network said: the innermost cause of a connection error."""
    inner = error
    while inner.__cause__ is not None:
        inner = inner.__cause__
    return " ".join(str(inner).split())[:200] or type(inner).__name__
