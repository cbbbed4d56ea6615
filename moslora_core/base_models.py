"""Base models and the adapters on them: paths, GGUF weights, quantisation, with every failure told in a line."""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from filelock import FileLock
from huggingface_hub import snapshot_download
from huggingface_hub.errors import StrictDataclassError
from peft import PeftModel
from safetensors import SafetensorError
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from .adapter_files import CONFIG_NAME, WEIGHTS_NAME
from .errors import UserError
from .prepared import sha256
from .record import read_json

logger = logging.getLogger(__name__)

_PACKAGE = "package:"
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Kinds whose message is for the user; what else transformers raises on values that it did not foresee is no sentence.
_SAID = (OSError, ValueError, ImportError, SafetensorError, StrictDataclassError)

T = TypeVar("T")


# -------------------------------------------------------------------------------------------------------------- paths


def resolve_path(path: str, key: str = "model.path") -> str:
    """Turns ``package:<module>[/<folder>]`` into the folder of that installed package; leaves other paths alone.

    The package is located, not imported: one that only carries weights may need libraries that are not installed.

    Raises:
        UserError: no such package or folder, with ``key``, the setting that names it; or a local folder with a damaged
            JSON file.
    """
    if not path.startswith(_PACKAGE):
        check_json_files(Path(path), key)
        return path
    module, _, folder = path.removeprefix(_PACKAGE).partition("/")
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError):  # the parent is missing, or the name is no module's
        spec = None
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"{key}={path}: no package {module!r} is installed; pip install it (make does)")
    found = Path(spec.submodule_search_locations[0]) / folder
    if not found.is_dir():
        raise UserError(f"{key}={path}: the package has no folder {folder!r} at {found}")
    return str(found)


def check_json_files(folder: Path, key: str) -> None:
    """Reads the JSON files in ``folder``: transformers passes over some that are damaged, and names few.

    Raises:
        UserError: the first that is damaged; ``key`` is the setting that names the folder.
    """
    for path in sorted(folder.glob("*.json")):
        try:
            read_json(path)
        except UserError as error:
            raise UserError(f"{key}={folder}: {error}") from None


def local_folder(path: str, revision: str | None = None, key: str = "model.path") -> Path:
    """The folder of a model: a local one, one inside an installed package, or that of a hub id, downloaded.

    Raises:
        UserError: none of them.
    """
    resolved = resolve_path(path, key)
    if Path(resolved).is_dir():
        return Path(resolved)
    return Path(loading(lambda: snapshot_download(resolved, revision=revision), f"{key}={path}"))


