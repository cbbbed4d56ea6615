"""The mixer as a matrix: how one is drawn, and how it is multiplied into B or A. Pure functions of tensors.

Shapes as in PEFT: A (r, in), B (out, r), M (r, r), delta_W = scaling * B @ M @ A. The paper writes row vectors, so
that its W (Eq 7) is M transposed.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable

import torch
from torch import nn

from .errors import UserError

# name -> in-place initialiser of a float32 (r, r) tensor
MIXER_INITS: dict[str, Callable[[torch.Tensor, torch.Generator | None], torch.Tensor]] = {
    # U(-1/sqrt r, 1/sqrt r), as A itself: the released code's choice and the paper's best (Table 3).
    "kaiming_uniform": lambda M, g: nn.init.kaiming_uniform_(M, a=math.sqrt(5), generator=g),
    "orthogonal": lambda M, g: nn.init.orthogonal_(M, generator=g),
    # Standard normal, std 1: the paper says "normal distribution", and the released code's line names no scale.
    "gaussian": lambda M, g: nn.init.normal_(M, generator=g),
    "identity": lambda M, g: nn.init.eye_(M),
    # The start that cannot learn: with B = 0 the gradients of A, B and M all vanish.
    "zero": lambda M, g: nn.init.zeros_(M),
}


def two_subspaces(r: int) -> torch.Tensor:
    """The fixed mixer [[I, I], [I, I]] of r/2 blocks, (r, r): two-subspaces mixing (Eq 3, 6).

    Raises:
        UserError: r is odd.
    """
    if r % 2:
        raise UserError(f"two-subspaces mixing pairs rank i with rank i + r/2, so r must be even, found r={r}")
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
    """A new mixer M (r, r), drawn on the CPU in float32: a seed gives one mixer on every device and in every dtype.

    On the meta device nothing is drawn: a checkpoint or a dry run follows.

    Args:
        init: a name in :data:`MIXER_INITS`, or ``two_subspaces``.
        generator: source of the random numbers, on the CPU; None is torch's global one.

    Raises:
        UserError: unknown ``init``, or an odd r for ``two_subspaces``.
    """
    if init != "two_subspaces" and init not in MIXER_INITS:
        raise UserError(f"mixer initialisation must be one of {', '.join(MIXER_INITS)}, two_subspaces, found {init!r}")
    if torch.device(device).type == "meta":
        return torch.empty(r, r, dtype=dtype, device=device)
    # Named, or a surrounding device context or default dtype would decide.
    with torch.device("cpu"):
        M = (
            two_subspaces(r)
            if init == "two_subspaces"
            else MIXER_INITS[init](torch.empty(r, r, dtype=torch.float32), generator)
        )
    return M.to(device=device, dtype=dtype)


def seeded_generator(seed: int, module_name: str) -> torch.Generator:
    """Source of one module's mixer: it depends on the seed and the name alone, not on the order of the modules."""
    # Not Python's hash, which differs between processes.
    digest = hashlib.sha256(f"{seed}:{module_name}".encode()).digest()
    # 63 bits, since torch's seeds are signed.
    return torch.Generator(device="cpu").manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def fold_into_b(B: torch.Tensor, M: torch.Tensor) -> torch.Tensor:
    """B @ M for B (out, r), or a pointwise convolution's (out, r, 1, ..); the shape and dtype of B are kept."""
    return (B.flatten(1) @ M.to(B.dtype)).view_as(B)


def fold_into_a(A: torch.Tensor, M: torch.Tensor) -> torch.Tensor:
    """M @ A for A (r, in), or a convolution's (r, in, k, ..); the shape and dtype of A are kept."""
    return (M.to(A.dtype) @ A.flatten(1)).view_as(A)
