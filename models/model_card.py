"""The README.md of an exported or imported reward model: how its scores are read, with a program that reads them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..basics import read_json
from .formats import CONVENTIONS
from .heads import MLP_NAMES, VALUE_NAMES
from .step_format import StepFormat

# What a written model is checked with: arithmetic of the lab, words, a step that repeats, another number of steps.
PROBES: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("Start 3 ; + 5 ; * 2", ("3 + 5 = 8", "8 * 2 = 5", "Answer: 5")),
    ("Tom has 3 apples and buys 4 more. How many?", ("3 + 4 = 7.", "So he has 7 apples.", "3 + 4 = 7.", "Answer: 7")),
    ("What is 12 - 5?", ("Answer: 7",)),
)

_READ = {
    "two_class": "softmax of two logits at the last separator token of each step",
    "scalar": "sigmoid of one logit at the last separator token of each step",
    "mlp_two_class": "softmax of two logits of a two-layer head at the last separator token of each step",
    "label_tokens": "softmax of the vocabulary logits of two words",
    "value_head": "sigmoid of `v_head.summary` at the last separator token of each step",
    "sequence": "sigmoid of the one logit, which transformers reads at the last token that is not padding",
}
_WHERE = {
    "steps": "at the last separator token of each step, from the output at that token (no shift)",
    "text": "at the token with the last character of each tag, from the output at that token (no shift)",
    "turns": "at the token before each answer, which predicts it",
    "answer": "at the last token of problem and answer so far",
}


def model_card(
    target: str, step_format: StepFormat, tokenizer: Any, config: Any, *, origin: str, difference: float | None = None
) -> str:
    """Markdown that tells what is in the folder and how others read it."""
    architecture = (config.architectures or ["?"])[0]
    good = step_format.positive_class
    labels = [tokenizer.convert_ids_to_tokens(i) for i in step_format.label_ids]
    rows = [
        ("format", f"`{target}`: {CONVENTIONS[target].about}"),
        ("architecture", f"`{architecture}`"),
        ("score", _READ[step_format.head]),
        ("read", _WHERE[step_format.arrangement]),
        ("positive class", f"index {good}" if good is not None else "high is good"),
        (
            "words",
            f"good `{labels[0]}` (id {step_format.label_ids[0]}), bad `{labels[1]}` (id {step_format.label_ids[1]})",
        )
        if labels
        else None,
        (
            "separator",
            f"`{json.dumps(step_format.separator, ensure_ascii=False)}`, ids {list(step_format.separator_ids)}",
        )
        if step_format.separator_ids
        else None,
        ("added to the log-odds", f"**{step_format.offset!r}**: a bias that this layout has no room for")
        if step_format.offset
        else None,
        ("trained on", f"`{step_format.label_kind}` labels"),
        ("one score a solution", f"`{step_format.aggregation}` of the step scores"),
    ]
    table = "\n".join(f"| {name} | {text} |" for name, text in (row for row in rows if row is not None))
    parts = [
        f"---\nlibrary_name: transformers\ntags: [reward-model, process-reward-model, {target}]\n---",
        f"# Reward model in the layout `{target}`",
        f"From `{origin}`. `step_format.json` holds the same for Stepladder: `RewardModel.load` reads this folder.",
        f"| | |\n|---|---|\n{table}",
        f"## Reading the scores\n\n```python\n{snippet(step_format, config)}```",
        *([_vllm(step_format, architecture)] if _vllm(step_format, architecture) else []),
        _training(Path(origin)),
    ]
    if difference is not None:
        parts.append(
            f"When it was written, its step scores differed from those of its source by at most {difference:.1e}."
        )
    return "\n\n".join(part for part in parts if part) + "\n"


def snippet(step_format: StepFormat, config: Any) -> str:
    """A program that scores one solution with transformers alone; `scores` holds the result."""
    return _IMPORTS + _ids(step_format) + _read(step_format, config)


_IMPORTS = """import torch
from transformers import AutoTokenizer

