"""Exported and foreign reward models against readings of their own: one solution at a time, with plain transformers."""

from __future__ import annotations

import dataclasses
import functools
import json
import random
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import save_torch_state_dict
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
)

from stepladder.basics import UserError
from stepladder.launch.cli import main
from stepladder.models.export import Wanted, export_reward, pass_through_mlp
from stepladder.models.formats import CONVENTIONS, Given, foreign_format
from stepladder.models.import_reward import import_reward, likely_format
from stepladder.models.lab import lab_config
from stepladder.models.loading import load_tokenizer
from stepladder.models.prefix_cache import PrefixCache
from stepladder.models.reward import RewardModel
from stepladder.models.step_format import StepFormat

CHAT = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] | trim }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SYSTEM = "Please reason step by step, and put your final answer within \\boxed{}."


@functools.cache
def foreign_tokenizer(tag: bool = True) -> Any:
    """A small tokenizer of Qwen2's class with a chat template, and ` ки` and, if wanted, `<extra_0>` as single tokens.

    Of Qwen2's class, because transformers gives a Qwen2 model that one whatever its folder says.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import Qwen2Tokenizer

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    specials = ["<pad>", "<bos>", "<eos>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>", *["<extra_0>"] * tag]
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator([" ки\n"] * 50 + ["So the answer is 4. Then 3 + 4 = 7\n\n"] * 20, trainer)
    learnt = json.loads(core.to_str())["model"]
    made = Qwen2Tokenizer(
        vocab=learnt["vocab"], merges=[tuple(pair) for pair in learnt["merges"]], unk_token="<pad>", pad_token="<pad>",
        bos_token="<bos>", eos_token="<eos>", additional_special_tokens=specials[3:], model_max_length=512,
    )  # fmt: skip
    made.chat_template = CHAT
    return made


# --- how other projects read their models, by their own conventions. Nothing here calls the package. ---------------------------


@functools.cache
def loaded(auto: Any, folder: str) -> Any:
    return auto.from_pretrained(folder).eval()


def weights_of(folder: Path | str) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in Path(folder).glob("*.safetensors"):
        found |= load_file(file)
    return found


def hidden(folder: Any, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return loaded(AutoModel, str(folder))(input_ids=torch.tensor([ids])).last_hidden_state[0]


def vocabulary_logits(folder: Any, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return loaded(AutoModelForCausalLM, str(folder))(input_ids=torch.tensor([ids])).logits[0]


def two_layers(folder: Any, ids: list[int], tag: int) -> list[float]:
    """Qwen2.5-Math-PRM: Linear, ReLU, Linear; class 1 wherever the id is the tag's."""
    parts = weights_of(folder)
    inner = torch.relu(hidden(folder, ids) @ parts["score.0.weight"].T + parts["score.0.bias"])
    logits = inner @ parts["score.2.weight"].T + parts["score.2.bias"]
    return logits.softmax(-1)[torch.tensor(ids) == tag][:, 1].tolist()


def qwen_prm(folder: Any, problem: str, steps: list[str], chat: bool = True) -> list[float]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    answer = "<extra_0>".join(steps) + "<extra_0>"
    text = problem + " " + answer
    if chat:
        messages = [("system", SYSTEM), ("user", problem), ("assistant", answer)]
        turns = [{"role": role, "content": content} for role, content in messages]
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=False)
    [tag] = tokenizer.encode("<extra_0>", add_special_tokens=False)
    return two_layers(folder, tokenizer.encode(text, add_special_tokens=False), tag)


def math_shepherd(folder: Any, problem: str, steps: list[str], after: str = " ки\n") -> list[float]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    words = [tokenizer.encode(word, add_special_tokens=False)[-1] for word in "+-"]
    tag = tokenizer.encode(after.strip("\n"), add_special_tokens=False)[-1]
    ids = tokenizer.encode(f"{problem} " + "".join(step + after for step in steps))
    scores = vocabulary_logits(folder, ids)[:, words].softmax(-1)[:, 0]
    return scores[torch.tensor(ids) == tag].tolist()


def rlhflow(folder: Any, problem: str, steps: list[str]) -> list[float]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    words = [tokenizer.encode(word, add_special_tokens=False)[-1] for word in "+-"]
    conversation, scores = [], []
    for number, step in enumerate(steps):
        conversation.append({"role": "user", "content": step if number else problem + " " + step})
        conversation.append({"role": "assistant", "content": "+"})
        text = tokenizer.apply_chat_template(conversation, tokenize=False)
        ids = tokenizer.encode(text, add_special_tokens=False)
        [sign] = [i for i in range(len(ids)) if ids[i] == words[0]][-1:]
        scores.append(vocabulary_logits(folder, ids)[sign - 1, words].softmax(-1)[0].item())
    return scores


