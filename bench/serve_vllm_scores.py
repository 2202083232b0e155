"""Step scores of an exported reward model: vLLM's, which knows the Qwen2.5-Math-PRM architecture by name, beside ours.

    stepladder export runs/prm --to qwen-prm --out runs/prm_qwen
    python bench/serve_vllm_scores.py runs/prm_qwen --vllm-python vllm-env/bin/python

vLLM usually lives in an environment of its own: `--vllm-python` names its interpreter, which needs nothing of Stepladder. Without a
MODEL a small random Qwen2 is made and exported. Both are given the same token ids. In the layout qwen-prm vLLM finds the step
tags by their id, in trl its scores of all tokens are read at the steps' ends, in seqcls each prefix is a request.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "model", nargs="?", help="a folder that `stepladder export` wrote; left out: a small random one is made"
    )
    parser.add_argument("--to", default="qwen-prm", help="the layout of that small one: qwen-prm, trl or seqcls")
    parser.add_argument("--vllm-python", default=sys.executable, help="the interpreter that has vllm")
    parser.add_argument("--dtype", default="float32", help="precision of vLLM's weights")
    parser.add_argument("--solutions", type=int, default=64, help="how many solutions are scored")
    parser.add_argument("--serve", metavar="JOB", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.serve:
        serve(Path(given.serve))
    else:
        compare(given)


def compare(given: argparse.Namespace) -> None:
    from stepladder.models.reward import RewardModel

    with tempfile.TemporaryDirectory() as temporary:
        model = given.model or small_export(Path(temporary), given.to)
        reward = RewardModel.load(model, device="cpu")
        step_format, solutions = reward.step_format, solutions_of(given.solutions)
        began = time.perf_counter()
        ours = reward.score(solutions)
        seconds = time.perf_counter() - began
        encoded = [step_format.encode(reward.tokenizer, *one) for one in solutions]
        tag = step_format.separator_ids[-1]
        if step_format.head == "mlp_two_class" and any(
            [i for i, token in enumerate(one.ids) if token == tag] != list(one.step_ends) for one in encoded
        ):
            raise SystemExit(f"the tag {step_format.separator!r} also stands elsewhere than behind a step")
        job = Path(temporary) / "job.json"
        asked = {"model": str(model), "dtype": given.dtype, "head": step_format.head, "tag": tag}
        ids, ends = [list(one.ids) for one in encoded], [list(one.step_ends) for one in encoded]
        job.write_text(json.dumps({**asked, "ids": ids, "ends": ends, "offset": step_format.offset}))
        subprocess.run([given.vllm_python, __file__, "--serve", str(job)], check=True)
        answer = json.loads(job.with_suffix(".answer").read_text())
    pairs = list(zip(ours, answer["scores"], strict=True))
    gaps = [abs(a - b) for one, other in pairs for a, b in zip(one, other, strict=True)]
    tokens = sum(map(len, ids))
    print(f"architecture  {answer['architecture']}, vLLM {answer['version']}, {given.dtype}")
    print(f"step scores   {len(gaps)} of {len(pairs)} solutions, {tokens} tokens")
    print(f"difference    largest {max(gaps):.2e}, mean {sum(gaps) / len(gaps):.2e}")
    print(f"range         {min(map(min, ours)):.3f} to {max(map(max, ours)):.3f}")
    print(f"seconds       ours {seconds:.2f}, vLLM {answer['seconds']:.2f} (after {answer['start']:.0f} s to start)")


def serve(job: Path) -> None:
    """The half that runs where vllm is: scores of every step, from token ids."""
    import vllm
    from vllm.config import PoolerConfig

    asked = json.loads(job.read_text())
    step_tags = PoolerConfig(step_tag_id=asked["tag"]) if asked["head"] == "mlp_two_class" else None
    began = time.perf_counter()
    engine = vllm.LLM(
        model=asked["model"], runner="pooling", dtype=asked["dtype"], enforce_eager=True,
        pooler_config=step_tags,
    )  # fmt: skip
    start = time.perf_counter() - began
    began = time.perf_counter()
    rows = list(zip(asked["ids"], asked["ends"], strict=True))
    whole = asked["head"] != "sequence"
    prompts = [{"prompt_token_ids": ids} for ids, _ in rows]
    if not whole:
        prompts = [{"prompt_token_ids": ids[: end + 1]} for ids, ends in rows for end in ends]
    task = "token_classify" if whole else "classify"
    found = [one.outputs.data for one in engine.encode(prompts, pooling_task=task, use_tqdm=False)]
    seconds = time.perf_counter() - began
    if asked["head"] == "mlp_two_class":
        scores = [[float(pair[1]) for pair in data] for data in found]  # class 1 is the good one
    elif whole:
        scores = [[float(data[end][1]) for end in ends] for data, (_, ends) in zip(found, rows, strict=True)]
    else:
        each = iter(found)
        scores = [[sigmoid(logit(float(next(each)[0])) + asked["offset"]) for _ in ends] for _, ends in rows]
    answer = {
        "scores": scores,
        "architecture": engine.llm_engine.model_config.architectures[0],
        "version": vllm.__version__,
        "seconds": seconds,
        "start": start,
    }
    job.with_suffix(".answer").write_text(json.dumps(answer))


def logit(p: float) -> float:
    return math.log(p) - math.log1p(-p)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def solutions_of(count: int) -> list[tuple[str, list[str]]]:
    """Sums with steps, of many lengths."""
    made = []
    for n in range(count):
        steps = [f"{n} + {k} = {n + k}" for k in range(1, 2 + n % 9)]
        made.append((f"Add the numbers up to {n % 9 + 1} to {n}, one by one.", steps))
    return made


def small_export(folder: Path, to: str) -> str:
    """A random Qwen2 of 0.4 million parameters with a two-class head, exported."""
    import torch
    from transformers import Qwen2Config, Qwen2ForTokenClassification, Qwen2Tokenizer

    from stepladder.models.export import Wanted, export_reward
    from stepladder.models.reward import RewardModel
    from stepladder.models.step_format import StepFormat

    tokenizer: Any = Qwen2Tokenizer(
        vocab=byte_words(), merges=[], unk_token="<pad>", pad_token="<pad>", eos_token="<eos>"
    )
    config = Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=384, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=512,
    )  # fmt: skip
    config.num_labels = 2
    torch.manual_seed(0)
    model = Qwen2ForTokenClassification(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.normal_(1.0 if "norm" in name else 0.0, 0.15)
    layout = StepFormat.for_policy(tokenizer, "\n", prompt_template="{prompt}\n").for_reward("two_class", "soft")
    RewardModel(model, tokenizer, layout).save(folder / "ours")
    export_reward(str(folder / "ours"), to, str(folder / "theirs"), Wanted(bias="beside"))
    return str(folder / "theirs")


def byte_words() -> dict[str, int]:
    from tokenizers import pre_tokenizers

    return {word: i for i, word in enumerate(["<pad>", "<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet())])}


if __name__ == "__main__":
    main()