folder = "."  # this folder
tokenizer = AutoTokenizer.from_pretrained(folder)
problem, steps = "Start 3 ; + 5", ["3 + 5 = 8", "Answer: 8"]

"""


def _ids(step_format: StepFormat) -> str:
    """The part of the program that makes `ids` and `ends`, or one of `samples` for each step."""
    prompt = _prompt(step_format)
    if step_format.arrangement == "turns":
        return f"""turns, samples = {_conversation(step_format)}, []
for number, step in enumerate(steps):
    turns.append({{"role": "user", "content": step if number else {prompt} + step}})
    # What the model reads before it answers; in the conversation each step is answered with {step_format.answer!r}.
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    samples.append(tokenizer(text, add_special_tokens=False)["input_ids"])
    turns.append({{"role": "assistant", "content": {step_format.answer!r}}})
"""
    if step_format.arrangement == "answer":
        answer = f"{step_format.separator!r}.join(steps[:t])"
        make = f'    samples.append(tokenizer({prompt} + {answer})["input_ids"])\n'
        if step_format.chat:
            make = f"""    turns = {_conversation(step_format, ("user", prompt), ("assistant", answer))}
    text = tokenizer.apply_chat_template(turns, tokenize=False)
    samples.append(tokenizer(text, add_special_tokens=False)["input_ids"])
"""
        return "samples = []\nfor t in range(1, len(steps) + 1):\n" + make
    begin, special = f"text = {prompt}\n", ""
    if step_format.chat:
        turns, special = _conversation(step_format, ("user", prompt)), ", add_special_tokens=False"
        begin = f"turns = {turns}\ntext = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)\n"
    if step_format.arrangement == "text":
        return f"""{begin}marks = []
for step in steps:
    text += step + {step_format.separator!r}
    marks.append(len(text) - 1)
    text += {step_format.tail!r}
found = tokenizer(text{special}, return_offsets_mapping=True)
ids = found["input_ids"]
# The positions come from the text: the tag may stand in the problem too.
ends = [max(i for i, (a, b) in enumerate(found["offset_mapping"]) if a <= mark < b) for mark in marks]
"""
    closing = "" if step_format.chat else _CLOSING
    return f"""{begin}ids, ends = tokenizer(text{special})["input_ids"], []
{closing}for step in steps:  # ids are appended: joined texts may be cut into other tokens
    ids += tokenizer(step, add_special_tokens=False)["input_ids"] + {list(step_format.separator_ids)}
    ends.append(len(ids) - 1)
"""


_CLOSING = """if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id:
    ids.pop()  # a tokenizer that closes every text
"""


def _prompt(step_format: StepFormat) -> str:
    """The problem with the text around it, as an expression."""
    if step_format.prompt_template == "{prompt}":
        return "problem"
    return f'{step_format.prompt_template!r}.replace("{{prompt}}", problem)'


def _conversation(step_format: StepFormat, *turns: tuple[str, str]) -> str:
    """A list of messages, as an expression; each turn is a role and an expression."""
    spoken = [f'{{"role": {json.dumps(role)}, "content": {content}}}' for role, content in turns]
    if step_format.system is not None:
        spoken.insert(0, f'{{"role": "system", "content": {step_format.system!r}}}')
    return "[" + ", ".join(spoken) + "]"


def _read(step_format: StepFormat, config: Any) -> str:
    """The part that loads the model and reads `scores`."""
    offset = f" + {step_format.offset!r}" if step_format.offset else ""
    good = step_format.positive_class or 0
    several = step_format.arrangement in ("turns", "answer")
    if step_format.head in ("mlp_two_class", "value_head"):
        names = MLP_NAMES if step_format.head == "mlp_two_class" else VALUE_NAMES
        load = f"""
from pathlib import Path

from safetensors import safe_open
from transformers import AutoModel

