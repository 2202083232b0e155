"""The server's side of OpenAI's chat protocol: what a request says, and the bodies of replies, chunks and errors."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ..basics import finite
from .solving import Solved, Ways

# Fields that say something about the request and nothing about the answer.
_IGNORED = ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key")
# Fields that are not supported, with the values that ask for nothing; null always does.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "stop": ([],),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "reasoning_effort": (),
    "verbosity": (),
    "web_search_options": (),
}
_READ = (
    "model", "messages", "stream", "stream_options", "max_tokens", "max_completion_tokens", "temperature", "top_p", "seed",
    "budget", "tree",
)  # fmt: skip


class Refused(Exception):
    """A request that gets no answer: its status and what the client is told."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None, retry_after: int = 0
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code, self.retry_after = status, param, code, retry_after

    def body(self) -> dict[str, Any]:
        """The error in OpenAI's shape."""
        kinds = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


@dataclass(frozen=True)
class Chat:
    """What a request asks for; None where it says nothing."""

    prompt: str
    system: str | None
    seed: int | None
    budget: int | None
    max_tokens: int | None
    temperature: float | None
    top_p: float | None
    stream: bool
    include_usage: bool  # of a stream: its last chunk has the usage
    tree: bool  # send the whole search along


def parse_chat(raw: bytes, model: str) -> Chat:
    """The request in a body. Raises Refused, with the field, for all that is not understood or not supported."""
    try:
        body = json.loads(raw.decode(), parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise Refused(400, f"The body is not valid JSON ({str(error)[:200]}).", code="invalid_json") from None
    if not isinstance(body, dict):
        raise Refused(400, f"The body must be a JSON object, found {type(body).__name__}.", code="invalid_json")
    known = (*_READ, *_IGNORED, *_NEUTRAL)
    for name, value in body.items():
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]}?" if near else "."
            raise Refused(400, f"Unknown field {name[:80]!r}{hint}", param=name[:80], code="unknown_parameter")
        if name in _NEUTRAL and value is not None and value not in _NEUTRAL[name]:
            raise Refused(400, f"{name} is not supported by this server.", param=name, code="unsupported_parameter")
    asked = body.get("model")
    if not isinstance(asked, str):
        raise _bad("model", "is missing" if asked is None else "must be text")
    if asked != model:
        message = f"The model {asked[:80]!r} does not exist; this server has {model!r}."
        raise Refused(404, message, param="model", code="model_not_found")
    system, prompt = _messages(body.get("messages"))
    options = body.get("stream_options") or {}
    if not isinstance(options, dict):
        raise _bad("stream_options", "must be an object")
    longest = [_whole(body, name, 1) for name in ("max_completion_tokens", "max_tokens")]
    return Chat(
        prompt=prompt,
        system=system,
        seed=_whole(body, "seed"),
        budget=_whole(body, "budget", 1),
        max_tokens=longest[0] or longest[1],
        temperature=_number(body, "temperature", 0.0, 2.0),
        top_p=_number(body, "top_p", 1e-6, 1.0),
        stream=_flag(body, "stream"),
        include_usage=_flag(options, "include_usage"),
        tree=_flag(body, "tree"),
    )


def _messages(messages: Any) -> tuple[str | None, str]:
    """(system message, the problem)."""
    if not isinstance(messages, list) or not messages:
        raise _bad("messages", "is missing" if messages is None else "must be a list with a message")
    texts: dict[str, list[str]] = {"system": [], "user": []}
    for number, message in enumerate(messages):
        at = f"messages[{number}]"
        if not isinstance(message, dict):
            raise _bad(at, "must be an object with role and content")
        role = {"developer": "system"}.get(message.get("role", ""), message.get("role"))
        if role not in ("system", "user"):
            raise _bad(
                f"{at}.role", "must be system, developer or user: a search answers one problem, not a conversation"
            )
        content = message.get("content")
        if isinstance(content, list):
            if not all(
                isinstance(p, dict) and p.get("type") == "text" and isinstance(p.get("text"), str) for p in content
            ):
                raise _bad(f"{at}.content", "may hold text only")
            content = "".join(part["text"] for part in content)
        if not isinstance(content, str):
            raise _bad(f"{at}.content", "must be text")
        texts[role].append(content)
    if len(texts["user"]) != 1:
        raise _bad("messages", f"must hold one user message, the problem, found {len(texts['user'])}")
    if not texts["user"][0].strip():
        raise _bad("messages", "hold an empty problem")
    return "\n\n".join(texts["system"]) if texts["system"] else None, texts["user"][0]


