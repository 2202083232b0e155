"""Decoding: tokens a second of SmolLM2 in bfloat16, beside plain `generate` and vLLM on a CPU.

    python bench/decode.py --model FOLDER [--batch 128] [--vllm-python vllm-env/bin/python]

Every prompt is another word problem with one sample of exactly `--new-tokens` tokens at temperature 1; end-of-sequence tokens do
not end it. What the first token takes, and with it the prompts, is measured apart and taken off. vLLM lives in an environment of
its own: `--vllm-python` names its interpreter, which needs nothing of Stepladder.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

from measure import Question, Work, bench, now

OPTIONS = {"model": "", "dtype": "bfloat16", "batch": 64, "new_tokens": 64, "vllm_python": ""}
OURS, PLAIN, VLLM = "stepladder", "generate", "vLLM"


def question(args: argparse.Namespace) -> Question:
    arms = (OURS, PLAIN, VLLM) if args.vllm_python else (OURS, PLAIN)
    asks = f"Decoding, batch {args.batch}, {args.dtype}"
    return Question("decode", asks, "tokens a second", arms, {PLAIN: 1.6, VLLM: 0.9}, dtype=args.dtype)


def prompts(tokenizer: Any, count: int) -> list[list[int]]:
    """Ids of word problems of a few lengths, as the model's chat template lays them out where it has one."""
    names, things = ("Ann", "Ben", "Cleo", "Dan"), ("apples", "books", "red marbles", "small boxes of chalk")
    found = []
    for n in range(count):
        text = f"{names[n % 4]} has {n + 3} {things[n // 4 % 4]} and buys {2 * n + 1} more."
        text += f" Then {names[(n + 1) % 4]} takes {n % 3 + 1} of them." * (1 + n % 2) + " How many are left?"
        if tokenizer.chat_template:
            text = tokenizer.apply_chat_template(
                [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
            )
        found.append(tokenizer(text, add_special_tokens=False)["input_ids"])
    return found


def prepare(arm: str, args: argparse.Namespace) -> Callable[[], Work]:
    """The prompts are encoded and the model is warm."""
    from stepladder.models.loading import load_tokenizer

    if not args.model:
        raise SystemExit("--model FOLDER is missing: SmolLM2-135M-Instruct, as `stepladder import-gguf` writes it")
    asked = prompts(load_tokenizer(args.model), args.batch)
    tokens = args.batch * (args.new_tokens - 1)
    if arm == VLLM:
        return vllm_work(args, asked, tokens)

    import torch

    from stepladder.models.engine import Request, Sampling
    from stepladder.models.loading import load_engine

    engine: Any = load_engine(args.model, dtype=args.dtype, device="cpu", batch_size=args.batch)
    engine.eos_ids = ()
    model, pad = engine.model, engine.tokenizer.pad_token_id

    def ours(new_tokens: int) -> None:
        requests = [Request(tuple(ids), (n,)) for n, ids in enumerate(asked)]
        found = engine.generate(requests, Sampling(new_tokens))
        assert all(len(sample.ids) == new_tokens for one in found for sample in one)

    def plain(new_tokens: int) -> None:
        longest = max(map(len, asked))
        ids = torch.tensor([[pad] * (longest - len(one)) + one for one in asked])
        mask = torch.tensor([[0] * (longest - len(one)) + [1] * len(one) for one in asked])
        with torch.inference_mode():
            out = model.generate(
                input_ids=ids, attention_mask=mask, do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
                max_new_tokens=new_tokens, pad_token_id=pad, eos_token_id=None,
            )  # fmt: skip
        assert out.shape[1] == longest + new_tokens

    torch.manual_seed(0)
    model.generation_config.eos_token_id = None
    sample = ours if arm == OURS else plain
    sample(2)

    def work() -> Work:
        began = now()
        sample(1)
        first = [after - before for before, after in zip(began, now(), strict=True)]
        sample(args.new_tokens)
        flops = 2.0 * engine.parameters * tokens
        return Work(units=tokens, tokens=tokens, flops=flops, uncounted=(2 * first[0], 2 * first[1]))

    return work


def vllm_work(args: argparse.Namespace, asked: list[list[int]], tokens: int) -> Callable[[], Work]:
    """A process in vLLM's environment that samples whenever it is told to."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
    # vLLM binds its threads to the first processors unless it is told which.
    environment.setdefault(
        "VLLM_CPU_OMP_THREADS_BIND", ",".join(map(str, range(args.threads))) if args.threads > 1 else "0"
    )
    job = json.dumps({"model": args.model, "dtype": args.dtype, "prompts": asked, "new_tokens": args.new_tokens})
    process = subprocess.Popen(
        [args.vllm_python, "-c", _VLLM, job], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdin is not None
    assert process.stdout is not None
    told: Any = process.stdout

    def reply() -> dict[str, Any]:
        for line in told:
            if line.startswith("STEPLADDER "):
                return json.loads(line.removeprefix("STEPLADDER "))
            print(line, end="", file=sys.stderr)
        raise SystemExit("vLLM ended with an error")

    version = reply()["version"]

    def work() -> Work:
        process.stdin.write("go\n")  # type: ignore[union-attr]
        process.stdin.flush()  # type: ignore[union-attr]
        first = reply()["first"]
        return Work(units=tokens, tokens=tokens, uncounted=(2 * first, 0.0), extra={"version": version})

    return work


_VLLM = """
import json, sys, time
import vllm

asked = json.loads(sys.argv[1])
engine = vllm.LLM(model=asked["model"], dtype=asked["dtype"], max_model_len=512, max_num_seqs=len(asked["prompts"]),
                  enable_prefix_caching=False)
prompts = [{"prompt_token_ids": ids} for ids in asked["prompts"]]
params = lambda n: vllm.SamplingParams(temperature=1.0, max_tokens=n, ignore_eos=True, detokenize=False)
engine.generate(prompts, params(2), use_tqdm=False)
print("STEPLADDER", json.dumps({"version": vllm.__version__}), flush=True)
for _ in sys.stdin:
    began = time.perf_counter()
    engine.generate(prompts, params(1), use_tqdm=False)
    first = time.perf_counter() - began
    found = engine.generate(prompts, params(asked["new_tokens"]), use_tqdm=False)
    assert all(len(one.outputs[0].token_ids) == asked["new_tokens"] for one in found)
    print("STEPLADDER", json.dumps({"first": first}), flush=True)
"""


if __name__ == "__main__":
    bench(question, prepare, **OPTIONS)