def trl(folder: Any, problem: str, steps: list[str], separator: str = "\n", bos: bool = True) -> list[float]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(problem, add_special_tokens=False)["input_ids"]
    if bos and tokenizer.bos_token_id is not None:
        ids = [tokenizer.bos_token_id, *ids]
    separator_ids = tokenizer.encode(separator, add_special_tokens=False)
    ends = []
    for step in steps:
        ids = ids + tokenizer(step, add_special_tokens=False)["input_ids"] + separator_ids
        ends.append(len(ids) - 1)
    with torch.no_grad():
        return (
            loaded(AutoModelForTokenClassification, str(folder))(input_ids=torch.tensor([ids]))
            .logits[0, ends]
            .softmax(-1)[:, 1]
            .tolist()
        )


def skywork(folder: Any, problem: str, steps: list[str], start: str = "<bos>", end: str = "\n") -> list[float]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids, flags = tokenizer.encode(start + problem + end), []
    flags = [0] * len(ids)
    newline = tokenizer.encode("\n")[-1]
    for step in steps:
        own = [*tokenizer.encode(step), newline]
        ids, flags = ids + own, flags + [0] * (len(own) - 1) + [1]
    parts = weights_of(folder)
    values = hidden(folder, ids) @ parts["v_head.summary.weight"].T + parts["v_head.summary.bias"]
    return torch.sigmoid(values.squeeze(-1))[torch.tensor(flags) == 1].tolist()


def sequence_logit(folder: Any, ids: list[int]) -> float:
    with torch.no_grad():
        return (
            loaded(AutoModelForSequenceClassification, str(folder))(input_ids=torch.tensor([ids])).logits[0, 0].item()
        )


def seqcls(folder: Any, problem: str, steps: list[str], chat: bool = True) -> list[float]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    scores = []
    for t in range(1, len(steps) + 1):
        if not chat:
            ids = tokenizer.encode(problem + " " + "".join(step + "\n" for step in steps[:t]))
            scores.append(torch.tensor(sequence_logit(folder, ids)).sigmoid().item())
            continue
        turns = [{"role": "user", "content": problem}, {"role": "assistant", "content": "\n".join(steps[:t])}]
        text = tokenizer.apply_chat_template(turns, tokenize=False)
        logit = sequence_logit(folder, tokenizer.encode(text, add_special_tokens=False))
        scores.append(torch.tensor(logit).sigmoid().item())
    return scores


# --- ours, written in their layouts --------------------------------------------------------------------------------------------

# These problems have no words whose tokens depend on what stands beside them: a joined text gives the tokens of its parts.
READ = {
    "qwen-prm": functools.partial(qwen_prm, chat=False),
    "math-shepherd": functools.partial(math_shepherd, after="ки"),
    "rlhflow": rlhflow,
    "trl": lambda folder, problem, steps: trl(folder, problem + " ", steps, bos=False),
    "skywork": functools.partial(skywork, start="", end=" "),
    "seqcls": functools.partial(seqcls, chat=False),
}
AUTO = {
    "qwen-prm": (AutoModel, r"score\.[02]\."),
    "math-shepherd": (AutoModelForCausalLM, None),
    "rlhflow": (AutoModelForCausalLM, None),
    "trl": (AutoModelForTokenClassification, None),
    "skywork": (AutoModelForCausalLM, r"v_head\."),
    "seqcls": (AutoModelForSequenceClassification, None),
}
NO_BIAS = ("math-shepherd", "rlhflow", "seqcls")
HEADS = [("scalar", None), ("two_class", 0), ("two_class", 1)]


def problems(count: int = 5, seed: int = 0) -> list[tuple[str, list[str]]]:
    rng = random.Random(seed)
    number = lambda: rng.randrange(13)
    return [
        (
            f"Start {number()}" + " ; + 5" * rng.randint(0, 4),
            [f"{number()} + {number()} = {number()}" for _ in range(rng.randint(1, 6))],
        )
        for _ in range(count)
    ]