def _bad(param: str, what: str) -> Refused:
    return Refused(400, f"{param} {what}.", param=param, code="invalid_value")


def _no_number(name: str) -> Any:
    raise ValueError(f"{name} is no JSON number")


def _whole(body: Mapping[str, Any], name: str, least: int | None = None) -> int | None:
    value = body.get(name)
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool) or (least is not None and value < least):
        raise _bad(name, "must be a whole number" + (f" of {least} or more" if least is not None else ""))
    return value


def _number(body: Mapping[str, Any], name: str, least: float, most: float) -> float | None:
    value = body.get(name)
    if value is None:
        return None
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not least <= value <= most:
        raise _bad(name, f"must be a number from {least:g} to {most:g}")
    return float(value)


def _flag(body: Mapping[str, Any], name: str) -> bool:
    value = body.get(name)
    if value is not None and not isinstance(value, bool):
        raise _bad(name, "must be true or false")
    return bool(value)


# --- replies -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reply:
    """An answer on its way to a client."""

    id: str
    created: int
    model: str
    chat: Chat
    solved: Solved
    ways: Ways
    batch: Mapping[str, Any]  # the problems that were searched together, and what that cost

    def usage(self) -> dict[str, Any]:
        """Tokens of the prompt and of the chosen solution, and under `search` what was spent to find it."""
        record, completion = self.solved.record, len(self.solved.solution.token_ids)
        return {
            "prompt_tokens": self.solved.prompt_tokens,
            "completion_tokens": completion,
            "total_tokens": self.solved.prompt_tokens + completion,
            "search": {
                "budget": self.ways.budget,
                "generated_tokens": record["tokens"],
                "solutions": len(record["finals"]),
                "rounds": record["rounds"],
                "batch": self.batch,
            },
        }

    def search(self) -> dict[str, Any]:
        """What the search says beyond the text."""
        record = self.solved.record
        found: dict[str, Any] = {
            "strategy": record["strategy"],
            "answer": self.solved.solution.answer,
            "score": record["finals"][self.solved.chosen]["score"],
            "votes": [{"answer": a, "count": count, "score": s} for a, (count, s) in self.solved.votes.items()],
        }
        return found | ({"tree": record} if self.chat.tree else {})

    @property
    def finish(self) -> str:
        return "length" if self.solved.solution.stop in ("length", "context") else "stop"

    def body(self) -> dict[str, Any]:
        """The whole reply."""
        message = {"role": "assistant", "content": self.solved.solution.text, "refusal": None}
        choice = {"index": 0, "message": message, "finish_reason": self.finish, "logprobs": None}
        return finite(
            {**self._head("chat.completion"), "choices": [choice], "usage": self.usage(), "search": self.search()}
        )

    def chunks(self, separator: str) -> Iterator[dict[str, Any]]:
        """The reply as chunks, a step at a time; the last has the search, and one more the usage if that was asked for."""
        head = self._head("chat.completion.chunk")
        rest = {"usage": None} if self.chat.include_usage else {}
        piece = lambda delta, finish=None: {"index": 0, "delta": delta, "finish_reason": finish, "logprobs": None}
        yield {**head, "choices": [piece({"role": "assistant", "content": ""})], **rest}
        lines = self.solved.solution.text.split(separator)
        for text in [*(line + separator for line in lines[:-1]), lines[-1]]:
            if text:
                yield {**head, "choices": [piece({"content": text})], **rest}
        yield finite({**head, "choices": [piece({}, self.finish)], "search": self.search(), **rest})
        if self.chat.include_usage:
            yield finite({**head, "choices": [], "usage": self.usage()})

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}
