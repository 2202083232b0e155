"""What a model needs: parameters, memory and FLOPs, from its configuration alone. Pure functions of numbers, without torch.

The shapes are those of Llama-like decoders (Llama, Mistral, Qwen2, Qwen3, SmolLM2 ...) as transformers runs them with PyTorch's
scaled dot-product attention. Memory is that of tensors: what an allocator keeps beside them, a CUDA context and a Python process
come on top.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..basics import UserError, read_json
from ..config import read_yaml

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
GB = 1e9
LANGUAGE = 0  # `labels` of a model whose head is the vocabulary; a token classifier has 1 or 2


# --- models ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shape:
    """The sizes of a decoder that decide what it costs."""

    vocabulary: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    tied: bool = False  # embedding and language-model head are one matrix
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    dtype: str = "float32"  # of the checkpoint

    @property
    def attention(self) -> int:
        """Width of queries, and of keys and values once they are repeated for all heads."""
        return self.heads * self.head_dim

    @property
    def kv(self) -> int:
        """Width of the keys, and of the values, that are kept."""
        return self.kv_heads * self.head_dim

    @property
    def layer_matrices(self) -> int:
        """Weights of one layer that multiply activations."""
        return self.hidden * (2 * self.attention + 2 * self.kv + 3 * self.intermediate)

    @property
    def layer(self) -> int:
        """Parameters of one layer."""
        biases = self.qkv_bias * (self.attention + 2 * self.kv) + self.output_bias * self.hidden
        biases += self.mlp_bias * (2 * self.intermediate + self.hidden)
        return self.layer_matrices + biases + 2 * self.hidden + self.qk_norm * 2 * self.head_dim

    @property
    def embedding(self) -> int:
        return self.vocabulary * self.hidden

    def head(self, labels: int) -> int:
        """Weights of the head; a tied one is the embedding's."""
        return labels * self.hidden if labels else self.embedding

    def parameters(self, labels: int = LANGUAGE) -> int:
        """All parameters, with the head of a language model, or of a token classifier of so many labels (and its bias)."""
        head = self.head(labels) + labels if labels or not self.tied else 0
        return self.embedding + self.layers * self.layer + self.hidden + head

    def adapters(self, rank: int) -> int:
        """Parameters of LoRA on all linear layers but the head: r (in + out) each (arXiv:2106.09685)."""
        h, a, k, i = self.hidden, self.attention, self.kv, self.intermediate
        return self.layers * rank * (2 * (h + a) + 2 * (h + k) + 3 * (h + i))


_QKV_BIAS_BY_DEFAULT = ("qwen2",)  # its configuration does not say so
_DENSE = ("llama", "mistral", "qwen2", "qwen3", "smollm3", "gemma", "olmo2", "phi3")


def read_shape(path: str | Path) -> Shape:
    """The shape in a config.json, given the file or its folder. Raises UserError for what is not such a decoder."""
    path = Path(path)
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise UserError(f"{path}: no such model folder or config.json")
    return shape_of(read_json(file), str(file))


def shape_of(config: Mapping[str, Any], where: str) -> Shape:
    """The shape that a model's configuration gives."""
    config = {**config, **config["text_config"]} if isinstance(config.get("text_config"), Mapping) else config
    kind = str(config.get("model_type", ""))
    if config.get("num_experts") or config.get("num_local_experts"):
        raise UserError(f"{where}: a mixture of experts cannot be planned, only dense decoders")
    missing = [
        name
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        if not isinstance(config.get(name), int)
    ]
    if missing:
        raise UserError(
            f"{where}: no {missing[0]}; only decoders laid out as {', '.join(_DENSE[:4])} can be planned"
            + (f", found {kind}" if kind else "")
        )
    heads = config["num_attention_heads"]
    bias = bool(config.get("attention_bias", False))
    return Shape(
        vocabulary=config["vocab_size"],
        hidden=config["hidden_size"],
        intermediate=config["intermediate_size"],
        layers=config["num_hidden_layers"],
        heads=heads,
        kv_heads=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or config["hidden_size"] // heads,
        tied=bool(config.get("tie_word_embeddings", False)),
        qkv_bias=bias or kind in _QKV_BIAS_BY_DEFAULT,
        output_bias=bias and kind not in _QKV_BIAS_BY_DEFAULT,
        mlp_bias=bool(config.get("mlp_bias", False)),
        qk_norm=kind == "qwen3",
        dtype=str(config.get("dtype") or config.get("torch_dtype") or "float32"),
    )


