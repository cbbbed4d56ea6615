"""Training on a tiny Llama: the run record, seeds, resuming, refusals, the paper's counts, several processes."""

from __future__ import annotations

import itertools
import math
import resource
import time
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path
from pickle import UnpicklingError

import pytest
import torch
from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer

from commonsense_reasoning import train as train_module
from commonsense_reasoning.config import (
    CONF_MODULE,
    Config,
    DataConfig,
    ModelConfig,
    ProtocolConfig,
    ScaleConfig,
)
from commonsense_reasoning.data import load_training
from commonsense_reasoning.train import locate, main
from moslora_core import launch
from moslora_core.base_models import adapter_sha256, resolve_path
from moslora_core.checkpoints import SEAL, Sealing, damage, seal
from moslora_core.errors import UserError
from moslora_core.methods import METHODS, AdapterConfig, peft_config
from moslora_core.record import read_json
from moslora_core.running import TrainingConfig

from .. import training_runs
from ..training_runs import Killed, having, same

STEPS = 4
PROTOCOLS = ("paper", "corrected")
SCALES = ("smoke", "small", "paper")


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
        ),
        runs_dir=str(tmp_path / "runs"),
    )


def adapter_of(config: Config) -> dict[str, torch.Tensor]:
    return training_runs.adapter_of(locate(config))


def log_of(config: Config) -> list[tuple[int, float]]:
    return training_runs.losses_of(locate(config))


def refusal(config: Config) -> str:
    """The one line that refuses ``config``."""
    with pytest.raises(UserError) as caught:
        main(config)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# -------------------------------------------------------------------------------------------------------- run record


def test_a_run_leaves_the_whole_record(config):
    config = having(config, data__validation_items=4, training__eval_steps=2)
    main(config)
    record = locate(config)
    assert {path.name for path in record.path.iterdir()} == {
        ".lock",
        "adapter",
        "config.yaml",
        "environment.json",
        "metrics.jsonl",
        "results.json",
        "status.json",
    }
    assert record.path == Path(config.runs_dir) / "commonsense_reasoning/tiny/moslora/default/seed-0"
    assert OmegaConf.load(record.config_path) == OmegaConf.structured(config)
    assert (record.status().state, record.status().stage) == ("finished", "train")
    environment = read_json(record.path / "environment.json")["train"]
    assert environment["packages"]["torch"] == torch.__version__
    assert environment["start"] <= environment["end"]

    rows = record.metrics()
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3, 4]
    assert [row["step"] for row in rows if "eval_loss" in row] == [2, 4]
    for name in ("tokens", "seconds", "peak_memory_bytes"):
        values = [row[name] for row in rows]
        assert values == sorted(values) and values[0] > 0, name
    # Linear decay from 1e-2 to 0 over four steps, without a warm-up.
    rates = [row["learning_rate"] for row in rows if "loss" in row]
    assert rates == pytest.approx([1e-2, 0.75e-2, 0.5e-2, 0.25e-2])

    training = record.results().training
    assert training.steps == STEPS
    assert training.adapter_sha256 == adapter_sha256(record.adapter_path)
    assert training.final_loss == rows[-2]["loss"] and training.validation_loss == rows[-1]["eval_loss"]
    # Two layers of hidden 32, intermediate 64: r * (in + out) and a mixer r * r for q, k, v, up and down.
    assert training.trainable_parameters == 2 * (3 * (4 * 64 + 16) + 2 * (4 * 96 + 16))
    assert training.trainable_parameters == sum(tensor.numel() for tensor in adapter_of(config).values())
    assert not list(record.adapter_path.glob("*.bin"))


def test_the_saved_adapter_is_the_trained_one(config):
    """Its validation loss, computed anew from the folder, is the one that the training recorded."""
    config = having(config, data__validation_items=4, training__eval_steps=STEPS)
    main(config)
    model = AutoModelForCausalLM.from_pretrained(config.model.path)
    model = PeftModel.from_pretrained(model, str(locate(config).adapter_path)).eval()
    _, validation = load_training(config.data, config.protocol, AutoTokenizer.from_pretrained(config.model.path))
    with torch.no_grad():
        # Trainer averages over batches of two; the sequences of a batch weigh by their response tokens.
        losses = []
        for start in (0, 2):
            total, count = 0.0, 0
            for item in (validation[start], validation[start + 1]):
                scored = sum(label != -100 for label in item["labels"])
                batch = {name: torch.tensor([item[name]]) for name in ("input_ids", "attention_mask", "labels")}
                total, count = total + model(**batch).loss.item() * scored, count + scored
            losses.append(total / count)
    assert locate(config).results().training.validation_loss == pytest.approx(sum(losses) / 2, rel=1e-5)


