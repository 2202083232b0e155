"""What goes to and comes from an OpenAI-compatible server: request bodies in its dialect, and what a reply says."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ..basics import UserError
from .engine import Sampling, StopReason

Api = Literal["completions", "chat"]

# Asked of every server and given up together when it refuses them. The first three undo the defaults that a server takes from
# a model's generation_config (or invents), the others make it return what was sampled and not a rendering of it.
EXTENSIONS = {
    "top_k": -1,  # all tokens; 0 means the same to some servers and is refused by others
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "return_token_ids": True,
    "return_tokens_as_token_ids": True,
    "include_stop_str_in_output": True,
    "skip_special_tokens": False,
    "spaces_between_special_tokens": False,
}


@dataclass(frozen=True)
class Prompt:
    """A prefix as ids, and as the text that stands for it; `exact` says whether the text encodes to these ids."""

    ids: tuple[int, ...]
    text: str
    exact: bool


@dataclass
class Dialect:
    """What a server takes. It begins with everything; `step_down` gives up what is refused."""

    api: Api
    token_ids: bool = True  # prompts as token ids, not text
    extensions: bool = True
    logprobs: bool = True
    serve: bool = False  # `transformers serve`, which refuses unknown fields and takes sampling in a field of its own

    def step_down(self, message: str) -> bool:
        """Gives up one thing that a server may have refused with `message`. False when nothing is left."""
        lower = message.lower()
        if "unexpected fields" in lower and not self.serve:
            self.serve, self.token_ids, self.extensions, self.logprobs = True, False, False, False
            return True
        hints = (
            ("logprob", "logprobs"),
            ("prompt", "token_ids"),
            ("", "extensions"),
            ("", "logprobs"),
            ("", "token_ids"),
        )
        for word, what in hints:
            if word in lower and getattr(self, what):
                setattr(self, what, False)
                return True
        return False

    def body(
        self, model: str, prompt: Prompt, seed: int, max_tokens: int, sampling: Sampling, stop: Sequence[str]
    ) -> dict[str, Any]:
        """The JSON body of the request for one sample. Raises UserError if the server cannot be asked for `sampling`."""
        body: dict[str, Any] = {"model": model, "max_tokens": max_tokens, "seed": seed}
        if self.api == "chat":
            body["messages"] = [{"role": "user", "content": prompt.text}]
        else:
            body["prompt"] = list(prompt.ids) if self.token_ids else prompt.text
        if self.serve:
            # Where a request is silent this server is greedy or filters by its own defaults, and this is its only field that
            # says otherwise. What it leaves open (the end-of-sequence ids) comes from the model.
            config: dict[str, Any] = {"do_sample": sampling.temperature > 0, "repetition_penalty": 1.0}
            if sampling.temperature > 0:
                config.update(temperature=sampling.temperature, top_k=sampling.top_k, top_p=sampling.top_p)
            if stop:
                config["stop_strings"] = list(stop)
            body["generation_config"] = json.dumps(config)
            return body
        body.update(n=1, temperature=sampling.temperature, top_p=sampling.top_p)
        if stop:
            body["stop"] = list(stop)
        if self.logprobs:
            body["logprobs"] = True if self.api == "chat" else 1
        if self.extensions:
            body.update(EXTENSIONS)
            if self.api == "completions":
                body["add_special_tokens"] = False  # a prompt has the special tokens that it should have
            if sampling.top_k:
                body["top_k"] = sampling.top_k
        elif sampling.top_k:
            raise UserError(f"the server of {model} does not take top_k; set top_k: 0")
        return body


class MalformedReply(Exception):
    """A reply without what the protocol promises, as a dying server or a proxy sends it."""


@dataclass(frozen=True)
class Choice:
    """What a reply says of its sample. `ids` None: the server gives only text."""

    text: str
    finish: str  # "stop" or "length"
    reason_given: bool  # the server tells a stop string from the end of the sequence
    reason: str | int | None  # the stop string, or a token id, or None for the end of the sequence
    ids: tuple[int, ...] | None
    tokens: tuple[str, ...]  # as the server writes them; empty without log-probabilities
    logprobs: tuple[float | None, ...]

    @classmethod
    def parse(cls, reply: Any) -> tuple[Choice, Mapping[str, Any]]:
        """(first choice, usage) of a reply. Raises MalformedReply, and UserError for what no retry would change."""
        choices = reply.get("choices") if isinstance(reply, dict) else None
        if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
            raise MalformedReply(f"no choices in {str(reply)[:100]!r}")
        found = choices[0]
        message = found.get("message") or {}
        if message.get("reasoning_content") or message.get("reasoning"):
            raise UserError("the server splits off the model's reasoning; start it without a reasoning parser")
        finish = found.get("finish_reason")
        if finish in ("content_filter", "tool_calls"):
            raise UserError(f"the server ended a sample with finish_reason {finish}; only text is supported")
        text = message.get("content") or "" if message else found.get("text")
        if finish not in ("stop", "length") or not isinstance(text, str):
            raise MalformedReply(f"finish_reason {finish!r}, text {str(text)[:50]!r}")
        tokens, logprobs = _logprobs(found.get("logprobs") or {})
        ids = found.get("token_ids")
        if not isinstance(ids, list):
            ids = None
            if tokens and all(t.startswith("token_id:") for t in tokens):
                ids = [int(t.removeprefix("token_id:")) for t in tokens]
        choice = cls(
            text=text,
            finish=finish,
            reason_given="stop_reason" in found or "matched_stop" in found,
            reason=found.get("stop_reason", found.get("matched_stop")),
            ids=None if ids is None else tuple(ids),
            tokens=tokens,
            logprobs=logprobs,
        )
        return choice, reply.get("usage") or {}

    def full_text(self, stop: Sequence[str]) -> str:
        """The text with the stop string that ended it, if the server names it but cuts it off."""
        cut = isinstance(self.reason, str) and not any(s in self.text for s in stop)
        return self.text + str(self.reason) if cut else self.text

    def leaves_open(self, stop: Sequence[str]) -> bool:
        """Whether a stop string that was cut off, or the end of the sequence, may have ended the sample."""
        return bool(stop) and self.finish == "stop" and not self.reason_given and not any(s in self.text for s in stop)

    def stop_reason(self, stop: Sequence[str], *, stop_sent: bool) -> StopReason:
        """Why the sample ended. With `stop_sent` False the server knew of no stop strings and the text decides."""
        if isinstance(self.reason, str):
            return StopReason.STOP
        undecided = self.finish == "length" or not self.reason_given or not stop_sent
        if undecided and any(s in self.text for s in stop):
            return StopReason.STOP
        return StopReason.LENGTH if self.finish == "length" else StopReason.EOS


def _logprobs(found: Mapping[str, Any]) -> tuple[tuple[str, ...], tuple[float | None, ...]]:
    """(tokens, log-probabilities of the sampled tokens) in the layout of either endpoint."""
    if isinstance(found.get("content"), list):
        return tuple(c["token"] for c in found["content"]), tuple(c["logprob"] for c in found["content"])
    tokens, values = found.get("tokens"), found.get("token_logprobs")
    if not isinstance(tokens, list) or not isinstance(values, list):
        return (), ()
    return tuple(tokens), tuple(values)
