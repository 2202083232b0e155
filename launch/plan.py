"""`stepladder plan`: what a recipe needs on so many GPUs, stage by stage, before anything runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..basics import UserError, read_json, read_jsonl
from ..config import build
from ..models.ledger import Ledger
from . import planning
from .options import WithPolicy
from .options_plan import Plan
from .pipeline import plan as planned_stages
from .planned_work import Asked, Lengths, Rows, Work, units_of, work_of
from .planning import GB, LANGUAGE, Layout, Memory, Shape, Training
from .stages import config_class

_LAB = Path(__file__).parent.parent / "models" / "lab_policy"  # what `source: lab` copies
_ACCELERATE = Path(__file__).parent / "accelerate"
_SCORED_TOKENS = 16384  # that a reward model reads at once (models/reward.py)
_ASSUMED_PROMPT = 128.0
_SCORERS = ("reward", "prm", "value", "orm", "process_reward")  # options that name a model that scores
_NO_MODELS = ("self", "rollouts", "checker", "facts")  # what some of them may say instead


@dataclass
class Stage:
    """One stage of a recipe, as it is planned."""

    name: str
    kind: str
    config: Any
    asked: Asked
    work: Work
    rows: Rows
    shape: Shape | None = None  # of the model that samples or is trained
    scorer: Shape | None = None  # of the one that scores beside it
    memory: Memory = Memory()
    seconds: float = 0.0  # of one GPU
    processes: int = 1
    upper: bool = False  # its lengths are upper bounds

    @property
    def hours(self) -> float:
        """Hours on the clock."""
        return self.seconds / self.processes / 3600


@dataclass
class Measured:
    """What a finished run tells of one of its stages."""

    work: Work
    estimate: Work  # what the same formulas say of it
    flops: float
    seconds: float


def layout_for(given: Plan, gpus: int) -> Layout:
    """How training is spread over `gpus` GPUs of all machines."""
    name = given.launch
    if name == "run":
        return Layout("one process")
    if not name:
        name = "one" if gpus == 1 else "multi_gpu" if given.nodes == 1 else "multi_node"
    path = Path(name) if "/" in name or name.endswith((".yaml", ".yml")) else _ACCELERATE / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in _ACCELERATE.glob("*.yaml")))
        raise UserError(f"launch: {path} is no file; a file of accelerate's, run, or one of {known}")
    return planning.read_layout(path, gpus)


# --- which stage does what ------------------------------------------------------------------------------------------------


def read_stages(recipe: Mapping[str, Any], out: Path, where: str, given: Plan) -> dict[str, Stage]:
    """The stages of a recipe with their models, rows and tokens."""
    stages: dict[str, Stage] = {}
    shapes: dict[str, Shape] = {}
    counts: dict[str, tuple[float, float]] = {}
    for name, (kind, values) in planned_stages(recipe, out, where).items():
        config: Any = build(config_class(kind), _with_folder(kind, values, out / name), f"{where}, stage {name}")
        if kind == "model.copy":
            source = str(_LAB) if config.source == "lab" else config.source
            shapes[name] = _shape(source, f"{where}, stage {name}", given)
        named = lambda text: stages.get(_stage_in(text, out)) if isinstance(text, str) else None
        values_of = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
        rows = {key: found.rows for key, v in values_of.items() if (found := named(v)) is not None and found.rows.count}
        listed = [
            found.rows for v in values_of.values() for text in _inner_texts(v) if (found := named(text)) is not None
        ]
        shape = _model_of(config, ("policy", "model"), shapes, out, f"{where}, stage {name}", given)
        scorer = _model_of(config, _SCORERS, shapes, out, f"{where}, stage {name}", given)
        problems, prompt = 0.0, given.prompt_tokens
        if isinstance(getattr(config, "task", None), Mapping) and _works_on_problems(kind, config):
            model = getattr(config, "policy", "") or getattr(config, "model", "")
            key = repr((config.task, config.split, config.limit, given.prompt_tokens))
            if key not in counts:
                counts[key] = _problems(config, _folder_of(model, stages, out), given, f"{where}, stage {name}")
            problems, prompt = counts[key]
        upper = not given.solution_tokens
        lengths = Lengths(
            prompt=prompt or next((r.prompt for r in (*rows.values(), *listed) if r.prompt), _ASSUMED_PROMPT),
            solution=given.solution_tokens
            or getattr(config, "max_new_tokens", 0)
            or next((r.answer for r in (*rows.values(), *listed) if r.answer), 0)
            or _default_new_tokens(stages),
            steps=given.steps,
            right=given.right,
        )
        asked = Asked(problems, rows, listed, lengths)
        if kind in ("data.import", "data.prm800k"):
            longest = given.solution_tokens or 512.0
            work, made = Work(), Rows(config.limit or given.imported_rows, 1, lengths.prompt, longest)
        else:
            work, made = work_of(kind, config, asked)
        stages[name] = Stage(name, kind, config, asked, work, made, shape, scorer, upper=upper)
        if kind.startswith("train.") and shape is not None:
            shapes[name] = shape
    return stages


def _with_folder(kind: str, values: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    takes = any(field.name == "output_dir" for field in dataclasses.fields(config_class(kind)))
    return {**({"output_dir": str(folder)} if takes else {}), **values}


def _stage_in(text: str, out: Path) -> str:
    """The name of the stage whose folder a path lies in; "" for any other text."""
    path = Path(text)
    return path.relative_to(out).parts[0] if text and out in path.parents else ""


def _inner_texts(value: Any) -> list[str]:
    if isinstance(value, Mapping):
        return [t for v in value.values() for t in ([v] if isinstance(v, str) else _inner_texts(v))]
    if isinstance(value, (list, tuple)):
        return [t for v in value for t in ([v] if isinstance(v, str) else _inner_texts(v))]
    return []


def _works_on_problems(kind: str, config: Any) -> bool:
    return isinstance(config, WithPolicy) or kind in ("data.demonstrations", "train.rl")


def _default_new_tokens(stages: Mapping[str, Stage]) -> float:
    return next((stage.rows.answer for stage in stages.values() if stage.rows.answer), 128.0)


def _folder_of(model: str, stages: Mapping[str, Stage], out: Path) -> str:
    """Where the checkpoint of a model lies now: that which its stage is copied or trained from."""
    seen = model
    while (name := _stage_in(seen, out)) in stages:
        config = stages[name].config
        seen = getattr(config, "source", "") or getattr(config, "model", "")
    return str(_LAB) if seen == "lab" else seen


def _model_of(
    config: Any, names: tuple[str, ...], shapes: Mapping[str, Shape], out: Path, where: str, given: Plan
) -> Shape | None:
    if "model" in names and getattr(config, "lab_model", None):
        from ..models.lab import LAB_SPECIALS, lab_config

        told = dict(config.lab_model)
        words = told.pop("largest_number", 12) + len(LAB_SPECIALS) + 9
        return planning.shape_of(lab_config(words, **told).to_dict(), where)
    several = getattr(config, "models", None) or {}
    for text in [getattr(config, name, "") for name in names] + list(several.values() if "reward" in names else ()):
        if isinstance(text, str) and text and text not in _NO_MODELS:
            stage = _stage_in(text, out)
            return shapes[stage] if stage in shapes else _shape(text, where, given)
    return None


def _shape(model: str, where: str, given: Plan) -> Shape:
    """The shape of a folder's model, or of a hub id by --model_config."""
    if Path(model).is_dir():
        return planning.read_shape(model)
    if not given.model_config:
        raise UserError(f"{where}: the model {model} is no folder here: give its config.json with --model_config FILE")
    return planning.read_shape(given.model_config)


