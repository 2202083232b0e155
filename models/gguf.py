"""From a GGUF file to a plain Hugging Face checkpoint."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from ..basics import UserError, make_folder, told_as_user_error
from .loading import write_checkpoint

DTYPES = ("bfloat16", "float16", "float32")


def import_gguf(file: str, out: str, dtype: str = "bfloat16") -> None:
    """Writes the model and tokenizer in a GGUF file to the folder `out`, as `from_pretrained` expects them without gguf.

    Weights are dequantised and rounded to `dtype`; what quantisation lost stays lost. transformers cannot save a model that it
    knows as GGUF: the weights are copied into a new one of the same configuration. The tokenizer keeps its chat template, a
    missing pad token becomes the end-of-sequence token, and the context length is written to it.

    Raises UserError for a missing or broken file, an architecture that transformers cannot read, an unwritable folder, and
    without the `gguf` package.
    """
    path = Path(file)
    if not path.is_file():
        raise UserError(f"{file}: no such file")
    with told_as_user_error(f"read {file}"), path.open("rb") as opened:
        if opened.read(4) != b"GGUF":
            raise UserError(f"{file}: not a GGUF file (it does not begin with GGUF)")
    if dtype not in DTYPES:
        raise UserError(f"dtype must be one of {', '.join(DTYPES)}, found {dtype!r}")
    if importlib.util.find_spec("gguf") is None:
        raise UserError("reading GGUF files needs the gguf package: pip install 'stepladder[gguf]'")
    make_folder(out)  # before minutes of work
    model, tokenizer = _read(path, dtype)
    with write_checkpoint(out) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def _read(path: Path, dtype: str) -> tuple[Any, Any]:
    """(model, tokenizer) that know nothing of GGUF any more."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
        loaded = AutoModelForCausalLM.from_pretrained(
            str(path.parent), gguf_file=path.name, dtype=getattr(torch, dtype)
        )
        _name_special_tokens(tokenizer, path)
    except Exception as error:
        # A broken file makes its readers fail in any way (struct, numpy, tokenizers); all of them mean the same to the user.
        line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path}: transformers cannot read this GGUF file ({line[:300]})") from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    config = _plain_config(loaded.config, tokenizer)
    tokenizer.model_max_length = config.max_position_embeddings
    with torch.device("meta"):
        model = type(loaded)(config)
    # The tensors are handed over, not copied: a large model is in memory once.
    missing, unexpected = model.load_state_dict(loaded.state_dict(), strict=False, assign=True)
    if set(missing) - set(_tied(model)) or unexpected:
        raise UserError(
            f"{path}: weights do not fit {type(loaded).__name__}: missing {missing}, unexpected {unexpected}"
        )
    model.tie_weights()
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
    )
    return model, tokenizer


def _name_special_tokens(tokenizer: Any, path: Path) -> None:
    """Sets the special tokens that the file names; transformers 5.16 guesses them from the architecture."""
    from gguf import GGUFReader

    fields = GGUFReader(path).fields
    for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        field = fields.get(f"tokenizer.ggml.{key}_token_id")
        if field is not None:
            setattr(tokenizer, f"{name}_token", tokenizer.convert_ids_to_tokens(int(field.contents())))


def _plain_config(config: Any, tokenizer: Any) -> Any:
    """The configuration without what says that it came from a GGUF file, and with the tokenizer's special ids."""
    import numpy as np

    foreign = ("quantization_config", "_name_or_path", "_model_name_or_path", "dtype", "torch_dtype")
    values = {k: v for k, v in config.to_dict().items() if k not in foreign}
    # GGUF keeps numbers in single precision: 1e-05 comes out as 9.999999747378752e-06. The shortest decimal of the same
    # single-precision number is what its author wrote.
    values = {k: float(str(np.float32(v))) if isinstance(v, float) else v for k, v in values.items()}
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        values[name] = getattr(tokenizer, name)
    return type(config)(**values)


def _tied(model: Any) -> list[str]:
    """Names of the weights that are copies of others, and not in the file."""
    return ["lm_head.weight"] if model.config.tie_word_embeddings else []
