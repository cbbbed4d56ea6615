"""Loading the base model, its tokenizer and a run's adapter."""

from __future__ import annotations

from pathlib import Path

from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

import moslora_core  # noqa: F401  (registers the adapter type MOSLORA with PEFT)
from moslora_core.base_models import (
    attach_saved,
    device_map,
    from_gguf,
    loading,
    quantization_config,
    resolve_path,
    set_padding,
    weights_dtype,
)
from moslora_core.errors import UserError

from .config import ModelConfig


def _name(config: ModelConfig) -> str:
    return f"model.path={config.path}"


def base_path(config: ModelConfig) -> str:
    """Path or hub id that transformers loads: converts GGUF weights into ``cache_dir`` at their first use."""
    path = resolve_path(config.path)
    return path if config.gguf_file is None else str(from_gguf(path, config.gguf_file, config.cache_dir))


def load_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    """Tokenizer of the base, ready for batches (see :func:`~moslora_core.base_models.set_padding`).

    Raises:
        UserError: a path that holds no tokenizer, or one without an end of sequence.
    """
    tokenizer = loading(
        lambda: AutoTokenizer.from_pretrained(
            base_path(config), revision=config.revision, trust_remote_code=config.trust_remote_code
        ),
        _name(config),
    )
    return set_padding(tokenizer, _name(config))


def load_base(config: ModelConfig, device_map: dict | None = None) -> PreTrainedModel:
    """The frozen base model.

    Raises:
        UserError: a path that holds no model, an unknown dtype or quantisation.
    """
    dtype = weights_dtype(config.dtype)
    settings = {"revision": config.revision, "trust_remote_code": config.trust_remote_code, "dtype": dtype}
    if (quantization := quantization_config(config.quantization, dtype)) is not None:
        settings["quantization_config"] = quantization
    return loading(
        lambda: AutoModelForCausalLM.from_pretrained(base_path(config), device_map=device_map, **settings),
        _name(config),
    )


def load_adapted(config: ModelConfig, adapter: Path | None) -> PreTrainedModel | PeftModel:
    """The base model in evaluation mode, on the GPU where there is one, with ``adapter`` on it if one is given.

    Raises:
        UserError: an adapter that is damaged, of another model, or incomplete.
    """
    model = load_base(config, device_map())
    return (model if adapter is None else attach_saved(model, adapter, _name(config))).eval()


def architecture(config: ModelConfig):
    """transformers configuration of the base, from the configuration file where it is written there."""
    if config.architecture is not None:
        settings = dict(config.architecture)
        kind = settings.pop("model_type", None)
        try:
            return AutoConfig.for_model(kind, **settings)
        except ValueError:
            raise UserError(f"model.architecture: model_type {kind!r} is not one that transformers knows") from None
    return loading(
        lambda: AutoConfig.from_pretrained(
            base_path(config), revision=config.revision, trust_remote_code=config.trust_remote_code
        ),
        _name(config),
    )
