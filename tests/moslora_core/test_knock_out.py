"""Knock-out: which terms go, against updates computed term by term in numpy, and that the copies still load."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.numpy import load_file, save_file

from moslora_core.adapter_files import write_adapter
from moslora_core.errors import UserError
from moslora_core.fold import fold_adapter
from moslora_core.knock_out import (
    Terms,
    knock_out_adapter,
    main,
    removed_pairs,
    removed_ranks,
    terms_of,
    without_terms,
)
from moslora_core.mixer import seeded_generator
from moslora_core.subspaces import Factors, adapter_factors, rank_one_term

from .kinds import EMBEDDING, FEW_MIXERS, GROUPED2D, LINEAR, LLAMA, MIXERS, Kind, lora_layers, scramble

R = 4
quick = settings(max_examples=40, deadline=None)


def saved(tmp_path, kind: Kind = LINEAR, name: str = "adapter", **given):
    model = scramble(kind.model(**given))
    model.save_pretrained(tmp_path / name)
    return tmp_path / name


def arrays(folder) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A, M and B of the only module, as they lie on the disk."""
    tensors = {
        key.split("layer.", 1)[1]: value for key, value in load_file(folder / "adapter_model.safetensors").items()
    }
    mixer = tensors.get("lora_B.mixer", np.eye(R))
    A = tensors["lora_A.weight"]
    return A, mixer, tensors.get("lora_B.raw", tensors.get("lora_B.weight"))


def update(folder) -> np.ndarray:
    """delta_W without its scaling, term by term."""
    A, M, B = (matrix.astype(np.float64) for matrix in arrays(folder))
    return sum(M[i, j] * np.outer(B[:, i], A[j]) for i in range(R) for j in range(R))


def pairs(mask: torch.Tensor) -> list[tuple[int, int]]:
    return [(i, j) for i, j in mask.nonzero().tolist()]


def terms(folder) -> list[tuple[float, int, int, np.ndarray]]:
    """(size, i, j, term), the smallest first."""
    A, M, B = (matrix.astype(np.float64) for matrix in arrays(folder))
    found = [(i, j, M[i, j] * np.outer(B[:, i], A[j])) for i in range(R) for j in range(R)]
    return sorted(((np.linalg.norm(term), i, j, term) for i, j, term in found), key=lambda entry: entry[0])


# ---------------------------------------------------------------------------------------------------------- what goes


@pytest.mark.parametrize("order", ["weakest", "strongest"])
@pytest.mark.parametrize("count", [0, 1, 5, 16])
def test_the_terms_at_one_end_are_gone(tmp_path, order, count):
    adapter = saved(tmp_path)
    out = knock_out_adapter(adapter, tmp_path / "out", zero_pairs=count, order=order)
    ordered = terms(adapter) if order == "weakest" else terms(adapter)[::-1]
    left = sum((term for *_, term in ordered[count:]), np.zeros((8, 6)))
    np.testing.assert_allclose(update(out), left, atol=1e-7)
    assert np.count_nonzero(arrays(out)[1] == 0) == count
    for before, after in zip(arrays(adapter)[::2], arrays(out)[::2], strict=True):
        np.testing.assert_array_equal(before, after)


@pytest.mark.parametrize("order", ["weakest", "strongest"])
@pytest.mark.parametrize("keep", [0, 1, 3, 4])
def test_ranks_go_with_their_row_and_column(tmp_path, order, keep):
    adapter = saved(tmp_path)
    out = knock_out_adapter(adapter, tmp_path / "out", keep=keep, order=order)
    sizes = np.zeros(R)
    for size, i, j, _ in terms(adapter):
        for rank in {i, j}:
            sizes[rank] += size**2
    weakest_first = np.argsort(sizes)
    stay = set(weakest_first[R - keep :] if order == "weakest" else weakest_first[:keep])
    left = [term for _, i, j, term in terms(adapter) if {i, j} <= stay]
    np.testing.assert_allclose(update(out), sum(left, np.zeros((8, 6))), atol=1e-7)
    assert np.count_nonzero(arrays(out)[1]) == keep**2