def _problems(config: Any, model: str, given: Plan, where: str) -> tuple[float, float]:
    """(problems that a stage works on, tokens of a prompt on average): counted where the data and the tokenizer are here."""
    from ..models.loading import load_policy_format, load_tokenizer
    from ..tasks.load import load_task

    task = load_task(config.task)
    sizes = getattr(task, "sizes", None) or {}
    if given.prompt_tokens and config.split in sizes:
        return float(min(sizes[config.split], config.limit or sizes[config.split])), given.prompt_tokens
    try:
        problems = task.problems(config.split)
    except (UserError, ValueError) as error:
        if not config.limit:
            raise UserError(f"{where}: its problems cannot be counted, and it has no limit ({error})") from None
        return float(config.limit), given.prompt_tokens
    count = float(min(len(problems), config.limit) if config.limit else len(problems))
    if given.prompt_tokens or not Path(model).is_dir():
        return count, given.prompt_tokens
    try:
        tokenizer = load_tokenizer(model)
    except UserError:
        return count, 0.0
    step_format = load_policy_format(model, tokenizer, task.step_separator)
    some = problems[: min(int(count), 100)]
    return count, sum(len(step_format.encode_prompt(tokenizer, one.prompt)) for one in some) / max(len(some), 1)


# --- memory ----------------------------------------------------------------------------------------------------------------


