"""PEFT's LoRA tuner with mixers."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

from torch import nn

from .adapter_files import pattern_value
from .config import DEFAULT_INIT, MoSLoraConfig
from .errors import UserError
from .layers import MixedEmbedding, attach_mixer, folded_embeddings
from .peft_seam import LoraLayer, LoraModel

logger = logging.getLogger(__name__)

_SVD_SUFFIX = "svd"


class MoSLoraModel(LoraModel):
    """Mixture-of-subspaces LoRA: PEFT's ``LoraModel``, with a mixer in each adapted module that is to have one.

    Args:
        model: the model to adapt.
        config: a :class:`~moslora_core.config.MoSLoraConfig`, or several by adapter name.
        adapter_name: name of the adapter.
        low_cpu_mem_usage: create the adapter on the meta device, to be filled by loading.
    """

    def _check_new_adapter_config(self, config: MoSLoraConfig) -> None:
        # Again, since fields may have been assigned after the configuration was built.
        config.validate()
        super()._check_new_adapter_config(config)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        # As PEFT does for its own patterns: a misspelt key would quietly give another method.
        for key in self.peft_config[adapter_name].mixer_pattern:
            if not any(pattern_value({key: True}, False, module) for module in self.targeted_module_names):
                logger.warning("mixer_pattern[%r] matches no adapted module and has no effect", key)

    def _create_and_replace(
        self,
        lora_config: MoSLoraConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **kwargs: Any,
    ) -> None:
        setting = lora_config.mixer_of(current_key)
        if target_name in (getattr(lora_config, "target_modules_to_tie", None) or ()):
            embedding = self.model.get_input_embeddings()
            if setting.exists or (isinstance(embedding, MixedEmbedding) and adapter_name in embedding.lora_mixer):
                raise UserError(
                    f"{current_key}: ensure_weight_tying shares A and B with the input embedding, transposed, while a "
                    "mixer belongs to one module; set ensure_weight_tying=False"
                )
        if setting.exists:
            lora_config.check_rank(current_key)
            _check_target(target, current_key)
        super()._create_and_replace(lora_config, adapter_name, target, target_name, parent, current_key, **kwargs)
        if setting.exists:
            attach_mixer(getattr(parent, target_name), adapter_name, setting, current_key)

    def add_weighted_adapter(
        self,
        adapters: list[str],
        weights: list[float],
        adapter_name: str,
        combination_type: str = "svd",
        **kwargs: Any,
    ) -> None:
        """Adds a combination of adapters, as PEFT does, as an adapter without mixers.

        What is combined are the folded adapters, A and B @ M: the result is PEFT's for plain LoRA adapters of the same
        function. Arguments as in ``LoraModel.add_weighted_adapter``.

        Raises:
            UserError: the adapters adapt grouped convolutions and the combination concatenates or decomposes, which
                PEFT does without regard to the groups.
        """
        mixed = [name for name in adapters if name in self.peft_config and self.peft_config[name].has_mixer]
        if len(adapters) > 1 and (combination_type == "cat" or combination_type.endswith(_SVD_SUFFIX)):
            self._refuse_grouped(adapters, combination_type)
        first = adapters[0] if adapters else None
        with folded_embeddings(self.model, mixed):
            if first in mixed:
                # PEFT copies the first adapter's configuration to the new adapter, which must not get mixers.
                original = self.peft_config[first]
                self.peft_config[first] = replace(
                    original, mixer="identity", mixer_init=DEFAULT_INIT, mixer_pattern={}
                )
            try:
                super().add_weighted_adapter(adapters, weights, adapter_name, combination_type, **kwargs)
            finally:
                if first in mixed:
                    self.peft_config[first] = original

    def _refuse_grouped(self, adapters: list[str], combination_type: str) -> None:
        for name, layer in self.model.named_modules():
            if isinstance(layer, LoraLayer) and any(
                getattr(layer.lora_B[adapter], "groups", 1) > 1 for adapter in adapters if adapter in layer.lora_B
            ):
                raise UserError(
                    f"{name}: combination_type={combination_type!r} is not defined for grouped convolutions, whose B "
                    "belongs to parts of A; use 'linear' or another that keeps the rank"
                )

    def subtract_mutated_init(self, output_state_dict: dict, adapter_name: str, kwargs: Any = None) -> dict:
        if self.peft_config[adapter_name].has_mixer:
            raise UserError(
                "path_initial_model_for_weight_conversion is for initialisations that change the base weight, which "
                "are not combined with mixers; save without it"
            )
        return super().subtract_mutated_init(output_state_dict, adapter_name, kwargs)


def _check_target(target: nn.Module, module_name: str) -> None:
    """Refuses, before the module is changed, one whose A and B are split over processes.

    Raises:
        UserError: see above.
    """
    base = target.get_base_layer() if isinstance(target, LoraLayer) else target
    if getattr(base, "_hf_tp_plan", None) is not None:
        raise UserError(
            f"{module_name}: the module is split by tensor parallelism, which splits A or B and not a mixer; load the "
            "model without a tp_plan"
        )