@pytest.mark.parametrize("numbers", [{"zero_pairs": 2}, {"keep": 2}])
def test_plain_lora_has_diagonal_subspaces_alone(tmp_path, numbers):
    base = LINEAR.base()
    model = scramble(get_peft_model(base, LoraConfig(r=R, lora_alpha=8, target_modules=["layer"])))
    model.save_pretrained(tmp_path / "lora")
    A, _, B = arrays(tmp_path / "lora")
    out = knock_out_adapter(tmp_path / "lora", tmp_path / "out", **numbers)
    strongest = np.argsort(np.linalg.norm(B, axis=0) * np.linalg.norm(A, axis=1))[2:]
    np.testing.assert_allclose(update(out), sum(np.outer(B[:, i], A[i]) for i in strongest), atol=1e-7)
    assert json.loads((out / "adapter_config.json").read_text())["peft_type"] == "LORA"
    with pytest.raises(UserError, match="expected 0 to 4"):
        knock_out_adapter(tmp_path / "lora", tmp_path / "other", zero_pairs=5)


@pytest.mark.parametrize("mixer", list(MIXERS))
@pytest.mark.parametrize("kind", [LINEAR, GROUPED2D, EMBEDDING, LLAMA], ids=str)
def test_the_copy_loads_and_applies_what_is_left(tmp_path, kind, mixer):
    adapter = saved(tmp_path, kind, **MIXERS[mixer])
    before = adapter_factors(adapter)
    out = knock_out_adapter(adapter, tmp_path / "out", keep=2)
    after = adapter_factors(out)
    model = PeftModel.from_pretrained(kind.base(), out)
    for name, factors in before.items():
        left = pairs(terms_of(factors).there & ~removed_ranks(terms_of(factors), factors.r - 2))
        assert len(left) == (4 if factors.mixed else 2)
        expected = sum(rank_one_term(factors, i, j) for i, j in left)
        torch.testing.assert_close(after[name].delta(), expected, atol=1e-7, rtol=1e-6)
    loaded = adapter_factors(model)
    assert lora_layers(model) and loaded.keys() == after.keys()
    for name, factors in loaded.items():
        torch.testing.assert_close(factors.delta(), after[name].delta())


def test_a_knocked_out_adapter_folds(tmp_path):
    out = knock_out_adapter(saved(tmp_path), tmp_path / "out", zero_pairs=9)
    folded = fold_adapter(out, tmp_path / "folded")
    np.testing.assert_allclose(update(folded), update(out), atol=1e-6)


def test_modules_are_ranked_by_themselves(tmp_path):
    adapter = saved(tmp_path, LLAMA)
    out = knock_out_adapter(adapter, tmp_path / "out", zero_pairs=5)
    for factors in adapter_factors(out).values():
        assert torch.count_nonzero(factors.M == 0) == 5


def test_everything_else_stays(tmp_path):
    adapter = saved(tmp_path)
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path) | {"base_model.model.head.weight": np.ones((3, 8), np.float32)}
    save_file(tensors, path)
    (adapter / "README.md").write_text("card")
    out = knock_out_adapter(adapter, tmp_path / "out", zero_pairs=3)
    copied = load_file(out / "adapter_model.safetensors")
    assert copied.keys() == tensors.keys() and (out / "README.md").read_text() == "card"
    changed = {key for key in tensors if not np.array_equal(tensors[key], copied[key])}
    assert changed == {"base_model.model.layer.lora_B.mixer"}
    config, before = (json.loads((folder / "adapter_config.json").read_text()) for folder in (out, adapter))
    assert config == before


# --------------------------------------------------------------------------------------------------------- identities


