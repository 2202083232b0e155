"""What the vLLM engine asks of vLLM and makes of its answers, with a stand-in for the package."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from stepladder.basics import UserError
from stepladder.models.engine import Request, Sample, Sampling, StopReason
from stepladder.models.vllm_engine import VLLMEngine


@pytest.fixture
def fake_vllm(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A package `vllm` that keeps what it is asked and answers with `answer(prompt ids, params)`."""
    module = ModuleType("vllm")
    state = SimpleNamespace(made=[], asked=[], answer=None, cached=None)

    class LLM:
        def __init__(self, **options: Any) -> None:
            if options["model"] == "broken":
                raise ValueError("no such architecture\nmore lines")
            state.made.append(options)
            self.model_config = SimpleNamespace(max_model_len=10, dtype=torch.bfloat16)

        def generate(self, prompts: Any, sampling_params: Any, use_tqdm: bool) -> list[Any]:
            assert use_tqdm is False
            assert len(prompts) == len(sampling_params)
            state.asked += [
                (p["prompt_token_ids"], vars(s)) for p, s in zip(prompts, sampling_params, strict=True) if len(p) == 1
            ]
            return [
                SimpleNamespace(outputs=[state.answer(p["prompt_token_ids"], s)], num_cached_tokens=state.cached)
                for p, s in zip(prompts, sampling_params, strict=True)
            ]

    module.LLM = LLM  # type: ignore[attr-defined]
    module.SamplingParams = SimpleNamespace  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", module)
    return state


def output(ids: Sequence[int], finish: str | None, reason: Any = None, *, logprobs: bool = True) -> Any:
    """A completion as vLLM gives it: for each position a dict from token id, in which other tokens may come first."""
    values = [{i + 1: SimpleNamespace(logprob=-9.0), i: SimpleNamespace(logprob=-i / 4)} for i in ids]
    return SimpleNamespace(
        token_ids=list(ids), finish_reason=finish, stop_reason=reason, logprobs=values if logprobs else None
    )


def engine(tokenizer: Any, **options: Any) -> VLLMEngine:
    return VLLMEngine("some/model", tokenizer, parameters=5, **options)


def test_parameters_sent(fake_vllm: Any, lab_words: Any) -> None:
    fake_vllm.answer = lambda ids, params: output([4, 2], "stop")
    made = engine(lab_words, max_model_len=10)
    assert fake_vllm.made == [
        {
            "model": "some/model", "dtype": "auto", "trust_remote_code": False, "enable_prefix_caching": True,
            "logprobs_mode": "processed_logprobs", "seed": 0, "max_model_len": 10,
        }
    ]  # fmt: skip
    assert made.name == "vllm:some/model:bfloat16"
    sampling = Sampling(6, temperature=0.7, top_p=0.9, top_k=3, stop=("\n",))
    made.generate([Request((5, 6), (11, 12)), Request((5, 6, 7, 8, 9, 5, 6), (13,))], sampling)
    common = {
        "n": 1, "temperature": 0.7, "top_p": 0.9, "top_k": 3, "min_p": 0.0, "repetition_penalty": 1.0, "stop": ["\n"],
        "include_stop_str_in_output": True, "detokenize": True, "skip_special_tokens": False, "logprobs": 0,
    }  # fmt: skip
    assert fake_vllm.asked == [
        ([5, 6], {**common, "seed": 11, "max_tokens": 6}),
        ([5, 6], {**common, "seed": 12, "max_tokens": 6}),
        ([5, 6, 7, 8, 9, 5, 6], {**common, "seed": 13, "max_tokens": 3}),  # what the context has left
    ]
    fake_vllm.asked.clear()
    made.generate([Request((5,), (1,))], Sampling(2))
    assert fake_vllm.asked[0][1]["top_k"] == -1
    assert fake_vllm.asked[0][1]["stop"] is None