def tiny(architecture: str, kind: str, tokenizer: Any, seed: int = 0, **settings: Any) -> Any:
    """A random model of transformers' own class: `kind` is ForTokenClassification, ForCausalLM ..."""
    import transformers

    lab = lab_config(len(tokenizer), width=32, layers=2, heads=4).to_dict()
    kept = (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "pad_token_id",
    )
    values = {k: lab[k] for k in (*kept, "num_key_value_heads", "bos_token_id", "eos_token_id")}
    config = getattr(transformers, f"{architecture}Config")(**values, max_position_embeddings=512, **settings)
    torch.manual_seed(seed)
    model = getattr(transformers, f"{architecture}{kind}")(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():  # biases too
            weight.normal_(1.0 if "norm" in name else 0.0, 0.25)
    return model.eval()


@pytest.fixture(scope="module")
def source(tmp_path_factory: Any, lab_words: Any) -> Any:
    """Folders of reward models as the trainers write them: Llama with the lab's words, Qwen2 with its own kind of tokenizer."""

    @functools.cache
    def make(
        architecture: str, head: str, positive: int | None, bias: bool = True, labels: str = "soft", turns: bool = False
    ) -> str:
        tokenizer = lab_words if architecture == "Llama" else foreign_tokenizer(tag=False)
        model = tiny(architecture, "ForTokenClassification", tokenizer, num_labels=1 if head == "scalar" else 2)
        if not bias:
            torch.nn.init.zeros_(model.score.bias)
        if turns:
            layout = StepFormat("", (), prompt_template="{prompt} ", chat=True, arrangement="turns", answer="+")
        else:
            layout = StepFormat.for_policy(tokenizer, "\n", prompt_template="{prompt} ")
        folder = tmp_path_factory.mktemp("source")
        layout = dataclasses.replace(layout.for_reward(head, labels), positive_class=positive)
        RewardModel(model, tokenizer, layout).save(folder)
        return str(folder)

    return make


def ours(folder: Any, solutions: Any, **options: Any) -> list[list[float]]:
    return RewardModel.load(str(folder), device="cpu", **options).score(solutions)


def close(found: Any, want: Any, tolerance: float = 1e-5) -> bool:
    assert [len(one) for one in found] == [len(one) for one in want]
    return all(abs(a - b) < tolerance for x, y in zip(found, want, strict=True) for a, b in zip(x, y, strict=True))


@pytest.mark.parametrize("architecture", ["Llama", "Qwen2"])
@pytest.mark.parametrize(("head", "positive"), HEADS)
@pytest.mark.parametrize("target", list(CONVENTIONS))
def test_an_export_scores_as_its_source_and_as_others_read_it(source, tmp_path, architecture, head, positive, target):
    turns = (architecture, target) == ("Qwen2", "rlhflow")  # its tokenizer merges, and steps alone are refused
    model, solutions = source(architecture, head, positive, target not in NO_BIAS, turns=turns), problems()
    difference = export_reward(model, target, str(tmp_path))
    want = ours(model, solutions)
    assert max(map(max, want)) - min(map(min, want)) > 0.1
    assert close(ours(tmp_path, solutions), want)
    assert close([READ[target](tmp_path, *one) for one in solutions], want)
    assert difference is not None
    assert difference < 1e-5
    # The empty prefix and an empty solution too.
    [with_root] = RewardModel.load(model, device="cpu").score_with_root(solutions[:1])
    assert close(RewardModel.load(str(tmp_path), device="cpu").score_with_root(solutions[:1]), [with_root])
    assert ours(tmp_path, [(solutions[0][0], [])]) == [[]]
    # What the scores mean went along.
    before, after = StepFormat.load(model), StepFormat.load(tmp_path)
    assert (after.label_kind, after.aggregation) == (before.label_kind, before.aggregation)
    # transformers' own class finds all of its weights and knows all others.
    auto, foreign = AUTO[target]
    _, found = auto.from_pretrained(tmp_path, output_loading_info=True)
    assert not found["missing_keys"]
    assert all(foreign and re.match(foreign, key) for key in found["unexpected_keys"])
    assert bool(found["unexpected_keys"]) == bool(foreign)


def test_architectures_are_named_as_their_readers_look_for_them(source, tmp_path):
    names = {}
    for target in CONVENTIONS:
        model = source("Qwen2", "two_class", 1, bias=False, turns=target == "rlhflow")
        export_reward(model, target, str(tmp_path / target))
        config = json.loads((tmp_path / target / "config.json").read_text())
        names[target] = config["architectures"][0]
        assert config["model_type"] == "qwen2"
        assert "auto_map" not in config
        assert not list((tmp_path / target).glob("*.bin"))
    assert names == {
        "qwen-prm": "Qwen2ForProcessRewardModel",
        "math-shepherd": "Qwen2ForCausalLM",
        "rlhflow": "Qwen2ForCausalLM",
        "trl": "Qwen2ForTokenClassification",
        "skywork": "Qwen2ForPrmModel",
        "seqcls": "Qwen2ForSequenceClassification",
    }
    told = {target: likely_format(str(tmp_path / target)) for target in CONVENTIONS}
    assert told == {k: "" if k in ("math-shepherd", "rlhflow") else k for k in CONVENTIONS}
    export_reward(source("Llama", "scalar", None), "qwen-prm", str(tmp_path / "llama"))
    config = json.loads((tmp_path / "llama" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForProcessRewardModel"]


def probability(logits: torch.Tensor, good: int | None) -> float:
    return (logits.sigmoid() if good is None else logits.softmax(-1)[good]).item()


@pytest.mark.parametrize("target", list(CONVENTIONS))
def test_scores_are_read_at_the_same_tokens_with_padding_on_either_side(source, tmp_path, target):
    export_reward(source("Llama", "two_class", 0, bias=False), target, str(tmp_path))
    reward, solutions = RewardModel.load(str(tmp_path), device="cpu"), problems(6, seed=3)
    want = reward.score(solutions)
    encoded = [reward.step_format.encode(reward.tokenizer, *one) for one in solutions]
    width = max(len(one.ids) for one in encoded)
    for left in (True, False):
        ids = torch.zeros(len(encoded), width, dtype=torch.long)
        mask = torch.zeros_like(ids)
        shift = [width - len(one.ids) if left else 0 for one in encoded]
        for row, one in enumerate(encoded):
            ids[row, shift[row] : shift[row] + len(one.ids)] = torch.tensor(one.ids)
            mask[row, shift[row] : shift[row] + len(one.ids)] = 1
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        with torch.no_grad():
            logits = reward.model(input_ids=ids, attention_mask=mask, position_ids=positions).logits
        read = [[logits[r, shift[r] + e] for e in one.step_ends] for r, one in enumerate(encoded)]
        assert close([[probability(x, reward.step_format.positive_class) for x in row] for row in read], want)
    if target == "seqcls":  # the class itself looks for the last token that is not padding
        model = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
        for side in ("left", "right"):
            batch = reward.tokenizer.pad(
                {"input_ids": [list(one.ids) for one in encoded]}, return_tensors="pt", padding_side=side
            )
            batch["position_ids"] = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
            with torch.no_grad():
                last = model(**batch).logits.sigmoid().squeeze(-1).tolist()
            assert close([last], [[one[-1] for one in want]])


@pytest.mark.parametrize("target", list(CONVENTIONS))
def test_the_program_in_the_model_card_reads_the_same_scores(source, tmp_path, target, monkeypatch):
    export_reward(source("Llama", "two_class", 0, labels="human"), target, str(tmp_path), Wanted(bias="beside"))
    card = (tmp_path / "README.md").read_text()
    [program] = re.findall(r"## Reading the scores\n\n```python\n(.*?)```", card, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    said: dict[str, Any] = {}
    exec(program, said)
    assert "stepladder" not in program
    assert close([said["scores"]], ours(tmp_path, [(said["problem"], said["steps"])]))
    assert close(
        [said["scores"]], ours(source("Llama", "two_class", 0, labels="human"), [(said["problem"], said["steps"])])
    )
    for part in ("human", "min", f"`{target}`", str(list(StepFormat.load(tmp_path).separator_ids))):
        assert part in card


def test_a_bias_is_refused_or_written_beside_and_never_dropped(source, tmp_path):
    for target in NO_BIAS:
        for head, positive in HEADS:
            model, out = source("Llama", head, positive), tmp_path / f"{target}-{head}-{positive}"
            with pytest.raises(UserError, match=r"has a bias \([-+]\d.*, and Llama\w+ has none; with --bias beside"):
                export_reward(model, target, str(out))
            assert not (out / "config.json").exists()
            export_reward(model, target, str(out), Wanted(bias="beside"))
            solutions = problems()
            assert close(ours(out, solutions), ours(model, solutions))
            written = StepFormat.load(out)
            score = weights_of(model)["score.bias"].tolist()
            want = score[0] if head == "scalar" else score[positive] - score[1 - positive]
            assert written.offset == pytest.approx(want)
            # A reader that does not know of it is off by exactly that.
            theirs = [READ[target](out, *one) for one in solutions]
            odds = lambda rows: [torch.tensor(row).logit() for row in rows]
            for a, b in zip(odds(theirs), odds(ours(model, solutions)), strict=True):
                assert torch.allclose(a + want, b, atol=1e-4)


def test_an_export_of_an_export_folds_what_stood_beside(source, tmp_path):
    model, solutions = source("Llama", "two_class", 0), problems()
    want = ours(model, solutions)
    export_reward(model, "math-shepherd", str(tmp_path / "a"), Wanted(bias="beside"))
    for number, target in enumerate(("skywork", "trl", "seqcls", "math-shepherd", "qwen-prm", "qwen-prm")):
        here, there = tmp_path / ("a" if not number else str(number - 1)), tmp_path / str(number)
        export_reward(str(here), target, str(there), Wanted(bias="beside"))
        assert close(ours(there, solutions), want)
    with pytest.raises(UserError, match="its head has two layers, and this format has room for one"):
        export_reward(str(there), "trl", str(tmp_path / "no"))


def test_two_hidden_units_carry_a_linear_head_through_relu():
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 6), (2,), (9, 6))
    weight, bias, inputs = (torch.randn(*shape, dtype=torch.float64, generator=generator) for shape in shapes)
    first, first_bias, second, second_bias = (part.tolist() for part in pass_through_mlp(weight, bias))

    def layer(rows: list[list[float]], beside: list[float], x: list[float]) -> list[float]:
        return [sum(w * a for w, a in zip(row, x, strict=True)) + b for row, b in zip(rows, beside, strict=True)]

    for x in inputs.tolist():
        found = layer(second, second_bias, [max(0.0, a) for a in layer(first, first_bias, x)])
        assert found == pytest.approx(layer(weight.tolist(), bias.tolist(), x), abs=1e-12)


def test_the_tag_is_a_word_of_its_own_with_the_separators_embedding(source, tmp_path):
    model = source("Llama", "two_class", 1, bias=False)
    for tag, target in ((None, "qwen-prm"), ("<step>", "qwen-prm"), (None, "math-shepherd"), ("", "qwen-prm")):
        out = tmp_path / f"{target}{tag}"
        export_reward(model, target, str(out), Wanted(tag=tag))
        written, tokenizer = StepFormat.load(out), load_tokenizer(str(out))
        [new] = written.separator_ids
        if tag == "":
            assert (written.separator, new) == ("\n", StepFormat.load(model).separator_ids[0])
            continue
        shown = tag or {"qwen-prm": "<extra_0>", "math-shepherd": "ки"}[target]
        assert tokenizer(f"1 {shown}2", add_special_tokens=False)["input_ids"][1] == new
        table = weights_of(out)["model.embed_tokens.weight"]
        assert torch.equal(table[new], table[StepFormat.load(model).separator_ids[0]])
        assert json.loads((out / "config.json").read_text())["vocab_size"] == len(table) == new + 1
    # A tag in the problem is no step: positions come from what was encoded.
    reward = RewardModel.load(str(tmp_path / "qwen-prm<step>"), device="cpu")
    assert [len(x) for x in reward.score([("Start 3 <step> 4", ["3 + 5 = 8"] * 2)])] == [2]
    with pytest.raises(UserError, match="has a word '=' already, with a meaning of its own; choose another --tag"):
        export_reward(model, "qwen-prm", str(tmp_path / "no"), Wanted(tag="="))


def test_exports_that_would_score_other_tokens_are_refused(tmp_path, lab_words, merging_tokenizer, source):
    def saved(name: str, tokenizer: Any, layout: StepFormat) -> str:
        RewardModel(tiny("Llama", "ForTokenClassification", tokenizer), tokenizer, layout).save(tmp_path / name)
        return str(tmp_path / name)

    long = saved(
        "long", merging_tokenizer, StepFormat.for_policy(merging_tokenizer, " END\n").for_reward("two_class", "hard")
    )
    with pytest.raises(UserError, match=r"its separator ' END\\n' is \d+ tokens, and the one tag token"):
        export_reward(long, "qwen-prm", str(tmp_path / "out"))
    lines = saved(
        "lines", merging_tokenizer, StepFormat.for_policy(merging_tokenizer, "\n").for_reward("two_class", "hard")
    )
    with pytest.raises(UserError, match="a chat turn holds 'problem step', and its ids would be others"):
        export_reward(lines, "rlhflow", str(tmp_path / "out"), Wanted(bias="beside"))
    layout = dataclasses.replace(
        StepFormat.for_policy(lab_words, "\n").for_reward("two_class", "hard"), separator="<pad>", separator_ids=(0,)
    )
    with pytest.raises(UserError, match="its separator is its padding token"):
        export_reward(saved("pad", lab_words, layout), "seqcls", str(tmp_path / "out"))
    plain = source("Llama", "two_class", 1, bias=False)
    for wanted, message in (
        (Wanted(good="yes"), r"'yes' is not one token of its tokenizer"),
        (Wanted(good="-"), "its good and its bad word are the same token"),
        (Wanted(bias="drop"), "bias must be refuse or beside, found 'drop'"),
    ):
        with pytest.raises(UserError, match=message):
            export_reward(plain, "math-shepherd", str(tmp_path / "out"), wanted)
    with pytest.raises(UserError, match=r"unknown format 'qwen'.*did you mean qwen-prm"):
        export_reward(plain, "qwen", str(tmp_path / "out"))
    with pytest.raises(UserError, match="is the model's own folder"):
        export_reward(plain, "trl", plain)
    assert not (tmp_path / "out" / "config.json").exists()
    assert not (tmp_path / "out" / ".unfinished").exists()


def test_half_precision_stays_and_scores_stay_near(source, tmp_path):
    model = RewardModel.load(source("Qwen2", "two_class", 1), device="cpu")
    model.model.bfloat16()
    model.save(tmp_path / "half")
    for target in ("qwen-prm", "trl", "skywork"):
        assert export_reward(str(tmp_path / "half"), target, str(tmp_path / target)) < 2e-2
        kinds = {weight.dtype for weight in weights_of(tmp_path / target).values()}
        assert kinds == {torch.bfloat16}
        assert json.loads((tmp_path / target / "config.json").read_text())["dtype"] == "bfloat16"


# --- theirs, read here -----------------------------------------------------------------------------------------------------------

WORDS = [
    ("How much is 2 + 2?", ["Two and two.", "So the answer is 4."]),
    ("What is ки or <extra_0>?", ["Then 3 + 4 = 7", "7 = 7", "x"]),
    ("So", ["the answer is 4."]),
]


def theirs(name: str, folder: Path, architecture: str = "Llama", labels: int = 2, seed: int = 0) -> str:
    """A checkpoint as another project publishes it, made without the package."""
    tokenizer = foreign_tokenizer()
    kinds = {"qwen-prm": "Model", "trl": "ForTokenClassification", "seqcls": "ForSequenceClassification"}
    settings = {"num_labels": 1 if name == "seqcls" else labels}
    model = tiny(architecture, kinds.get(name, "ForCausalLM"), tokenizer, seed=seed, **settings)
    state, width = dict(model.state_dict()), model.config.hidden_size
    draw = lambda *shape: torch.randn(*shape, generator=torch.Generator().manual_seed(seed + len(shape))) * 0.4
    if name == "qwen-prm":
        state = {f"model.{key}": value for key, value in state.items()}
        state |= {"score.0.weight": draw(width, width), "score.0.bias": draw(width)}
        state |= {"score.2.weight": draw(2, width), "score.2.bias": draw(2)}
    if name == "skywork":
        state |= {"v_head.summary.weight": draw(1, width), "v_head.summary.bias": draw(1)}
    model.config.architectures = [
        {"qwen-prm": f"{architecture}ForProcessRewardModel", "skywork": f"{architecture}ForPrmModel"}.get(
            name, type(model).__name__
        )
    ]
    model.config.save_pretrained(folder)
    save_file({k: v.clone().contiguous() for k, v in state.items()}, folder / "model.safetensors", {"format": "pt"})
    tokenizer.save_pretrained(folder)
    if name == "qwen-prm":  # as published: names of remote code, and the code
        config = json.loads((folder / "config.json").read_text())
        config["auto_map"] = {"AutoConfig": "configuration_x.X", "AutoModel": "modeling_x.X"}
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "modeling_x.py").write_text("raise RuntimeError('remote code ran')")
        (folder / "configuration_x.py").write_text("raise RuntimeError('remote code ran')")
    return str(folder)


THEIR_READING = {
    "qwen-prm": qwen_prm, "math-shepherd": math_shepherd, "rlhflow": rlhflow, "trl": trl, "skywork": skywork, "seqcls": seqcls,
}  # fmt: skip


@pytest.mark.parametrize("architecture", ["Llama", "Qwen2"])
@pytest.mark.parametrize("name", list(CONVENTIONS))
def test_a_foreign_model_is_read_by_its_convention_directly_and_imported(tmp_path, name, architecture, capsys):
    folder = tmp_path / "theirs"
    folder.mkdir()
    theirs(name, folder, architecture)
    # The convention of a tag by id cannot tell a tag in the problem from a step's: ours can, and reads steps alone.
    solutions = [WORDS[0], WORDS[2]] if name in ("qwen-prm", "math-shepherd") else WORDS
    want = [THEIR_READING[name](folder, *one) for one in solutions]
    assert [len(one) for one in want] == [len(steps) for _, steps in solutions]
    assert max(map(max, want)) - min(map(min, want)) > 0.01
    assert close(ours(folder, solutions, format=name), want)
    main(["import-reward", str(folder), "--from", name, "--out", str(tmp_path / "here")])
    assert "head" in capsys.readouterr().out
    assert close(ours(tmp_path / "here", solutions), want)
    if name in ("qwen-prm", "math-shepherd"):
        problem, steps = WORDS[1]
        whole = THEIR_READING[name](folder, problem, steps)
        assert len(whole) == len(steps) + 1
        assert close(ours(folder, [WORDS[1]], format=name), [whole[1:]])
    # Weights are the same bytes; no code and no name of code came along.
    assert (folder / "model.safetensors").read_bytes() == (tmp_path / "here" / "model.safetensors").read_bytes()
    assert not list((tmp_path / "here").glob("*.py"))
    assert "auto_map" not in json.loads((tmp_path / "here" / "config.json").read_text())
    # Batches, one by one, and with a cache of prefixes; growing solutions too.
    reward = RewardModel.load(str(tmp_path / "here"), device="cpu", keep_prefixes=True)
    for length in (1, 2, 3):
        grown = [(problem, steps[:length]) for problem, steps in solutions]
        plain = RewardModel.load(str(tmp_path / "here"), device="cpu")
        assert close(reward.score(grown), [plain.score([one])[0] for one in grown])
        assert close(reward.score_with_root(grown), plain.score_with_root(grown))
        assert [len(one) for one in plain.score_with_root(grown)] == [1 + len(steps) for _, steps in grown]
    assert close(reward.score(solutions), want)


@pytest.mark.parametrize("name", ["qwen-prm", "math-shepherd", "rlhflow", "trl", "skywork"])
def test_a_foreign_solution_that_grows_encodes_only_what_is_new(tmp_path, name):
    theirs(name, tmp_path)
    reward = RewardModel.load(str(tmp_path), device="cpu", format=name)
    cached = RewardModel(reward.model, reward.tokenizer, reward.step_format, cache=PrefixCache())
    problem, steps = "How much is 2 + 2?", ["Two and two."] * 6
    for length in range(1, 7):
        cached.score([(problem, steps[:length])])
    whole = reward.step_format.encode(reward.tokenizer, problem, steps)
    assert cached.ledger.reward_tokens == whole.step_ends[-1] + 1


def test_a_card_of_an_imported_model_reads_it(tmp_path, monkeypatch):
    for name in CONVENTIONS:
        folder = tmp_path / name
        folder.mkdir()
        theirs(name, folder)
        import_reward(str(folder), name, str(folder / "here"))
        monkeypatch.chdir(folder / "here")
        [program] = re.findall(r"```python\n(.*?)```", Path("README.md").read_text(), re.DOTALL)[:1]
        said: dict[str, Any] = {}
        exec(program, said)
        assert close([said["scores"]], ours(folder / "here", [(said["problem"], said["steps"])]))


def test_weights_in_several_files_are_read_and_copied(tmp_path):
    for name in ("qwen-prm", "math-shepherd"):
        folder = tmp_path / name
        folder.mkdir()
        theirs(name, folder)
        want = ours(folder, WORDS, format=name)
        state = weights_of(folder)
        (folder / "model.safetensors").unlink()
        save_torch_state_dict(state, folder, max_shard_size="30KB", metadata={"format": "pt"})
        assert len(list(folder.glob("model-0*.safetensors"))) > 2
        import_reward(str(folder), name, str(folder / "here"))
        assert close(ours(folder / "here", WORDS), want)
        export_reward(str(folder / "here"), name, str(folder / "again"))
        assert close(ours(folder / "again", WORDS), want)


def test_what_a_user_says_wins_over_the_convention(tmp_path):
    theirs("trl", tmp_path, labels=1)
    one = foreign_format(str(tmp_path), "trl", Given(separator="\n\n", label_kind="human", aggregation="min"))
    assert (one.head, one.positive_class, one.separator, one.label_kind, one.aggregation) == (
        "scalar", None, "\n\n", "human", "min",
    )  # fmt: skip
    with pytest.raises(UserError, match="label_kind must be one of"):
        foreign_format(str(tmp_path), "trl", Given(label_kind="warm"))
    with pytest.raises(UserError, match=r"unknown format 'tlr'.*did you mean trl"):
        foreign_format(str(tmp_path), "tlr")
    with pytest.raises(UserError, match=r"the checkpoint has no v_head.summary.weight"):
        RewardModel.load(str(tmp_path), device="cpu", format="skywork")


def test_a_checkpoint_without_its_head_is_refused_and_not_given_a_random_one(tmp_path):
    theirs("math-shepherd", tmp_path)
    with pytest.raises(UserError, match=r"lacks score.bias, score.weight of LlamaForTokenClassification"):
        RewardModel.load(str(tmp_path), device="cpu", format="trl")
    with pytest.raises(UserError, match=r"the checkpoint has no score.weight"):
        RewardModel.load(str(tmp_path), device="cpu", format="seqcls")
    with pytest.raises(UserError, match="its architecture fits several formats; say --from"):
        import_reward(str(tmp_path), "", str(tmp_path / "out"))


def test_a_tag_that_the_tokenizer_does_not_know_or_merges_is_refused(tmp_path, lab_words):
    tiny("Llama", "ForCausalLM", lab_words).save_pretrained(tmp_path)
    lab_words.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="no token for the step tag ' ки'"):
        RewardModel.load(str(tmp_path), device="cpu", format="math-shepherd")
    theirs("math-shepherd", tmp_path)
    reward = RewardModel.load(str(tmp_path), device="cpu", format="math-shepherd")
    merged = dataclasses.replace(reward.step_format, separator=" an", separator_ids=(5,))
    with pytest.raises(UserError, match="the tokenizer merges the step tag ' an' with what stands beside it"):
        merged.encode(reward.tokenizer, "x", ["So", "the"])


