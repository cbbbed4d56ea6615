"""Numbers of the subspaces inside adapters, against numpy and scipy on whole matrices."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from analysis.load import load_runs
from analysis.subspace import (
    Place,
    by_setting,
    chance_angles,
    drawn_groups,
    groups_of,
    magnitudes,
    mean_angles,
    mean_spectrum,
    module_numbers,
    over_modules,
    over_seeds,
    place_of,
    read_bases,
    read_trace,
    setting_of,
)
from analysis.subspace_files import load_traces
from moslora_core.base_models import adapter_sha256
from moslora_core.errors import UserError
from moslora_core.subspaces import Factors

from . import adapters

SCALING = 2.0  # alpha 6 over r 3


def factors(seed: int, mixed: bool = True, **given) -> Factors:
    A, M, B = adapters.matrices(seed, mixed=mixed, **given)
    A, B = torch.from_numpy(A), torch.from_numpy(B)
    return Factors(A, torch.eye(len(A)) if M is None else torch.from_numpy(M), B, SCALING, mixed)


def entropy_rank(values: np.ndarray) -> float:
    shares = values / values.sum()
    return float(np.exp(-(shares * np.log(shares)).sum()))


def trace_of(runs, record):
    (run,) = [run for run in load_runs(runs.root, "commonsense_reasoning")[0] if str(record.path).endswith(run.path)]
    return read_trace(run, record)


# ------------------------------------------------------------------------------------------------------------ modules


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        ("model.layers.3.self_attn.q_proj", ("", (3,), "q_proj")),
        ("model.language_model.layers.11.mlp.down_proj", ("language_model", (11,), "down_proj")),
        ("model.vision_tower.encoder.layers.0.mlp.fc1", ("vision_tower", (0,), "fc1")),
        ("model.multi_modal_projector.linear_1", ("", (), "model.multi_modal_projector.linear_1")),
        (
            "down_blocks.0.attentions.1.transformer_blocks.2.attn1.to_out.0",
            ("down_blocks", (0, 1, 2), "attn1.to_out.0"),
        ),
        ("mid_block.attentions.0.transformer_blocks.0.attn2.to_q", ("mid_block.attentions", (0, 0), "attn2.to_q")),
        ("model.layers.0", ("", (), "model.layers.0")),
    ],
)
def test_modules_have_a_place(module, expected):
    assert place_of(module) == Place(*expected)


def test_numbers_are_those_of_whole_matrices():
    found = factors(1)
    A, M, B = (matrix.numpy() for matrix in (found.A, found.M, found.B))
    start = adapters.matrices(2)[1].astype(float)
    numbers = module_numbers(found, torch.from_numpy(start))
    diagonal = SCALING * sum(M[i, i] * np.outer(B[:, i], A[i]) for i in range(3))
    mixed = SCALING * sum(M[i, j] * np.outer(B[:, i], A[j]) for i in range(3) for j in range(3) if i != j)
    update = SCALING * B @ M @ A
    square = np.linalg.norm(update) ** 2
    values = np.linalg.svd(M, compute_uv=False)
    of_update = np.linalg.svd(update, compute_uv=False)[:3]
    assert numbers.r == 3
    assert numbers.mixer_values == pytest.approx(values)
    assert numbers.rank == pytest.approx(entropy_rank(values))
    assert numbers.condition == pytest.approx(np.linalg.cond(M))
    assert numbers.distance == pytest.approx(np.linalg.norm(M - start) / np.linalg.norm(start))
    assert numbers.scale == pytest.approx(np.linalg.norm(M @ A) / np.linalg.norm(A))
    assert numbers.update_values == pytest.approx(of_update / of_update[0])
    assert numbers.update_rank == pytest.approx(entropy_rank(of_update))
    assert numbers.diagonal == pytest.approx(np.linalg.norm(diagonal) ** 2 / square)
    assert numbers.mixed == pytest.approx(np.linalg.norm(mixed) ** 2 / square)
    assert numbers.cross == pytest.approx(2 * (diagonal * mixed).sum() / square)
    norms = np.linalg.norm(diagonal), np.linalg.norm(mixed)
    assert numbers.mixed_share == pytest.approx(norms[1] ** 2 / (norms[0] ** 2 + norms[1] ** 2))
    assert numbers.cosine == pytest.approx((diagonal * mixed).sum() / norms[0] / norms[1])


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 6), st.integers(1, 9), st.integers(1, 9), st.integers(0, 2**31), st.booleans())
def test_the_shares_add_up_to_one(r, out, inp, seed, mixed):
    numbers = module_numbers(factors(seed, mixed=mixed, r=r, out=out, inp=inp), None)
    assert numbers.diagonal + numbers.mixed + numbers.cross == pytest.approx(1, rel=1e-6, abs=1e-6)
    assert 0 <= numbers.mixed_share <= 1 and -1 <= numbers.cosine <= 1
    assert numbers.distance is None
    if not mixed or r == 1:
        assert (numbers.diagonal, numbers.mixed, numbers.cross) == pytest.approx((1, 0, 0))
    assert (numbers.rank is None) == (not mixed)


def test_equal_terms_in_independent_directions_have_the_share_that_the_caption_names():
    r = 4
    numbers = module_numbers(Factors(torch.eye(r, 9), torch.ones(r, r), torch.eye(8, r), 1.0), None)
    assert numbers.mixed_share == pytest.approx(1 - 1 / r) and numbers.cosine == pytest.approx(0)


def test_an_update_of_zero_has_no_shares():
    numbers = module_numbers(factors(0, zero=True), None)
    assert numbers.update_values == () and numbers.rank > 0
    shares = (numbers.update_rank, numbers.diagonal, numbers.mixed, numbers.cross, numbers.mixed_share, numbers.cosine)
    assert shares == (None,) * 6
    found = factors(0)
    nothing = module_numbers(Factors(found.A, torch.zeros(3, 3), found.B), torch.zeros(3, 3))
    assert (nothing.rank, nothing.distance, nothing.scale, nothing.condition) == (0, 0, 0, math.inf)


# --------------------------------------------------------------------------------------------------------------- runs


def test_a_trace_has_the_kept_copies_and_the_trained_adapter_last(runs):
    record = adapters.add(runs, "moslora", 1, kept=(0, 20, 50))
    trace = trace_of(runs, record)
    assert list(trace.steps) == [0, 20, 50] and trace.has_mixers
    module = adapters.MODULES[2]
    mixers = {step: adapters.matrices(100 * seed + 2)[1] for step, seed in ((0, 1001), (20, 21001), (50, 1))}
    for step, mixer in mixers.items():
        expected = np.linalg.norm(mixer - mixers[0]) / np.linalg.norm(mixers[0])
        assert trace.steps[step][module].distance == pytest.approx(expected, rel=1e-6), step
    np.testing.assert_array_equal(trace.start[module], np.abs(mixers[0]))
    np.testing.assert_array_equal(trace.end[module], np.abs(mixers[50]))
    assert trace.steps[0][module].mixed_share is None


def test_a_trace_without_copies_has_the_end_alone(runs):
    trace = trace_of(runs, adapters.add(runs, "moslora", 1))
    assert list(trace.steps) == [50] and trace.start is None
    assert all(numbers.distance is None and numbers.rank for numbers in trace.last.values())
    late = trace_of(runs, adapters.add(runs, "moslora", 2, kept=(25,)))
    assert list(late.steps) == [25, 50] and late.start is None


def test_lora_has_no_mixers(runs):
    trace = trace_of(runs, adapters.add(runs, "lora", 1, kept=(0,)))
    assert not trace.has_mixers and trace.last[adapters.MODULES[0]].mixer_values is None
    assert over_modules(trace.last, "mixed_share") is None and over_modules(trace.last, "update_rank") > 0


def test_what_cannot_be_read_is_named(runs):
    adapters.add(runs, "moslora", 1)
    runs.add("base")
    runs.add("moslora", 2)
    (adapters.add(runs, "moslora", 3).adapter_path / "adapter_model.safetensors").write_bytes(b"torn")
    lokr = adapters.add(runs, "lokr", 1)
    (lokr.adapter_path / "adapter_config.json").write_text('{"peft_type": "LOKR"}')
    (adapters.add(runs, "lora", 4, kept=(0,)).kept_adapter_path(0) / "adapter_config.json").unlink()
    changed = adapters.add(runs, "moslora", 4)
    training = changed.results().training
    training.adapter_sha256 = adapter_sha256(lokr.adapter_path)
    changed.set_training(training)
    ((_, _, trained),) = by_setting(load_runs(runs.root, "commonsense_reasoning")[0])
    traces, left_out = load_traces(trained, runs.root)
    assert [(trace.run.method, trace.run.label, trace.run.seed) for trace in traces] == [("moslora", "default", 1)]
    path = "commonsense_reasoning/smoke"
    assert left_out[0].startswith(f"{path}/lokr/default/seed-1: ") and "peft_type is LOKR" in left_out[0]
    assert left_out[1].startswith(f"{path}/lora/default/seed-4: adapters/step-0") and "adapter_config" in left_out[1]
    assert left_out[2] == f"{path}/moslora/default/seed-2: no adapter and no subspaces.json beside the record"
    assert left_out[3].startswith(f"{path}/moslora/default/seed-3: adapter/adapter_model.safetensors: not a complete")
    assert left_out[4].startswith(f"{path}/moslora/default/seed-4: adapter/adapter_config.json is damaged: its sha256")
    assert len(left_out) == 5 and str(runs.root) not in "".join(left_out)


def test_a_setting_is_the_base_model_where_evaluations_name_one(runs, visual):
    runs.add("lora")
    visual.add("lora", base="other/base", quantization="nf4")
    (first,) = load_runs(runs.root, "commonsense_reasoning")[0]
    (second,) = load_runs(visual.root, "visual_instruction")[0]
    assert setting_of(first) is None
    assert (setting_of(second).base, setting_of(second).quantization) == ("other/base", "nf4")


@pytest.mark.parametrize("r", [5, 32, 33, 70])
def test_large_mixers_are_kept_as_means_over_blocks(r):
    M = np.random.default_rng(r).standard_normal((r, r))
    found = np.array(magnitudes(torch.from_numpy(M)))
    block = 1 if r <= 32 else 2 if r <= 64 else 3
    assert len(found) == -(-r // block) <= 32
    for i, j in ((0, 0), (1, 2), (len(found) - 1, 0), (len(found) - 1, len(found) - 1)):
        part = np.abs(M)[i * block : (i + 1) * block, j * block : (j + 1) * block]
        assert found[i, j] == pytest.approx(part.mean())


def test_the_drawn_groups_are_those_of_most_seeds_with_lora_and_mixers_first(runs):
    one = adapters.MODULES[:1]
    for number in range(4):  # a learning rate grid: one seed each
        adapters.add(runs, "lora", 0, f"training.learning_rate=0.{number}", modules=one)
    for seed in (1, 2):
        for method, label in (
            *(("lora", "adapter.r=4"), ("lora", "default"), ("lora_scaled", "default"), ("two_subspaces", "default")),
            *(("moslora", f"method.mixer_init={init}") for init in ("gaussian", "identity", "orthogonal", "zero")),
        ):
            adapters.add(runs, method, seed, label, modules=one, mixed=not method.startswith("lora"))
    ((_, _, trained),) = by_setting(load_runs(runs.root, "commonsense_reasoning")[0])
    groups = groups_of(load_traces(trained, runs.root)[0])
    assert [group.key for group in drawn_groups(groups)] == [
        ("lora", "default"),
        ("two_subspaces", "default"),
        *(("moslora", f"method.mixer_init={init}") for init in ("gaussian", "identity", "orthogonal", "zero")),
    ]
    assert drawn_groups([]) == []


# ---------------------------------------------------------------------------------------------------------- summaries


def test_summaries_bear_infinite_condition_numbers():
    numbers = [module_numbers(factors(seed), None) for seed in range(3)]
    singular = module_numbers(Factors(factors(9).A, torch.ones(3, 3), factors(9).B), None)
    modules = dict(zip("abcd", [*numbers, singular], strict=True))
    finite = sorted(n.condition for n in numbers)
    assert over_modules(modules, "condition") == pytest.approx((finite[1] + finite[2]) / 2)
    assert over_modules(modules, "rank") == pytest.approx(np.mean([n.rank for n in modules.values()]))
    summary = over_seeds([1.0, math.inf, None])
    assert (summary.mean, summary.sd, summary.n) == (math.inf, None, 2)
    assert over_seeds([None]) is None and over_seeds([1.0, 3.0]).sd == pytest.approx(math.sqrt(2))


def test_spectra_of_several_lengths_are_averaged_where_they_are():
    assert mean_spectrum([(3.0, 1.0), (1.0,), None, ()]) == [2.0, 1.0]
    assert mean_spectrum([None]) == []


# ------------------------------------------------------------------------------------------------------------- angles


def test_angles_are_those_of_the_updates(runs):
    first, second = (read_bases(adapters.add(runs, method, 1 + n)) for n, method in enumerate(("lora", "moslora")))
    expected = {"columns": [], "rows": []}
    for number, _ in enumerate(adapters.MODULES):
        (A1, _, B1), (A2, M2, B2) = adapters.matrices(100 + number), adapters.matrices(200 + number)
        one, other = B1.astype(float) @ A1, B2.astype(float) @ M2 @ A2
        for name, left, right in (("columns", one, other), ("rows", one.T, other.T)):
            bases = (scipy.linalg.orth(matrix, rcond=1e-5) for matrix in (left, right))
            expected[name].append(np.degrees(scipy.linalg.subspace_angles(*bases)).mean())
    found = mean_angles(first, second)
    assert (found.columns, found.rows) == pytest.approx((np.mean(expected["columns"]), np.mean(expected["rows"])))
    same = mean_angles(first, first)
    assert (same.columns, same.rows) == pytest.approx((0, 0), abs=1e-5)
    back = mean_angles(second, first)
    assert (back.columns, back.rows) == pytest.approx((found.columns, found.rows))


def test_angles_are_over_the_modules_in_common(runs):
    some = read_bases(adapters.add(runs, "lora", 1, modules=adapters.MODULES[:2]))
    every = read_bases(adapters.add(runs, "lora", 2))
    none = read_bases(adapters.add(runs, "lora", 3, modules=("model.layers.7.mlp.up_proj",)))
    assert 0 < mean_angles(some, every).columns < 90
    assert (mean_angles(some, none).columns, mean_angles(some, none).rows) == (None, None)
    wider = runs.add("lora", 4)
    adapters.write(wider.adapter_path, {adapters.MODULES[0]: adapters.matrices(0, mixed=False, out=9)})
    assert mean_angles(every, read_bases(wider)).columns is None


def test_the_angle_of_chance_is_that_of_random_spaces(runs):
    record = runs.add("lora", 1)
    adapters.write(record.adapter_path, {"model.layers.0.mlp.up_proj": adapters.matrices(0, 4, 64, 32, mixed=False)})
    trace = trace_of(runs, record)
    rng = np.random.default_rng(1)
    found = chance_angles([trace])
    for angle, size in ((found.columns, 64), (found.rows, 32)):
        angles = [scipy.linalg.subspace_angles(*rng.standard_normal((2, size, 4))).mean() for _ in range(100)]
        assert angle == pytest.approx(np.degrees(np.mean(angles)), abs=1.5)


def test_a_missing_adapter_is_an_error_of_its_run(runs):
    record = runs.add("lora", 1)
    with pytest.raises(UserError, match="no such folder"):
        trace_of(runs, record)
