"""Mixers as matrices: their distributions, seeds, and the two ways of folding."""

from __future__ import annotations

import hashlib
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moslora_core import MIXER_INITS, UserError, fold_into_a, fold_into_b, init_mixer
from moslora_core.mixer import seeded_generator, two_subspaces

from .reference import two_subspaces_written_out

INITS = [*MIXER_INITS, "two_subspaces"]


def test_kaiming_uniform_is_uniform_within_one_over_root_r():
    torch.manual_seed(0)
    M = init_mixer("kaiming_uniform", 256)
    bound = 1 / math.sqrt(256)
    assert M.abs().max() <= bound
    assert M.abs().max() > 0.999 * bound
    assert M.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.01)


def test_orthogonal_is_orthogonal():
    torch.manual_seed(0)
    M = init_mixer("orthogonal", 32, dtype=torch.float64)
    assert torch.allclose(M @ M.T, torch.eye(32, dtype=torch.float64), atol=1e-5)


def test_gaussian_is_standard_normal():
    torch.manual_seed(0)
    M = init_mixer("gaussian", 256)
    assert M.std().item() == pytest.approx(1, rel=0.02)
    assert abs(M.mean().item()) < 0.02


def test_fixed_matrices():
    eye = torch.eye(3)
    assert torch.equal(init_mixer("identity", 6), torch.eye(6))
    assert torch.equal(init_mixer("zero", 6), torch.zeros(6, 6))
    assert torch.equal(init_mixer("two_subspaces", 6), torch.cat([torch.cat([eye, eye]), torch.cat([eye, eye])], 1))


def test_kaiming_mixer_shrinks_a_by_root_three():
    torch.manual_seed(0)
    A = torch.randn(64, 512)
    ratio = (init_mixer("kaiming_uniform", 64) @ A).norm() / A.norm()
    assert ratio.item() == pytest.approx(1 / math.sqrt(3), rel=0.03)


def test_rank_one_is_legal():
    for init in MIXER_INITS:
        assert init_mixer(init, 1).shape == (1, 1)


@pytest.mark.parametrize("r", [1, 3, 7])
def test_two_subspaces_needs_an_even_rank(r):
    with pytest.raises(UserError, match=f"must be even, found r={r}"):
        init_mixer("two_subspaces", r)


def test_unknown_init_names_the_known():
    with pytest.raises(UserError, match=r"kaiming_uniform, .*two_subspaces, found 'xavier'"):
        init_mixer("xavier", 4)


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_a_seed_is_the_same_draw_in_every_dtype(init, dtype):
    torch.manual_seed(1)
    wide = init_mixer(init, 8)
    torch.manual_seed(1)
    M = init_mixer(init, 8, dtype=dtype)
    assert M.dtype == dtype
    assert torch.equal(M, wide.to(dtype))


@pytest.mark.parametrize("init", INITS)
def test_meta_device_draws_nothing(init):
    torch.manual_seed(1)
    before = torch.get_rng_state()
    M = init_mixer(init, 8, device="meta", dtype=torch.bfloat16)
    assert (M.device.type, M.dtype, M.shape) == ("meta", torch.bfloat16, (8, 8))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("init", INITS)
def test_a_surrounding_device_context_does_not_decide(init):
    torch.manual_seed(1)
    expected = init_mixer(init, 4, device="cpu")
    torch.manual_seed(1)
    with torch.device("meta"):
        M = init_mixer(init, 4, device="cpu")
    assert torch.equal(M, expected)


@pytest.mark.parametrize("init", INITS)
def test_a_generator_leaves_the_global_one_alone(init):
    before = torch.get_rng_state()
    first = init_mixer(init, 4, generator=seeded_generator(3, "layers.0.q_proj"))
    second = init_mixer(init, 4, generator=seeded_generator(3, "layers.0.q_proj"))
    assert torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), before)


def test_seed_and_name_both_decide():
    draws = [init_mixer("gaussian", 4, generator=seeded_generator(*key)) for key in [(0, "a"), (1, "a"), (0, "b")]]
    assert not any(torch.equal(draws[i], draws[j]) for i in range(3) for j in range(i))


def test_the_seed_means_the_same_in_every_process():
    """Python's own hash of a string would not."""
    assert seeded_generator(7, "x").initial_seed() == int(hashlib.sha256(b"7:x").hexdigest()[:16], 16) // 2


shapes = st.tuples(st.integers(1, 6), st.integers(1, 6), st.integers(1, 6), st.integers(0, 2**31))


@settings(max_examples=30, deadline=None)
@given(shapes)
def test_folding_into_either_factor_gives_the_same_update(shape):
    out, r, inner, seed = shape
    generator = torch.Generator().manual_seed(seed)
    A, M, B = (torch.randn(size, generator=generator, dtype=torch.float64) for size in [(r, inner), (r, r), (out, r)])
    assert torch.allclose(fold_into_b(B, M) @ A, B @ fold_into_a(A, M), atol=1e-12)
    assert torch.equal(fold_into_b(B, M), B @ M)
    assert torch.equal(fold_into_a(A, M), M @ A)


@pytest.mark.parametrize("ones", [(), (1,), (1, 1), (1, 1, 1)])
def test_convolutions_keep_their_shape(ones):
    B, M = torch.randn(5, 3, *ones), torch.randn(3, 3)
    assert fold_into_b(B, M).shape == B.shape
    assert torch.allclose(fold_into_b(B, M).flatten(1), B.flatten(1) @ M)
    A = torch.randn(3, 4, *(2 for _ in ones))
    assert fold_into_a(A, M).shape == A.shape
    assert torch.allclose(fold_into_a(A, M), torch.einsum("ij,j...->i...", M, A), atol=1e-6)


@pytest.mark.parametrize("fold", [fold_into_a, fold_into_b])
def test_folding_keeps_the_dtype_of_the_factor(fold):
    factor = torch.randn(4, 4, dtype=torch.bfloat16)
    assert fold(factor, torch.eye(4)).dtype == torch.bfloat16
    assert torch.equal(fold(factor, torch.eye(4)), factor)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 4), st.integers(1, 5), st.integers(1, 5), st.integers(0, 2**31))
def test_two_subspaces_mixing_is_what_the_paper_writes_out(half, inner, out, seed):
    generator = torch.Generator().manual_seed(seed)
    r = 2 * half
    x, A, B = (
        torch.randn(size, generator=generator, dtype=torch.float64) for size in [(3, inner), (r, inner), (out, r)]
    )
    M = two_subspaces(r).double()
    mixed = x @ (B @ M @ A).T
    # Eq 3, in column blocks of the paper's A (rows of ours): x (A1 + A2) (B1 + B2).
    A1, A2, B1, B2 = A[:half].T, A[half:].T, B[:, :half].T, B[:, half:].T
    assert torch.allclose(mixed, x @ (A1 + A2) @ (B1 + B2), atol=1e-12)
    assert torch.allclose(mixed, x @ (A1 @ B1 + A2 @ B2 + A1 @ B2 + A2 @ B1), atol=1e-12)
    assert torch.allclose(mixed, two_subspaces_written_out(x, A, B), atol=1e-12)
    assert torch.linalg.matrix_rank(M) == half
