"""The compared methods, defined once for all experiments: names of the ``method=`` group and how each is attached.

PEFT's own tuners serve as baselines; what is defined here is only which of their settings a name stands for.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field, fields

from peft import AdaLoraConfig, LoHaConfig, LoKrConfig, LoraConfig, PeftConfig, PeftModel, get_peft_model
from torch import nn

from .adapter_files import regex
from .config import MoSLoraConfig
from .errors import UserError
from .fold import fold_into_init

# Kaiming uniform (a = sqrt 5) on an r x r matrix draws U(-1/sqrt r, 1/sqrt r): E[M^T M] = I / 3, so that
# |M A| is about |A| / sqrt 3. A LoRA scaled by this factor is the step-size control for the mixer's initialisation.
KAIMING_SCALE = 0.577


TUNERS = ("lora", "adalora", "lokr", "loha")


@dataclass
class MethodConfig:
    """One entry of the ``method`` configuration group.

    Attributes:
        name: name in run folders and tables.
        tuner: PEFT tuner: lora (with or without a mixer), adalora, lokr, loha; none for the untrained model.
        mixer: learned | frozen | identity | two_subspaces; identity is plain LoRA (Eq 7 with W = I).
        mixer_init: kaiming_uniform | orthogonal | gaussian | identity | zero.
        fold_into_init: start a plain LoRA from A0 := M0 A0 (control: is the mixer only another start?).
        alpha_scale: factor on lora_alpha, in every module.
        init_lora_weights: PEFT's initialisation of A and B; "default" is that of the adapter's configuration.
        lora_plus_ratio: learning rate of B over that of A (LoRA+); None trains both at one rate.
    """

    name: str = "lora"
    tuner: str = "lora"
    mixer: str = "identity"
    mixer_init: str = "kaiming_uniform"
    fold_into_init: bool = False
    alpha_scale: float = 1.0
    init_lora_weights: str = "default"
    use_dora: bool = False
    use_rslora: bool = False
    lora_plus_ratio: float | None = None


METHODS: dict[str, MethodConfig] = {
    method.name: method
    for method in (
        MethodConfig("lora"),
        MethodConfig("lora_scaled", alpha_scale=KAIMING_SCALE),
        MethodConfig("two_subspaces", mixer="two_subspaces"),
        MethodConfig("moslora", mixer="learned"),
        MethodConfig("moslora_frozen", mixer="frozen"),
        MethodConfig("moslora_folded", mixer="learned", fold_into_init=True),
        MethodConfig("dora", use_dora=True),
        MethodConfig("rslora", use_rslora=True),
        MethodConfig("pissa", init_lora_weights="pissa"),
        MethodConfig("lora_plus", lora_plus_ratio=16.0),
        MethodConfig("adalora", tuner="adalora"),
        MethodConfig("lokr", tuner="lokr"),
        MethodConfig("loha", tuner="loha"),
        # The untrained model: a reference row, evaluated and never trained.
        MethodConfig("base", tuner="none"),
    )
}


@dataclass
class AdapterConfig:
    """Size and place of the adapter, equal for every method.

    Attributes:
        target_modules: module names, or in a list of its own one regular expression or PEFT's ``all-linear``.
        rank_pattern: module name pattern -> rank, where it differs from ``r``.
        alpha_pattern: module name pattern -> alpha, where it differs from ``lora_alpha``.
        mixer_pattern: module name pattern -> mixer, where it is not the method's; methods without a mixer, which are
            those of plain LoRA and of other tuners, have none anywhere and leave it aside.
        exclude_modules: target modules to leave as they are; names, or in a list of its own one regular expression.
        modules_to_save: modules that are trained whole and saved with the adapter, such as LLaVA's projector.
        init_lora_weights: PEFT's initialisation of A and B in methods that have none of their own; "default" is
            Kaiming uniform and zero, "gaussian" has A normal with standard deviation 1 / r.
    """

    r: int = 16
    lora_alpha: int = 32
    lora_dropout: float = 0.05
    target_modules: list[str] = field(default_factory=lambda: ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"])
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    mixer_pattern: dict[str, str] = field(default_factory=dict)
    exclude_modules: list[str] = field(default_factory=list)
    modules_to_save: list[str] = field(default_factory=list)
    init_lora_weights: str = "default"


def peft_config(
    method: MethodConfig, adapter: AdapterConfig, *, seed: int, total_steps: int, task_type: str | None = "CAUSAL_LM"
) -> PeftConfig:
    """PEFT configuration of a method.

    Args:
        seed: draws the mixers, apart from torch's global generator, so that A starts equal in all methods of a seed.
        total_steps: optimiser steps of the training; AdaLoRA's budget schedule needs them.

    Raises:
        UserError: an impossible rank, alpha or dropout, an unknown tuner, or a setting that the tuner lacks.
    """
    if method.tuner == "none":
        raise UserError(f"method={method.name} is the untrained model: there is nothing to train, only to evaluate")
    if method.tuner not in TUNERS:
        raise UserError(f"method.tuner must be one of {', '.join(TUNERS)}, found {method.tuner!r}")
    for key in ("alpha_scale", "lora_plus_ratio"):
        if (value := getattr(method, key)) is not None and not 0 < value < math.inf:
            raise UserError(f"method.{key} must be positive and finite, found {value}")
    if adapter.r < 1:
        raise UserError(f"adapter.r must be a positive rank, found {adapter.r}")
    if not 0 <= adapter.lora_dropout < 1:
        raise UserError(f"adapter.lora_dropout must be in [0, 1), found {adapter.lora_dropout}")
    if not adapter.target_modules:
        raise UserError("adapter.target_modules is empty; name at least one module")
    if adapter.lora_alpha <= 0:
        raise UserError(f"adapter.lora_alpha must be positive, found {adapter.lora_alpha}")
    for name in ("rank_pattern", "alpha_pattern"):
        for key, value in getattr(adapter, name).items():
            if not 0 < value < math.inf:
                raise UserError(f"adapter.{name}[{key!r}] must be positive, found {value}")
    alpha = adapter.lora_alpha * method.alpha_scale
    common = {
        "r": adapter.r,
        "target_modules": _modules("target_modules", adapter.target_modules),
        "exclude_modules": _modules("exclude_modules", adapter.exclude_modules),
        "modules_to_save": list(adapter.modules_to_save) or None,
        "task_type": task_type,
    }
    lora = {**common, "lora_alpha": alpha, "lora_dropout": adapter.lora_dropout}
    patterns = {
        "rank_pattern": dict(adapter.rank_pattern),
        "alpha_pattern": {key: value * method.alpha_scale for key, value in adapter.alpha_pattern.items()},
    }
    if method.tuner != "lora":
        _refuse_lora_settings(method)
    try:
        if method.tuner == "lora":
            lora |= patterns | {"use_dora": method.use_dora, "use_rslora": method.use_rslora}
            own = [init for init in (method.init_lora_weights, adapter.init_lora_weights) if init != "default"]
            if own:
                lora["init_lora_weights"] = own[0]
            if method.mixer == "identity":
                return LoraConfig(**lora)
            return MoSLoraConfig(
                **lora,
                mixer=method.mixer,
                mixer_init=method.mixer_init,
                mixer_seed=seed,
                mixer_pattern=dict(adapter.mixer_pattern),
            )
        if method.tuner == "adalora":
            for name, pattern in patterns.items():
                if pattern:  # AdaLoRA finds the ranks itself, and keeps what it found under this name
                    raise UserError(
                        f"adapter.{name}={pattern}: method={method.name} has no such setting; leave it empty"
                    )
            return _adalora(lora, total_steps)
        # PEFT's LoHa and LoKr call alpha and dropout by their own names; dropout is on the rank, not on the input.
        own = common | patterns | {"alpha": alpha, "rank_dropout": adapter.lora_dropout}
        if method.tuner == "loha":
            return LoHaConfig(**own)
        return LoKrConfig(**own)
    except UserError:
        raise
    except (TypeError, ValueError) as error:
        raise UserError(f"method={method.name}: {error}") from None


def _modules(setting: str, names: list[str]) -> list[str] | str | None:
    """PEFT takes names as a list, and as a string what is a pattern."""
    if not names:
        return None
    if len(names) > 1 or re.fullmatch(r"[\w.]+", names[0]):
        return list(names)
    return regex(names[0], f"adapter.{setting}").pattern


def _refuse_lora_settings(method: MethodConfig) -> None:
    default = MethodConfig()
    for entry in fields(MethodConfig):
        if entry.name in ("name", "tuner", "alpha_scale"):
            continue
        if (found := getattr(method, entry.name)) != getattr(default, entry.name):
            raise UserError(f"method.{entry.name}={found} is a setting of LoRA; method.tuner={method.tuner} has none")


def _adalora(lora: dict, total_steps: int) -> AdaLoraConfig:
    """AdaLoRA starts at 1.5 r and prunes to r between a tenth and a half of the training, as its paper suggests."""
    rank = lora.pop("r")
    if total_steps < 10:
        raise UserError(
            f"method=adalora needs at least 10 optimiser steps for its budget schedule, found {total_steps}"
        )
    return AdaLoraConfig(
        **lora,
        init_r=max(rank + 1, round(1.5 * rank)),
        target_r=rank,
        tinit=total_steps // 10,
        tfinal=total_steps // 2,
        deltaT=max(1, total_steps // 100),
        total_step=total_steps,
    )


def attach(model: nn.Module, method: MethodConfig, config: PeftConfig) -> PeftModel:
    """Attaches the adapter of ``method`` to ``model`` in place.

    Raises:
        UserError: if the model has none of the target modules or lacks one to save, or PEFT refuses the combination.
    """
    for name in config.modules_to_save or ():  # PEFT passes over what it does not find
        if not any(module.endswith(name) for module, _ in model.named_modules()):
            raise UserError(f"adapter.modules_to_save: the model has no module {name!r}")
    try:
        if method.fold_into_init:
            return fold_into_init(model, config)
        return get_peft_model(model, config)
    except ValueError as error:
        raise UserError(f"method={method.name}: {str(error).splitlines()[0]}") from None