def test_answers_become_samples_in_order(fake_vllm: Any, lab_words: Any) -> None:
    answers = {
        1: output([8, 2], "stop"),
        2: output([8, 4], "stop", "\n"),
        3: output([8, 9, 10], "length"),
        4: output([8, 12], "stop", 12),  # another end-of-sequence id of the model
        5: output([8], "length", logprobs=False),
    }
    fake_vllm.answer = lambda ids, params: answers[params.seed]
    made = engine(lab_words)
    found = made.generate([Request((5, 6), (3, 1)), Request((5,) * 10, (1,)), Request((5,), (2, 4, 5))], Sampling(3))
    assert found[0] == [
        Sample((8, 9, 10), (-2.0, -2.25, -2.5), StopReason.LENGTH),
        Sample((8, 2), (-2.0, -0.5), StopReason.EOS),
    ]
    assert found[1] == [Sample((), (), StopReason.CONTEXT)]
    assert [s.stop for s in found[2]] == [StopReason.STOP, StopReason.EOS, StopReason.LENGTH]
    assert math.isnan(found[2][2].logprobs[0])
    ledger = made.ledger
    assert (ledger.generated_tokens, ledger.prefilled_tokens, ledger.policy_calls) == (3 + 2 + 2 + 2 + 1, 2 + 1, 5)
    assert ledger.flops == 2 * 5 * 13


def test_the_ledger_takes_what_vllm_says_was_cached(fake_vllm: Any, lab_words: Any) -> None:
    fake_vllm.answer = lambda ids, params: output([8], "length")
    fake_vllm.cached = 3
    made = engine(lab_words)
    made.generate([Request((5, 6, 7, 8), (1, 2))], Sampling(1))
    assert made.ledger.prefilled_tokens == 2


def test_parameters_are_counted_without_weights(
    fake_vllm: Any, lab_words: Any, tiny_policy: Any, tmp_path: Any
) -> None:
    model = tiny_policy(lab_words)
    model.config.save_pretrained(tmp_path)
    made = VLLMEngine(str(tmp_path), lab_words)
    assert made.parameters == model.num_parameters()


def test_mistakes(fake_vllm: Any, lab_words: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"broken: vLLM could not load the model \(no such architecture\)"):
        VLLMEngine("broken", lab_words)
    fake_vllm.answer = lambda ids, params: output([8], "abort")
    with pytest.raises(RuntimeError, match="finish_reason 'abort'"):
        engine(lab_words).generate([Request((5,), (1,))], Sampling(1))
    assert engine(lab_words).generate([Request((), (1,))], Sampling(1)) == [[Sample((), (), StopReason.CONTEXT)]]
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(UserError, match=r"needs vLLM.*pip install 'stepladder\[vllm\]'"):
        engine(lab_words)


@pytest.mark.parametrize("reloads", [True, False])
def test_new_weights_go_to_the_model_and_empty_the_cache(fake_vllm: Any, lab_words: Any, reloads: bool) -> None:
    """By vLLM's own way of reloading, which lays weights out for its kernels again; by the model itself where vLLM has none yet."""
    engine = VLLMEngine("some", lab_words, parameters=1)
    told: list[Any] = []
    model = torch.nn.Module()
    model.load_weights = lambda weights: told.append(["load_weights", dict(weights)])
    model.read, model.other, model.write = (torch.nn.Linear(2, 3) for _ in range(3))
    model.write.weight = model.read.weight  # tied
    for name, layer in model.named_children():
        layer.quant_method = SimpleNamespace(
            process_weights_after_loading=lambda _, n=name: told.append(["laid out", n])
        )
    runner = SimpleNamespace(model=model, reload_weights=lambda: None)
    if reloads:
        runner.reload_weights = lambda weights_iterator=None, weights_path=None: None
    worker = SimpleNamespace(model_runner=runner)
    engine.llm.llm_engine = SimpleNamespace(model_executor=SimpleNamespace(driver_worker=worker))
    engine.llm.collective_rpc = lambda name, kwargs: told.append([name, dict(kwargs["weights_iterator"])])
    engine.llm.reset_prefix_cache = lambda: told.append("reset")
    engine.update_weights([("a", 1), ("b", 2)])
    expected = {
        True: [["reload_weights", {"a": 1, "b": 2}], ["laid out", "write"]],
        False: [["load_weights", {"a": 1, "b": 2}]],
    }
    assert told == [*expected[reloads], "reset"]