@contextmanager
def made_once(target: Path) -> Iterator[bool]:
    """Whether ``target``, a model folder, is still to be made; one process makes it, and the others wait.

    Raises:
        UserError: its parent cannot be written.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(target.parent / f".{target.name}.lock")
        lock.acquire()
    except OSError as error:
        raise UserError(f"cannot write {target}: {error.strerror}; expected a writable folder") from None
    try:
        yield not (target / "config.json").exists()
    finally:
        lock.release()


def from_gguf(path: str, gguf_file: str, cache_dir: str, key: str = "model.gguf_file") -> Path:
    """Folder below ``cache_dir`` with the language model of a GGUF file, converted at its first use to float32.

    Raises:
        UserError: ``path`` has no such file.
    """
    target = Path(cache_dir) / Path(gguf_file).stem
    with made_once(target) as missing:
        if missing:
            _convert_gguf(path, gguf_file, target, key)
    return target


def _convert_gguf(path: str, gguf_file: str, target: Path, key: str) -> None:
    if not (Path(path) / gguf_file).is_file():
        raise UserError(f"{key}={gguf_file}: not found in {path}")
    logger.info("converting %s to float32 safetensors in %s (once, about a minute)", gguf_file, target)
    model = AutoModelForCausalLM.from_pretrained(path, gguf_file=gguf_file, dtype=torch.float32)
    # The weights are dequantised by now; the marks would make save_pretrained refuse them.
    model.hf_quantizer = None
    model.is_quantized = False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    tokenizer = AutoTokenizer.from_pretrained(path, gguf_file=gguf_file)
    with tempfile.TemporaryDirectory(dir=target.parent) as temporary:
        folder = Path(temporary) / "model"
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        if target.exists():
            shutil.rmtree(target)
        folder.rename(target)


# ------------------------------------------------------------------------------------------------------------ loading


def loading(load: Callable[[], T], name: str) -> T:
    """What ``load`` returns; what transformers and safetensors raise becomes a UserError that begins with ``name``."""
    try:
        return load()
    except UserError:
        raise
    except Exception as error:
        # transformers' advice, which would leave weights at random
        if isinstance(error, RuntimeError) and "ignore_mismatched_sizes" in str(error):
            raise UserError(
                f"{name}: the weights have other shapes than its config.json says; expected a checkpoint and its own "
                "configuration (the report above names the weights)"
            ) from None
        kind = "" if isinstance(error, _SAID) else f"{type(error).__name__}: "
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise UserError(f"{name}: {kind}{reason}") from None


def weights_dtype(name: str) -> torch.dtype | str:
    """torch's dtype of a setting; ``auto`` is the checkpoint's.

    Raises:
        UserError: an unknown name.
    """
    dtype = "auto" if name == "auto" else _DTYPES.get(name)
    if dtype is None:
        raise UserError(f"model.dtype must be auto, float32, bfloat16 or float16, found {name!r}")
    return dtype


def quantization_config(
    name: str, dtype: torch.dtype | str, skip: list[str] | None = None
) -> BitsAndBytesConfig | None:
    """bitsandbytes' settings of a quantisation: none | nf4 (with double quantisation) | int8.

    Args:
        dtype: dtype in which NF4 layers compute.
        skip: modules that stay as they are, beside the output head.

    Raises:
        UserError: an unknown name.
    """
    if name == "none":
        return None
    if name == "nf4":
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32 if dtype == "auto" else dtype,
            llm_int8_skip_modules=skip,
        )
    if name == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skip)
    raise UserError(f"model.quantization must be none, nf4 or int8, found {name!r}")


def set_padding(tokenizer: PreTrainedTokenizerBase, name: str) -> PreTrainedTokenizerBase:
    """``tokenizer`` with left padding (for generation) and a padding token that is never an end of sequence.

    The published code pads with token 0, which is an ordinary token of LLaMA-3; attention masks make the choice of
    token immaterial here, but it must not be the end token that generation stops at where another exists.

    Raises:
        UserError: a tokenizer without an end of sequence; ``name`` says which.
    """
    if tokenizer.eos_token is None:
        raise UserError(f"{name}: its tokenizer has no end-of-sequence token")
    if tokenizer.pad_token is None:
        special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
        reserved = [token for token in special if "pad" in token.lower() or "reserved" in token.lower()]
        tokenizer.pad_token = min(reserved) if reserved else tokenizer.eos_token
    tokenizer.padding_side = "left"
    return tokenizer


# ----------------------------------------------------------------------------------------------------- saved adapters


def adapter_sha256(adapter: Path) -> dict[str, str]:
    """SHA-256 of each of the files that make an adapter, by name.

    Raises:
        UserError: the folder lacks one of them.
    """
    found = {}
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        try:
            found[name] = sha256(adapter / name)
        except OSError as error:
            raise UserError(f"{adapter / name}: {error.strerror}; expected a saved adapter") from None
    return found


def adapter_digest(adapter: Path) -> str:
    """SHA-256 over the files that make an adapter.

    Raises:
        UserError: the folder lacks one of them.
    """
    return hashlib.sha256(b"".join(bytes.fromhex(found) for found in adapter_sha256(adapter).values())).hexdigest()


def check_adapter(adapter: Path, expected: Mapping[str, str] | None) -> None:
    """Compares the files of an adapter with what they were when it was trained.

    Args:
        expected: ``adapter_sha256`` of the training in its record; None in records from before there was one.

    Raises:
        UserError: one is missing or was changed.
    """
    for name, found in adapter_sha256(adapter).items() if expected is not None else ():
        if found != expected.get(name):
            raise UserError(
                f"{adapter / name} is damaged: its sha256 is not the one in results.json; train the run again"
            )


def attach_saved(model: PreTrainedModel, adapter: Path, name: str) -> PeftModel:
    """``model`` with the saved ``adapter`` on it.

    Args:
        name: setting that names the base, as in ``model.path=...``.

    Raises:
        UserError: an adapter that is damaged, of another model, or incomplete.
    """
    try:
        with warnings.catch_warnings():
            # PEFT warns of weights that the file lacks and goes on with random ones.
            warnings.filterwarnings("error", message="Found missing adapter keys")
            return PeftModel.from_pretrained(model, str(adapter))
    except SafetensorError as error:
        raise UserError(f"{adapter / WEIGHTS_NAME} is damaged or cut off: {error}; train the run again") from None
    except UserWarning as error:
        missing = str(error).split(": ", 1)[-1].splitlines()[0]
        raise UserError(f"{adapter / WEIGHTS_NAME} lacks weights of its adapter: {missing[:200]}") from None
    except UserError:
        raise
    except (RuntimeError, ValueError, KeyError, TypeError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        detail = next((line for line in lines if "size mismatch" in line), lines[0] if lines else repr(error))
        raise UserError(f"{adapter} is no adapter of {name}: {detail}") from None


def device_map() -> dict[str, Any] | None:
    """Where evaluation loads a model: the first GPU, if there is one."""
    return {"": 0} if torch.cuda.is_available() else None
