"""From a GGUF file to a plain Hugging Face checkpoint."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from ..basics import UserError, make_folder


def import_gguf(file: str, out: str, dtype: str = "bfloat16") -> None:
    """Writes the model and tokenizer in a GGUF file to the folder `out`, as `from_pretrained` expects them.

    transformers dequantises the weights but cannot save a model that it knows as GGUF: they are copied into a new model of the
    same configuration. The tokenizer keeps its chat template; a missing pad token becomes the end-of-sequence token. Raises
    UserError for a missing or broken file and without the `gguf` package.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    path = Path(file)
    if not path.is_file():
        raise UserError(f"{file}: no such file")
    with path.open("rb") as opened:
        if opened.read(4) != b"GGUF":
            raise UserError(f"{file}: not a GGUF file")
    if importlib.util.find_spec("gguf") is None:
        raise UserError("reading GGUF files needs the gguf package: pip install 'stepladder[gguf]'")
    if dtype not in ("bfloat16", "float16", "float32"):
        raise UserError(f"dtype must be bfloat16, float16 or float32, found {dtype!r}")
    folder, name = str(path.parent), path.name
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
        loaded = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32)
    except (OSError, ValueError, KeyError, RuntimeError, NotImplementedError) as error:
        line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"{file}: transformers cannot read this GGUF file ({line[:300]})") from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    config = _clean(loaded.config, tokenizer)
    model = type(loaded)(config)
    missing, unexpected = model.load_state_dict(loaded.state_dict(), strict=False)
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    if set(missing) - tied or unexpected:
        raise UserError(f"{file}: weights do not fit {type(loaded).__name__}: missing {missing}, unexpected {unexpected}")
    model.tie_weights()
    model = model.to(getattr(torch, dtype))
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
    )
    make_folder(out)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def _clean(config: Any, tokenizer: Any) -> Any:
    """The configuration without what says that it came from a GGUF file, and with the tokenizer's special ids."""
    values = {k: v for k, v in config.to_dict().items() if k not in ("quantization_config", "_name_or_path", "dtype", "torch_dtype")}
    values.update(bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    return type(config)(**values)
