"""Judges behind a server: critics that speak OpenAI's chat protocol, and reward models behind vLLM's /pooling route."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar
from urllib.parse import urlsplit

from ..basics import UserError
from .engine import Sampling
from .ledger import Ledger
from .loading import load_tokenizer
from .step_format import Encoded, StepFormat

T = TypeVar("T")
J = TypeVar("J")


class Server:
    """JSON requests to one address, several at once; what passes (timeouts, 429, 5xx) is tried again."""

    def __init__(self, base_url: str, *, concurrency: int = 16, retries: int = 8, timeout_s: float = 600.0) -> None:
        try:
            import openai
        except ImportError:
            raise UserError("a served judge needs the openai package: pip install 'stepladder[openai]'") from None
        parts = urlsplit(base_url)
        if parts.scheme not in ("http", "https") or not parts.netloc:
            raise UserError(f"base_url must look like http://localhost:8000/v1, found {base_url!r}")
        self.base_url, self.concurrency = base_url.rstrip("/"), concurrency
        key = os.environ.get("OPENAI_API_KEY") or "none"
        self._client = openai.OpenAI(base_url=self.base_url, api_key=key, timeout=timeout_s, max_retries=retries)
        self._retries, self._answered = retries, False

    def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """The server's JSON object. Raises UserError if it stays away, refuses, or answers something else."""
        import openai

        from .openai_engine import _cause, _message

        # What fails at the very first is more often set up wrong than about to come back: that is said soon.
        client = self._client if self._answered else self._client.with_options(max_retries=min(2, self._retries))
        try:
            found = client.post(path, cast_to=object, body=body)
            self._answered = True
        except openai.APIConnectionError as error:
            raise UserError(f"{self.base_url}: no server answers ({_cause(error)})") from error
        except openai.APIStatusError as error:
            raise UserError(
                f"{self.base_url}: the server refuses {path} (status {error.status_code}: {_message(error)})"
            ) from error
        except (openai.OpenAIError, ValueError) as error:
            raise UserError(f"{self.base_url}: no usable answer to {path} ({str(error)[:200]})") from error
        if not isinstance(found, dict):
            raise UserError(f"{self.base_url}: expected a JSON object from {path}, found {str(found)[:100]!r}")
        return found

    def all(self, jobs: Sequence[J], ask: Callable[[J], T]) -> list[T]:
        """`ask` of every job, in order."""
        pool = ThreadPoolExecutor(max(1, min(self.concurrency, len(jobs))))
        try:
            return list(pool.map(ask, jobs))
        finally:
            pool.shutdown(wait=False, cancel_futures=True)  # one that failed for good: the others are not wanted


class ChatWriter:
    """Answers by a model behind /chat/completions, one request a sample. The server applies its own chat template."""

    def __init__(
        self, base_url: str, model: str, sampling: Sampling, *, concurrency: int = 16, retries: int = 8
    ) -> None:
        if base_url and not urlsplit(base_url).path.strip("/"):
            base_url = base_url.rstrip("/") + "/v1"
        self.server = Server(base_url, concurrency=concurrency, retries=retries)
        self.model, self.sampling, self.ledger = model, sampling, Ledger()

    def write(self, prompts: Sequence[str], seeds: Sequence[Sequence[int]]) -> list[list[str]]:
        """Answers [B][len(seeds[b])]; tokens are counted as the server reports them."""
        jobs = [(prompt, seed) for prompt, own in zip(prompts, seeds, strict=True) for seed in own]
        with self.ledger.timed():
            answers = self.server.all(jobs, self._ask)
        for _, usage in answers:
            generated, read = (usage.get(k) for k in ("completion_tokens", "prompt_tokens"))
            self.ledger.add_policy(0, generated=generated or 0, prefilled=read or 0, calls=1)
        texts = iter(text for text, _ in answers)
        return [[next(texts) for _ in own] for own in seeds]

    def _ask(self, job: tuple[str, int]) -> tuple[str, dict[str, Any]]:
        prompt, seed = job
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": prompt}],
            "max_tokens": self.sampling.max_new_tokens,
            "temperature": self.sampling.temperature,
            "top_p": self.sampling.top_p,
            "seed": seed % 2**31,  # some servers refuse a larger one
        }
        reply = self.server.post("/chat/completions", body)
        try:
            text = reply["choices"][0]["message"].get("content") or ""
        except (KeyError, IndexError, TypeError, AttributeError):
            raise UserError(f"{self.server.base_url}: no message in the answer {str(reply)[:100]!r}") from None
        return text, reply.get("usage") or {}


class ServedRewardModel:
    """Step scores from vLLM's /pooling: token ids laid out by the step format go in, class probabilities come back.

    `layout` is a folder with the tokenizer and step_format.json of the model that is served. The server answers with the values of
    every token (task `token_classify`) or of every step (a model with STEP pooling, such as Qwen2.5-Math-PRM); both are read. It
    must return probabilities, as it does by default.
    """

    def __init__(self, server: Server, model: str, tokenizer: Any, step_format: StepFormat) -> None:
        if step_format.head == "none":
            raise UserError(f"{model}: the step format says head: none, so it is a policy and not a reward model")
        self.server, self.name, self.tokenizer, self.step_format = server, model, tokenizer, step_format
        self.ledger = Ledger()

    @classmethod
    def load(cls, base_url: str, model: str, layout: str, *, concurrency: int = 16) -> ServedRewardModel:
        """The model that a server at `base_url` (with or without /v1) knows as `model`."""
        return cls(
            Server(base_url.rstrip("/").removesuffix("/v1"), concurrency=concurrency),
            model,
            load_tokenizer(layout),
            StepFormat.load(layout),
        )

    def score(self, solutions: Sequence[tuple[str, Sequence[str]]]) -> list[list[float]]:
        """Scores [B][T_b] of the steps of each solution."""
        encoded = [self.step_format.encode(self.tokenizer, prompt, steps) for prompt, steps in solutions]
        distinct = list(dict.fromkeys(one for one in encoded if one.step_ends))
        with self.ledger.timed():
            found = dict(zip(distinct, self.server.all(distinct, self._ask), strict=True))
        self.ledger.add_reward(0, sum(len(one.ids) for one in distinct))
        return [found[one] if one.step_ends else [] for one in encoded]

    def _ask(self, one: Encoded) -> list[float]:
        reply = self.server.post("/pooling", {"model": self.name, "input": list(one.ids)})
        try:
            values = reply["data"][0]["data"]
            values = [list(v) if isinstance(v, list) else [v] for v in values]
        except (KeyError, IndexError, TypeError):
            raise UserError(f"{self.server.base_url}: no values in the answer {str(reply)[:100]!r}") from None
        if len(values) == len(one.ids):
            values = [values[end] for end in one.step_ends]
        elif len(values) != len(one.step_ends):
            raise UserError(
                f"{self.server.base_url}: {len(values)} values for {len(one.ids)} tokens and {len(one.step_ends)} steps; "
                "serve the model with --runner pooling, and a pooling type that returns all tokens or steps"
            )
        column = self.step_format.positive_class if self.step_format.head == "two_class" else 0
        labels = 2 if self.step_format.head == "two_class" else 1
        if any(len(v) != labels for v in values):
            raise UserError(
                f"{self.server.base_url}: a {self.step_format.head} head gives {labels} values a step, found {len(values[0])}"
            )
        scores = [float(v[column or 0]) for v in values]
        if any(not 0 <= s <= 1 for s in scores):
            raise UserError(f"{self.server.base_url}: expected probabilities, found {min(scores):g} to {max(scores):g}")
        return scores
