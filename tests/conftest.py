"""Small models, tokenizers and engines that the tests share. Everything is made from scratch and from fixed seeds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
