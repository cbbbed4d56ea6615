"""Adapters without some of their subspaces: what is each of them worth?

    python -m moslora_core.knock_out ADAPTER OUT --zero-pairs 8                   # without the 8 weakest terms
    python -m moslora_core.knock_out ADAPTER OUT --keep 4 --order strongest       # without the strongest ranks but 4

delta_W is a sum of rank-one terms m_ij B_i A_j (Eq 7 of the paper, arXiv 2406.11909) of size |m_ij| |B_i| |A_j|, which
are counted and ranked in every module by itself. A knocked-out term is a zero in the mixer, so that the copy is still
a MoSLoRA adapter and loads wherever the first one does. Plain LoRA, and modules without a mixer, have the r terms with
i = j alone: there row i of A becomes zero. Everything else in the folder stays as it is.

The commands write copies. An adapter in memory loses its terms for a while (:func:`without_terms`), which is how a
curve of many such adapters is evaluated (:mod:`moslora_core.knock_out_curve`).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from .adapter_files import PREFIX, check_output, read_config, read_weights, write_adapter
from .arguments import Parser
from .errors import UserError
from .mixer import seeded_generator
from .subspaces import Factors, adapter_factors, rank_sizes, term_sizes

ORDERS = ("weakest", "strongest", "random")

# Where a module's terms are, as its tensors are named: on disk without the adapter's name, in memory with it.
_MIXERS = ("lora_B{}.mixer", "lora_A{}.mixer", "lora_mixer{}")  # (r, r)
_PLAIN = ("lora_A{}.weight", "lora_embedding_A{}")  # (r, ...): row i is the term i


# -------------------------------------------------------------------------------------------------------------- terms


@dataclass(frozen=True)
class Terms:
    """The rank-one terms of one module.

    Attributes:
        sizes: |scaling| |m_ij| |B_i| |A_j|, (r, r).
        mixed: whether all r^2 are there, or without a mixer the r with i = j alone.
    """

    sizes: torch.Tensor
    mixed: bool

    @property
    def r(self) -> int:
        return len(self.sizes)

    @property
    def there(self) -> torch.Tensor:
        """Which terms there are, (r, r) of booleans."""
        return torch.ones_like(self.sizes, dtype=torch.bool) if self.mixed else torch.eye(self.r, dtype=torch.bool)

    @property
    def number(self) -> int:
        return self.r**2 if self.mixed else self.r


def terms_of(factors: Factors) -> Terms:
    return Terms(term_sizes(factors), factors.mixed)


def removed_pairs(
    terms: Terms, number: int, order: str = "weakest", generator: torch.Generator | None = None
) -> torch.Tensor:
    """So many terms (i, j) of a module, all of them where it has fewer: (r, r) of booleans, True for what goes.

    Args:
        order: which go first: the weakest, the strongest, or any by ``generator``. Terms of one size stand in the
            order of (i, j).
    """
    flat = terms.there.flatten().nonzero().flatten()
    removed = torch.zeros(terms.r**2, dtype=torch.bool)
    removed[flat[_first(terms.sizes.flatten()[flat], number, order, generator)]] = True
    return removed.view(terms.r, terms.r)


def removed_ranks(
    terms: Terms, number: int, order: str = "weakest", generator: torch.Generator | None = None
) -> torch.Tensor:
    """The terms of so many ranks i of a module, (r, r) of booleans: with a rank go its row and column of the mixer."""
    gone = torch.zeros(terms.r, dtype=torch.bool)
    gone[_first(rank_sizes(terms.sizes), number, order, generator)] = True
    return terms.there & (gone[:, None] | gone[None, :])


def _first(sizes: torch.Tensor, number: int, order: str, generator: torch.Generator | None) -> torch.Tensor:
    """Indices of those that go first."""
    if order == "random":
        return torch.randperm(len(sizes), generator=generator)[:number]
    largest_first = sizes.argsort(descending=True, stable=True)
    return (largest_first if order == "strongest" else largest_first.flip(0))[:number]


def _holder(tensors: Mapping[str, torch.Tensor], module: str, adapter_name: str = "") -> tuple[str, bool]:
    """Name of the tensor that holds a module's terms, and whether it is a mixer."""
    names = [(name.format(adapter_name), name in _MIXERS) for name in (*_MIXERS, *_PLAIN)]
    return next(
        (key, mixer)
        for prefix in (PREFIX, "")
        for name, mixer in names
        if (key := f"{prefix}{module}.{name}") in tensors
    )


