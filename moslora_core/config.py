"""``MoSLoraConfig``: a LoRA configuration with a mixer."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field

from peft import LoraConfig

from .errors import UserError
from .mixer import MIXER_INITS
from .peft_seam import MOSLORA

logger = logging.getLogger(__name__)

MIXERS = ("learned", "frozen", "identity", "two_subspaces")
DEFAULT_INIT = "kaiming_uniform"

# LoRA's variants whose update is not scaling * B @ A of the two stored factors: a mixer between them is undefined.
_NOT_B_A = {
    "target_parameters": "adapters on bare parameters have no B module to hold the mixer",
    "use_bdlora": "block-diagonal factors are not mixed by a dense (r, r) matrix",
    "arrow_config": "Arrow routes between whole adapters and reads B and A itself",
    "kasa_config": "KaSA puts a diagonal of its own between B and A",
    "monteclora_config": "MonteCLoRA samples around its own factors",
    "velora_config": "VeLoRA compresses the activations of plain LoRA",
    "alora_invocation_tokens": "activated LoRA switches B and A by token",
    "use_qalora": "QA-LoRA pools the input of A by groups",
    "ensure_weight_tying": "tied layers share B and A by transposition, which the mixer does not survive",
    "megatron_config": "Megatron's parallel layers split B and A over processes",
}
# Initialisations that leave W + scaling * B @ A = W; with a mixer between B and A that equality breaks.
_PLAIN_INITS = (True, False, "gaussian")


@dataclass
class MoSLoraConfig(LoraConfig):
    """Configuration of MoSLoRA: delta_W = scaling * B @ M @ A with the mixer M of shape (r, r) (paper, Eq 7).

    All of :class:`peft.LoraConfig` applies. ``mixer="identity"``, and ``mixer="frozen"`` with
    ``mixer_init="identity"``, are vanilla LoRA: nothing is attached and PEFT's own layers run.

    Raises:
        UserError: (a ``ValueError``) for an unknown value, an odd rank with ``two_subspaces``, an adapter that could
            never learn, or a variant of LoRA in which a mixer has no meaning.
    """

    mixer: str = field(
        default="learned",
        metadata={
            "help": "learned: MoSLoRA, M is trained. frozen: M keeps its initial value. identity: vanilla LoRA. "
            "two_subspaces: M = [[I, I], [I, I]] of r/2 blocks, fixed; needs an even r."
        },
    )
    mixer_init: str = field(
        default=DEFAULT_INIT,
        metadata={
            "help": "Start of a learned or frozen mixer: kaiming_uniform (a = sqrt 5), orthogonal, gaussian (standard "
            "normal), identity, or zero (with B = 0 a dead start: no gradient reaches A, B or M)."
        },
    )
    mixer_seed: int | None = field(
        default=None,
        metadata={
            "help": "Draws each layer's mixer from its own generator, seeded by this number and the layer's name: "
            "A is then initialised as in a LoRA of the same torch seed. None draws from torch's global generator."
        },
    )

    def __post_init__(self):
        super().__post_init__()
        self.peft_type = MOSLORA
        if self.mixer not in MIXERS:
            raise UserError(f"mixer must be one of {', '.join(MIXERS)}, found {self.mixer!r}")
        if self.mixer_init not in MIXER_INITS:
            raise UserError(f"mixer_init must be one of {', '.join(MIXER_INITS)}, found {self.mixer_init!r}")
        if self.mixer_seed is not None and (not isinstance(self.mixer_seed, int) or self.mixer_seed < 0):
            raise UserError(f"mixer_seed must be a non-negative integer or None, found {self.mixer_seed!r}")
        self._check_mixer()
        if self.has_mixer:
            self._check_variants()

    @property
    def has_mixer(self) -> bool:
        """Whether layers store a mixer; False for what is vanilla LoRA."""
        return self.mixer != "identity" and not (self.mixer == "frozen" and self.mixer_init == "identity")

    @property
    def start(self) -> str:
        """Name of the mixer's initial value: ``mixer_init``, or ``two_subspaces``."""
        return "two_subspaces" if self.mixer == "two_subspaces" else self.mixer_init

    def _check_mixer(self) -> None:
        if self.mixer in ("identity", "two_subspaces") and self.mixer_init not in (DEFAULT_INIT, "identity"):
            raise UserError(
                f"mixer={self.mixer!r} is a fixed matrix, so mixer_init={self.mixer_init!r} has no effect; "
                "leave mixer_init out, or use mixer='learned' or 'frozen'"
            )
        if self.mixer == "frozen" and self.mixer_init == "zero":
            raise UserError("a frozen zero mixer keeps the update at zero forever; use another mixer_init")
        if self.mixer == "two_subspaces":
            ranks = {"r": self.r, **{f"rank_pattern[{k!r}]": rank for k, rank in (self.rank_pattern or {}).items()}}
            for name, rank in ranks.items():
                if rank % 2:
                    raise UserError(f"mixer='two_subspaces' halves the rank: {name} must be even, found {rank}")
        if self.mixer == "learned" and self.mixer_init == "zero" and self.init_lora_weights is not False:
            logger.warning("mixer_init='zero' with B = 0 is a dead start: no gradient reaches A, B or the mixer")

    def _check_variants(self) -> None:
        for name, reason in _NOT_B_A.items():
            if getattr(self, name, None):
                raise UserError(f"mixer={self.mixer!r} does not go with {name}: {reason}")
        if not any(self.init_lora_weights is value or self.init_lora_weights == value for value in _PLAIN_INITS):
            raise UserError(
                f"mixer={self.mixer!r} does not go with init_lora_weights={self.init_lora_weights!r}, which sets "
                "B and A (and the base weight) so that B @ A is exact; use True, False or 'gaussian'"
            )
