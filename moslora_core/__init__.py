"""MoSLoRA (arXiv 2406.11909) as a PEFT method: LoRA with an r x r mixer between A and B.

    from peft import get_peft_model
    from moslora_core import MoSLoraConfig

    model = get_peft_model(model, MoSLoraConfig(r=16, lora_alpha=32, target_modules=["q_proj", "v_proj"]))

Importing the package registers the method with PEFT, so that ``PeftModel.from_pretrained`` loads such adapters.
"""

from . import peft_seam
from .config import MoSLoraConfig
from .errors import UserError
from .model import MoSLoraModel

peft_seam.register(peft_seam.MOSLORA, MoSLoraConfig, MoSLoraModel, prefix="lora_")

from .count import count_parameters, estimate_memory, optimiser_steps  # noqa: E402
from .fold import fold_adapter, fold_into_init, fold_state_dict, fold_to_lora  # noqa: E402
from .official import load_official  # noqa: E402

__all__ = [
    "MoSLoraConfig",
    "MoSLoraModel",
    "UserError",
    "count_parameters",
    "estimate_memory",
    "fold_adapter",
    "fold_into_init",
    "fold_state_dict",
    "fold_to_lora",
    "load_official",
    "optimiser_steps",
]