def _zero(tensor: torch.Tensor, removed: torch.Tensor, mixer: bool) -> None:
    tensor[(removed if mixer else removed.diagonal()).to(tensor.device)] = 0


# ------------------------------------------------------------------------------------------------------------- copies


def knock_out_adapter(
    in_dir: str | os.PathLike,
    out_dir: str | os.PathLike,
    *,
    zero_pairs: int | None = None,
    keep: int | None = None,
    order: str = "weakest",
    seed: int = 0,
) -> Path:
    """Writes a copy of a saved LoRA or MoSLoRA adapter without some subspaces; exactly one number is given.

    Args:
        zero_pairs: how many terms (i, j) of each module go; all of them where a module has fewer.
        keep: how many ranks i of each module stay, all where it has fewer. With a rank go all terms of its row and
            its column of the mixer.
        order: which go first: the weakest, the strongest, or random ones.
        seed: draws the random ones, in every module by itself.

    Raises:
        UserError: the adapter is missing, damaged or no LoRA; a number is negative or larger than every module has;
            ``out_dir`` is not empty or cannot be written.
    """
    check_order(order)
    if (zero_pairs is None) == (keep is None):
        raise UserError("expected one of zero_pairs and keep")
    check_output(out_dir)
    modules = {module: terms_of(factors) for module, factors in adapter_factors(in_dir).items()}
    name, number, most = "zero_pairs", zero_pairs, max(terms.number for terms in modules.values())
    if keep is not None:
        name, number, most = "keep", keep, max(terms.r for terms in modules.values())
    if not 0 <= number <= most:
        raise UserError(f"{name} is {number}; expected 0 to {most}, as many as the largest module has")
    tensors = read_weights(in_dir)
    for module, terms in modules.items():
        generator = seeded_generator(seed, module)
        if keep is None:
            removed = removed_pairs(terms, number, order, generator)
        else:
            removed = removed_ranks(terms, max(terms.r - number, 0), order, generator)
        key, mixer = _holder(tensors, module)
        tensors[key] = tensors[key].clone()
        _zero(tensors[key], removed, mixer)
    return write_adapter(out_dir, read_config(in_dir), tensors, card_from=in_dir)


def check_order(order: str, name: str = "order") -> None:
    """Refuses an unknown order.

    Args:
        name: what sets it.

    Raises:
        UserError: see above.
    """
    if order not in ORDERS:
        raise UserError(f"{name} must be one of {', '.join(ORDERS)}, found {order!r}")


# ---------------------------------------------------------------------------------------------------------- in memory


@contextmanager
def without_terms(
    model: nn.Module, removed: Mapping[str, torch.Tensor], adapter_name: str = "default"
) -> Iterator[None]:
    """Inside the block the model's adapter lacks these terms; afterwards it is what it was, bit for bit.

    Args:
        removed: module -> which of its terms go, (r, r) of booleans.
    """
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    holders = {module: _holder(tensors, module, f".{adapter_name}") for module in removed}
    before = {key: tensors[key].detach().clone() for key, _ in holders.values()}
    try:
        with torch.no_grad():
            for module, (key, mixer) in holders.items():
                _zero(tensors[key], removed[module], mixer)
        yield
    finally:
        with torch.no_grad():
            for key, tensor in before.items():
                tensors[key].copy_(tensor)


# ------------------------------------------------------------------------------------------------------ command line


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns the exit status, 2 for bad input."""
    parser = Parser(
        prog="python -m moslora_core.knock_out", description="Copy a saved adapter without some of its subspaces."
    )
    parser.add_argument("in_dir", metavar="ADAPTER", help="folder of a saved LoRA or MoSLoRA adapter")
    parser.add_argument("out_dir", metavar="OUT", help="folder to write; new or empty")
    number = parser.add_mutually_exclusive_group(required=True)
    number.add_argument("--keep", type=int, metavar="K", help="keep K ranks of each module")
    number.add_argument("--zero-pairs", type=int, metavar="N", help="zero N terms m_ij B_i A_j of each module")
    parser.add_argument("--order", choices=ORDERS, default="weakest", help="which go first; default: weakest")
    parser.add_argument("--seed", type=int, default=0, help="of the random order; default: 0")
    return parser.write(argv, lambda given: knock_out_adapter(**vars(given)))


if __name__ == "__main__":
    sys.exit(main())
