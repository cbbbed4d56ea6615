"""MoSLoRA, mixture-of-subspaces LoRA (arXiv 2406.11909), as a PEFT method.

Importing this package registers the method: ``get_peft_model``, ``AutoPeftModel`` and ``model.add_adapter`` then take
a ``MoSLoraConfig``, and saved adapters of type MOSLORA load.
"""

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
