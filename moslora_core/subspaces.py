"""The subspaces inside an adapter: what the mixer mixes, how far it moved, and where two adapters point.

Notation and shapes (torch's layout, as PEFT has it): A is (r, in), B is (out, r), the mixer M is (r, r), and

    delta_W = scaling * B @ M @ A = scaling * sum_ij m_ij B_i A_j      B_i: column i of B, A_j: row j of A

which is Eq 7 of the paper (arXiv 2406.11909) with W = M^T. Vanilla LoRA keeps the r terms with i = j (Eq 4-5), the
two-subspaces mixer has 2 r of them (Eq 6), MoSLoRA all r^2. Convolutions and embeddings are read as matrices.

Everything is computed in float64. Nothing here returns NaN: where a quantity is not defined (the angle of a zero
update, say) the docstring names the value returned instead, or a :class:`UserError` is raised.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace

import torch
from torch import nn

from .adapter_files import PREFIX, read_config, read_weights, scaling_of
from .errors import UserError

# ---------------------------------------------------------------------------------------------------------- factors


@dataclass(frozen=True)
class Factors:
    """Factors of one adapted module in float64.

    Attributes:
        A: (r, in).
        M: (r, r); the identity for plain LoRA, and for modules that have no mixer.
        B: (out, r).
        scaling: alpha / r, or alpha / sqrt(r) under rank-stabilised LoRA.
        mixed: whether M is a mixer that the adapter has, learned or frozen, and not the identity of plain LoRA.
    """

    A: torch.Tensor
    M: torch.Tensor
    B: torch.Tensor
    scaling: float = 1.0
    mixed: bool = True

    def __post_init__(self) -> None:
        rank = self.A.shape[0]
        if self.A.ndim != 2 or self.B.ndim != 2 or tuple(self.M.shape) != (rank, rank) or self.B.shape[1] != rank:
            raise UserError(
                f"factors: A {tuple(self.A.shape)}, M {tuple(self.M.shape)}, B {tuple(self.B.shape)} do not fit; "
                "expected (r, in), (r, r), (out, r)"
            )
        for name in ("A", "M", "B"):
            tensor = getattr(self, name).detach().to("cpu", torch.float64)
            if not torch.isfinite(tensor).all():
                raise UserError(f"factors: {name} holds NaN or infinity; expected finite numbers")
            object.__setattr__(self, name, tensor)

    @property
    def r(self) -> int:
        return self.A.shape[0]

    def delta(self) -> torch.Tensor:
        """The update delta_W, (out, in)."""
        return self.scaling * (self.B @ self.M @ self.A)


def adapter_factors(source: str | os.PathLike | nn.Module, adapter_name: str = "default") -> dict[str, Factors]:
    """Factors of every module that an adapter adapts, LoRA or MoSLoRA; M = I where a module has no mixer.

    Rank and alpha patterns and rank-stabilised scaling are taken into account. A convolution's A, of shape
    (r, in, k, ...), is read as the matrix (r, in * k * ...), an embedding's A as (r, embeddings). A grouped
    convolution's B, (out, r / groups, 1, ...), becomes the block-diagonal (out, r) that it applies.

    Args:
        source: a saved adapter's folder, or a model with an adapter in memory.
        adapter_name: which of the adapters in memory; not used for a folder.

    Returns:
        Module name in the base model -> factors, in the adapter's order.

    Raises:
        UserError: the folder or adapter is missing or damaged, its tensors do not fit one another, it is no LoRA,
            or it has none of LoRA's factors.
    """
    if isinstance(source, nn.Module):
        config, tensors, where = *_from_model(source, adapter_name), f"adapter {adapter_name!r}"
    else:
        config, tensors, where = read_config(source), read_weights(source), os.fspath(source)
    if (kind := str(getattr(config.get("peft_type"), "value", config.get("peft_type")))) not in ("LORA", "MOSLORA"):
        raise UserError(f"{where}: peft_type is {kind}; expected LORA or MOSLORA")
    factors = {}
    for module in _modules(tensors):
        try:
            factors[module.removeprefix(PREFIX)] = _module_factors(config, tensors, module)
        except UserError as error:
            raise UserError(f"{where}: {module}: {error}") from None
    if not factors:
        raise UserError(f"{where}: has no lora_A or lora_embedding_A; expected the factors of a LoRA adapter")
    return factors


def _from_model(model: nn.Module, adapter_name: str) -> tuple[dict, dict[str, torch.Tensor]]:
    from peft import get_peft_model_state_dict

    adapters = getattr(model, "peft_config", {})
    if adapter_name not in adapters:
        raise UserError(f"model has no adapter {adapter_name!r}; it has {sorted(adapters) or 'none'}")
    config = adapters[adapter_name]
    tensors = get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=False)
    return {entry.name: getattr(config, entry.name) for entry in fields(config)}, tensors


def _modules(tensors: Mapping[str, torch.Tensor]) -> list[str]:
    found = {}
    for key in tensors:
        for part in (".lora_A.weight", ".lora_A.raw", ".lora_embedding_A"):
            if key.endswith(part):
                found[key.removesuffix(part)] = None
    return list(found)


def _module_factors(config: Mapping, tensors: Mapping[str, torch.Tensor], module: str) -> Factors:
    def first(*names: str) -> torch.Tensor:
        for name in names:
            if (tensor := tensors.get(f"{module}.{name}")) is not None:
                if tensor.ndim < 2:
                    raise UserError(f"{name} has shape {tuple(tensor.shape)}; expected a matrix or a kernel")
                return tensor
        raise UserError(f"has no {' or '.join(names)}")

    A = first("lora_A.weight", "lora_A.raw", "lora_embedding_A").double().flatten(1)
    B = _columns(first("lora_B.weight", "lora_B.raw", "lora_embedding_B").double(), rank=A.shape[0])
    mixed = any(f"{module}.{name}" in tensors for name in ("lora_A.raw", "lora_B.raw", "lora_mixer"))
    if mixed:
        M = first("lora_B.mixer", "lora_A.mixer", "lora_mixer").double()
    else:
        M = torch.eye(A.shape[0], dtype=torch.float64)
    return Factors(A, M, B, scaling_of(config, module.removeprefix(PREFIX), A.shape[0]), mixed)


def _columns(B: torch.Tensor, rank: int) -> torch.Tensor:
    """B as the matrix (out, r); that of a grouped convolution, (out, r / groups, 1, ...), as a block-diagonal one."""
    matrix = B.flatten(1)
    out, columns = matrix.shape
    if B.ndim == 2 or columns in (0, rank) or rank % columns or out % (rank // columns):
        return matrix
    return torch.block_diag(*matrix.chunk(rank // columns))


# --------------------------------------------------------------------------------------------------- rank-one terms


@dataclass(frozen=True)
class RankOneTerms:
    """delta_W as the sum of r^2 rank-one terms (Eq 7), and how it divides into LoRA's own terms and mixed ones.

    The terms are not orthogonal, so that their norms do not add up to that of the update; the diagonal and the mixed
    part are therefore measured as whole matrices, and their cosine tells whether they reinforce or cancel each other:

        |delta_W|^2 = diagonal_norm^2 + mixed_norm^2 + 2 * cosine * diagonal_norm * mixed_norm

    Attributes:
        weights: m_ij, (r, r).
        norms: |scaling| |m_ij| |B_i| |A_j|, the Frobenius norm of each term, (r, r).
        diagonal_norm: Frobenius norm of scaling * sum_i m_ii B_i A_i, the terms that LoRA has too.
        mixed_norm: Frobenius norm of scaling * sum_{i != j} m_ij B_i A_j, the terms that only mixing adds.
        total_norm: Frobenius norm of delta_W.
        mixed_share: mixed_norm^2 / (diagonal_norm^2 + mixed_norm^2), in [0, 1]; 0 for a zero update.
        cosine: of the angle between the two parts as vectors; 0 where either part is zero.
    """

    weights: torch.Tensor
    norms: torch.Tensor
    diagonal_norm: float
    mixed_norm: float
    total_norm: float
    mixed_share: float
    cosine: float


def rank_one_terms(factors: Factors) -> RankOneTerms:
    """Decomposes an update into its r^2 rank-one subspaces, without forming any (out, in) matrix."""
    # The parts are seen through the triangles of B = QR and A^T = QR: norms and angles stay, at size r x r.
    upper_b, upper_a = torch.linalg.qr(factors.B).R, torch.linalg.qr(factors.A.T).R
    diagonal = factors.scaling * upper_b @ torch.diag(factors.M.diagonal()) @ upper_a.T
    mixed = factors.scaling * upper_b @ (factors.M - torch.diag(factors.M.diagonal())) @ upper_a.T
    diagonal_norm, mixed_norm = float(torch.linalg.norm(diagonal)), float(torch.linalg.norm(mixed))
    energy = diagonal_norm**2 + mixed_norm**2
    product = diagonal_norm * mixed_norm
    cosine = float((diagonal * mixed).sum()) / product if product > 0 else 0.0
    return RankOneTerms(
        weights=factors.M,
        norms=term_sizes(factors),
        diagonal_norm=diagonal_norm,
        mixed_norm=mixed_norm,
        total_norm=float(torch.linalg.norm(diagonal + mixed)),
        mixed_share=mixed_norm**2 / energy if energy > 0 else 0.0,
        cosine=min(1.0, max(-1.0, cosine)),
    )


def term_sizes(factors: Factors) -> torch.Tensor:
    """|scaling| |m_ij| |B_i| |A_j|, the Frobenius norm of each term, (r, r)."""
    lengths = torch.outer(torch.linalg.norm(factors.B, dim=0), torch.linalg.norm(factors.A, dim=1))
    return abs(factors.scaling) * factors.M.abs() * lengths


def rank_sizes(sizes: torch.Tensor) -> torch.Tensor:
    """What each rank i counts, (r,): the norm of the sizes (r, r) of all terms in row i and column i of the mixer.

    For plain LoRA, whose only term of rank i is B_i A_i, that is its size.
    """
    squares = sizes**2
    return (squares.sum(dim=0) + squares.sum(dim=1) - squares.diagonal()).sqrt()


def rank_one_term(factors: Factors, i: int, j: int) -> torch.Tensor:
    """Term (i, j) of the update: scaling * m_ij B_i A_j, (out, in)."""
    return factors.scaling * factors.M[i, j] * torch.outer(factors.B[:, i], factors.A[j])


def knock_out(factors: Factors, pairs: Iterable[tuple[int, int]]) -> torch.Tensor:
    """The mixer with the weights of some subspaces set to zero, (r, r); ``factors`` stays as it is.

    Args:
        pairs: (i, j) of the terms m_ij B_i A_j to remove, counted from zero.

    Raises:
        UserError: a pair lies outside the mixer.
    """
    mixer = factors.M.clone()
    for i, j in pairs:
        if not (0 <= i < factors.r and 0 <= j < factors.r):
            raise UserError(f"knock_out: subspace ({i}, {j}) lies outside 0..{factors.r - 1}, r is {factors.r}")
        mixer[i, j] = 0.0
    return mixer


def with_mixer(factors: Factors, mixer: torch.Tensor) -> Factors:
    """The same factors with another mixer (r, r), such as one of :func:`knock_out`."""
    return replace(factors, M=mixer)


# ------------------------------------------------------------------------------------------------------------ mixer


def mixer_spectrum(mixer: torch.Tensor) -> torch.Tensor:
    """Singular values of a mixer (r, r), largest first, (r,).

    All ones for an orthogonal mixer; r/2 times 2 and r/2 times 0 for the two-subspaces mixer (Eq 6), which therefore
    has rank r / 2.
    """
    return torch.linalg.svdvals(_square(mixer))


def condition_number(mixer: torch.Tensor) -> float:
    """Largest over smallest singular value of a mixer (r, r).

    ``inf`` if the mixer is singular to float64 precision (smallest at or below r * eps * largest), the zero mixer
    included.
    """
    values = mixer_spectrum(mixer)
    largest, smallest = float(values[0]), float(values[-1])
    return largest / smallest if smallest > len(values) * torch.finfo(torch.float64).eps * largest else math.inf


def effective_rank(matrix: torch.Tensor) -> float:
    """Effective rank of a matrix (rows, columns): exp of the entropy of its normalised singular values.

    From 1 (one dominant direction) to min(rows, columns) (all alike); 0 for the zero matrix. Roy and Vetterli, "The
    effective rank: a measure of effective dimensionality", EUSIPCO 2007.
    """
    values = torch.linalg.svdvals(_matrix(matrix))
    if not len(values) or values[0] == 0:
        return 0.0
    # Scaling by the largest first keeps the sum finite for any representable spectrum.
    shares = values / values[0]
    shares = shares / shares.sum()
    return float(torch.exp(torch.special.entr(shares).sum()))


@dataclass(frozen=True)
class Distance:
    """How far a matrix moved: Frobenius norm of the difference, and the same over the norm of the start.

    ``relative`` is ``inf`` if the start is zero and the end is not, and 0 if both are zero.
    """

    absolute: float
    relative: float


def distance_from_start(end: torch.Tensor, start: torch.Tensor) -> Distance:
    """Distance of a trained mixer (or any matrix) from its start of the same shape."""
    end, start = _matrix(end), _matrix(start)
    if end.shape != start.shape:
        raise UserError(f"distance_from_start: shapes {tuple(end.shape)} and {tuple(start.shape)} differ")
    absolute = float(torch.linalg.norm(end - start))
    base = float(torch.linalg.norm(start))
    if base > 0:
        return Distance(absolute, absolute / base)
    return Distance(absolute, math.inf if absolute > 0 else 0.0)


def effective_scale(mixer: torch.Tensor, A: torch.Tensor) -> float:
    """|M A| / |A| in Frobenius norms for M (r, r) and A (r, in): the change of A's size that mixing amounts to.

    Near 1 / sqrt(3) for the Kaiming-uniform start, exactly 1 for an orthogonal mixer; 0 if A is zero.
    """
    mixer, A = _square(mixer), _matrix(A)
    if mixer.shape[1] != A.shape[0]:
        raise UserError(f"effective_scale: mixer {tuple(mixer.shape)} and A {tuple(A.shape)} do not fit")
    size = float(torch.linalg.norm(A))
    return float(torch.linalg.norm(mixer @ A)) / size if size > 0 else 0.0


# -------------------------------------------------------------------------------------------------- principal angles


def principal_angles(P: torch.Tensor, Q: torch.Tensor, rtol: float | None = None) -> torch.Tensor:
    """Principal angles between the column spaces of P (n, p) and Q (n, q), in radians, largest first.

    Small angles come from their sines, large ones from their cosines, since an arccosine near 1 loses half of the
    digits (Knyazev and Argentati, SIAM J. Sci. Comput. 23(6), 2002; as in ``scipy.linalg.subspace_angles``). The
    bases come from an SVD, so that dependent columns are dropped instead of adding arbitrary directions.

    Args:
        rtol: singular values at or below rtol * largest count as zero; max(shape) * eps by default.

    Returns:
        (min(rank P, rank Q),) angles in [0, pi/2]; empty if either matrix is zero, since a zero space has no angles.

    Raises:
        UserError: the row counts differ.
    """
    P, Q = _matrix(P), _matrix(Q)
    if P.shape[0] != Q.shape[0]:
        raise UserError(f"principal_angles: {P.shape[0]} and {Q.shape[0]} rows; expected spaces of one dimension")
    return basis_angles(orthonormal_basis(P, rtol), orthonormal_basis(Q, rtol))


def basis_angles(P: torch.Tensor, Q: torch.Tensor) -> torch.Tensor:
    """:func:`principal_angles` between spaces given by orthonormal bases (n, p) and (n, q), in float64."""
    if P.shape[1] < Q.shape[1]:
        P, Q = Q, P
    overlap = P.T @ Q
    cosines = torch.linalg.svdvals(overlap).clamp(max=1.0)
    # Q's part outside P: its singular values are the sines, smallest angle last, so that flipping aligns them.
    sines = torch.linalg.svdvals(Q - P @ overlap).clamp(max=1.0).flip(0)
    angles = torch.where(cosines**2 >= 0.5, torch.arcsin(sines), torch.arccos(cosines))
    return angles.flip(0)


def orthonormal_basis(matrix: torch.Tensor, rtol: float | None = None) -> torch.Tensor:
    """Orthonormal basis (n, rank) of the column space of a matrix (n, m); (n, 0) for the zero matrix.

    A QR factorisation first, so that the SVD, which finds the rank, is only of an (m, m) matrix.
    """
    matrix = _matrix(matrix)
    if rtol is None:
        rtol = max(matrix.shape) * torch.finfo(torch.float64).eps
    basis, triangle = torch.linalg.qr(matrix)
    left, values, _ = torch.linalg.svd(triangle, full_matrices=False)
    keep = values > rtol * values[:1] if len(values) else values > 0
    return basis @ left[:, keep]


@dataclass(frozen=True)
class AdapterAngles:
    """Principal angles between two updates of one module, in radians, largest first.

    Attributes:
        columns: between the column spaces, in the output (out); empty if either update is zero.
        rows: between the row spaces, in the input (in); empty if either update is zero.
    """

    columns: torch.Tensor
    rows: torch.Tensor


def update_angles(first: Factors, second: Factors, rtol: float | None = None) -> AdapterAngles:
    """Principal angles between the updates delta_W of two adapters on one module.

    The spaces are those of delta_W itself: a mixer that loses rank loses the directions it drops.

    Args:
        rtol: see :func:`principal_angles`; the default judges the rank of delta_W at float64 precision.
    """
    if first.B.shape[0] != second.B.shape[0] or first.A.shape[1] != second.A.shape[1]:
        shapes = [(f.B.shape[0], f.A.shape[1]) for f in (first, second)]
        raise UserError(f"update_angles: updates are {shapes[0]} and {shapes[1]}; expected one module")
    one, other = update_bases(first, rtol), update_bases(second, rtol)
    return AdapterAngles(columns=basis_angles(one[0], other[0]), rows=basis_angles(one[1], other[1]))


def update_spectrum(factors: Factors) -> torch.Tensor:
    """Singular values of delta_W, largest first, (min(r, out, in),): from r x r matrices, never (out, in)."""
    return torch.linalg.svdvals(_core(factors)[1])


def _core(factors: Factors) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """QR of both sides: delta_W = left @ core @ right^T with orthonormal columns left and right."""
    left, upper_b = torch.linalg.qr(factors.B)
    right, upper_a = torch.linalg.qr(factors.A.T)
    return left, factors.scaling * (upper_b @ factors.M @ upper_a.T), right


def update_bases(factors: Factors, rtol: float | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Orthonormal bases of the column space (out, rank) and the row space (in, rank) of delta_W; see update_angles."""
    left, core, right = _core(factors)
    u, values, vt = torch.linalg.svd(core, full_matrices=False)
    if rtol is None:
        rtol = max(factors.B.shape[0], factors.A.shape[1]) * torch.finfo(torch.float64).eps
    keep = values > rtol * values[:1] if len(values) else values > 0
    return left @ u[:, keep], right @ vt[keep].T


# ---------------------------------------------------------------------------------------------------------- helpers


def _matrix(matrix: torch.Tensor) -> torch.Tensor:
    matrix = torch.as_tensor(matrix).detach().to("cpu", torch.float64)
    if matrix.ndim != 2:
        raise UserError(f"expected a matrix, found shape {tuple(matrix.shape)}")
    if not torch.isfinite(matrix).all():
        raise UserError("matrix holds NaN or infinity; expected finite numbers")
    return matrix


def _square(matrix: torch.Tensor) -> torch.Tensor:
    matrix = _matrix(matrix)
    if matrix.shape[0] != matrix.shape[1] or not len(matrix):
        raise UserError(f"mixer has shape {tuple(matrix.shape)}; expected a square matrix (r, r)")
    return matrix