def test_load_best_keeps_the_lowest_validation_loss(config, tmp_path):
    config = having(
        config,
        data__validation_items=4,
        training__eval_steps=1,
        training__save_steps=1,
        training__load_best=True,
        training__max_steps=2,
        training__learning_rate=0.3,
        training__lr_scheduler="constant",
    )
    shorter = having(config, runs_dir=str(tmp_path / "shorter"), training__max_steps=1)
    main(config)
    main(shorter)
    first, second = [row["eval_loss"] for row in locate(config).metrics() if "eval_loss" in row]
    assert first < second, "the last checkpoint is the best one: this test shows nothing"
    assert locate(config).results().training.validation_loss == first
    assert same(adapter_of(config), adapter_of(shorter))


# ------------------------------------------------------------------------------------------------- seeds and resuming


def test_the_seed_decides_every_bit(config, tmp_path):
    again = having(config, runs_dir=str(tmp_path / "again"))
    other = having(config, seed=1)
    for run in (config, again, other):
        main(run)
    assert same(adapter_of(config), adapter_of(again))
    assert log_of(config) == log_of(again)
    assert not same(adapter_of(config), adapter_of(other))
    assert locate(other).path.name == "seed-1"


@pytest.mark.parametrize("method", ["moslora", "lora_plus"])
def test_a_killed_run_resumes_to_the_same_adapter(config, tmp_path, kill_at, monkeypatch, method):
    wall = itertools.count(2e9, -3600)
    monkeypatch.setattr(time, "time", lambda: next(wall))  # every look at the clock an hour back
    config = having(config, method=METHODS[method])
    undisturbed = having(config, runs_dir=str(tmp_path / "undisturbed"))
    main(undisturbed)

    kill_at(3)
    with pytest.raises(Killed):
        main(config)
    record = locate(config)
    assert record.status().state == "failed"
    assert [step for step, _ in log_of(config)] == [1, 2, 3] and not record.adapter_path.exists()
    with open(record.metrics_path, "a") as file:
        file.write('{"step": 4, "lo')  # what a kill in the middle of a write leaves

    main(config)
    assert same(adapter_of(config), adapter_of(undisturbed))
    assert log_of(config) == log_of(undisturbed)
    seconds = [row["seconds"] for row in record.metrics()]
    assert seconds == sorted(seconds) and seconds[0] > 0, "the clock goes on from where the stopped run left it"
    assert record.status().state == "finished" and not record.checkpoints_path.exists()


def test_a_killed_adalora_starts_again(config, tmp_path, kill_at, caplog):
    """PEFT cannot go on with it, nor load its best step into the model that has been trained on."""
    config = having(config, method=METHODS["adalora"], training__max_steps=10, data__validation_items=4)
    config = having(config, training__eval_steps=2, training__load_best=True)
    undisturbed = having(config, runs_dir=str(tmp_path / "undisturbed"))
    main(undisturbed)
    kill_at(5)
    with pytest.raises(Killed):
        main(config)
    assert not list(locate(config).checkpoints_path.iterdir())
    main(config)
    assert log_of(config) == log_of(undisturbed)
    assert same(adapter_of(config), adapter_of(undisturbed))
    assert "a training that is stopped starts again" in caplog.text and "that of the last" in caplog.text


def test_a_checkpoint_between_logged_steps_changes_no_logged_loss(config, tmp_path, kill_at):
    config = having(config, training__logging_steps=2, training__save_steps=3, training__max_steps=4)
    undisturbed = having(config, runs_dir=str(tmp_path / "undisturbed"))
    main(undisturbed)
    kill_at(3)
    with pytest.raises(Killed):
        main(config)
    main(config)
    assert [step for step, _ in log_of(config)] == [2, 3, 4]
    assert log_of(config) == log_of(undisturbed)