# --- how training is spread ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layout:
    """What accelerate is told: who holds what, and the precision that is computed in."""

    name: str = "one process"
    engine: str = "one"  # one, ddp, zero1, zero2, zero3 or fsdp
    precision: str = "no"  # no, bf16 or fp16: weights are cast to it for every forward
    processes: int = 1
    offload_optimizer: bool = False
    offload_weights: bool = False

    @property
    def deepspeed(self) -> bool:
        return self.engine.startswith("zero")

    def share(self, what: str) -> float:
        """The share of the weights, gradients or optimiser states that one process holds."""
        split = {
            "weights": ("zero3", "fsdp"),
            "gradients": ("zero2", "zero3", "fsdp"),
            "optimizer": ("zero1", "zero2", "zero3", "fsdp"),
        }[what]
        return 1 / self.processes if self.engine in split else 1.0


def read_layout(path: str | Path, processes: int) -> Layout:
    """The layout in a configuration of accelerate, for so many processes."""
    path = Path(path)
    known = read_yaml(path)
    kind = str(known.get("distributed_type", "")).upper()
    deepspeed = known.get("deepspeed_config") or {}
    fsdp = known.get("fsdp_config") or {}
    offloaded = lambda name: str(deepspeed.get(name, "none")) not in ("none", "")
    engines = {"NO": "one", "FALSE": "one", "MULTI_GPU": "ddp", "MULTI_CPU": "ddp", "FSDP": "fsdp"}
    if kind == "DEEPSPEED":
        engine = f"zero{deepspeed.get('zero_stage', 2)}"
    elif kind in engines:
        engine = engines[kind]
    else:
        raise UserError(f"{path}: distributed_type must be NO, MULTI_GPU, DEEPSPEED or FSDP, found {kind or 'nothing'}")
    return Layout(
        name=path.name,
        engine=engine,
        precision=str(known.get("mixed_precision", "no")),
        processes=1 if engine == "one" else processes,
        offload_optimizer=offloaded("offload_optimizer_device") or bool(fsdp.get("fsdp_offload_params", False)),
        offload_weights=offloaded("offload_param_device") or bool(fsdp.get("fsdp_offload_params", False)),
    )


# --- memory ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Memory:
    """Bytes of tensors on one device. `peak` is less than the sum: gradients grow while activations are given back."""

    weights: float = 0.0
    gradients: float = 0.0
    optimizer: float = 0.0
    activations: float = 0.0
    logits: float = 0.0
    cache: float = 0.0
    buffers: float = 0.0  # what a parallel engine gathers or reduces in
    peak: float = 0.0

    def __add__(self, other: Memory) -> Memory:
        return Memory(**{f.name: getattr(self, f.name) + getattr(other, f.name) for f in dataclasses.fields(self)})


# Bytes of three tensors over the vocabulary in float32. Forward they are the logits, their copy in float32 where they were
# narrower, and log-probabilities; backward the log-probabilities, their gradient and that of the logits.
LOSS_LOGITS = 12.0
# Logits, those of responses, the same over the temperature, and two more for the entropy, which has no graph; with one four.
ONLINE_LOGITS = 20.0


