"""The mixer as plain tensors: its initialisations, and folding it into A or B.

Shapes as in PEFT: A is (r, in), B is (out, r), the mixer M is (r, r), and delta_W = scaling * B @ M @ A. The paper
writes row vectors, so that its W (Eq 7) is M transposed.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable

import torch
from torch import nn

# name -> in-place initialiser of a float32 (r, r) tensor
MIXER_INITS: dict[str, Callable[[torch.Tensor, torch.Generator | None], torch.Tensor]] = {
    # U(-1/sqrt r, 1/sqrt r), as A itself: the released code's choice and the paper's best (Table 3).
    "kaiming_uniform": lambda M, g: nn.init.kaiming_uniform_(M, a=math.sqrt(5), generator=g),
    "orthogonal": lambda M, g: nn.init.orthogonal_(M, generator=g),
    # Standard normal: the paper says "normal distribution" (Table 3), the released code's line has no other scale.
    "gaussian": lambda M, g: nn.init.normal_(M, generator=g),
    "identity": lambda M, g: nn.init.eye_(M),
    "zero": lambda M, g: nn.init.zeros_(M),
}


def two_subspaces(r: int) -> torch.Tensor:
    """The fixed mixer [[I, I], [I, I]] of two-subspaces mixing (Eq 6), (r, r) with r even.

    Raises:
        ValueError: if r is odd.
    """
    if r % 2:
        raise ValueError(f"two-subspaces mixing halves the rank, so r must be even, found r={r}")
    return torch.eye(r // 2).repeat(2, 2)


@torch.no_grad()
def init_mixer(
    init: str,
    r: int,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """A new mixer (r, r), drawn on the CPU in float32: a seed means the same on every device and in every dtype.

    Args:
        init: a name in :data:`MIXER_INITS`, or ``two_subspaces``.
        generator: source of randomness; None is torch's global one.

    Raises:
        ValueError: unknown ``init``, or an odd r for ``two_subspaces``.
    """
    if init != "two_subspaces" and init not in MIXER_INITS:
        raise ValueError(f"mixer_init must be one of {', '.join(MIXER_INITS)}, found {init!r}")
    if torch.device(device).type == "meta":  # nothing to draw: a checkpoint or a dry run follows
        return torch.empty(r, r, dtype=dtype, device=device)
    mixer = two_subspaces(r) if init == "two_subspaces" else MIXER_INITS[init](torch.empty(r, r), generator)
    return mixer.to(device=device, dtype=dtype)


def seeded_generator(seed: int, module_name: str) -> torch.Generator:
    """Source of one module's mixer: it depends on the seed and the name alone, not on the order of the modules."""
    digest = hashlib.sha256(f"{seed}:{module_name}".encode()).digest()
    # 63 bits, since torch's seeds are signed.
    return torch.Generator(device="cpu").manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def fold_into_b(B: torch.Tensor, M: torch.Tensor) -> torch.Tensor:
    """B @ M for B of shape (out, r), or (out, r, 1, ...) of a convolution; the shape and dtype of B are kept."""
    return (B.flatten(1) @ M.to(B.dtype)).view_as(B)


def fold_into_a(A: torch.Tensor, M: torch.Tensor) -> torch.Tensor:
    """M @ A for A of shape (r, in), or (r, in, k, ...) of a convolution; the shape and dtype of A are kept."""
    return (M.to(A.dtype) @ A.flatten(1)).view_as(A)
