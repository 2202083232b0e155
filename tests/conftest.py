"""What the tests share: small models, tokenizers and engines, made from scratch and from fixed seeds; commands without imports."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from stepladder.models.engine import Request, Sample, Sampling, StopReason
from stepladder.models.lab import lab_config, lab_tokenizer
from stepladder.models.ledger import Ledger

# The models here are so small that a second thread costs more than it brings, above all where others use the cores too.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def lab_words() -> Any:
    """The lab's tokenizer for numbers up to 12."""
    return lab_tokenizer(12)


@pytest.fixture(scope="session")
def tiny_policy() -> Callable[..., Any]:
    """Makes a random Llama decoder for a tokenizer: two layers of width 32. `scale` sharpens its distributions."""

    def make(tokenizer: Any, *, seed: int = 0, context: int = 512, scale: float = 1.0, **sizes: int) -> Any:
        from transformers import LlamaForCausalLM

        torch.manual_seed(seed)
        sizes = {"width": 32, "layers": 2, "heads": 4, **sizes}
        model = LlamaForCausalLM(lab_config(len(tokenizer), context=context, **sizes))
        with torch.no_grad():
            for weight in model.parameters():
                if weight.dim() > 1:
                    weight.normal_(0.0, 0.2)
            model.lm_head.weight.mul_(scale)
        return model.eval()

    return make


@pytest.fixture(scope="session")
def tiny_scorer() -> Callable[..., Any]:
    """Makes a random Llama token classifier with one or two labels whose scores spread over (0, 1)."""

    def make(tokenizer: Any, *, labels: int = 1, seed: int = 0, context: int = 512) -> Any:
        from transformers import LlamaForTokenClassification

        torch.manual_seed(seed)
        config = lab_config(len(tokenizer), width=32, layers=2, heads=4, context=context)
        config.num_labels = labels
        model = LlamaForTokenClassification(config)
        with torch.no_grad():
            for weight in model.parameters():
                if weight.dim() > 1:
                    weight.normal_(0.0, 0.2)
        return model.eval()

    return make


@pytest.fixture(scope="session")
def markov_policy() -> Callable[..., Any]:
    """Makes a Llama decoder whose next token depends on the last one alone: `follows` maps a token to the next.

    One layer whose attention and feed-forward write nothing, one-hot embeddings, and a head that holds the table.
    """

    def make(tokenizer: Any, follows: dict[int, int], context: int = 64) -> Any:
        from transformers import LlamaForCausalLM

        size = len(tokenizer)
        width = size + size % 2
        model = LlamaForCausalLM(lab_config(size, width=width, layers=1, heads=1, context=context))
        with torch.no_grad():
            model.model.layers[0].self_attn.o_proj.weight.zero_()
            model.model.layers[0].mlp.down_proj.weight.zero_()
            model.model.embed_tokens.weight.copy_(torch.eye(size, width))
            model.lm_head.weight.zero_()
            for last, following in follows.items():
                model.lm_head.weight[following, last] = 10.0
        return model.eval()

    return make


@pytest.fixture(scope="session")
def merging_tokenizer() -> Any:
    """A byte-level BPE tokenizer in which ".\\n", "\\n\\n" and "4\\n" are single tokens, as in many real vocabularies."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=280,
        special_tokens=["<pad>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator([".\n", "\n\n", "4\n"] * 50 + ["So it is 4", "then", "the"] * 10, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", padding_side="left", model_max_length=512
    )
    for merged in (".\n", "\n\n", "4\n"):
        assert len(tokenizer(merged)["input_ids"]) == 1
    return tokenizer


@pytest.fixture(scope="session")
def fake_engine() -> Callable[..., Any]:
    """Makes an engine whose samples a function writes: (prefix ids, seed) -> ids. It keeps the requests it was asked."""

    def make(tokenizer: Any, write: Callable[[tuple[int, ...], int], Sequence[int]], context: int = 10**6) -> Any:
        engine = SimpleNamespace(name="fake", tokenizer=tokenizer, ledger=Ledger(), asked=[])

        def generate(requests: Sequence[Request], sampling: Sampling) -> list[list[Sample]]:
            engine.asked.extend(requests)
            found = []
            for request in requests:
                if len(request.prefix) >= context:
                    found.append([Sample((), (), StopReason.CONTEXT)] * len(request.seeds))
                    continue
                samples = []
                for seed in request.seeds:
                    ids = tuple(write(request.prefix, seed))[: sampling.max_new_tokens]
                    stop = StopReason.EOS if ids and ids[-1] == tokenizer.eos_token_id else StopReason.LENGTH
                    samples.append(Sample(ids, tuple(-0.5 for _ in ids), stop))
                engine.ledger.add_policy(1, generated=sum(len(s.ids) for s in samples), prefilled=len(request.prefix))
                found.append(samples)
            return found

        engine.generate = generate
        return engine

    return make


# One process imports what a command needs and forks for each: `python -m MODULE ARGUMENTS` starts in a tenth of a second,
# in a process of its own that can be killed. What libraries print goes to stderr: stdout tells how the children do.
_STARTER = """
import atexit, json, os, runpy, sys, traceback, warnings

