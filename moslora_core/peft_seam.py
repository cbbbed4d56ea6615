"""Every part of PEFT that is not its public interface, and that this package relies on.

``register_peft_method`` refuses a name outside the ``PeftType`` enum and a prefix that is taken, so a method from
outside PEFT has to extend the enum and the three mappings itself. A type of its own is needed: under the type LORA, a
process without this package would load the adapter, drop the mixer with a warning, and compute something else.
"""

from __future__ import annotations

import re
from importlib import metadata

from peft import PeftType
from peft.mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)
from peft.tuners.lora import layer as lora_layers

SUPPORTED_PEFT = ((0, 21), (0, 22))  # from, below

# The layer classes and the names inside them that the mixer hooks into.
Embedding = lora_layers.Embedding
MultiheadAttention = lora_layers.MultiheadAttention
ParamWrapper = lora_layers.ParamWrapper
LoraLayer = lora_layers.LoraLayer


def check_peft_version(version: str | None = None) -> None:
    """Raises ImportError, naming both, if the installed PEFT is outside the supported range."""
    version = metadata.version("peft") if version is None else version
    found = tuple(int(part) for part in re.findall(r"\d+", version)[:2])
    low, high = SUPPORTED_PEFT
    if not low <= found < high:
        wanted = f">={'.'.join(map(str, low))},<{'.'.join(map(str, high))}"
        raise ImportError(f"moslora_core supports peft {wanted}, found peft {version}; pip install 'peft{wanted}'")


def add_peft_type(name: str) -> PeftType:
    """A real member of PEFT's enum: transformers and diffusers read ``peft_type.value``."""
    if name in PeftType.__members__:
        return PeftType[name]
    member = str.__new__(PeftType, name)
    member._name_ = member._value_ = name
    member.__objclass__ = PeftType
    member._sort_order_ = len(PeftType._member_names_)
    type.__setattr__(PeftType, name, member)
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member
    return member


def register(peft_type: PeftType, config_class: type, tuner_class: type, prefix: str) -> None:
    """Makes ``get_peft_model``, ``from_pretrained`` and ``add_adapter`` know the method."""
    PEFT_TYPE_TO_CONFIG_MAPPING[peft_type] = config_class
    PEFT_TYPE_TO_TUNER_MAPPING[peft_type] = tuner_class
    PEFT_TYPE_TO_PREFIX_MAPPING[peft_type] = prefix


check_peft_version()
MOSLORA = add_peft_type("MOSLORA")
