"""The knock_out command: its points are what evaluate says of such adapters, and its arguments are evaluate's."""

from __future__ import annotations

import shutil

import pytest
from hydra import compose, initialize_config_module

from commonsense_reasoning import evaluate, knock_out
from commonsense_reasoning.config import CONF_MODULE, Config, locate
from moslora_core import MoSLoraConfig, launch
from moslora_core.errors import UserError
from moslora_core.knock_out import knock_out_adapter

from .test_evaluate import TARGETS, save_adapter

TASKS = ["boolq", "winogrande", "ARC-Easy"]


@pytest.fixture(scope="module")
def adapter_dir(tmp_path_factory, fluent_llama_dir):
    config = MoSLoraConfig(r=4, lora_alpha=8, target_modules=TARGETS, task_type="CAUSAL_LM")
    return save_adapter(fluent_llama_dir, tmp_path_factory.mktemp("adapter"), config)


@pytest.fixture
def make_config(tmp_path, data_dir, fluent_llama_dir):
    def make(*overrides: str) -> Config:
        launch.register(Config)
        common = [f"data.dir={data_dir}", f"model.path={fluent_llama_dir}", f"runs_dir={tmp_path / 'runs'}"]
        common += ["method=moslora", f"evaluation.tasks=[{','.join(TASKS)}]", "evaluation.knock_out.steps=2"]
        with initialize_config_module(CONF_MODULE, version_base="1.3"):
            return launch.instantiate(Config, compose("config", overrides=[*common, *overrides]))

    return make


@pytest.mark.parametrize("mode", ["generate", "loglikelihood"])
def test_the_points_are_the_evaluations_of_such_adapters(mode, make_config, adapter_dir, tmp_path):
    config = make_config(f"evaluation.mode={mode}")
    record = locate(config)
    shutil.copytree(adapter_dir, record.adapter_path)
    evaluate.main(config)
    before = record.results(), record.predictions()
    knock_out.main(config)
    assert (record.results(), record.predictions()) == before

    curve = record.knock_outs()[f"{mode}-corrected+pairs"]
    assert set(curve.items) == set(TASKS)
    points = {point.order: point for point in curve.points}
    copies = {"none": None, "strongest": 8, "all": 16}
    for number, (order, zero_pairs) in enumerate(copies.items()):
        other = make_config(f"evaluation.mode={mode}", f"seed={10 + number}")
        place = locate(other).adapter_path
        if zero_pairs is None:
            shutil.copytree(adapter_dir, place)
        else:
            knock_out_adapter(adapter_dir, place, zero_pairs=zero_pairs, order="strongest")
        evaluate.main(other)
        found = locate(other).results().evaluations[f"{mode}-corrected"]
        assert points[order].tasks == {task: result.value for task, result in found.tasks.items()}, order
        unparsed = [result.unparsed for result in found.tasks.values()]
        assert points[order].unparsed == (pytest.approx(sum(unparsed) / 3) if mode == "generate" else None)
    assert points["none"].tasks != points["all"].tasks  # or the adapter would not count


def test_mistakes_are_evaluates(make_config, adapter_dir):
    with pytest.raises(UserError, match=r"evaluation\.mode must be one of"):
        knock_out.main(make_config("evaluation.mode=guess"))
    config = make_config()
    with pytest.raises(UserError, match=r"train it: python -m commonsense_reasoning\.train"):
        knock_out.main(config)
    with pytest.raises(UserError, match="there is no adapter to take apart"):
        knock_out.main(make_config("method=base"))
    shutil.copytree(adapter_dir, locate(config).adapter_path)
    with pytest.raises(UserError, match="prepare_data"):
        knock_out.main(make_config("data.dir=nowhere"))