def stage_memory(stage: Stage, layout: Layout, given: Plan) -> Memory:
    """Bytes of tensors on one GPU while a stage runs."""
    config, shape = stage.config, stage.shape
    if stage.kind.startswith("train.") and shape is not None:
        return _training_memory(stage, shape, layout, given)
    memory = Memory()
    if isinstance(config, WithPolicy) and shape is not None and config.backend != "openai":
        dtype = _dtype(config.dtype, shape)
        rows = int(min(config.batch_size, max(stage.work.calls, 1)))
        read = int(min(rows, max(stage.work.prefilled / max(stage.asked.lengths.prompt, 1), 1)))
        prompt = int(stage.asked.lengths.prompt + (stage.asked.lengths.solution if stage.asked.first.count else 0))
        memory = planning.generation_memory(
            shape, dtype=dtype, rows=rows, prompts=read, prompt=prompt, new_tokens=config.max_new_tokens
        )
    if stage.work.reward and stage.scorer is not None:
        dtype = _dtype(getattr(config, "reward_dtype", getattr(config, "dtype", "float32")), stage.scorer)
        length = max(int(stage.asked.lengths.prompt + stage.asked.lengths.solution), 1)
        memory = memory + planning.scoring_memory(
            stage.scorer, dtype=dtype, rows=max(_SCORED_TOKENS // length, 1), length=length, labels=1
        )
    return memory


def _dtype(name: str, shape: Shape) -> str:
    return shape.dtype if name == "auto" else name


def _training_memory(stage: Stage, shape: Shape, layout: Layout, given: Plan) -> Memory:
    config = stage.config
    if (config.bf16 or config.fp16) and layout.precision == "no":
        layout = dataclasses.replace(layout, precision="bf16")
    language = stage.kind in ("train.sft", "train.dpo", "train.rl")
    sides = 2 if stage.kind in ("train.dpo", "train.ranking") else 1
    length = min(given.longest or config.max_length, config.max_length)
    if stage.kind == "train.rl":
        length = min(length, int(stage.asked.lengths.prompt) + config.max_new_tokens)
    rows = config.per_device_train_batch_size * sides
    read = config.max_new_tokens if stage.kind == "train.rl" else max(length - int(stage.asked.lengths.prompt), 1)
    training = Training(
        rows=rows,
        length=length,
        labels=LANGUAGE if language else 1 if getattr(config, "head", "") == "scalar" else 2,
        logit_positions=rows * read if language else 0,
        logit_bytes=planning.ONLINE_LOGITS if stage.kind == "train.rl" else planning.LOSS_LOGITS,
        dtype=_dtype(config.dtype, shape),
        lora_r=config.lora_r,
        checkpointing=config.gradient_checkpointing,
        accumulation=config.gradient_accumulation_steps,
        masked=rows > 1,
    )
    if stage.kind != "train.rl":
        return planning.training_memory(shape, training, layout)
    sampling = planning.generation_memory(
        shape,
        dtype=training.dtype,
        rows=config.generation_batch,
        prompts=max(config.generation_batch // config.samples, 1),
        prompt=int(stage.asked.lengths.prompt),
        new_tokens=config.max_new_tokens,
    )
    return planning.policy_gradient_memory(
        shape, training, layout, critic=config.algorithm == "ppo", reference=config.reference, generation=sampling
    )


# --- time ------------------------------------------------------------------------------------------------------------------


def stage_flops(stage: Stage, work: Work) -> tuple[float, float]:
    """(FLOPs of everything that is read or trained, FLOPs of sampling) of some work of this stage."""
    config, length = stage.config, stage.asked.lengths
    context = (length.prompt + length.solution) / 2
    read = sampled = 0.0
    if stage.shape is not None:
        shape, kind = stage.shape, stage.kind
        language = kind in ("train.sft", "train.dpo", "train.rl") or not kind.startswith("train.")
        labels = LANGUAGE if language else 1
        seen = lambda tokens, logits: planning.forward_flops(
            shape, tokens, context=context, labels=labels, logits=logits
        )
        sampled = seen(work.generated, work.generated)
        read = seen(work.prefilled, 0.0)
        if work.trained:
            share = length.solution / max(length.prompt + length.solution, 1)
            factor = planning.training_factor(lora=bool(config.lora_r), checkpointing=config.gradient_checkpointing)
            models = 2 if getattr(config, "algorithm", "") == "ppo" else 1
            read += models * factor * seen(work.trained, work.trained * share if language else work.trained)
            read += (models + 1 if kind == "train.rl" else 1) * seen(work.reference, work.reference * share)
    scorer = stage.scorer or stage.shape
    if scorer is not None and work.reward:
        read += planning.forward_flops(scorer, work.reward, context=context, labels=1)
    return read, sampled


def stage_seconds(stage: Stage, given: Plan, measured: Mapping[str, Measured]) -> float:
    """Seconds of one GPU: at the FLOP/s of the same stage of a finished run, else of its kind there, else by the data sheet."""
    read, sampled = stage_flops(stage, stage.work)
    like = measured.get(stage.name) or measured.get(stage.kind)
    if like is not None and like.flops and like.seconds:
        return (read + sampled) / (like.flops / like.seconds)
    seconds = read / (given.tflops * 1e12 * (given.train_use if stage.work.trained else given.read_use))
    if stage.shape is not None and stage.work.generated:
        length = stage.asked.lengths
        rows = int(min(getattr(stage.config, "batch_size", 256), max(stage.work.calls / stage.processes, 1)))
        seconds += planning.decode_seconds(
            stage.shape, stage.work.generated, rows=rows, context=length.prompt + length.solution / 2,
            width=planning.BYTES.get(_dtype(getattr(stage.config, "dtype", "bfloat16"), stage.shape), 2),
            flops=given.tflops * 1e12 * given.decode_use, bandwidth=given.bandwidth * 1e12 * given.decode_use,
        )  # fmt: skip
    return seconds


def read_measured(run: Path, given: Plan) -> dict[str, Measured]:
    """What a finished run tells, by stage and by kind of stage: tokens of its ledgers and logs beside what was estimated of it."""
    if not (run / "manifest.json").is_file():
        raise UserError(f"rates: {run} is no finished run (manifest.json is missing)")
    recipe = read_json(run / "manifest.json")["config"]
    stages = read_stages(recipe, run, str(run), dataclasses.replace(given, model_config=given.model_config))
    found: dict[str, Measured] = {}
    by_kind: dict[str, list[Measured]] = {}
    for stage in stages.values():
        one = _measured(stage, run / stage.name)
        if one is not None:
            found[stage.name] = one
            by_kind.setdefault(stage.kind, []).append(one)
    for kind, ones in by_kind.items():
        add = lambda name, ones=ones: sum(getattr(one, name) for one in ones[1:])
        found[kind] = Measured(
            sum((one.work for one in ones[1:]), ones[0].work),
            sum((one.estimate for one in ones[1:]), ones[0].estimate),
            ones[0].flops + add("flops"),
            ones[0].seconds + add("seconds"),
        )
    return found


def _measured(stage: Stage, folder: Path) -> Measured | None:
    """The tokens and seconds of one finished stage, from its ledger or its log; None if it asked nothing of a model."""
    if (folder / "rows.json").is_file():
        ledger = Ledger(**read_json(folder / "rows.json")["ledger"])
        work = Work(ledger.policy_calls, ledger.generated_tokens, ledger.prefilled_tokens, ledger.reward_tokens)
        seconds = ledger.seconds
    elif (folder / "metrics.jsonl").is_file() and stage.shape is not None:
        lines = [line for _, line in read_jsonl(folder / "metrics.jsonl")]
        last = next((line for line in reversed(lines) if "train_runtime" in line), None)
        if last is None:
            return None
        seconds, work = last["train_runtime"], stage.work
        if last.get("total_flos"):
            # transformers counts 6 FLOPs a token and parameter, embeddings left out, padding counted.
            shape, config = stage.shape, stage.config
            language = stage.kind in ("train.sft", "train.dpo")
            head = shape.head(LANGUAGE if language else 1) if not (language and shape.tied) else 0
            counted = shape.layers * shape.layer + shape.hidden + head + shape.adapters(config.lora_r)
            tokens = last["total_flos"] / 6 / counted
            work = dataclasses.replace(work, trained=tokens, reference=work.reference * tokens / max(work.trained, 1))
    elif (folder / "done.json").is_file() and stage.work.tokens:
        seconds, work = read_json(folder / "done.json")["seconds"], stage.work
    else:
        return None
    read, sampled = stage_flops(stage, work)
    return Measured(work, stage.work, read + sampled, seconds) if read + sampled else None


# --- the command -----------------------------------------------------------------------------------------------------------


def make_plan(recipe: Mapping[str, Any], where: str, given: Plan) -> tuple[list[Stage], Layout, float]:
    """(the stages with memory, tokens and seconds; how training is spread; bytes of one GPU)."""
    per_node, room = planning.parse_gpus(given.gpus)
    gpus = per_node * given.nodes
    layout = layout_for(given, gpus)
    measured = read_measured(Path(given.rates), given) if given.rates else {}
    stages = read_stages(recipe, Path("planned"), where, given)
    for stage in stages.values():
        like = measured.get(stage.name)
        if like is not None and like.estimate.tokens:
            # The run's own tokens, as many times as the formulas say this recipe asks for more.
            stage.work = like.work.scaled(stage.work, like.estimate)
            stage.upper = False
        spread = layout.processes if stage.kind.startswith("train.") else units_of(stage.config, stage.asked)
        stage.processes = int(min(gpus, spread))
        stage.memory = stage_memory(stage, layout, given)
        stage.seconds = stage_seconds(stage, given, measured)
    return list(stages.values()), layout, room


def plan_text(recipe: Mapping[str, Any], where: str, given: Plan) -> str:
    """The table that `stepladder plan` prints."""
    stages, layout, room = make_plan(recipe, where, given)
    shown = [stage for stage in stages if stage.work.tokens]
    heads: tuple[str, ...] = (
        "stage",
        "does",
        "model",
        "GB each",
        "weights",
        "grads",
        "Adam",
        "activ.",
        "logits",
        "cache",
        "other",
    )
    heads += ("written", "read", "trained", "GPUs", "GPU-h", "hours")
    lines: list[tuple[str, ...]] = [heads]
    for stage in shown:
        memory, work = stage.memory, stage.work
        model = stage.shape or stage.scorer
        mark = "!" if memory.peak > room else ""
        lines.append(
            (
                stage.name, stage.kind, _short(model.parameters() if model else 0), _gb(memory.peak) + mark,
                *(_gb(getattr(memory, name)) for name in (
                    "weights", "gradients", "optimizer", "activations", "logits", "cache", "buffers")),
                _short(work.generated), _short(work.prefilled + work.reward + work.reference), _short(work.trained),
                str(stage.processes), f"{stage.seconds / 3600:.3g}", f"{stage.hours:.3g}",
            )
        )  # fmt: skip
    widths = [max(len(line[i]) for line in lines) for i in range(len(heads))]
    text = ["  ".join(c.ljust(w) if i < 2 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True))).rstrip()
            for line in lines]  # fmt: skip
    total = sum(stage.seconds for stage in shown) / 3600
    clock = sum(stage.hours for stage in shown)
    per_node, _ = planning.parse_gpus(given.gpus)
    text.insert(0, f"{where} on {given.nodes} x {per_node} GPUs of {room / GB:g} GB; training: {layout.name}\n")
    text.append(f"\n{total:.3g} GPU-hours, {clock:.3g} hours one stage after another")
    text += [f"note: {note}" for note in _notes(shown, layout, room, given)]
    return "\n".join(text)


