"""Loading the base model and its tokenizer: a folder, a hub id, weights inside a package, GGUF."""

from __future__ import annotations

import importlib.util
import logging
import shutil
import tempfile
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from moslora_core.errors import UserError

from .config import ModelConfig

logger = logging.getLogger(__name__)

_PACKAGE = "package:"
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def resolve_path(path: str) -> str:
    """Turns ``package:<module>[/<folder>]`` into the folder of that installed package; leaves other paths alone.

    The package is located, not imported: one that only carries weights may need libraries that are not installed.
    """
    if not path.startswith(_PACKAGE):
        return path
    module, _, folder = path.removeprefix(_PACKAGE).partition("/")
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError):  # the parent is missing, or the name is no module's
        spec = None
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"model.path={path}: no package {module!r} is installed; pip install it (make does)")
    found = Path(spec.submodule_search_locations[0]) / folder
    if not found.is_dir():
        raise UserError(f"model.path={path}: the package has no folder {folder!r} at {found}")
    return str(found)


def base_path(config: ModelConfig) -> str:
    """Path or hub id that transformers loads: converts GGUF weights into ``cache_dir`` at their first use."""
    path = resolve_path(config.path)
    if config.gguf_file is None:
        return path
    target = Path(config.cache_dir) / Path(config.gguf_file).stem
    if not (target / "config.json").exists():
        _convert_gguf(path, config.gguf_file, target)
    return str(target)


def _convert_gguf(path: str, gguf_file: str, target: Path) -> None:
    if not (Path(path) / gguf_file).is_file():
        raise UserError(f"model.gguf_file={gguf_file}: not found in {path}")
    logger.info("converting %s to float32 safetensors in %s (once, about a minute)", gguf_file, target)
    model = AutoModelForCausalLM.from_pretrained(path, gguf_file=gguf_file, dtype=torch.float32)
    # The weights are dequantised by now; the marks would make save_pretrained refuse them.
    model.hf_quantizer = None
    model.is_quantized = False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    tokenizer = AutoTokenizer.from_pretrained(path, gguf_file=gguf_file)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as temporary:
        folder = Path(temporary) / "model"
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        if target.exists():
            shutil.rmtree(target)
        folder.rename(target)


# transformers raises ValueError for a folder of another kind, ImportError for a library that a format needs, and
# safetensors an error of its own.
_LOADING = (OSError, ValueError, ImportError, SafetensorError)


def _cannot_load(config: ModelConfig, error: Exception) -> UserError:
    reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return UserError(f"model.path={config.path}: {reason}")


def load_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    """Tokenizer with left padding (for generation) and a padding token that is never an end of sequence.

    The published code pads with token 0, which is an ordinary token of LLaMA-3; attention masks make the choice of
    token immaterial here, but it must not be the end token that generation stops at where another exists.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            base_path(config), revision=config.revision, trust_remote_code=config.trust_remote_code
        )
    except UserError:
        raise
    except _LOADING as error:
        raise _cannot_load(config, error) from None
    if tokenizer.eos_token is None:
        raise UserError(f"model.path={config.path}: its tokenizer has no end-of-sequence token")
    if tokenizer.pad_token is None:
        special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
        reserved = [token for token in special if "pad" in token.lower() or "reserved" in token.lower()]
        tokenizer.pad_token = min(reserved) if reserved else tokenizer.eos_token
    tokenizer.padding_side = "left"
    return tokenizer


def load_base(config: ModelConfig, device_map: dict | None = None) -> PreTrainedModel:
    """The frozen base model.

    Raises:
        UserError: a path that holds no model, an unknown dtype or quantisation.
    """
    dtype = "auto" if config.dtype == "auto" else _DTYPES.get(config.dtype)
    if dtype is None:
        raise UserError(f"model.dtype must be auto, float32, bfloat16 or float16, found {config.dtype!r}")
    settings = {"revision": config.revision, "trust_remote_code": config.trust_remote_code, "dtype": dtype}
    if (quantization := _quantization(config, dtype)) is not None:
        settings["quantization_config"] = quantization
    try:
        return AutoModelForCausalLM.from_pretrained(base_path(config), device_map=device_map, **settings)
    except UserError:
        raise
    except _LOADING as error:
        raise _cannot_load(config, error) from None


def _quantization(config: ModelConfig, dtype):
    if config.quantization == "none":
        return None
    from transformers import BitsAndBytesConfig

    if config.quantization == "nf4":
        compute = torch.float32 if dtype == "auto" else dtype
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=compute,
        )
    if config.quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    raise UserError(f"model.quantization must be none, nf4 or int8, found {config.quantization!r}")


def architecture(config: ModelConfig):
    """transformers configuration of the base, from the configuration file where it is written there."""
    if config.architecture is not None:
        settings = dict(config.architecture)
        kind = settings.pop("model_type", None)
        try:
            return AutoConfig.for_model(kind, **settings)
        except ValueError:
            raise UserError(f"model.architecture: model_type {kind!r} is not one that transformers knows") from None
    try:
        return AutoConfig.from_pretrained(
            base_path(config), revision=config.revision, trust_remote_code=config.trust_remote_code
        )
    except UserError:
        raise
    except _LOADING as error:
        raise _cannot_load(config, error) from None