@st.composite
def adapters(draw):
    r, out, inp = draw(st.integers(1, 5)), draw(st.integers(1, 6)), draw(st.integers(1, 6))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    # Few distinct values, so that sizes are often alike or zero.
    A, M, B = (torch.randint(-2, 3, shape, generator=generator).double() for shape in ((r, inp), (r, r), (out, r)))
    mixed = draw(st.booleans())
    return Factors(A, M if mixed else torch.eye(r), B, draw(st.sampled_from([0.5, 2.0])), mixed)


@quick
@given(adapters(), st.data())
def test_weakest_and_strongest_part_the_update(factors, data):
    found = terms_of(factors)
    assert found.number == (factors.r**2 if factors.mixed else factors.r) == int(found.there.sum())
    number = data.draw(st.integers(0, found.number))
    weakest = pairs(removed_pairs(found, number))
    strongest = pairs(removed_pairs(found, found.number - number, "strongest"))
    assert len(weakest) == number and sorted(weakest + strongest) == pairs(found.there)
    size = {pair: float(rank_one_term(factors, *pair).norm()) for pair in pairs(found.there)}
    assert max((size[p] for p in weakest), default=0) <= min((size[p] for p in strongest), default=np.inf) + 1e-9
    total = sum((rank_one_term(factors, *pair) for pair in weakest + strongest), torch.zeros_like(factors.delta()))
    torch.testing.assert_close(total, factors.delta())


@quick
@given(adapters(), st.integers(0, 2**31), st.data())
def test_a_random_order_is_the_seeds_own_and_nested(factors, seed, data):
    """What goes first stays gone, so that a curve over the numbers follows one order."""

    def of(number, seed=seed, removed=removed_pairs):
        return removed(terms_of(factors), number, "random", torch.Generator().manual_seed(seed))

    most = terms_of(factors).number
    few, more = sorted(data.draw(st.tuples(st.integers(0, most), st.integers(0, most))))
    assert int(of(few).sum()) == few and torch.equal(of(few), of(few))
    assert not (of(few) & ~of(more)).any() and not (of(more) & ~terms_of(factors).there).any()
    ranks = min(few, factors.r)
    assert not (of(ranks, removed=removed_ranks) & ~of(min(more, factors.r), removed=removed_ranks)).any()


def test_random_orders_take_every_term_alike_and_ignore_sizes():
    sizes = torch.arange(16.0).view(4, 4)
    counts = torch.zeros(4, 4)
    for seed in range(400):
        counts += removed_pairs(Terms(sizes, True), 4, "random", torch.Generator().manual_seed(seed))
    # 400 draws of 4 from 16: each is expected 100 times, with a deviation of 8.7.
    assert counts.sum() == 1600 and counts.min() > 65 and counts.max() < 135


@quick
@given(adapters())
def test_of_nothing_it_is_the_identity_and_of_everything_zero(tmp_path_factory, factors):
    folder = tmp_path_factory.mktemp("identity")
    names = ("lora_B.raw", "lora_B.mixer") if factors.mixed else ("lora_B.weight", None)
    tensors = {"lora_A.weight": factors.A, names[0]: factors.B} | ({names[1]: factors.M} if factors.mixed else {})
    config = {"peft_type": "MOSLORA" if factors.mixed else "LORA", "r": factors.r, "lora_alpha": factors.r}
    write_adapter(folder / "in", config, {f"base_model.model.layer.{name}": t for name, t in tensors.items()})

    def bytes_of(path: Path) -> bytes:
        return (path / "adapter_model.safetensors").read_bytes()

    for name, numbers in {"a": {"zero_pairs": 0}, "b": {"keep": factors.r}}.items():
        assert bytes_of(knock_out_adapter(folder / "in", folder / name, **numbers)) == bytes_of(folder / "in")
    for name, numbers in {"c": {"zero_pairs": terms_of(factors).number}, "d": {"keep": 0}}.items():
        (left,) = adapter_factors(knock_out_adapter(folder / "in", folder / name, **numbers)).values()
        assert not left.delta().any()