@dataclass(frozen=True)
class Training:
    """One micro-batch of training, as far as memory goes."""

    rows: int = 1
    length: int = 1024  # columns of the batch, padding included
    labels: int = LANGUAGE
    logit_positions: int = 0  # positions whose logits over the vocabulary are computed
    logit_bytes: float = LOSS_LOGITS  # for each of these positions and entry of the vocabulary
    dtype: str = "float32"  # of the weights
    lora_r: int = 0
    checkpointing: bool = False
    accumulation: int = 1
    masked: bool = True  # rows of different lengths: attention is told by a matrix what is padding

    @property
    def tokens(self) -> int:
        return self.rows * self.length


def layer_activations(shape: Shape, training: Training, compute: int) -> float:
    """Bytes that one layer keeps for its backward, for the whole micro-batch.

    For each token: the input of both norms in float32 and what they make of it, queries, repeated keys and values and the
    attention's output, and four tensors of the feed-forward's width (gate, its SiLU, up, their product). `compute` is the width
    in bytes of what matrices multiply: that of the weights, or 2 under mixed precision, where norms stay in float32 and every
    matrix casts its input for itself. Adapters of a 16-bit model are float32, and so are their inputs.
    """
    h, a, i = shape.hidden, shape.attention, shape.intermediate
    weight = BYTES[training.dtype]
    mixed = compute < weight
    adapter_inputs = 5 * h + a + i
    token = 2 * 4 * h + 4 * a * compute  # the inputs of the norms; queries, keys, values, output
    if training.lora_r:
        low_rank = 7 * training.lora_r
        if mixed:
            token += adapter_inputs * compute + 3 * i * compute + low_rank * compute
        elif weight < 4:
            token += adapter_inputs * 4 + 3 * i * compute + low_rank * 4
        else:
            token += 2 * h * 4 + 4 * i * compute + low_rank * 4
    elif mixed:
        token += 2 * h * 4 + 5 * h * compute + 4 * i * compute
    else:
        token += 4 * h * compute + 4 * i * compute
    if shape.qk_norm:
        token += (a + shape.kv) * (4 + compute)
    mask = training.rows * training.length**2 * compute if training.masked else 0
    return training.tokens * token + mask


def activations(shape: Shape, training: Training, compute: int) -> float:
    """Bytes that the whole body keeps for its backward."""
    weight = BYTES[training.dtype]
    final_norm = training.tokens * shape.hidden * (4 + 2 * compute)
    cast = 2 * shape.layers * shape.layer_matrices if compute < weight else 0  # 16-bit copies of the matrices
    if training.checkpointing:
        return shape.layers * training.tokens * shape.hidden * weight + final_norm
    return shape.layers * layer_activations(shape, training, compute) + final_norm + cast


