"""Step scores of a reward model in the Qwen2.5-Math-PRM layout: vLLM's, which knows the architecture by name, beside ours.

    stepladder export runs/prm --to qwen-prm --out runs/prm_qwen
    python bench/serve_vllm_scores.py runs/prm_qwen --vllm-python vllm-env/bin/python

vLLM usually lives in an environment of its own: `--vllm-python` names its interpreter, which needs nothing of Stepladder. Without
a MODEL a small random Qwen2 is made and exported. Both are given the same token ids; vLLM finds the step tags by their id.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "model", nargs="?", help="a folder in the layout qwen-prm; left out: a small random one is made"
    )
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
        model = given.model or small_export(Path(temporary))
        reward = RewardModel.load(model, device="cpu")
        solutions = solutions_of(given.solutions)
        began = time.perf_counter()
        ours = reward.score(solutions)
        seconds = time.perf_counter() - began
        encoded = [reward.step_format.encode(reward.tokenizer, *one) for one in solutions]
        tag = reward.step_format.separator_ids[-1]
        if any([i for i, token in enumerate(one.ids) if token == tag] != list(one.step_ends) for one in encoded):
            raise SystemExit(f"the tag {reward.step_format.separator!r} also stands elsewhere than behind a step")
        job = Path(temporary) / "job.json"
        ids = [list(one.ids) for one in encoded]
        job.write_text(json.dumps({"model": str(model), "dtype": given.dtype, "tag": tag, "ids": ids}))
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
    """The half that runs where vllm is: scores at every tag, from token ids."""
    import vllm
    from vllm.config import PoolerConfig

    asked = json.loads(job.read_text())
    began = time.perf_counter()
    engine = vllm.LLM(
        model=asked["model"], runner="pooling", dtype=asked["dtype"], enforce_eager=True, skip_tokenizer_init=True,
        pooler_config=PoolerConfig(step_tag_id=asked["tag"]),
    )  # fmt: skip
    start = time.perf_counter() - began
    began = time.perf_counter()
    prompts = [{"prompt_token_ids": ids} for ids in asked["ids"]]
    found = engine.encode(prompts, pooling_task="token_classify", use_tqdm=False)
    seconds = time.perf_counter() - began
    answer = {
        "scores": [[float(pair[1]) for pair in one.outputs.data] for one in found],  # class 1 is the good one
        "architecture": engine.llm_engine.model_config.architectures[0],
        "version": vllm.__version__,
        "seconds": seconds,
        "start": start,
    }
    job.with_suffix(".answer").write_text(json.dumps(answer))


def solutions_of(count: int) -> list[tuple[str, list[str]]]:
    """Sums with steps, of many lengths."""
    made = []
    for n in range(count):
        steps = [f"{n} + {k} = {n + k}" for k in range(1, 2 + n % 9)]
        made.append((f"Add the numbers up to {n % 9 + 1} to {n}, one by one.", steps))
    return made


def small_export(folder: Path) -> str:
    """A random Qwen2 of 0.4 million parameters with a two-class head, exported."""
    import torch
    from transformers import Qwen2Config, Qwen2ForTokenClassification, Qwen2Tokenizer

    from stepladder.models.export import export_reward
    from stepladder.models.reward import RewardModel
    from stepladder.models.step_format import StepFormat

    tokenizer: Any = Qwen2Tokenizer(
        vocab=byte_words(), merges=[], unk_token="<pad>", pad_token="<pad>", eos_token="<eos>"
    )
    config = Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=384, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=512, num_labels=2,
    )  # fmt: skip
    torch.manual_seed(0)
    model = Qwen2ForTokenClassification(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.normal_(1.0 if "norm" in name else 0.0, 0.15)
    layout = StepFormat.for_policy(tokenizer, "\n", prompt_template="{prompt}\n").for_reward("two_class", "soft")
    RewardModel(model, tokenizer, layout).save(folder / "ours")
    export_reward(str(folder / "ours"), "qwen-prm", str(folder / "theirs"))
    return str(folder / "theirs")


def byte_words() -> dict[str, int]:
    from tokenizers import pre_tokenizers

    return {word: i for i, word in enumerate(["<pad>", "<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet())])}


if __name__ == "__main__":
    main()