model = AutoModel.from_pretrained(folder, dtype="float32")
head = {{}}
for file in Path(folder).glob("*.safetensors"):
    with safe_open(file, "pt") as opened:
        for name in {list(names)}:
            if name in opened.keys():
                head[name] = opened.get_tensor(name).float()
with torch.no_grad():
    hidden = model(input_ids=torch.tensor([ids])).last_hidden_state[0, ends]
"""
        if step_format.head == "mlp_two_class":
            return (
                load
                + f"""inner = torch.relu(hidden @ head["score.0.weight"].T + head["score.0.bias"])
logits = inner @ head["score.2.weight"].T + head["score.2.bias"]
scores = logits.softmax(-1)[:, {good}].tolist()
"""
            )
        return (
            load
            + f"""values = hidden @ head["v_head.summary.weight"].T + head["v_head.summary.bias"]
scores = (values.squeeze(-1){offset}).sigmoid().tolist()
"""
        )
    auto = {"label_tokens": "CausalLM", "sequence": "SequenceClassification"}.get(
        step_format.head, "TokenClassification"
    )
    load = f"""
from transformers import AutoModelFor{auto}

model = AutoModelFor{auto}.from_pretrained(folder, dtype="float32")
"""
    if step_format.head == "sequence":
        samples = "" if several else "samples = [ids[: end + 1] for end in ends]\n"
        return (
            load
            + f"""{samples}with torch.no_grad():
    logits = torch.cat([model(input_ids=torch.tensor([sample])).logits for sample in samples])
scores = (logits.squeeze(-1){offset}).sigmoid().tolist()
"""
        )
    if several:
        read = """with torch.no_grad():
    logits = torch.stack([model(input_ids=torch.tensor([sample])).logits[0, -1] for sample in samples])
"""
    else:
        read = """with torch.no_grad():
    logits = model(input_ids=torch.tensor([ids])).logits[0, ends]
"""
    if step_format.head == "label_tokens":
        read += f"logits = logits[:, {list(step_format.label_ids)}]\n"
    if step_format.classes == 1:
        return load + read + f"scores = (logits.squeeze(-1){offset}).sigmoid().tolist()\n"
    if offset:
        return load + read + f"scores = (logits[:, {good}] - logits[:, {1 - good}]{offset}).sigmoid().tolist()\n"
    return load + read + f"scores = logits.softmax(-1)[:, {good}].tolist()\n"


def _vllm(step_format: StepFormat, architecture: str) -> str:
    """How vLLM serves it, where it knows the architecture; else ""."""
    if architecture != "Qwen2ForProcessRewardModel" or len(step_format.separator_ids) != 1:
        return ""
    return f"""## Serving it with vLLM

vLLM has a class of this name. It returns both class probabilities at each token whose id is the step tag:

```python
from vllm import LLM
from vllm.config import PoolerConfig

llm = LLM(".", runner="pooling", pooler_config=PoolerConfig(step_tag_id={step_format.separator_ids[0]}))
[found] = llm.encode([{{"prompt_token_ids": ids}}], pooling_task="token_classify")  # ids as above
scores = found.outputs.data[:, {step_format.positive_class}].tolist()
```

`bench/serve_vllm_scores.py` of Stepladder does so and compares the scores."""


def _training(folder: Path) -> str:
    """What the run that trained the model says of it, if the folder still lies in that run."""
    manifest, done = folder.parent / "manifest.json", folder / "done.json"
    if not manifest.is_file() or not done.is_file():
        return ""
    run = read_json(manifest)
    stage = (run.get("config", {}).get("stages") or {}).get(folder.name)
    if not isinstance(stage, dict):
        return ""
    settings = "\n".join(f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in stage.items())
    return f"""## Training

Stage `{folder.name}` of the recipe `{run.get("recipe")}` (Stepladder {run.get("stepladder")}), begun as `{run.get("command")}`:

```yaml
{settings}
```"""