def plan_json(recipe: Mapping[str, Any], where: str, given: Plan) -> dict[str, Any]:
    """The same for machines: bytes, tokens and seconds."""
    stages, layout, room = make_plan(recipe, where, given)
    found = [
        {
            "stage": stage.name, "do": stage.kind, "processes": stage.processes, "seconds": stage.seconds,
            "fits": stage.memory.peak <= room, "memory": dataclasses.asdict(stage.memory),
            "tokens": dataclasses.asdict(stage.work), "rows": stage.rows.count, "upper_bound": stage.upper,
        }
        for stage in stages
    ]  # fmt: skip
    return {
        "recipe": where, "layout": dataclasses.asdict(layout), "gpu_bytes": room, "stages": found,
        "gpu_hours": sum(stage.seconds for stage in stages) / 3600, "notes": _notes(stages, layout, room, given),
    }  # fmt: skip


def _notes(stages: list[Stage], layout: Layout, room: float, given: Plan) -> list[str]:
    notes = []
    if any(stage.upper and stage.work.tokens for stage in stages):
        notes.append(
            "solutions are taken to be as long as max_new_tokens allows; --solution_tokens N or --rates RUN says better"
        )
    if given.rates:
        other = [stage.name for stage in stages if stage.work.tokens and stage.upper]
        notes.append(
            f"rates and lengths are those of {given.rates}" + (f", but for {', '.join(other)}" if other else "")
        )
    else:
        notes.append(
            f"time by a data sheet ({given.tflops:g} TFLOP/s, {given.bandwidth:g} TB/s) and shares of it that are assumed; "
            "--rates RUN takes those of a finished run"
        )
    served = [s.name for s in stages if getattr(s.config, "backend", "") == "vllm"]
    if served:
        notes.append(f"vLLM takes 90 % of each GPU for {', '.join(served)}, whatever it needs")
    for stage in stages:
        if stage.memory.peak > room:
            notes.append(_does_not_fit(stage, layout, room, given))
    return notes


def _does_not_fit(stage: Stage, layout: Layout, room: float, given: Plan) -> str:
    told = f"{stage.name} needs {_gb(stage.memory.peak)} GB of the {room / GB:g} GB that a GPU has"
    if not stage.kind.startswith("train."):
        return f"{told}: a smaller batch_size needs less"
    per_node, _ = planning.parse_gpus(given.gpus)
    for name in ("zero2", "zero3", "fsdp2"):
        other = planning.read_layout(_ACCELERATE / f"{name}.yaml", per_node * given.nodes)
        if stage_memory(stage, other, given).peak <= room:
            return f"{told}: it fits with --launch {name}"
    return f"{told}: fewer rows at once (per_device_train_batch_size), gradient_checkpointing or lora_r need less"


def _gb(amount: float) -> str:
    value = amount / GB
    return "-" if not amount else f"{value:.3g}" if value < 100 else f"{value:.0f}"


def _short(count: float) -> str:
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.3g}{letter}"
    return f"{count:.0f}" if count else "-"