def training_memory(shape: Shape, training: Training, layout: Layout) -> Memory:
    """What one process holds while it trains, AdamW's moments included.

    Without DeepSpeed weights, gradients and moments have the precision of the weights; mixed precision adds 16-bit copies. With it
    weights and gradients have 16 bits, and a float32 copy of the weights and the moments are kept as well.
    """
    if training.dtype not in BYTES:
        raise UserError(f"dtype must be one of {', '.join(BYTES)}, found {training.dtype!r}")
    parameters = shape.parameters(training.labels)
    adapters = shape.adapters(training.lora_r) if training.lora_r else 0
    trained = adapters + (shape.head(training.labels) if training.labels else 0) if training.lora_r else parameters
    mixed = layout.precision != "no"
    weight = BYTES[training.dtype]
    if layout.deepspeed:
        weight = 2 if mixed else weight
        training = dataclasses.replace(training, dtype="bfloat16" if mixed else training.dtype)
    compute = 2 if mixed else weight
    adapter = 4 if not layout.deepspeed else weight  # peft keeps adapters in float32, DeepSpeed casts everything
    frozen = parameters * weight if training.lora_r else 0
    trained_weight = adapter if training.lora_r else weight
    weights = (frozen + trained * trained_weight) * layout.share("weights")
    gradients = trained * trained_weight * layout.share("gradients")
    states = 12 if layout.deepspeed and mixed else 2 * trained_weight
    optimizer = 0.0 if layout.offload_optimizer else trained * states * layout.share("optimizer")
    if layout.offload_weights:
        weights = 0.0
    buffers = _buffers(shape, parameters, trained * trained_weight, weight, layout)
    layer = layer_activations(shape, training, compute)
    working = training.tokens * (shape.intermediate + 2 * shape.hidden) * compute  # gradients inside a layer
    kept = activations(shape, training, compute)
    logits = 0.0
    if training.labels == LANGUAGE:
        logits = training.logit_bytes * training.logit_positions * shape.vocabulary
    if training.checkpointing and compute < BYTES[training.dtype]:
        layer += 2 * shape.layer_matrices
    recomputed = layer if training.checkpointing else 0.0
    standing = weights + optimizer + buffers
    # At the end of a backward a tied embedding has two gradients, from the head and from the look-up, and then their sum.
    tied = shape.tied and not training.labels and not training.lora_r
    added = 2.0 * shape.embedding * trained_weight if tied else 0.0
    begins = kept + max(logits, recomputed + working)
    ends = gradients + max(recomputed + working, added)
    if training.accumulation > 1 or layout.engine == "ddp":
        begins += gradients  # of the micro-batches before, or views of buckets that stay
    return Memory(weights, gradients, optimizer, kept + recomputed, logits, 0.0, buffers, standing + max(begins, ends))


_BUCKET = 5e8  # elements that DeepSpeed reduces at once, unless told otherwise


def _buffers(shape: Shape, parameters: int, gradients: float, weight: int, layout: Layout) -> float:
    """Bytes that an engine gathers weights or reduces gradients in; none for one process."""
    if layout.processes == 1:
        return 0.0
    if layout.engine == "ddp":
        return gradients  # the reducer's buckets
    if layout.engine in ("zero1", "zero2"):
        return 2.0 * min(parameters, _BUCKET)
    width = 2 if layout.precision != "no" else weight
    # Two layers (one computes, one arrives) and the embedding, with their gradients for a moment.
    return width * (2.0 * shape.layer + shape.embedding) * (2 if layout.engine == "zero3" else 1)


def policy_gradient_memory(
    shape: Shape, training: Training, layout: Layout, *, critic: bool, reference: bool, generation: Memory
) -> Memory:
    """What one process holds in online training: a policy, and perhaps a critic and a frozen reference, whose activations are
    there together; samples are drawn between updates, when there are none."""
    policy = made = training_memory(shape, training, layout)
    valued = Memory()
    if critic:
        valued = training_memory(shape, dataclasses.replace(training, labels=1, logit_positions=0), layout)
        made = policy + valued
    weights = made.weights + (policy.weights if reference and not training.lora_r else 0.0)
    standing = weights + made.optimizer + made.buffers
    if training.accumulation > 1 or layout.engine == "ddp":
        standing += made.gradients
    # All look first, without a graph. The critic comes last forward, so that its backward is over when the policy's begins.
    grows = max(
        policy.logits,
        policy.activations + valued.activations + 0.4 * policy.logits,
        policy.activations + 0.8 * policy.logits + valued.gradients,
        made.gradients + (2.0 * shape.embedding * BYTES[training.dtype] if shape.tied and not training.lora_r else 0.0),
    )
    made = dataclasses.replace(made, weights=weights, peak=standing + grows)
    sampling = made.weights + made.optimizer + made.buffers + generation.cache + generation.logits
    if layout.share("weights") < 1:
        sampling += generation.weights  # a whole copy to sample with
    return dataclasses.replace(made, cache=generation.cache, peak=max(made.peak, sampling))


def cache_bytes(shape: Shape, rows: int, columns: int, width: int) -> float:
    """Bytes of the keys and values of so many rows."""
    return 2.0 * shape.layers * shape.kv * rows * columns * width


