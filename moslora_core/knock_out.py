"""Copies of an adapter without some of its subspaces: what is each of them worth?

    python -m moslora_core.knock_out ADAPTER OUT --zero-pairs 8                   # without the 8 weakest terms
    python -m moslora_core.knock_out ADAPTER OUT --keep 4 --order strongest       # without the strongest ranks but 4

delta_W is a sum of rank-one terms m_ij B_i A_j (Eq 7 of the paper, arXiv 2406.11909) of size |m_ij| |B_i| |A_j|, which
are counted and ranked in every module by itself. A knocked-out term is a zero in the mixer, so that the copy is still
a MoSLoRA adapter and loads wherever the first one does. Plain LoRA, and modules without a mixer, have the r terms with
i = j alone: there row i of A becomes zero. Everything else in the folder stays as it is.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NoReturn

import torch

from .adapter_files import PREFIX, check_output, read_config, read_weights, write_adapter
from .errors import UserError
from .subspaces import Factors, adapter_factors, ranks_by_size, subspaces_by_size

ORDERS = ("weakest", "strongest")


def knock_out_adapter(
    in_dir: str | os.PathLike,
    out_dir: str | os.PathLike,
    *,
    zero_pairs: int | None = None,
    keep: int | None = None,
    order: str = "weakest",
) -> Path:
    """Writes a copy of a saved LoRA or MoSLoRA adapter without some subspaces; exactly one number is given.

    Args:
        zero_pairs: how many terms (i, j) of each module go; all of them where a module has fewer.
        keep: how many ranks i of each module stay, all where it has fewer. With a rank go all terms of its row and
            its column of the mixer.
        order: which go first, the weakest or the strongest.

    Raises:
        UserError: the adapter is missing, damaged or no LoRA; a number is negative or larger than every module has;
            ``out_dir`` is not empty or cannot be written.
    """
    if order not in ORDERS:
        raise UserError(f"order must be one of {', '.join(ORDERS)}, found {order!r}")
    if (zero_pairs is None) == (keep is None):
        raise UserError("expected one of zero_pairs and keep")
    check_output(out_dir)
    modules = adapter_factors(in_dir)
    _check_number(modules.values(), zero_pairs, keep)
    tensors = read_weights(in_dir)
    for module, factors in modules.items():
        pairs = removed_pairs(factors, zero_pairs=zero_pairs, keep=keep, order=order)
        _zero(tensors, module, factors, pairs)
    return write_adapter(out_dir, read_config(in_dir), tensors, card_from=in_dir)


def removed_pairs(
    factors: Factors, *, zero_pairs: int | None = None, keep: int | None = None, order: str = "weakest"
) -> list[tuple[int, int]]:
    """The terms (i, j) of one module that :func:`knock_out_adapter` removes."""
    if zero_pairs is not None:
        return _first(subspaces_by_size(factors), zero_pairs, order)
    gone = set(_first(ranks_by_size(factors), max(factors.r - keep, 0), order))
    return [(i, j) for i, j in subspaces_by_size(factors) if i in gone or j in gone]


def _first(largest_first: list, count: int, order: str) -> list:
    return (largest_first if order == "strongest" else largest_first[::-1])[:count]


def _check_number(modules: Iterable[Factors], zero_pairs: int | None, keep: int | None) -> None:
    name, number = ("zero_pairs", zero_pairs) if keep is None else ("keep", keep)
    most = max(len(subspaces_by_size(factors)) if keep is None else factors.r for factors in modules)
    if not 0 <= number <= most:
        raise UserError(f"{name} is {number}; expected 0 to {most}, as many as the largest module has")


def _zero(tensors: dict[str, torch.Tensor], module: str, factors: Factors, pairs: Iterable[tuple[int, int]]) -> None:
    """Removes the terms from an adapter's tensors under their names on disk."""
    names = ("lora_B.mixer", "lora_A.mixer", "lora_mixer") if factors.mixed else ("lora_A.weight", "lora_embedding_A")
    key = next(key for prefix in (PREFIX, "") for name in names if (key := f"{prefix}{module}.{name}") in tensors)
    tensor = tensors[key].clone()
    for i, j in pairs:
        if factors.mixed:
            tensor[i, j] = 0
        else:
            tensor[i] = 0
    tensors[key] = tensor


# ------------------------------------------------------------------------------------------------------ command line


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns the exit status, 2 for bad input."""
    parser = _Parser(
        prog="python -m moslora_core.knock_out", description="Copy a saved adapter without some of its subspaces."
    )
    parser.add_argument("input", metavar="ADAPTER", help="folder of a saved LoRA or MoSLoRA adapter")
    parser.add_argument("output", metavar="OUT", help="folder to write; new or empty")
    number = parser.add_mutually_exclusive_group(required=True)
    number.add_argument("--keep", type=int, metavar="K", help="keep K ranks of each module")
    number.add_argument("--zero-pairs", type=int, metavar="N", help="zero N terms m_ij B_i A_j of each module")
    parser.add_argument("--order", choices=ORDERS, default="weakest", help="which go first; default: weakest")
    try:
        arguments = parser.parse_args(argv)
        numbers = {"zero_pairs": arguments.zero_pairs, "keep": arguments.keep}
        written = knock_out_adapter(arguments.input, arguments.output, **numbers, order=arguments.order)
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    sys.stdout.write(f"{written}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
