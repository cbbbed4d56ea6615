"""Configuration of MoSLoRA: PEFT's ``LoraConfig`` and what the mixer is."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field

from peft import LoraConfig

from .adapter_files import pattern_value, regex
from .errors import UserError
from .mixer import MIXER_INITS
from .peft_seam import MOSLORA

logger = logging.getLogger(__name__)

MIXERS = ("learned", "frozen", "identity", "two_subspaces")
DEFAULT_INIT = "kaiming_uniform"

# Members of PEFT's LoRA family whose update is not scaling * B @ A of the two stored factors, or that set the factors
# from outside. With mixer="identity" all of them are allowed, since that is plain LoRA.
_REFUSED_FIELDS = {
    "target_parameters": "a mixer is part of a module, not of a bare nn.Parameter; name modules in target_modules",
    "use_bdlora": "BD-LoRA replaces A or B by a block-diagonal matrix, which a dense mixer would undo",
    "use_qalora": "QA-LoRA pools the inputs of A, and exists for GPTQ layers alone",
    "arrow_config": "Arrow routes tokens over whole adapters and writes to their A and B",
    "kasa_config": "KaSA puts a diagonal of its own between A and B, and truncates the base weight",
    "monteclora_config": "MonteCLoRA samples A, with a prior for plain LoRA",
    "velora_config": "VeLoRA replaces the backward pass of A by an approximation",
    "megatron_config": "Megatron's parallel layers split A or B over processes",
}

# Initialisations of A and B that make B @ A what it should be, which B @ M @ A then is not.
_REFUSED_INITS = {
    "eva": "EVA replaces A, and ranks, after the mixers were drawn",
    "olora": "OLoRA takes B @ A out of the base weight",
    "pissa": "PiSSA takes B @ A out of the base weight",
    "corda": "CorDA takes B @ A out of the base weight",
    "lora_ga": "LoRA-GA takes B @ A out of the base weight",
    "loftq": "LoftQ fits B @ A to the quantisation error",
    "orthogonal": "it draws A and B so that B @ A = 0, while B @ M @ A is not",
    "mica": "MiCA freezes the module that holds B, and with it the mixer",
}


@dataclass(frozen=True)
class MixerSetting:
    """What one module has between A and B: ``mixer``, ``mixer_init`` and ``mixer_seed`` of its configuration."""

    mixer: str
    init: str
    seed: int | None = None

    @property
    def exists(self) -> bool:
        """Whether the layer stores a mixer; False for what is plain LoRA."""
        return self.mixer != "identity" and (self.mixer, self.init) != ("frozen", "identity")

    @property
    def trains(self) -> bool:
        """Whether the mixer is a parameter, instead of a buffer or nothing."""
        return self.mixer == "learned"

    @property
    def start(self) -> str:
        """Name of the matrix that the mixer starts from, for :func:`~moslora_core.mixer.init_mixer`."""
        return self.mixer if self.mixer in ("identity", "two_subspaces") else self.init


@dataclass
class MoSLoraConfig(LoraConfig):
    """Mixture-of-subspaces LoRA: delta_W = scaling * B @ M @ A with a mixer M (r, r) between A and B (Eq 7).

    Everything of :class:`peft.LoraConfig` applies; four settings are added.

    Args:
        mixer (`str`):
            ``"learned"``: M is trained with A and B (MoSLoRA). ``"frozen"``: M stays as it was drawn, a control.
            ``"two_subspaces"``: M is [[I, I], [I, I]] and fixed (Eq 6); ranks must be even. ``"identity"``: M = I,
            which is LoRA: nothing is added to PEFT's layers.
        mixer_init (`str`):
            Where a learned or frozen mixer starts: ``"kaiming_uniform"`` (entries in U(-1/sqrt r, 1/sqrt r)),
            ``"orthogonal"``, ``"gaussian"`` (standard normal entries), ``"identity"`` or ``"zero"``.
        mixer_seed (`int`, *optional*):
            If given, each mixer is drawn from its own generator, seeded with this number and the module's name: A and
            B are then those of plain LoRA at the same torch seed. If None, mixers are drawn from torch's global
            generator, each after its A.
        mixer_pattern (`dict[str, str]`):
            Module name or regular expression -> mixer, where it is another than ``mixer``; matched as ``rank_pattern``
            is. Modules with ``"identity"`` are PEFT's LoRA layers as they are.

    Raises:
        ValueError: a setting is unknown, contradicts another, or would give something else than it says.
    """

    mixer: str = field(
        default="learned",
        metadata={
            "help": (
                "The r x r matrix between A and B: 'learned' (MoSLoRA), 'frozen' (drawn, not trained), "
                "'two_subspaces' ([[I, I], [I, I]], fixed, even ranks only) or 'identity' (plain LoRA)."
            ),
        },
    )
    mixer_init: str = field(
        default=DEFAULT_INIT,
        metadata={
            "help": (
                "Start of a learned or frozen mixer: 'kaiming_uniform', 'orthogonal', 'gaussian' (standard normal), "
                "'identity' or 'zero'. From zero nothing is ever learned; it is there for the paper's ablation."
            ),
        },
    )
    mixer_seed: int | None = field(
        default=None,
        metadata={
            "help": (
                "Seed of the mixers, apart from torch's global generator, so that A and B are those of plain LoRA at "
                "the same torch seed. None draws the mixers from the global generator."
            )
        },
    )

    mixer_pattern: dict[str, str] = field(
        default_factory=dict,
        metadata={
            "help": (
                "The mapping from layer names or regexp expression to mixers which are different from the one "
                "specified by `mixer`, for example `{'vision_tower.*': 'identity'}`; matched as `rank_pattern` is."
            )
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = MOSLORA
        self.validate()
        # Not for an adapter that is loaded to be used: the ablation has been run by then.
        if self.trains_mixer and self.mixer_init == "zero" and not self.inference_mode:
            logger.warning(
                "mixer_init='zero' is a dead start: with B = 0 the gradients of A, B and the mixer all vanish, and "
                "nothing will be learned (it is there for the paper's ablation of the initialisation)"
            )

    @property
    def has_mixer(self) -> bool:
        """Whether modules may store a mixer; False for what is plain LoRA everywhere."""
        return any(MixerSetting(mixer, self.mixer_init).exists for mixer in self._mixers().values())

    @property
    def trains_mixer(self) -> bool:
        """Whether modules may have a mixer that is a parameter."""
        return "learned" in self._mixers().values()

    def mixer_of(self, module: str) -> MixerSetting:
        """The mixer of one module.

        Args:
            module: name in the base model, such as ``model.layers.0.self_attn.q_proj``.
        """
        mixer = pattern_value(self.mixer_pattern, self.mixer, module)
        return MixerSetting(mixer, self.mixer_init, self.mixer_seed)

    def _mixers(self) -> dict[str, str]:
        """Setting, as errors name it -> mixer."""
        return {"mixer": self.mixer} | {f"mixer_pattern[{key!r}]": mixer for key, mixer in self.mixer_pattern.items()}

    def validate(self) -> None:
        """Checks the mixer's settings against each other and against LoRA's.

        Raises:
            UserError: (a ``ValueError``) says what was found and what would be right.
        """
        self._validate_pattern()
        mixers = self._mixers()
        for name, mixer in mixers.items():
            if mixer not in MIXERS:
                raise UserError(f"{name}={mixer!r} is unknown; expected one of {', '.join(MIXERS)}")
        if self.mixer_init not in tuple(MIXER_INITS):
            raise UserError(f"mixer_init={self.mixer_init!r} is unknown; expected one of {', '.join(MIXER_INITS)}")
        seed = self.mixer_seed
        if seed is not None and (not isinstance(seed, int) or isinstance(seed, bool) or seed < 0):
            raise UserError(f"mixer_seed must be a non-negative integer or None, found {seed!r}")
        drawn = {"learned", "frozen"} & set(mixers.values())
        if not drawn and self.mixer_init not in (DEFAULT_INIT, self.mixer):
            raise UserError(
                f"mixer={self.mixer!r} is a fixed matrix, so mixer_init={self.mixer_init!r} has no effect; leave "
                "mixer_init out, or use mixer='learned' or 'frozen'"
            )
        for name, mixer in mixers.items():
            if mixer == "frozen" and self.mixer_init == "zero":
                raise UserError(
                    f"{name}='frozen' with mixer_init='zero' keeps the update at B @ 0 @ A forever; use another "
                    "mixer_init"
                )
        self._validate_ranks()
        for name, mixer in mixers.items():
            if MixerSetting(mixer, self.mixer_init).exists:
                self._validate_lora(f"{name}={mixer!r}")

    def _validate_pattern(self) -> None:
        if not isinstance(self.mixer_pattern, dict):
            raise UserError(f"mixer_pattern must map module names to mixers, found {self.mixer_pattern!r}")
        for key in self.mixer_pattern:
            regex(key, "mixer_pattern")

    def _validate_ranks(self) -> None:
        """Refuses what is no rank, and odd ones for two subspaces as far as the settings tell.

        :meth:`check_rank` sees each module.
        """
        patterns = {} if self.rank_pattern is None else self.rank_pattern
        if not isinstance(patterns, dict):
            raise UserError(f"rank_pattern must map module names to ranks, found {patterns!r}")
        ranks = {f"rank_pattern[{key!r}]": rank for key, rank in patterns.items()}
        for name, rank in ({"r": self.r} | ranks).items():
            if not isinstance(rank, int) or isinstance(rank, bool):
                raise UserError(f"{name} must be a whole number, found {rank!r}")
        if "two_subspaces" not in self._mixers().values():
            return
        if not self.mixer_pattern:
            ranks = {"r": self.r} | ranks
        elif not patterns:
            ranks = {"r": self.r}
        else:  # which rank meets which mixer is known once there are modules, unless both stand under one key
            same = [key for key in patterns if self.mixer_pattern.get(key) == "two_subspaces"]
            ranks = {f"rank_pattern[{key!r}]": patterns[key] for key in same}
        for name, rank in ranks.items():
            if rank % 2:
                raise UserError(
                    f"mixer='two_subspaces' pairs rank i with rank i + r/2: {name} must be even, found {rank}"
                )

    def check_rank(self, module: str) -> None:
        """Refuses an odd rank of a module that mixes two subspaces.

        Raises:
            UserError: see above.
        """
        rank = pattern_value(self.rank_pattern, self.r, module)
        if self.mixer_of(module).mixer == "two_subspaces" and rank % 2:
            raise UserError(
                f"{module}: mixer='two_subspaces' pairs rank i with rank i + r/2: the rank must be even, found {rank}"
            )

    def _validate_lora(self, mixer: str) -> None:
        """Refuses settings of LoRA that do not go with a mixer; ``mixer`` is the setting that asks for one."""
        for name, reason in _REFUSED_FIELDS.items():
            if getattr(self, name):
                raise UserError(f"{name} cannot be combined with {mixer}: {reason}")
        init = self.init_lora_weights
        if isinstance(init, bool) or str(init).lower() == "gaussian":
            return
        reasons = [reason for key, reason in _REFUSED_INITS.items() if str(init).lower().startswith(key)]
        raise UserError(
            f"init_lora_weights={init!r} cannot be combined with {mixer}: "
            f"{reasons[0] if reasons else 'what it means for a mixer is not known'}; use True, False or 'gaussian'"
        )
