"""MoSLoRA, mixture-of-subspaces LoRA (arXiv 2406.11909), as a PEFT method.

Importing this package registers the method: ``get_peft_model``, ``AutoPeftModel`` and ``model.add_adapter`` then take
a ``MoSLoraConfig``, and saved adapters of type MOSLORA load.
"""

from importlib import import_module

from .versions import check_versions

# First, and without importing them: versions that do not go together fail there with an error that names neither.
check_versions()

from .config import MoSLoraConfig
from .errors import UserError
from .mixer import MIXER_INITS, fold_into_a, fold_into_b, init_mixer
from .model import MoSLoraModel
from .peft_seam import MOSLORA, register

register(MoSLoraConfig, MoSLoraModel)

__all__ = [
    "MIXER_INITS",
    "MOSLORA",
    "MoSLoraConfig",
    "MoSLoraModel",
    "UserError",
    "fold_into_a",
    "fold_into_b",
    "init_mixer",
]

# Loaded when first asked for: `python -m moslora_core.fold` and `.official` run modules that nothing has imported yet.
_LAZY = {
    "fold_adapter": "fold",
    "fold_into_init": "fold",
    "fold_state_dict": "fold",
    "fold_to_lora": "fold",
    "load_official": "official",
}
__all__ += list(_LAZY)


def __getattr__(name: str) -> object:
    if name in _LAZY:
        return getattr(import_module(f".{_LAZY[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