def test_the_shift_of_a_language_model_is_not_taken(tmp_path):
    """Math-Shepherd reads at the tag, RLHFlow at the token before the sign: one token off is another score."""
    theirs("math-shepherd", tmp_path)
    reward = RewardModel.load(str(tmp_path), device="cpu", format="math-shepherd")
    one = reward.step_format.encode(reward.tokenizer, *WORDS[0])
    logits = vocabulary_logits(tmp_path, list(one.ids))[:, list(reward.step_format.label_ids)].softmax(-1)[:, 0]
    [found] = reward.score([WORDS[0]])
    assert close([found], [logits[list(one.step_ends)].tolist()])
    assert not close([found], [logits[[end - 1 for end in one.step_ends]].tolist()], 1e-3)


# --- a model trained in turns -----------------------------------------------------------------------------------------------------


def test_a_head_trained_at_the_turns_of_a_chat_becomes_a_sign(tmp_path, source):
    model, here = source("Qwen2", "two_class", 0, bias=False, turns=True), tmp_path / "theirs"
    export_reward(model, "rlhflow", str(here))
    assert StepFormat.load(here).arrangement == "turns"
    assert AutoTokenizer.from_pretrained(here).chat_template == CHAT
    assert close([rlhflow(here, *one) for one in WORDS], ours(model, WORDS))
    assert close(ours(here, WORDS, format="rlhflow"), ours(model, WORDS))
    for target in ("trl", "qwen-prm", "math-shepherd", "skywork", "seqcls"):
        with pytest.raises(UserError, match="its samples are laid out as turns, and this format reads"):
            export_reward(model, target, str(tmp_path / "no"))