def test_an_unfinished_or_damaged_checkpoint_is_not_resumed(config, tmp_path, kill_at, caplog):
    undisturbed = having(config, runs_dir=str(tmp_path / "undisturbed"), training__save_steps=1)
    main(undisturbed)
    config = having(config, training__save_steps=1)
    kill_at(3)
    with pytest.raises(Killed):
        main(config)
    folder = locate(config).checkpoints_path
    (folder / "checkpoint-3" / SEAL).unlink()  # killed before it was whole
    weights = folder / "checkpoint-2" / "adapter_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1  # the lowest bit of an exponent: loads, and trains on from something else
    weights.write_bytes(content)
    main(config)
    assert f"{weights} is damaged" in caplog.text
    assert same(adapter_of(config), adapter_of(undisturbed))
    assert log_of(config) == log_of(undisturbed)


class RunsCode:
    """Writes a file where it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"])
def test_a_checkpoint_of_an_attacker_runs_no_code(config, tmp_path, kill_at, name):
    kill_at(3)
    with pytest.raises(Killed):
        main(config)
    checkpoint = locate(config).checkpoints_path / "checkpoint-2"
    ran = tmp_path / "ran"
    torch.save(RunsCode(ran), checkpoint / name)
    seal(checkpoint, processes=1)  # who can write a checkpoint can seal it
    with pytest.raises(UnpicklingError) if name != "training_args.bin" else nullcontext():
        main(config)
    assert not ran.exists()


def test_a_damaged_best_checkpoint_is_not_taken_for_the_best(config, monkeypatch):
    config = having(config, data__validation_items=4, training__eval_steps=1, training__save_steps=1)
    config = having(config, training__load_best=True, training__max_steps=2)
    config = having(config, training__learning_rate=0.3, training__lr_scheduler="constant")
    original = Sealing.on_save

    def damaged_later(self, args, state, control, **kwargs):
        original(self, args, state, control, **kwargs)
        if state.global_step == 2:
            with open(self.folder / "checkpoint-1" / "optimizer.pt", "ab") as file:
                file.write(b"x")

    monkeypatch.setattr(Sealing, "on_save", damaged_later)
    message = refusal(config)
    assert "the checkpoint of the lowest validation loss cannot be used: " in message and "checkpoint-1/" in message
    assert not locate(config).is_trained()


@pytest.mark.parametrize("what", ["adapter_model.safetensors", "optimizer.pt"])
def test_a_full_disk_is_told_in_a_line_and_costs_nothing_but_time(config, tmp_path, monkeypatch, what):
    """A limit on the size of files stands for the disk: the second checkpoint meets it."""
    undisturbed = having(config, runs_dir=str(tmp_path / "undisturbed"), training__save_steps=1)
    config = having(config, training__save_steps=1)
    main(undisturbed)
    original, limits = Sealing.on_save, resource.getrlimit(resource.RLIMIT_FSIZE)

    def full_later(self, args, state, control, **kwargs):
        original(self, args, state, control, **kwargs)
        size = (self.folder / f"checkpoint-{state.global_step}" / what).stat().st_size
        resource.setrlimit(resource.RLIMIT_FSIZE, (size - 1, limits[1]))

    with monkeypatch.context() as patch:
        patch.setattr(Sealing, "on_save", full_later)
        try:
            message = refusal(config)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "cannot write a file below" in message and str(locate(config).path) in message
    assert locate(config).status().state == "failed" and not locate(config).is_trained()
    assert damage(locate(config).checkpoints_path / "checkpoint-1") is None
    main(config)
    assert same(adapter_of(config), adapter_of(undisturbed))
    assert log_of(config) == log_of(undisturbed)


def test_a_run_killed_after_its_results_is_finished_when_it_is_met_again(config):
    main(config)
    record = locate(config)
    record.checkpoints_path.mkdir()
    for on_finished in ("refuse", "skip"):
        record.set_status("running", "train")
        if on_finished == "refuse":
            refusal(config)
        else:
            main(having(config, on_finished="skip"))
        assert record.status().state == "finished" and not record.checkpoints_path.exists()
    record.set_status("failed", "evaluate", "another stage's")
    main(having(config, on_finished="skip"))
    assert record.status().state == "failed"
    record.set_status("running", "train")
    with record._locked():  # by a process that is about to end
        main(having(config, on_finished="skip"))
    assert record.status().state == "running"


def test_sharding_that_was_asked_for_and_not_got_is_an_error(config, monkeypatch):
    monkeypatch.setattr("moslora_core.running.zero_stage", lambda training: 2)
    assert "asks for ZeRO-2, but is set up with one process" in refusal(config)
    assert locate(config).metrics() == []


def test_a_damaged_log_is_named(config, kill_at):
    kill_at(3)
    with pytest.raises(Killed):
        main(config)
    path = locate(config).metrics_path
    path.write_text(path.read_text().replace('"step": 2', '"stap": 2'))
    assert refusal(config).startswith(f"{path} line 2: step is missing")


def test_a_stopped_run_goes_on_under_the_same_settings_alone(config, kill_at):
    kill_at(3)
    with pytest.raises(Killed):
        main(config)
    kept = locate(config).config_path.read_text()
    message = refusal(having(config, training__learning_rate=2e-2, adapter__r=8))
    assert "training.learning_rate was 0.01, is 0.02" in message and "adapter.r was 4, is 8" in message
    assert locate(config).config_path.read_text() == kept
    # How it will be evaluated, and what to do when it is finished, is no part of the training.
    main(having(config, evaluation__batch_size=3, on_finished="skip"))
    assert locate(config).status().state == "finished"


def test_a_finished_run_is_refused_kept_or_replaced(config):
    main(config)
    record = locate(config)
    before = record.results()
    assert "on_finished=skip" in refusal(config)
    main(having(config, on_finished="skip"))
    assert record.results() == before
    (record.path / "predictions.jsonl").write_text("of the run before\n")
    main(having(config, on_finished="overwrite", training__learning_rate=2e-2))
    assert record.results().training.final_loss != before.training.final_loss
    assert not (record.path / "predictions.jsonl").exists(), "predictions of another adapter"
    assert "on_finished must be" in refusal(having(config, on_finished="maybe"))


def test_a_run_in_use_is_not_overwritten(config):
    main(config)
    record = locate(config)
    with record.stage("evaluate"):
        assert "in use by another process" in refusal(having(config, on_finished="overwrite"))
        assert record.is_trained() and record.adapter_path.exists()


# -------------------------------------------------------------------------------------------------------------- loss


@pytest.mark.parametrize("loss_on_prompt", [False, True])
def test_the_first_loss_is_that_of_the_base_on_the_labels(config, loss_on_prompt):
    """B starts at zero, so the first step's loss is the base model's, over the tokens that the protocol names."""
    config = having(
        config,
        protocol=ProtocolConfig("corrected", loss_on_prompt=loss_on_prompt, num_beams=1, max_new_tokens=8),
        adapter__lora_dropout=0.0,
        training__max_steps=1,
        training__global_batch_size=32,  # all items in one step
        training__per_device_batch_size=8,
        training__save_steps=None,
    )
    main(config)
    train_set, _ = load_training(config.data, config.protocol, AutoTokenizer.from_pretrained(config.model.path))
    assert len(train_set) == 32
    model = AutoModelForCausalLM.from_pretrained(config.model.path).eval()
    total, count = 0.0, 0
    with torch.no_grad():
        for item in train_set:
            logits = model(input_ids=torch.tensor([item["input_ids"]])).logits[0, :-1]
            labels = torch.tensor(item["labels"][1:])
            scored = labels != -100
            nll = -logits.log_softmax(-1)[scored].gather(1, labels[scored, None])
            total, count = total + nll.sum().item(), count + nll.numel()
    # Over the tokens of the whole accumulated batch, however it was dealt and padded.
    assert log_of(config)[0][1] == pytest.approx(total / count, abs=2e-4)


def test_a_diverged_training_fails_in_one_line(config, monkeypatch):
    original = Trainer.compute_loss

    def compute_loss(self, *args, **kwargs):
        result = original(self, *args, **kwargs)
        scale = math.nan if self.state.global_step >= 2 else 1.0
        return (result[0] * scale, result[1]) if isinstance(result, tuple) else result * scale

    monkeypatch.setattr(Trainer, "compute_loss", compute_loss)
    message = refusal(having(config, training__max_grad_norm=0.0))
    assert message == "training diverged at step 3: loss is nan; lower training.learning_rate"
    record = locate(config)
    status = record.status()
    assert (status.state, status.stage) == ("failed", "train") and message in status.reason
    assert [row["step"] for row in record.metrics()] == [1, 2] and not record.is_trained()


def test_divergence_after_the_last_logged_step_is_seen(config, monkeypatch):
    monkeypatch.setattr(Trainer, "compute_loss", lambda self, model, inputs, **kw: model(**inputs).loss * math.nan)
    assert "loss is nan" in refusal(having(config, training__logging_steps=100))
    assert not locate(config).is_trained() and not locate(config).adapter_path.exists()


def test_a_learning_rate_far_too_high_is_named(config):
    config = having(config, training__learning_rate=1e30, training__lr_scheduler="constant", training__max_steps=6)
    assert "lower training.learning_rate" in refusal(config)
    assert locate(config).status().state == "failed"


def test_tensorboard_files_stay_with_the_run(config):
    config = having(config, training__tensorboard=True)
    train_module.main(config)
    assert list((locate(config).path / "tensorboard").glob("events.out.tfevents.*"))


# ----------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"training__global_batch_size": 7, "training__per_device_batch_size": 2},
            "global_batch_size 7 is not a multiple of per_device_batch_size 2 x world_size 1 = 2: 7 = 3 x 2 + 1",
        ),
        ({"training__per_device_batch_size": 0}, "per_device_batch_size must be positive, found 0"),
        ({"training__precision": "fp16"}, "training.precision=fp16 needs a GPU"),
        ({"training__precision": "fp8"}, "training.precision must be one of auto, fp32, bf16, fp16, found 'fp8'"),
        ({"training__max_steps": 0}, "training.max_steps must be positive or null, found 0"),
        ({"training__max_steps": None, "training__epochs": 0.0}, "epochs must be positive, found 0.0"),
        ({"training__learning_rate": 0.0}, "training.learning_rate must be positive"),
        ({"training__lr_scheduler": "sawtooth"}, "sawtooth"),
        ({"training__optimizer": "adamm"}, "adamm"),
        ({"training__load_best": True}, "training.load_best needs data.validation_items"),
        ({"training__deepspeed": "zero9"}, "training.deepspeed=zero9: no such file"),
        ({"training__deepspeed": "zero2"}, "training.deepspeed=zero2 needs a launcher, also for one process"),
        ({"training__save_total_limit": 0}, "training.save_total_limit must be positive, found 0"),
        ({"method": METHODS["base"]}, "method=base is the untrained model"),
        ({"method": METHODS["adalora"]}, "at least 10 optimiser steps"),
        ({"adapter__target_modules": ["no_such_proj"]}, "no_such_proj"),
        ({"data__validation_items": 32}, "data.validation_items=32 must be below the number of training items, 32"),
        ({"data__dir": "nowhere"}, "data.dir=nowhere: no prepared data"),
        ({"model__path": "nowhere/at-all"}, "model.path=nowhere/at-all"),
    ],
    ids=lambda value: "-".join(f"{k}={v}" for k, v in value.items())[:40] if isinstance(value, dict) else "",
)
def test_bad_settings_are_told_in_a_line(config, changes, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert expected in refusal(having(config, **changes))
    assert not locate(having(config, **changes)).path.exists()


# ---------------------------------------------------------------------------------------------- the shipped settings


def composed(*overrides: str) -> Config:
    launch.register(Config)
    GlobalHydra.instance().clear()
    with initialize_config_module(CONF_MODULE, version_base="1.3"):
        return launch.instantiate(Config, compose("config", overrides=list(overrides)))


@pytest.mark.parametrize(("method", "trainable"), [("lora", 28_311_552), ("moslora", 28_352_512)])
def test_a_dry_run_of_the_paper_scale_counts_what_the_paper_trains(method, trainable, caplog):
    config = composed("scale=paper", f"method={method}", "dry_run=true")
    plan = train_module.dry_run(config)
    assert plan.count.trainable == trainable
    assert plan.count.base == 8_030_261_248  # LLaMA-3 8B
    assert (plan.global_batch, plan.accumulation) == (16, 4)
    # 170,420 items less 120 for validation in batches of 16, three epochs.
    assert plan.steps == 3 * math.ceil((170_420 - 120) / 16) == 31_932
    caplog.set_level("INFO")
    main(config)
    assert f"{trainable:,}" in caplog.text and not Path(config.runs_dir, "commonsense_reasoning", "paper").exists()


def test_every_shipped_configuration_composes():
    """Scale x protocol x method: the schema accepts it, batches divide, the method builds, a base is named."""
    methods = [composed(f"method={name}").method for name in METHODS]
    assert methods == list(METHODS.values())
    for scale, protocol in itertools.product(SCALES, PROTOCOLS):
        config = composed(f"scale={scale}", f"protocol={protocol}")
        assert (config.scale.name, config.protocol.name) == (scale, protocol)
        assert not OmegaConf.missing_keys(OmegaConf.structured(config)), (scale, protocol)
        assert config.training.global_batch_size % config.training.per_device_batch_size == 0, scale
        assert config.protocol.loss_on_prompt == (protocol == "paper")
        if scale == "smoke":
            assert Path(resolve_path(config.model.path), "config.json").is_file()
        else:
            assert config.model.path and config.data.source == "folder"
        for method in methods:  # the groups are apart in the schema: any method goes with any scale's adapter
            if method.tuner != "none":
                peft_config(method, config.adapter, seed=0, total_steps=100)


def test_conf_holds_no_other_group_entries():
    """What the test above goes through is all that is shipped."""
    conf = Path(train_module.__file__).parent / "conf"
    assert {path.stem for path in (conf / "scale").glob("*.yaml")} == set(SCALES)
    assert {path.stem for path in (conf / "protocol").glob("*.yaml")} == set(PROTOCOLS)


# --------------------------------------------------------------------------------------------------- several processes


def launched(config: Config, tmp_path: Path, processes: int, **environment: str) -> None:
    training_runs.launched("commonsense_reasoning", config, tmp_path, processes, **environment)


def close(first: Config, second: Config) -> None:
    training_runs.assert_close(locate(first), locate(second), STEPS)


@pytest.fixture
def deterministic(config) -> Config:
    """Without dropout, whose masks depend on how a batch is dealt to processes, and with items of one order."""
    return having(config, adapter__lora_dropout=0.0, training__group_by_length=False, training__save_steps=None)


@pytest.mark.slow
def test_two_processes_train_as_one(deterministic, tmp_path):
    main(deterministic)
    two = having(deterministic, runs_dir=str(tmp_path / "two"))
    launched(two, tmp_path, processes=2)
    close(two, deterministic)
    assert locate(two).status().state == "finished"


@pytest.mark.slow
@pytest.mark.skipif(find_spec("deepspeed") is None, reason="deepspeed is not installed")
@pytest.mark.parametrize("stage", ["zero2", "zero3"])
def test_zero_trains_as_one_process(deterministic, tmp_path, stage):
    main(deterministic)
    sharded = having(
        deterministic, runs_dir=str(tmp_path / "sharded"), training__deepspeed=stage, training__keep_steps=STEPS
    )
    launched(sharded, tmp_path, processes=2, DS_ACCELERATOR="cpu")
    close(sharded, deterministic)
    # Copies along the training are whole too: ZeRO-3 gathers the parameters for each.
    start, end = (load_file(path / "adapter_model.safetensors") for path in locate(sharded).kept_adapters().values())
    trained = training_runs.adapter_of(locate(sharded))
    assert training_runs.same(end, trained)
    assert {name: tensor.shape for name, tensor in start.items()} == {n: tensor.shape for n, tensor in trained.items()}
    assert all(tensor.any() != name.endswith(("lora_B.weight", "lora_B.raw")) for name, tensor in start.items())


@pytest.mark.slow
@pytest.mark.skipif(find_spec("deepspeed") is None, reason="deepspeed is not installed")
def test_a_killed_run_of_two_processes_resumes_to_the_same_adapter(deterministic, tmp_path):
    """Under ZeRO-3, which has each process save its part of the optimiser and the parameters."""
    config = having(deterministic, training__deepspeed="zero3", training__save_steps=2)
    undisturbed = having(config, runs_dir=str(tmp_path / "undisturbed"))
    launched(undisturbed, tmp_path, processes=2, DS_ACCELERATOR="cpu")
    launched(config, tmp_path, processes=2, DS_ACCELERATOR="cpu", KILL_AT="3")
    assert [path.name for path in locate(config).checkpoints_path.iterdir()] == ["checkpoint-2"]
    launched(config, tmp_path, processes=2, DS_ACCELERATOR="cpu")
    assert log_of(config) == log_of(undisturbed)
    assert same(adapter_of(config), adapter_of(undisturbed))
