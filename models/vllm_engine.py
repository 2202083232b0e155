"""The engine in process on vLLM, behind the extra `vllm`. It is imported only when an engine is made."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Sequence
from typing import Any

from ..basics import UserError
from .engine import Request, Sample, Sampling, StopReason
from .ledger import Ledger


class VLLMEngine:
    """Samples from the model at `path` (folder or hub id) with vLLM in this process.

    Every sample is a request of its own with its own seed; vLLM's prefix cache encodes a shared prefix once. Log-probabilities
    are asked for after temperature, top-k and top-p, as `Sample` promises. `options` go to `vllm.LLM` (tensor_parallel_size,
    max_model_len, gpu_memory_utilization, ...).

    Raises UserError when vLLM is not installed or cannot load the model.
    """

    def __init__(
        self,
        path: str,
        tokenizer: Any,
        *,
        dtype: str = "auto",
        name: str = "",
        parameters: int | None = None,
        ledger: Ledger | None = None,
        **options: Any,
    ) -> None:
        try:
            import vllm
        except ImportError as error:
            raise UserError(
                "the vllm backend needs vLLM, in an environment of its own because it fixes the versions of torch and "
                f"transformers: pip install 'stepladder[vllm]' ({error})"
            ) from error
        self.tokenizer = tokenizer
        options = {"enable_prefix_caching": True, "logprobs_mode": "processed_logprobs", "seed": 0, **options}
        try:
            self.llm = vllm.LLM(model=path, dtype=dtype, trust_remote_code=False, **options)
        except (OSError, ValueError, RuntimeError) as error:
            line = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise UserError(f"{path}: vLLM could not load the model ({line[:300]})") from error
        config = getattr(self.llm, "model_config", None) or self.llm.llm_engine.model_config
        self.context = int(config.max_model_len)
        self.name = name or f"vllm:{path}:{str(config.dtype).removeprefix('torch.')}"
        self.parameters = _count_parameters(path) if parameters is None else parameters
        self.ledger = ledger or Ledger()

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[list[Sample]]:
        """Samples [len(requests)][len(request.seeds)], in the order asked."""
        results = [[Sample((), (), StopReason.CONTEXT)] * len(r.seeds) for r in requests]
        jobs = [
            (row, column)
            for row, request in enumerate(requests)
            if 0 < len(request.prefix) < self.context
            for column in range(len(request.seeds))
        ]
        if not jobs:
            return results
        with self.ledger.timed():
            outputs = self.llm.generate(
                [{"prompt_token_ids": list(requests[row].prefix)} for row, _ in jobs],
                sampling_params=[
                    self._params(requests[row], requests[row].seeds[column], sampling) for row, column in jobs
                ],
                use_tqdm=False,
            )
        for (row, column), output in zip(jobs, outputs, strict=True):
            results[row][column] = _to_sample(output.outputs[0])
            length, cached = len(requests[row].prefix), getattr(output, "num_cached_tokens", None)
            if cached is None:  # not reported: a shared prefix is encoded with its first sample
                cached = 0 if column == 0 else length
            self.ledger.add_policy(
                self.parameters, generated=len(results[row][column].ids), prefilled=length - cached, calls=1
            )
        return results

    def update_weights(self, weights: Iterable[tuple[str, Any]]) -> None:
        """Overwrites the model's weights with (name, tensor) pairs in the names of the checkpoint, and forgets what was cached.

        vLLM must run its model in this process (VLLM_ENABLE_V1_MULTIPROCESSING=0). Tried with vLLM 0.32 on a CPU.
        """
        runner = self.llm.llm_engine.model_executor.driver_worker.model_runner
        reload = getattr(runner, "reload_weights", None)
        if reload is not None and "weights_iterator" in inspect.signature(reload).parameters:
            # After loading, vLLM gives weights the layout of its kernels and drops what could load them, on CPUs always. Its own
            # way of reloading lays them out once more.
            self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(weights)})
            _lay_out_shared(runner.model)
        else:
            runner.model.load_weights(weights)
        self.llm.reset_prefix_cache()

    def _params(self, request: Request, seed: int, sampling: Sampling) -> Any:
        import vllm

        return vllm.SamplingParams(
            n=1,
            seed=seed,
            max_tokens=min(sampling.max_new_tokens, self.context - len(request.prefix)),
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k or -1,  # -1 is "all tokens" in every version; 0 is not
            min_p=0.0,
            repetition_penalty=1.0,
            stop=list(sampling.stop) or None,
            include_stop_str_in_output=True,
            detokenize=True,  # stop strings are found in text
            skip_special_tokens=False,
            logprobs=0,  # of the sampled token alone
        )


def _lay_out_shared(model: Any) -> None:
    """Lays out once more what a layer shares with one before it: vLLM (0.32) does so for the first alone, and on a CPU a tied head
    would go on with the product that it packed of the old embeddings."""
    seen = set()
    for layer in model.modules():
        weight, method = getattr(layer, "weight", None), getattr(layer, "quant_method", None)
        if weight is None or method is None or not weight.numel():
            continue
        if weight.data_ptr() in seen:
            method.process_weights_after_loading(layer)
        seen.add(weight.data_ptr())


def _to_sample(output: Any) -> Sample:
    """The sample in a vLLM completion. Its stop_reason is a stop string, a token id, or None for the end of the sequence."""
    ids = tuple(output.token_ids)
    if output.finish_reason == "length":
        stop = StopReason.LENGTH
    elif output.finish_reason == "stop":
        stop = StopReason.STOP if isinstance(output.stop_reason, str) else StopReason.EOS
    else:
        raise RuntimeError(f"vLLM ended a sample with finish_reason {output.finish_reason!r}")
    if output.logprobs is None:
        return Sample(ids, (math.nan,) * len(ids), stop)
    logprobs = tuple(float(at[i].logprob) for i, at in zip(ids, output.logprobs, strict=True))
    return Sample(ids, logprobs, stop)


def _count_parameters(path: str) -> int:
    """Parameters of the model at `path`, counted without loading its weights; FLOPs are reckoned with them."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path))
    return sum(p.numel() for p in model.parameters())
