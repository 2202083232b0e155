"""Checkpoints in and out, and one clear sentence for what a checkpoint lacks."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForTokenClassification, AutoTokenizer
from transformers.utils import logging

from stepladder.basics import UserError
from stepladder.models.loading import load_engine, load_model, load_policy_format, load_tokenizer, pick_device
from stepladder.models.reward import RewardModel
from stepladder.models.step_format import StepFormat


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, lab_words, tiny_policy) -> str:
    folder = tmp_path_factory.mktemp("policy")
    tiny_policy(lab_words).save_pretrained(folder)
    lab_words.save_pretrained(folder)
    return str(folder)


def test_a_checkpoint_becomes_an_engine(checkpoint):
    engine = load_engine(checkpoint, device="cpu", batch_size=3, keep_prefixes=True)
    assert (engine.batch_size, engine.cache is not None) == (3, True)
    assert engine.name == f"transformers:{checkpoint}:float32"
    assert load_engine(checkpoint, device="cpu").cache is None
    assert load_model(AutoModelForCausalLM, checkpoint, dtype="bfloat16").dtype is torch.bfloat16
    assert (
        load_model(AutoModelForCausalLM, checkpoint, settings={"attention_dropout": 0.5}).config.attention_dropout
        == 0.5
    )


def test_a_missing_pad_token_becomes_the_end_of_sequence(tmp_path, lab_words):
    lab_words.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config.pop("pad_token")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert AutoTokenizer.from_pretrained(tmp_path).pad_token_id is None
    tokenizer = load_tokenizer(str(tmp_path))
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 2
    assert tokenizer.padding_side == "left"
    config.pop("eos_token")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="neither a pad token nor an end-of-sequence token"):
        load_tokenizer(str(tmp_path))


@pytest.mark.parametrize("load", [load_tokenizer, load_engine, lambda path: load_model(AutoModelForCausalLM, path)])
def test_a_folder_that_is_not_there(tmp_path, load):
    for path in (str(tmp_path / "nothing"), "./nothing", "runs/no/such"):
        with pytest.raises(UserError, match="no such model folder"):
            load(path)


def test_a_folder_that_holds_no_model(tmp_path, checkpoint):
    with pytest.raises(UserError, match="no tokenizer could be loaded"):
        load_tokenizer(str(tmp_path))
    with pytest.raises(UserError, match="no AutoModelForCausalLM model could be loaded"):
        load_model(AutoModelForCausalLM, str(tmp_path))
    with pytest.raises(UserError, match="dtype must be one of float32, bfloat16, float16, auto, found 'float8'"):
        load_model(AutoModelForCausalLM, checkpoint, dtype="float8")
    with pytest.raises(UserError, match="backend must be transformers, vllm or openai, found 'jax'"):
        load_engine(checkpoint, backend="jax")


def test_weights_that_are_not_safetensors_are_refused(tmp_path, lab_words, tiny_policy):
    model = tiny_policy(lab_words)
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="no AutoModelForCausalLM model could be loaded"):
        load_model(AutoModelForCausalLM, str(tmp_path))


def test_truncated_weights_are_one_sentence(tmp_path, lab_words, tiny_policy):
    tiny_policy(lab_words).save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UserError, match="no AutoModelForCausalLM model could be loaded"):
        load_model(AutoModelForCausalLM, str(tmp_path))


def test_weights_that_a_checkpoint_lacks_are_never_drawn_at_random_unasked(
    tmp_path, checkpoint, lab_words, tiny_policy
):
    with pytest.raises(UserError, match=r"checkpoint lacks score\.bias, score\.weight of LlamaForTokenClassification"):
        load_model(AutoModelForTokenClassification, checkpoint)
    scorer = load_model(AutoModelForTokenClassification, checkpoint, settings={"num_labels": 1}, new=("score",))
    policy = load_model(AutoModelForCausalLM, checkpoint)
    assert torch.equal(scorer.model.layers[0].mlp.up_proj.weight, policy.model.layers[0].mlp.up_proj.weight)
    scorer.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"checkpoint lacks lm_head\.weight of LlamaForCausalLM"):
        load_engine(str(tmp_path))
    with pytest.raises(
        UserError, match=r"has another shape for score\.bias, score\.weight of LlamaForTokenClassification"
    ):
        load_model(AutoModelForTokenClassification, str(tmp_path), settings={"num_labels": 2}, new=("score",))


def test_loading_prints_no_table_of_left_over_weights(checkpoint, caplog):
    logging.enable_propagation()
    try:
        load_model(AutoModelForTokenClassification, checkpoint, new=("score",))
        assert "LOAD REPORT" not in caplog.text
        AutoModelForTokenClassification.from_pretrained(checkpoint)
        assert "LOAD REPORT" in caplog.text
    finally:
        logging.disable_propagation()


def test_the_format_beside_a_policy_or_one_derived(tmp_path, lab_words, merging_tokenizer):
    assert load_policy_format(str(tmp_path), lab_words, "\n") == StepFormat.for_policy(lab_words, "\n", chat=False)
    merging_tokenizer.chat_template = "{{ messages[0]['content'] }}"
    try:
        assert load_policy_format(str(tmp_path), merging_tokenizer, "\n\n").chat
    finally:
        merging_tokenizer.chat_template = None
    saved = StepFormat.for_policy(lab_words, "\n", prompt_template="{prompt} ;")
    saved.save(tmp_path)
    assert load_policy_format(str(tmp_path), lab_words, "\n\n") == saved


def test_a_policy_is_no_reward_model(checkpoint):
    with pytest.raises(UserError, match="has its step format beside it"):
        RewardModel.load(checkpoint, device="cpu")


def test_pick_device():
    assert pick_device("cpu") == "cpu"
    assert pick_device("auto") in ("cpu", "cuda", "mps")
