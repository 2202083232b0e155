"""LoRA: the final folder is a plain checkpoint, its weights are base + scale * B @ A, and a new head is trained and kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from stepladder.models.reward import RewardModel

LORA = {"lora_r": 4, "lora_alpha": 12}
SCALE = 12 / 4


def adapter_of(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "adapter" / "adapter_model.safetensors")


@pytest.fixture
def trained(settings: Any, train: Any, tmp_path: Path) -> Any:
    def make(kind: str, **over: Any) -> Any:
        return train(kind, settings(kind, max_steps=8, output_dir=str(tmp_path / kind), **LORA, **over))

    return make


@pytest.mark.parametrize("kind", ["sft", "prm", "orm"])
def test_merged_weights_are_base_plus_scaled_product(trained, policy_folder, kind):
    base = load_file(policy_folder / "model.safetensors")
    before = (policy_folder / "model.safetensors").read_bytes()
    out = trained(kind).out
    merged, adapter = load_file(out / "model.safetensors"), adapter_of(out)
    assert not [name for name in merged if "lora" in name or "base_layer" in name or "modules_to_save" in name]
    adapted = 0
    for name, weight in merged.items():
        a = adapter.get(f"base_model.model.{name.removesuffix('.weight')}.lora_A.weight")
        if name.startswith("score."):
            continue
        if a is None:
            assert torch.equal(weight, base[name]), name
            continue
        b = adapter[f"base_model.model.{name.removesuffix('.weight')}.lora_B.weight"]
        assert b.abs().max() > 0, name  # B begins at zero
        torch.testing.assert_close(weight, base[name] + SCALE * b @ a)
        assert not torch.equal(weight, base[name])
        adapted += 1
    assert adapted == 7  # four projections of attention and three of the feed-forward, in one layer
    assert (policy_folder / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize("kind", ["sft", "prm", "orm"])
def test_the_folder_loads_without_peft(trained, kind):
    from transformers import AutoModelForCausalLM, AutoModelForTokenClassification

    out = trained(kind).out
    assert not (out / "adapter_config.json").exists()  # transformers would look for a base model
    assert not list(out.rglob("training_args.bin"))
    auto = AutoModelForCausalLM if kind == "sft" else AutoModelForTokenClassification
    model, loading = auto.from_pretrained(out, output_loading_info=True)
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    assert type(model).__module__.startswith("transformers.")
    assert not hasattr(model, "peft_config")


@pytest.mark.parametrize("kind", ["prm", "orm"])
def test_the_new_head_is_trained_in_full_and_kept(trained, settings, train, tmp_path, kind):
    started = load_file(train(kind, settings(kind, max_steps=1, learning_rate=1e-12, **LORA)).out / "model.safetensors")
    out = trained(kind).out
    head, adapter = load_file(out / "model.safetensors")["score.weight"], adapter_of(out)
    saved = [name for name in adapter if ".score." in name]
    assert "base_model.model.score.weight" in saved
    assert not [name for name in saved if "lora" in name]
    assert torch.equal(adapter["base_model.model.score.weight"], head)
    assert (head - started["score.weight"]).abs().max() > 0.01  # eight steps of 0.01 or a little less


def test_the_merged_model_is_the_trained_one(rows, settings, train):
    """Trained until it fits, read back from the plain folder: a lost head or adapter would score at chance."""
    training = [
        rows.labels(0, ["1 + 1 = 2", "2 + 1 = 3", "3 + 1 = 4"], [10, 0, 10]),
        rows.labels(1, ["4 + 4 = 8", "8 + 4 = 12"], [0, 10]),
        rows.labels(2, ["7 + 5 = 12"], [10]),
    ]
    values = settings(
        "prm", training, labels="soft", after_first_zero=True, max_steps=200, learning_rate=0.03, logging_steps=100,
        lora_r=8, lora_alpha=16,
    )  # fmt: skip
    out = train("prm", values).out
    found = RewardModel.load(str(out), device="cpu").score([(row.prompt, row.steps) for row in training])
    for row, scores in zip(training, found, strict=True):
        assert scores == pytest.approx([c / 10 for c in row.n_correct[1:]], abs=0.15)


def test_the_adapter_alone_gives_the_same_scores(trained, policy_folder, lab_words):
    from peft import PeftModel
    from transformers import AutoModelForTokenClassification

    out = trained("prm").out
    plain = AutoModelForTokenClassification.from_pretrained(out).eval()
    base = AutoModelForTokenClassification.from_pretrained(policy_folder, num_labels=2)
    adapted = PeftModel.from_pretrained(base, out / "adapter").eval()
    ids = torch.tensor([lab_words("Start 3 ; + 5 3 + 5 = 8")["input_ids"]])
    with torch.no_grad():
        torch.testing.assert_close(adapted(input_ids=ids).logits, plain(input_ids=ids).logits, rtol=1e-4, atol=1e-5)


def test_dropout_of_adapters_is_off_when_scoring(trained):
    out = trained("prm", lora_dropout=0.5).out
    reward = RewardModel.load(str(out), device="cpu")
    question = [("Start 3 ; + 5", ["3 + 5 = 8"])]
    assert reward.score(question) == reward.score(question)
