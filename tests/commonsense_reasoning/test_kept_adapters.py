"""Copies of the adapter along a training: which, that they change nothing of it, and what a stopped run does."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import Trainer

from commonsense_reasoning.config import Config, DataConfig, ModelConfig, ProtocolConfig, ScaleConfig
from commonsense_reasoning.train import locate, main
from moslora_core.errors import UserError
from moslora_core.methods import METHODS, AdapterConfig
from moslora_core.record import RunRecord
from moslora_core.running import TrainingConfig
from moslora_core.subspaces import adapter_factors

from .. import training_runs
from ..training_runs import Killed, having, same

STEPS = 4


@pytest.fixture
def config(tiny_llama_dir, data_dir, tmp_path) -> Config:
    return Config(
        method=METHODS["moslora"],
        scale=ScaleConfig("tiny"),
        protocol=ProtocolConfig("corrected", loss_on_prompt=False, num_beams=1, max_new_tokens=8),
        adapter=AdapterConfig(r=4, lora_alpha=8, lora_dropout=0.1),
        model=ModelConfig(path=str(tiny_llama_dir)),
        data=DataConfig(dir=str(data_dir), source="folder", cutoff=160),
        training=TrainingConfig(
            learning_rate=1e-2,
            max_steps=STEPS,
            global_batch_size=4,
            per_device_batch_size=2,
            logging_steps=1,
            save_steps=2,
            keep_steps=1,
        ),
        runs_dir=str(tmp_path / "runs"),
    )


def copies_of(record: RunRecord) -> dict[int, dict[str, torch.Tensor]]:
    return {step: load_file(path / "adapter_model.safetensors") for step, path in record.kept_adapters().items()}


def equal(first: RunRecord, second: RunRecord) -> bool:
    a, b = copies_of(first), copies_of(second)
    return list(a) == list(b) and all(same(a[step], b[step]) for step in a)


def test_copies_are_the_adapter_at_those_steps(config, tmp_path):
    main(config)
    record = locate(config)
    copies = copies_of(record)
    assert list(copies) == [0, 1, 2, 3, 4]
    assert same(copies[STEPS], training_runs.adapter_of(record))
    start = adapter_factors(record.kept_adapters()[0])
    assert all(not factors.B.any() and factors.A.any() and factors.M.any() for factors in start.values())
    # The mixers of the start are those that the configuration draws: U(-1/sqrt r, 1/sqrt r), and they learn.
    assert all(factors.M.abs().max() <= 0.5 for factors in start.values())
    assert not any(
        torch.equal(factors.M, start[name].M) for name, factors in adapter_factors(record.path / "adapter").items()
    )
    for folder in record.kept_adapters().values():
        assert {path.name for path in folder.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
        assert json.loads((folder / "adapter_config.json").read_text())["peft_type"] == "MOSLORA"
    assert not list(record.path.rglob(".adapter*"))

    shorter = having(config, runs_dir=str(tmp_path / "shorter"), training__max_steps=1, training__warmup_steps=0)
    main(shorter)  # its first step has the same learning rate
    assert same(training_runs.adapter_of(locate(shorter)), copies[1])


@pytest.mark.parametrize("keep", [None, 3])
def test_keeping_changes_nothing_of_the_training(config, tmp_path, keep):
    other = having(config, runs_dir=str(tmp_path / "other"), training__keep_steps=keep)
    main(config)
    main(other)
    assert same(training_runs.adapter_of(locate(config)), training_runs.adapter_of(locate(other)))
    assert training_runs.losses_of(locate(config)) == training_runs.losses_of(locate(other))
    assert list(locate(other).kept_adapters()) == ([] if keep is None else [0, 3])
    assert (locate(other).path / "adapters").exists() == (keep is not None)


def test_a_resumed_run_has_the_copies_of_an_undisturbed_one(config, tmp_path, kill_at):
    undisturbed = having(config, runs_dir=str(tmp_path / "undisturbed"))
    main(undisturbed)
    kill_at(3)
    with pytest.raises(Killed):
        main(config)
    record = locate(config)
    assert list(record.kept_adapters()) == [0, 1, 2, 3]
    shutil.copytree(record.kept_adapter_path(0), record.kept_adapter_path(9))  # what lies after the checkpoint goes
    (record.kept_adapter_path(3) / "adapter_model.safetensors").write_bytes(b"torn")
    main(config)
    assert equal(record, locate(undisturbed))


def test_a_run_stopped_before_its_first_checkpoint_starts_again(config, tmp_path, kill_at):
    undisturbed = having(config, runs_dir=str(tmp_path / "undisturbed"))
    main(undisturbed)
    kill_at(1)
    with pytest.raises(Killed):
        main(config)
    (locate(config).kept_adapter_path(0) / "adapter_model.safetensors").write_bytes(b"torn")
    main(config)
    assert equal(locate(config), locate(undisturbed))


@pytest.mark.parametrize(("keep", "expected"), [(None, [0, 1, 2]), (3, [0, 1, 2, 3])])
def test_a_stopped_run_goes_on_with_another_distance_between_copies(config, tmp_path, kill_at, keep, expected):
    undisturbed = having(config, runs_dir=str(tmp_path / "undisturbed"))
    main(undisturbed)
    kill_at(3)
    with pytest.raises(Killed):
        main(config)
    other = having(config, training__keep_steps=keep)
    main(other)
    assert list(locate(other).kept_adapters()) == expected
    assert same(training_runs.adapter_of(locate(other)), training_runs.adapter_of(locate(undisturbed)))


def test_copies_go_with_an_overwritten_run(config):
    main(config)
    main(having(config, on_finished="overwrite", training__keep_steps=None))
    assert locate(config).kept_adapters() == {} and not (locate(config).path / "adapters").exists()


def test_a_copy_killed_while_it_was_written_is_not_there(config, monkeypatch):
    original = Trainer.save_model

    def save_model(self, output_dir=None, **kwargs):
        original(self, output_dir, **kwargs)
        if self.state.global_step == 1 and output_dir:
            (Path(output_dir) / "adapter_model.safetensors").write_bytes(b"torn")
            raise Killed

    monkeypatch.setattr(Trainer, "save_model", save_model)
    with pytest.raises(Killed):
        main(config)
    monkeypatch.undo()
    record = locate(config)
    assert list(record.kept_adapters()) == [0]
    main(config)
    assert list(copies_of(record)) == [0, 1, 2, 3, 4] and not list(record.path.rglob(".adapter*"))


def test_steps_are_positive(config):
    with pytest.raises(UserError, match=r"training\.keep_steps must be positive or null, found 0"):
        main(having(config, training__keep_steps=0))
    assert not locate(config).path.exists()


def test_the_record_knows_its_copies_by_name(tmp_path):
    record = RunRecord(tmp_path)
    assert record.kept_adapters() == {}
    for name in ("step-10", "step-9", "step-", "step-2.partial", ".step-3", "other"):
        (tmp_path / "adapters" / name).mkdir(parents=True)
    (tmp_path / "adapters" / "step-4").write_text("a file")
    assert list(record.kept_adapters().items()) == [(step, record.kept_adapter_path(step)) for step in (9, 10)]


@pytest.mark.slow
def test_the_first_of_two_processes_keeps_the_copies(config, tmp_path):
    config = having(config, adapter__lora_dropout=0.0, training__group_by_length=False, training__keep_steps=2)
    main(config)
    two = having(config, runs_dir=str(tmp_path / "two"))
    training_runs.launched("commonsense_reasoning", two, tmp_path, 2)
    one, other = copies_of(locate(config)), copies_of(locate(two))
    assert list(one) == list(other) == [0, 2, 4] and same(one[0], other[0])
    assert same(other[STEPS], training_runs.adapter_of(locate(two)))