@quick
@given(adapters(), st.data())
def test_of_plain_lora_ranks_and_pairs_are_the_same(factors, data):
    number = data.draw(st.integers(0, factors.r))
    order = data.draw(st.sampled_from(["weakest", "strongest"]))
    if not factors.mixed:
        found = terms_of(factors)
        assert torch.equal(removed_ranks(found, number, order), removed_pairs(found, number, order))


# ---------------------------------------------------------------------------------------------------------- in memory


@pytest.mark.parametrize("mixer", list(FEW_MIXERS))
@pytest.mark.parametrize("kind", [LINEAR, GROUPED2D, EMBEDDING, LLAMA], ids=str)
def test_a_model_without_terms_computes_what_the_copy_does_and_is_itself_again(tmp_path, kind, mixer):
    adapter = saved(tmp_path, kind, **FEW_MIXERS[mixer])
    model = PeftModel.from_pretrained(kind.base(), adapter).eval()
    copy = knock_out_adapter(adapter, tmp_path / "out", zero_pairs=3, order="random", seed=5)
    expected = PeftModel.from_pretrained(kind.base(), copy).eval()
    removed = {
        name: removed_pairs(terms_of(factors), 3, "random", seeded_generator(5, name))
        for name, factors in adapter_factors(adapter).items()
    }
    x = kind.inputs(3)
    with torch.no_grad():
        before, left = model(x), expected(x)
        state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        with without_terms(model, removed):
            assert torch.equal(model(x), left)
        assert not torch.equal(before, left) and torch.equal(model(x), before)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_a_model_is_itself_again_after_an_error(tmp_path):
    model = PeftModel.from_pretrained(LINEAR.base(), saved(tmp_path))
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(KeyError), without_terms(model, {"layer": torch.ones(R, R, dtype=torch.bool)}):
        assert not torch.equal(adapter_factors(model)["layer"].M, state["base_model.model.layer.lora_B.default.mixer"])
        raise KeyError
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


# ------------------------------------------------------------------------------------------------------------ command


def test_the_command_writes_a_copy(tmp_path, capsys):
    adapter = saved(tmp_path)
    assert main([str(adapter), str(tmp_path / "a"), "--zero-pairs", "3", "--order", "strongest"]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'a'}\n"
    command = [sys.executable, "-m", "moslora_core.knock_out", str(adapter), str(tmp_path / "b"), "--keep", "1"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert np.count_nonzero(arrays(tmp_path / "a")[1] == 0) == 3
    assert np.count_nonzero(arrays(tmp_path / "b")[1]) == 1


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["{in}", "{out}"], "one of the arguments --keep --zero-pairs is required"),
        (["{in}", "{out}", "--keep", "1", "--zero-pairs", "1"], "not allowed with"),
        (["{in}", "{out}", "--keep", "5"], "keep is 5; expected 0 to 4"),
        (["{in}", "{out}", "--keep", "-1"], "keep is -1; expected 0 to 4"),
        (["{in}", "{out}", "--zero-pairs", "17"], "zero_pairs is 17; expected 0 to 16"),
        (["{in}", "{out}", "--zero-pairs", "few"], "invalid int value: 'few'"),
        (["{in}", "{out}", "--keep", "1", "--order", "largest"], "'largest'"),
        (["{in}/none", "{out}", "--keep", "1"], "no such folder"),
        (["{in}", "{in}", "--keep", "1"], "exists and is not empty"),
    ],
)
def test_bad_input_is_one_line(tmp_path, capsys, arguments, expected):
    names = {"in": saved(tmp_path), "out": tmp_path / "out"}
    assert main([argument.format(**names) for argument in arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and expected in error
    assert not (tmp_path / "out").exists()


def test_a_call_without_one_number_or_of_another_order_is_refused(tmp_path):
    for given_ in ({}, {"keep": 1, "zero_pairs": 1}):
        with pytest.raises(UserError, match="one of zero_pairs and keep"):
            knock_out_adapter(tmp_path, tmp_path / "out", **given_)
    with pytest.raises(UserError, match="order must be one of"):
        knock_out_adapter(tmp_path, tmp_path / "out", keep=1, order="largest")
