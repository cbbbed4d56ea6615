"""Subspace mathematics: known answers, identities over random factors, and saved adapters."""

from __future__ import annotations

import json
import math

import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from moslora_core import MoSLoraConfig
from moslora_core.errors import UserError
from moslora_core.subspaces import (
    Factors,
    adapter_factors,
    condition_number,
    distance_from_start,
    effective_rank,
    effective_scale,
    knock_out,
    mixer_spectrum,
    orthonormal_basis,
    principal_angles,
    rank_one_term,
    rank_one_terms,
    update_angles,
    update_spectrum,
    with_mixer,
)

TIGHT = {"rtol": 1e-9, "atol": 1e-11}


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def random_factors(r: int, out: int, inp: int, seed: int, scaling: float = 2.0) -> Factors:
    return Factors(
        gaussian(r, inp, seed=seed), gaussian(r, r, seed=seed + 1), gaussian(out, r, seed=seed + 2), scaling
    )


def two_subspaces(r: int) -> torch.Tensor:
    return torch.eye(r // 2, dtype=torch.float64).repeat(2, 2)


sizes = st.tuples(st.integers(1, 6), st.integers(1, 9), st.integers(1, 9), st.integers(0, 2**31))
quick = settings(max_examples=40, deadline=None)


# --------------------------------------------------------------------------------------------------- rank-one terms


@quick
@given(sizes, st.floats(-4, 4))
def test_the_rank_one_terms_add_up_to_the_update(size, scaling):
    f = random_factors(*size, scaling=scaling)
    total = sum(rank_one_term(f, i, j) for i in range(f.r) for j in range(f.r))
    torch.testing.assert_close(total, f.delta(), **TIGHT)
    terms = rank_one_terms(f)
    expected = torch.tensor([[float(rank_one_term(f, i, j).norm()) for j in range(f.r)] for i in range(f.r)])
    torch.testing.assert_close(terms.norms, expected.double(), rtol=1e-6, atol=1e-9)


@quick
@given(sizes)
def test_the_parts_and_their_cosine_give_back_the_norm(size):
    f = random_factors(*size)
    t = rank_one_terms(f)
    assert t.total_norm == pytest.approx(float(f.delta().norm()), rel=1e-9)
    squared = t.diagonal_norm**2 + t.mixed_norm**2 + 2 * t.cosine * t.diagonal_norm * t.mixed_norm
    assert squared == pytest.approx(t.total_norm**2, rel=1e-7, abs=1e-9)
    assert 0 <= t.mixed_share <= 1
    diagonal = f.scaling * f.B @ torch.diag(f.M.diagonal()) @ f.A
    assert t.diagonal_norm == pytest.approx(float(diagonal.norm()), rel=1e-9)


def test_plain_lora_has_no_mixed_part():
    f = with_mixer(random_factors(4, 5, 6, 0), torch.eye(4))
    t = rank_one_terms(f)
    assert (t.mixed_norm, t.mixed_share, t.cosine) == (0.0, 0.0, 0.0)
    assert torch.count_nonzero(t.norms) == 4


def test_two_subspaces_mixing_adds_the_cross_terms_of_equation_3():
    r = 6
    f = with_mixer(random_factors(r, 7, 8, 3, scaling=1.0), two_subspaces(r))
    A1, A2 = f.A.chunk(2)
    B1, B2 = f.B.chunk(2, dim=1)
    torch.testing.assert_close(f.delta(), (B1 + B2) @ (A1 + A2), **TIGHT)
    t = rank_one_terms(f)
    assert torch.count_nonzero(t.norms) == 2 * r
    assert t.mixed_norm == pytest.approx(float((B1 @ A2 + B2 @ A1).norm()), rel=1e-9)


def test_orthogonal_terms_share_the_update_by_their_weights():
    # With orthonormal rows of A and columns of B the terms are orthogonal and their norms are the weights.
    M = torch.tensor([[3.0, 4.0], [0.0, 0.0]])
    t = rank_one_terms(Factors(torch.eye(2, 5), M, torch.eye(6, 2), 0.5))
    torch.testing.assert_close(t.norms, 0.5 * M.double())
    assert (t.diagonal_norm, t.mixed_norm, t.total_norm) == pytest.approx((1.5, 2.0, 2.5))
    assert t.mixed_share == pytest.approx(16 / 25)
    assert t.cosine == 0.0


def test_opposed_parts_have_a_cosine_of_minus_one():
    ones = torch.ones(2, 3)
    t = rank_one_terms(Factors(ones, torch.tensor([[1.0, -1.0], [0.0, 0.0]]), ones.T, 1.0))
    assert t.cosine == pytest.approx(-1.0)
    assert t.total_norm == pytest.approx(0.0, abs=1e-12)


def test_an_untrained_adapter_is_a_zero_update_without_nan():
    f = Factors(gaussian(3, 4), gaussian(3, 3), torch.zeros(5, 3), 2.0)
    t = rank_one_terms(f)
    assert (t.diagonal_norm, t.mixed_norm, t.mixed_share, t.cosine) == (0.0, 0.0, 0.0, 0.0)
    assert torch.equal(t.norms, torch.zeros(3, 3, dtype=torch.float64))
    assert len(update_angles(f, f).rows) == 0
    assert torch.equal(update_spectrum(f), torch.zeros(3, dtype=torch.float64))


@quick
@given(sizes, st.data())
def test_a_knock_out_removes_exactly_its_terms(size, data):
    f = random_factors(*size)
    index = st.integers(0, f.r - 1)
    pairs = data.draw(st.lists(st.tuples(index, index), unique=True))
    before = f.M.clone()
    changed = with_mixer(f, knock_out(f, pairs))
    removed = sum((rank_one_term(f, i, j) for i, j in pairs), torch.zeros_like(f.delta()))
    torch.testing.assert_close(changed.delta() + removed, f.delta(), **TIGHT)
    assert torch.equal(f.M, before)


@pytest.mark.parametrize("pair", [(3, 0), (0, 3), (-1, 0)])
def test_a_knock_out_outside_the_mixer_is_refused(pair):
    with pytest.raises(UserError, match=r"outside 0\.\.2"):
        knock_out(random_factors(3, 4, 5, 0), [pair])


def test_factors_that_do_not_fit_are_refused():
    with pytest.raises(UserError, match="do not fit"):
        Factors(torch.zeros(3, 4), torch.eye(2), torch.zeros(5, 3))
    with pytest.raises(UserError, match="M holds NaN"):
        Factors(torch.zeros(1, 4), torch.tensor([[math.nan]]), torch.zeros(5, 1))


# ------------------------------------------------------------------------------------------------------------ mixer


@quick
@given(st.integers(1, 12), st.integers(0, 2**31))
def test_an_orthogonal_mixer_has_ones_for_a_spectrum_and_changes_no_size(r, seed):
    Q = torch.linalg.qr(gaussian(r, r, seed=seed)).Q
    torch.testing.assert_close(mixer_spectrum(Q), torch.ones(r, dtype=torch.float64))
    assert condition_number(Q) == pytest.approx(1.0)
    assert effective_rank(Q) == pytest.approx(r)
    assert effective_scale(Q, gaussian(r, 7, seed=seed)) == pytest.approx(1.0)


@pytest.mark.parametrize("r", [2, 4, 16])
def test_the_two_subspaces_mixer_has_rank_r_over_2(r):
    M = two_subspaces(r)
    values = mixer_spectrum(M)
    torch.testing.assert_close(values, torch.tensor([2.0] * (r // 2) + [0.0] * (r // 2), dtype=torch.float64))
    assert effective_rank(M) == pytest.approx(r / 2)
    assert condition_number(M) == math.inf
    angles = update_angles(with_mixer(random_factors(r, 20, 20, 0), M), random_factors(r, 20, 20, 5))
    assert len(angles.rows) == len(angles.columns) == r // 2


def test_known_conditions_and_ranks():
    assert condition_number(torch.diag(torch.tensor([8.0, 2.0]))) == pytest.approx(4.0)
    assert condition_number(torch.zeros(3, 3)) == math.inf
    assert effective_rank(torch.zeros(3, 3)) == 0.0
    assert effective_rank(torch.ones(3, 5)) == pytest.approx(1.0)
    # exp(H(3/4, 1/4))
    assert effective_rank(torch.diag(torch.tensor([3.0, 1.0]))) == pytest.approx(4 / 3**0.75)


def test_distances_from_the_start():
    d = distance_from_start(torch.eye(4) * 3, torch.eye(4))
    assert (d.absolute, d.relative) == pytest.approx((4.0, 2.0))
    zero = torch.zeros(2, 2)
    assert distance_from_start(zero, zero).relative == 0.0
    assert distance_from_start(torch.eye(2), zero).relative == math.inf
    with pytest.raises(UserError, match="differ"):
        distance_from_start(torch.eye(2), torch.eye(3))


def test_the_kaiming_uniform_start_shrinks_a_by_about_root_three():
    r = 64
    M = torch.empty(r, r, dtype=torch.float64)
    nn.init.kaiming_uniform_(M, a=math.sqrt(5), generator=torch.Generator().manual_seed(0))
    assert effective_scale(M, gaussian(r, 256)) == pytest.approx(1 / math.sqrt(3), rel=0.03)
    assert effective_scale(M, torch.zeros(r, 4)) == 0.0


@pytest.mark.parametrize("bad", [torch.zeros(2, 3), torch.zeros(0, 0), torch.zeros(3)])
def test_a_mixer_that_is_not_square_is_refused(bad):
    with pytest.raises(UserError, match=r"square|matrix"):
        mixer_spectrum(bad)


# -------------------------------------------------------------------------------------------------- principal angles


@quick
@given(st.integers(2, 9), st.integers(1, 5), st.integers(1, 5), st.integers(0, 2**31))
def test_angles_agree_with_scipy(n, p, q, seed):
    P, Q = gaussian(n, min(n, p), seed=seed), gaussian(n, min(n, q), seed=seed + 1)
    expected = torch.from_numpy(scipy.linalg.subspace_angles(P.numpy(), Q.numpy()))
    # SciPy 1.17 may take a small angle from its cosine when others are large, hence no better than sqrt(eps).
    torch.testing.assert_close(principal_angles(P, Q), expected, rtol=1e-7, atol=1e-7)


@quick
@given(st.integers(1, 5), st.integers(0, 2**31))
def test_angles_do_not_depend_on_the_bases(k, seed):
    P, Q = gaussian(9, k, seed=seed), gaussian(9, k, seed=seed + 1)
    # Orthogonal times a well-conditioned diagonal: invertible without amplifying rounding.
    mix = torch.linalg.qr(gaussian(k, k, seed=seed + 2)).Q * torch.linspace(0.5, 3.0, k, dtype=torch.float64)
    torch.testing.assert_close(principal_angles(P @ mix, Q), principal_angles(P, Q), rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(principal_angles(Q, P), principal_angles(P, Q), rtol=1e-9, atol=1e-12)
    assert float(principal_angles(P, P @ mix).max()) < 1e-12


@pytest.mark.parametrize("angle", [0.0, 1e-12, 1e-9, 1e-4, 0.3, math.pi / 4, 1.2, math.pi / 2 - 1e-9, math.pi / 2])
def test_a_known_angle_is_found_at_every_size(angle):
    P = torch.tensor([[1.0], [0.0], [0.0]])
    Q = torch.tensor([[math.cos(angle)], [math.sin(angle)], [0.0]], dtype=torch.float64)
    assert float(principal_angles(P, Q)) == pytest.approx(angle, rel=1e-9, abs=1e-15)


def test_dependent_columns_add_no_direction():
    P = torch.tensor([[1.0, 2.0, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    assert orthonormal_basis(P).shape == (3, 1)
    assert principal_angles(P, torch.eye(3)[:, 1:2]).tolist() == [math.pi / 2]
    assert len(principal_angles(P, torch.zeros(3, 2))) == 0
    with pytest.raises(UserError, match="3 and 4 rows"):
        principal_angles(P, torch.eye(4))


@quick
@given(st.integers(1, 4), st.integers(0, 2**31))
def test_update_angles_are_those_of_the_update_itself(r, seed):
    first, second = random_factors(r, 8, 7, seed), random_factors(r, 8, 7, seed + 10)
    angles = update_angles(first, second, rtol=1e-8)
    columns = principal_angles(first.delta(), second.delta(), 1e-8)
    torch.testing.assert_close(angles.columns, columns, rtol=1e-5, atol=1e-6)
    rows = principal_angles(first.delta().T, second.delta().T, 1e-8)
    torch.testing.assert_close(angles.rows, rows, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(update_spectrum(first), torch.linalg.svdvals(first.delta())[:r], rtol=1e-7, atol=1e-9)


def test_an_invertible_mixer_turns_no_subspace():
    f = random_factors(4, 12, 11, 0)
    same = update_angles(f, with_mixer(f, gaussian(4, 4, seed=9)))
    assert float(torch.cat([same.columns, same.rows]).max()) < 1e-12
    with pytest.raises(UserError, match="expected one module"):
        update_angles(f, random_factors(4, 12, 10, 0))


# ----------------------------------------------------------------------------------------------------------- loading


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.q = nn.Linear(8, 6)
        self.k = nn.Linear(6, 10)
        self.conv = nn.Conv2d(4, 8, 3, padding=1)
        self.grouped = nn.Conv2d(4, 8, 3, padding=1, groups=2)

    def forward(self, ids):
        return self.k(self.q(self.embed(ids)))


def randomise(model: nn.Module, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)


@pytest.mark.parametrize("plain", [True, False], ids=["lora", "moslora"])
@pytest.mark.parametrize("rslora", [True, False], ids=["rslora", "alpha_over_r"])
def test_factors_of_an_adapter_in_memory_and_on_disk_give_its_update(tmp_path, plain, rslora):
    settings = {
        "r": 4,
        "lora_alpha": 8,
        "use_rslora": rslora,
        "target_modules": ["embed", "q", "k", "conv"],
        "rank_pattern": {"k": 2, r"[qz]": 6},
        "alpha_pattern": {"k": 3},
    }
    model = get_peft_model(Net(), (LoraConfig if plain else MoSLoraConfig)(**settings))
    randomise(model)
    model.save_pretrained(tmp_path)
    memory, disk = adapter_factors(model), adapter_factors(tmp_path)
    assert set(memory) == set(disk) == {"embed", "q", "k", "conv"}
    for name, layer in model.base_model.model.named_children():
        if name not in memory:
            continue
        expected = layer.get_delta_weight("default").detach().double()
        expected = expected.T if name == "embed" else expected.flatten(1)
        for factors in (memory[name], disk[name]):
            torch.testing.assert_close(factors.delta(), expected, rtol=1e-4, atol=1e-5)
            assert factors.r == {"k": 2, "q": 6}.get(name, 4)
            assert torch.equal(factors.M, torch.eye(factors.r, dtype=torch.float64)) == plain


@pytest.mark.parametrize("plain", [True, False], ids=["lora", "moslora"])
def test_factors_of_a_grouped_convolution_are_the_map_that_it_applies(plain):
    config = {"r": 4, "lora_alpha": 8, "target_modules": ["grouped"]}
    model = get_peft_model(Net(), (LoraConfig if plain else MoSLoraConfig)(**config))
    randomise(model)
    layer = model.base_model.model.grouped
    factors = adapter_factors(model)["grouped"]
    x = torch.randn(2, 4, 5, 5)
    update = layer.lora_B["default"](layer.lora_A["default"](x)) * layer.scaling["default"]
    kernel = factors.delta().view(8, 4, 3, 3).float()
    torch.testing.assert_close(nn.functional.conv2d(x, kernel, padding=1), update, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("plain", [True, False], ids=["lora", "moslora"])
def test_both_projections_of_multihead_attention_are_read(plain):
    config = {"r": 4, "target_modules": ["attn"], "alpha_pattern": {"attn": 12}}
    net = nn.ModuleDict({"attn": nn.MultiheadAttention(8, 2)})
    model = get_peft_model(net, (LoraConfig if plain else MoSLoraConfig)(**config))
    randomise(model)
    factors = adapter_factors(model)
    layer = model.base_model.model["attn"]
    for name, projection in (("attn", layer), ("attn.base_layer.out_proj", layer.base_layer.out_proj)):
        delta = projection.get_delta_weight("default").detach().double()
        torch.testing.assert_close(factors[name].delta(), delta, rtol=1e-4, atol=1e-4)


def test_a_named_adapter_is_read_and_an_absent_one_refused():
    model = get_peft_model(Net(), MoSLoraConfig(r=2, target_modules=["q"]), adapter_name="first")
    model.add_adapter("second", MoSLoraConfig(r=3, target_modules=["k"], mixer="identity"))
    assert list(adapter_factors(model, "first")) == ["q"]
    assert adapter_factors(model, "second")["k"].r == 3
    with pytest.raises(UserError, match=r"no adapter 'default'.*first.*second"):
        adapter_factors(model)
    with pytest.raises(UserError, match="no adapter"):
        adapter_factors(Net())


@pytest.fixture
def saved(tmp_path):
    model = get_peft_model(Net(), MoSLoraConfig(r=4, target_modules=["q", "k"]))
    model.save_pretrained(tmp_path)
    return tmp_path


def test_damaged_adapters_are_refused_by_name(saved, tmp_path):
    weights = saved / "adapter_model.safetensors"
    tensors = load_file(weights)
    q = "base_model.model.q."
    without = {key: value for key, value in tensors.items() if not key.startswith(q + "lora_B")}
    raw, mixer = tensors[q + "lora_B.raw"], tensors[q + "lora_B.mixer"]
    for broken, message in [
        (without | {q + "lora_B.raw": raw}, r"q: has no lora_B\.mixer"),
        (without | {q + "lora_B.mixer": mixer}, "q: has no lora_B"),
        (tensors | {q + "lora_B.mixer": torch.eye(3)}, r"M \(3, 3\)"),
        (tensors | {q + "lora_B.raw": torch.zeros(6, 2)}, r"B \(6, 2\)"),
        ({"x": torch.zeros(1)}, "has no lora_A"),
    ]:
        save_file(broken, weights)
        with pytest.raises(UserError, match=message):
            adapter_factors(saved)
    save_file(tensors, weights)
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(UserError, match="not a complete safetensors file"):
        adapter_factors(saved)
    config = saved / "adapter_config.json"
    content = json.loads(config.read_text())
    save_file(tensors, weights)
    config.write_text(json.dumps(content | {"lora_alpha": None}))
    with pytest.raises(UserError, match="lora_alpha must be a finite number, found None"):
        adapter_factors(saved)
    config.write_text(json.dumps(content | {"peft_type": "LOKR"}))
    with pytest.raises(UserError, match="LOKR; expected LORA or MOSLORA"):
        adapter_factors(saved)
    config.write_text("[]")
    with pytest.raises(UserError, match="expected an object"):
        adapter_factors(saved)
    with pytest.raises(UserError, match="no such folder"):
        adapter_factors(tmp_path / "absent")
