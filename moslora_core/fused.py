"""The training pass of an adapted linear layer as one autograd function.

    out = x W^T + b + dropout(x) A^T (scaling M)^T B^T                                                      (Eq 7)

PEFT's layer forms the update as a tensor of the output's size, scales it and adds it, and keeps the dropped input and
its mask in full precision. Here the scale goes into the r x r matrix, the update is added into the base's output by
the product that computes it, its part of x's gradient likewise, and what is kept is x and a mask of bytes. The result
is the same up to rounding. Dropout drops as often, but other elements at the same state of torch's generator.

Which layers take this way, and when, is :class:`moslora_core.layers.FusedLinear`'s to decide.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional


class _Fused(torch.autograd.Function):
    """``fused_linear`` on rows of one dtype."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        W: torch.Tensor,
        bias: torch.Tensor | None,
        A: torch.Tensor,
        B: torch.Tensor,
        M: torch.Tensor,
        scaling: float,
        p: float,
    ) -> torch.Tensor:
        mask, kept = keep_mask(x, p)
        # What dropout keeps grows by the inverse of its share, here in the small matrix.
        ctx.scale = scaling / kept
        h = _dropped(x, mask) @ A.T  # (n, r)
        # Under autocast W is a copy, and without a gradient for x nothing else would keep it.
        ctx.save_for_backward(x, W if ctx.needs_input_grad[0] else None, A, B, M, mask, h)
        return functional.linear(x, W, bias).addmm_(h @ (ctx.scale * M).T, B.T)

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, W, A, B, M, mask, h = ctx.saved_tensors
        x_needs, _, _, A_needs, B_needs, M_needs, *_ = ctx.needs_input_grad
        if torch.is_grad_enabled():
            # Someone will differentiate these gradients, and what the forward pass computed is a constant there.
            h = _dropped(x, mask) @ A.T
        mixer = ctx.scale * M
        g_h = g @ B @ mixer  # (n, r)
        dx = dA = dB = dM = None
        if x_needs:
            dx = g @ W
            dx = dx.addmm_(g_h, A) if mask is None else dx.add_(_dropped(g_h @ A, mask))
        if A_needs:
            dA = g_h.T @ _dropped(x, mask)
        if B_needs or M_needs:
            product = g.T @ h  # (out, r), the gradient of B M
            dB = product @ mixer.T
            dM = ctx.scale * (B.T @ product) if M_needs else None
        return dx, None, None, dA, dB, dM, None, None


def keep_mask(x: torch.Tensor, p: float) -> tuple[torch.Tensor | None, float]:
    """Which elements dropout keeps, and the share of them that it keeps on average.

    A Bernoulli draw for every element takes a CPU longer than the products of an adapter do. 16 random bits decide
    here, four elements a draw, so that p is rounded to a multiple of 2^-16.

    Args:
        x: of any shape.
        p: probability of dropping an element.

    Returns:
        Ones and zeros of x's shape in uint8, whose product with x is fast where that with booleans is not; None where
        nothing is dropped. And 1 - p as rounded, between 2^-16 and 1.
    """
    kept = max(1, round((1 - p) * 2**16))
    if kept == 2**16:
        return None, 1.0
    bits = torch.empty((x.numel() + 3) // 4, dtype=torch.int64, device=x.device).random_(-(2**63), None)
    mask = torch.empty(x.numel(), dtype=torch.uint8, device=x.device)
    torch.lt(bits.view(torch.int16)[: x.numel()], kept - 2**15, out=mask)
    return mask.view(x.shape), kept / 2**16


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype that autocast is computing in on a device; None where it is off, as on the meta device."""
    kind = device.type
    on = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return torch.get_autocast_dtype(kind) if on else None


def _dropped(x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    return x if mask is None else x * mask


def fused_linear(
    x: torch.Tensor,
    W: torch.Tensor,
    bias: torch.Tensor | None,
    A: torch.Tensor,
    B: torch.Tensor,
    M: torch.Tensor,
    *,
    scaling: float,
    p: float = 0.0,
) -> torch.Tensor:
    """A frozen linear layer and its MoSLoRA update (Eq 7), differentiable in x, A, B and M, also twice.

    Args:
        x: (.., in).
        W: (out, in), without gradient.
        bias: (out,) or None, without gradient.
        A: (r, in).
        B: (out, r).
        M: (r, r).
        scaling: factor of the update.
        p: probability with which dropout zeroes an element of x, below 1; drawn from torch's global generator.

    Returns:
        (.., out), in the common dtype or, under autocast, in autocast's.
    """
    if (dtype := autocast_dtype(x.device)) is not None:
        x, W, A, B, M = (tensor.to(dtype) for tensor in (x, W, A, B, M))
        bias = None if bias is None else bias.to(dtype)
    out = _Fused.apply(x.reshape(-1, x.shape[-1]), W, bias, A, B, M, scaling, p)
    return out.view(*x.shape[:-1], out.shape[-1])