def test_a_chat_answer_exported_as_qwen_prm_is_read_by_its_convention(tmp_path):
    tokenizer = foreign_tokenizer()
    layout = StepFormat("<extra_0>", tuple(tokenizer("<extra_0>")["input_ids"]), chat=True, system=SYSTEM)
    model = tiny("Qwen2", "ForTokenClassification", tokenizer, num_labels=2)
    reward = RewardModel(model, tokenizer, layout.for_reward("two_class", "hard"))
    reward.save(tmp_path / "ours")
    export_reward(str(tmp_path / "ours"), "qwen-prm", str(tmp_path / "theirs"))
    assert close(
        [qwen_prm(tmp_path / "theirs", *one) for one in (WORDS[0], WORDS[2])], reward.score([WORDS[0], WORDS[2]])
    )
    again = foreign_format(str(tmp_path / "theirs"), "qwen-prm")
    assert again.layout() == StepFormat.load(tmp_path / "theirs").layout()


# --- the command -----------------------------------------------------------------------------------------------------------------


def test_the_commands_and_their_mistakes(source, tmp_path, capsys):
    main(
        ["export", source("Llama", "two_class", 1), "--to", "qwen-prm", "--out", str(tmp_path / "out"), "--tag", "<s>"]
    )
    assert "as qwen-prm; its scores differ by at most" in capsys.readouterr().out
    assert StepFormat.load(tmp_path / "out").separator == "<s>"
    for arguments, message in (
        (["export", "--to", "trl"], "needs the model's folder first"),
        (["export", "m", "--to", "trl"], "--out DIR is missing"),
        (["export", str(tmp_path / "no"), "--to", "trl", "--out", "x"], "no such file"),
        (["export", str(tmp_path / "out"), "--to", "trl", "--out", "x", "--tags", "<s>"], "did you mean tag"),
        (["import-reward", str(tmp_path / "no"), "--from", "trl", "--out", "x"], "no such model folder"),
        (["import-reward", str(tmp_path / "out"), "--from", "trl", "--out", str(tmp_path / "x")], "lacks score.bias"),
    ):
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        assert ended.value.code == 2
        assert message in capsys.readouterr().err
    for command, word in (("export", "bias"), ("import-reward", "separator")):
        main([command, "--help"])
        said = capsys.readouterr().out
        assert said.startswith(f"usage: stepladder {command} DIR")
        assert word in said
        assert all(name in said for name in CONVENTIONS)