tell = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)
from stepladder.launch import cli, evaluate_first_errors, evaluate_policies, evaluate_steps, make_report, making, pipeline
from stepladder.launch import report, tables
from stepladder.trainers import dpo, orm, prm, sft
from transformers import AutoModelForCausalLM, AutoModelForTokenClassification
from transformers.models.llama import modeling_llama
import accelerate.state, peft, pyarrow.parquet, tqdm

warnings.filterwarnings("ignore", category=RuntimeWarning, module="runpy")
for line in sys.stdin:
    job = json.loads(line)
    child = os.fork()
    if not child:
        if job["watched"]:
            os.nice(10)  # whoever is to kill it must get to see the moment
        os.chdir(job["folder"])
        os.environ.update(job["environment"])
        for number, path in ((1, job["out"]), (2, job["err"])):
            os.dup2(os.open(path, os.O_WRONLY | os.O_TRUNC), number)
        sys.argv, status = job["arguments"], 0
        try:
            runpy.run_module(job["arguments"][0], run_name="__main__", alter_sys=True)
        except SystemExit as error:
            status = error.code or 0
        except BaseException:
            traceback.print_exc()
            status = 1
        atexit._run_exitfuncs()
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(status)
    print(child, file=tell, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), file=tell, flush=True)
"""


@dataclass
class Ended:
    """How a command ended; a status of -9 is a kill."""

    status: int
    out: str
    err: str


class Starter:
    """Runs `python -m MODULE ...` as forked processes, one at a time."""

    def __init__(self, logs: Path) -> None:
        self.logs, self.count = logs, 0
        self.process = subprocess.Popen(
            [sys.executable, "-c", _STARTER],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
        )  # fmt: skip

    def __call__(
        self,
        module: str,
        *arguments: Any,
        folder: Path | str = ".",
        kill: Callable[[], bool] | None = None,
        environment: dict[str, str] | None = None,
    ) -> Ended:
        """Runs the module in a folder; with `kill` it is killed (SIGKILL) as soon as that says so."""
        self.count += 1
        out, err = self.logs / f"{self.count}.out", self.logs / f"{self.count}.err"
        out.touch(), err.touch()  # a kill may come before the child has opened them
        job = {
            "arguments": [module, *map(str, arguments)],
            "folder": str(folder),
            "watched": kill is not None,
            "environment": environment or {},
            "out": str(out),
            "err": str(err),
        }
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        child = int(self.process.stdout.readline())
        if kill is not None:
            # The child may end first; until its status line is read its number cannot belong to another process.
            while _runs(child):
                if kill():
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(child, signal.SIGKILL)
                    break
                time.sleep(0.001)
        return Ended(int(self.process.stdout.readline()), out.read_text(), err.read_text())


def _runs(process: int) -> bool:
    try:
        # A child that has ended and was not waited for yet is a zombie, which no signal tells from a running one.
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.fixture(scope="session")
def starter(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Starter]:
    made = Starter(tmp_path_factory.mktemp("logs"))
    yield made
    assert made.process.stdin is not None
    made.process.stdin.close()
    made.process.wait(timeout=60)
