"""MoSLoRA written out in plain torch: what the adapter must compute, without PEFT and without this package.

Each function is the adapted layer's forward pass with explicit factors. Names and shapes as in the paper's equations
turned to PEFT's layout: A (r, in, ..), M (r, r), B (out, r, ..).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


def update(base: nn.Module, x: torch.Tensor, A: torch.Tensor, M: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
    """What the adapter adds to the layer's output, without scaling: x A^T M^T B^T, step by step."""
    if isinstance(base, nn.Embedding):
        return F.embedding(x, A.T) @ M.T @ B.T
    if isinstance(base, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        convolve = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[len(base.kernel_size)]
        inner = convolve(x, A, stride=base.stride, padding=base.padding)
        inner = torch.einsum("ij,bj...->bi...", M, inner)
        if base.groups == 1:
            return torch.einsum("or,br...->bo...", B.flatten(1), inner)
        # Each group of outputs sees its own slice of the r channels.
        parts = zip(inner.chunk(base.groups, 1), B.flatten(1).chunk(base.groups, 0), strict=True)
        return torch.cat([torch.einsum("or,br...->bo...", b, h) for h, b in parts], 1)
    return x @ A.T @ M.T @ B.T


def adapted(base: nn.Module, x: torch.Tensor, A, M, B, scaling: float) -> torch.Tensor:
    """The adapted layer: base(x) + scaling * update (Eq 7)."""
    return base(x) + scaling * update(base, x, A, M, B)


def two_subspaces_written_out(x: torch.Tensor, A: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
    """Eq 6: sum over i <= r/2 of x (A_i + A_{i+r/2}) (B_i + B_{i+r/2}), each term a rank-one map."""
    half = A.shape[0] // 2
    terms = [((x @ (A[i] + A[i + half]))[..., None]) * (B[:, i] + B[:, i + half]) for i in range(half)]
    return torch.stack(terms).sum(0)