# --- the page --------------------------------------------------------------------------------------------------------------------

PAGE = Path(__file__).parents[2] / "docs" / "formats.md"


@pytest.mark.parametrize("target", list(CONVENTIONS))
def test_the_programs_of_the_page_read_an_export(source, tmp_path, target):
    model = source("Llama", "two_class", 0)
    export_reward(model, target, str(tmp_path), Wanted(bias="beside"))
    text = PAGE.read_text()
    [ids] = re.findall(r"## Reading an export by hand\n.*?```python\n(.*?)```", text, re.DOTALL)
    [read] = re.findall(rf"### {target}\n\n```python\n(.*?)```", text, re.DOTALL)
    said: dict[str, Any] = {}
    exec(ids.replace("runs/prm_out", str(tmp_path)) + read, said)
    assert close([said["scores"].tolist()], ours(model, [(said["problem"], said["steps"])]))


def test_the_page_names_every_option():
    from stepladder.launch.options_formats import FORMATS, Export, Import

    assert tuple(CONVENTIONS) == FORMATS
    page = PAGE.read_text()
    for options, heading in ((Export, "## Export"), (Import, "## Import")):
        part = page.split(f"{heading}\n")[1].split("\n## ")[0]
        for field in dataclasses.fields(options):
            assert f"`{field.name}`" in part
    for name in FORMATS:
        assert f"| `{name}` |" in page


def test_the_command_lines_of_the_page_are_understood(tmp_path):
    """OpenR's tag, words and tail as the page writes them for a shell."""
    import shlex

    from stepladder.config import build, parse_overrides
    from stepladder.launch.options_formats import Import

    [block] = re.findall(r"```bash\n# OpenR.*?```", PAGE.read_text(), re.DOTALL)
    words = shlex.split(block.replace("\\\n", " "), comments=True)[1:]
    words = words[: words.index("stepladder", 1)]
    values = parse_overrides(words[3:])
    values["format"] = values.pop("from")
    options = build(Import, values, "page")
    assert (options.separator, options.tail, options.good, options.bad) == (" " + "\n" * 5, "", " +", " -")