def generation_memory(shape: Shape, *, dtype: str, rows: int, prompts: int, prompt: int, new_tokens: int) -> Memory:
    """What a process holds while it samples `rows` sequences from `prompts` different prompts at once: weights, keys and values,
    and one step's distribution."""
    width = BYTES[dtype]
    weights = float(shape.parameters() * width)
    cache = cache_bytes(shape, rows, prompt + new_tokens, width)
    growing = cache / shape.layers  # a layer's keys and values are held twice while they grow
    # The logits of the last position, in float32 where they are not, and what drawing from them needs.
    logits = 12.0 * rows * shape.vocabulary
    layer = prompts * prompt * (3 * shape.intermediate + 2 * shape.hidden) * width  # while prompts are read
    return Memory(
        weights=weights,
        cache=cache,
        logits=logits,
        activations=layer,
        peak=weights + max(cache + growing + logits, layer),
    )


def scoring_memory(shape: Shape, *, dtype: str, rows: int, length: int, labels: int) -> Memory:
    """What a process holds while a reward model reads `rows` solutions at once."""
    width = BYTES[dtype]
    weights = float(shape.parameters(labels) * width)
    layer = rows * length * (3 * shape.intermediate + 4 * shape.hidden) * width + rows * length**2 * width
    return Memory(weights=weights, activations=layer, peak=weights + layer)


# --- time --------------------------------------------------------------------------------------------------------------


def forward_flops(
    shape: Shape, tokens: float, *, context: float = 0.0, labels: int = LANGUAGE, logits: float = -1
) -> float:
    """FLOPs of reading `tokens` tokens, each of which attends to `context` others on average.

    2 a weight and token (arXiv:2001.08361, section 2.1) for the matrices of the layers, 4 a width, context and token for scores
    and sums of attention, and 2 a weight of the head for every position it is read at: `logits`, all if it is negative.
    """
    read = tokens if logits < 0 else logits
    body = shape.layers * (2.0 * shape.layer_matrices + 4.0 * shape.attention * context)
    return tokens * body + 2.0 * read * shape.head(labels)


def training_factor(*, lora: bool, checkpointing: bool) -> float:
    """How many forwards a training step costs: the backward is two (to inputs and to weights), with frozen weights one, and
    checkpointing repeats the forward."""
    return (2.0 if lora else 3.0) + (1.0 if checkpointing else 0.0)


def decode_seconds(
    shape: Shape, tokens: float, *, rows: int, context: float, width: int, flops: float, bandwidth: float
) -> float:
    """Seconds to sample `tokens` tokens, `rows` at a time: each step reads all weights and all keys and values once, and
    cannot be faster than memory or arithmetic allows."""
    rows = max(rows, 1)
    moved = shape.parameters() * width + cache_bytes(shape, rows, 1, width) * context
    step = max(moved / bandwidth, forward_flops(shape, rows, context=context) / flops)
    return math.ceil(tokens / rows) * step


def parse_gpus(text: str) -> tuple[int, float]:
    """(GPUs of a machine, bytes of each) in a text such as 8x80GB."""
    count, _, size = text.lower().replace(" ", "").partition("x")
    try:
        number, memory = int(count), float(size.removesuffix("b").removesuffix("g"))
        if number < 1 or memory <= 0 or not size.endswith(("g", "gb")):
            raise ValueError
    except ValueError:
        raise UserError(f"gpus must be how many of which memory, for example 8x80GB, found {text!r}") from None
    return number, memory * GB


def count_weights(folder: str | Path) -> int:
    """Parameters in the safetensors files of a checkpoint, read from their headers."""
    found = 0
    for file in sorted(Path(folder).glob("*.safetensors")):
        with file.open("rb") as opened:
            header = json.loads(opened.read(int.from_bytes(opened.read(8), "little")))
        found += sum(math.prod(one["shape"]) for name, one in header.items() if name != "__metadata__")
    return found
