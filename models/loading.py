"""Loading and saving models and tokenizers, with one clear sentence for what a checkpoint lacks."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..basics import UserError, make_folder, told_as_user_error
from .engine import Engine
from .step_format import StepFormat

DTYPES = ("float32", "bfloat16", "float16", "auto")


def load_tokenizer(path: str) -> Any:
    """The tokenizer of a checkpoint (folder or hub id), padding on the left; a missing pad token becomes the EOS token."""
    from transformers import AutoTokenizer

    _check_folder(path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{path}: no tokenizer could be loaded ({_first_line(error)})") from error
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise UserError(
                f"{path}: the tokenizer has neither a pad token nor an end-of-sequence token; give it one of them"
            )
        # Padding is always masked by position, never recognised by id, so that sharing the id loses no EOS label.
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "left"
    return tokenizer


def load_model(
    auto_class: Any,
    path: str,
    *,
    dtype: str = "float32",
    settings: Mapping[str, Any] | None = None,
    new: Sequence[str] = (),
    **options: Any,
) -> Any:
    """A model of `auto_class` from a checkpoint (folder or hub id): whole, safetensors only, no remote code.

    `settings` are set on the checkpoint's configuration first, whether its class knows them or not: `classifier_dropout` is
    read by heads of architectures whose configuration does not list it. Weights that the checkpoint lacks
    are drawn at random in the modules named by `new`; elsewhere they are a UserError, as are weights of another shape.
    """
    import torch
    from safetensors import SafetensorError
    from transformers import AutoConfig

    if dtype not in DTYPES:
        raise UserError(f"dtype must be one of {', '.join(DTYPES)}, found {dtype!r}")
    _check_folder(path)
    try:
        if settings:
            options["config"] = AutoConfig.from_pretrained(path)
            for name, value in settings.items():
                setattr(options["config"], name, value)
        with _without_report():
            model, found = auto_class.from_pretrained(
                path,
                dtype="auto" if dtype == "auto" else getattr(torch, dtype),
                use_safetensors=True,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
                **options,
            )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{path}: no {auto_class.__name__} model could be loaded ({_first_line(error)})") from error
    for names, what in (
        ({name for name in found["missing_keys"] if name.split(".")[0] not in new}, "lacks"),
        ({name for name, *_ in found["mismatched_keys"]}, "has another shape for"),
    ):
        if names:
            told = ", ".join(sorted(names)[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            raise UserError(f"{path}: the checkpoint {what} {told} of {type(model).__name__}")
    return model


@contextlib.contextmanager
def _without_report() -> Iterator[None]:
    """Without transformers' table of weights that were missing or left over: `load_model` says what matters of it."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def pick_device(name: str = "auto") -> str:
    """`name`, or for "auto" the first of cuda, mps and cpu that is there."""
    import torch

    if name != "auto":
        return name
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def load_policy_format(path: str, tokenizer: Any, separator: str) -> StepFormat:
    """The step format beside a policy; for a foreign checkpoint one is derived: its chat template if it has one."""
    if Path(path, "step_format.json").is_file():
        return StepFormat.load(path)
    return StepFormat.for_policy(tokenizer, separator, chat=bool(getattr(tokenizer, "chat_template", None)))


def load_engine(
    path: str,
    *,
    backend: str = "transformers",
    dtype: str = "float32",
    device: str = "auto",
    batch_size: int = 256,
    base_url: str = "",
    keep_prefixes: bool = False,
) -> Engine:
    """An engine over the policy at `path` (folder or hub id, or a served model's name with `backend` openai).

    `keep_prefixes`: keep keys and values of what was sampled, for search, where the same prefixes grow.
    """
    if backend == "transformers":
        from transformers import AutoModelForCausalLM

        from .prefix_cache import PrefixCache
        from .transformers_engine import TransformersEngine

        model = load_model(AutoModelForCausalLM, path, dtype=dtype).to(pick_device(device))
        cache = PrefixCache() if keep_prefixes else None
        return TransformersEngine(model, load_tokenizer(path), batch_size=batch_size, cache=cache)
    if backend == "vllm":
        from .vllm_engine import VLLMEngine

        return VLLMEngine(path, load_tokenizer(path))
    if backend == "openai":
        from .openai_engine import OpenAIEngine

        return OpenAIEngine(base_url, path, load_tokenizer(path), concurrency=min(batch_size, 64))
    raise UserError(f"backend must be transformers, vllm or openai, found {backend!r}")


def hub_folder(name: str) -> Path:
    """The local folder of a hub id's checkpoint (safetensors, configuration and tokenizer), fetched if it is not there yet."""
    from huggingface_hub import snapshot_download

    _check_folder(name)
    try:
        found = snapshot_download(name, allow_patterns=["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja"])
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(
            f"{name}: neither a folder nor a model of the hub could be read ({_first_line(error)})"
        ) from error
    return Path(found)


@contextlib.contextmanager
def write_checkpoint(out: str | Path) -> Iterator[Path]:
    """An empty folder to write a checkpoint to; what it holds at the end goes to `out`, over what was there.

    config.json comes last: a folder left by a kill is never taken for a whole checkpoint. Weights of an older checkpoint go.
    """
    from safetensors import SafetensorError

    out = make_folder(out)
    unfinished = out / ".unfinished"
    with told_as_user_error(f"write the checkpoint to {out}"):
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir()
        try:
            yield unfinished
            for old in (out / "config.json", out / "model.safetensors.index.json", *out.glob("*.safetensors")):
                old.unlink(missing_ok=True)
            for part in sorted(unfinished.iterdir(), key=lambda p: p.name == "config.json"):
                part.chmod(0o644)
                os.replace(part, out / part.name)
        except SafetensorError as error:  # how a full disk shows itself
            raise UserError(f"cannot write the checkpoint to {out}: {error}") from error
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)


def _check_folder(path: str) -> None:
    # A path that looks local must not be asked of a hub: the hub's error would speak of repository names.
    looks_local = path.startswith((".", "/", "~")) or path.count("/") != 1
    if looks_local and not Path(path).is_dir():
        raise UserError(f"{path}: no such model folder")


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
