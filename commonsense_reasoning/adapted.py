"""Loading a run's adapter onto its base model, with every way in which that fails told in a line."""

from __future__ import annotations

import hashlib
import warnings
from pathlib import Path

import torch
from peft import PeftModel
from safetensors import SafetensorError
from transformers import PreTrainedModel

import moslora_core  # noqa: F401  (registers the adapter type MOSLORA with PEFT)
from moslora_core.errors import UserError

from .config import ModelConfig
from .models import load_base

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"


def adapter_digest(adapter: Path) -> str:
    """SHA-256 over the files that make an adapter.

    Raises:
        UserError: the folder lacks one of them.
    """
    digest = hashlib.sha256()
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        try:
            with open(adapter / name, "rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        except OSError as error:
            raise UserError(f"{adapter / name}: {error.strerror}; expected a saved adapter") from None
    return digest.hexdigest()


def load_adapted(config: ModelConfig, adapter: Path | None) -> PreTrainedModel | PeftModel:
    """The base model in evaluation mode, on the GPU where there is one, with ``adapter`` on it if one is given.

    Raises:
        UserError: an adapter that is damaged, of another model, or incomplete.
    """
    model = load_base(config, device_map={"": 0} if torch.cuda.is_available() else None)
    if adapter is not None:
        model = _attach(model, adapter, config.path)
    return model.eval()


def _attach(model: PreTrainedModel, adapter: Path, base: str) -> PeftModel:
    try:
        with warnings.catch_warnings():
            # PEFT warns of weights that the file lacks and goes on with random ones.
            warnings.filterwarnings("error", message="Found missing adapter keys")
            return PeftModel.from_pretrained(model, str(adapter))
    except SafetensorError as error:
        raise UserError(f"{adapter / WEIGHTS_FILE} is damaged or cut off: {error}; train the run again") from None
    except UserWarning as error:
        missing = str(error).split(": ", 1)[-1].splitlines()[0]
        raise UserError(f"{adapter / WEIGHTS_FILE} lacks weights of its adapter: {missing[:200]}") from None
    except UserError:
        raise
    except (RuntimeError, ValueError, KeyError, TypeError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        detail = next((line for line in lines if "size mismatch" in line), lines[0] if lines else repr(error))
        raise UserError(f"{adapter} is no adapter of model.path={base}: {detail}") from None
