"""The knock_out command of visual instruction tuning: both towers lose their ranks, the projector stays."""

from __future__ import annotations

import shutil

import pytest
from hydra import compose, initialize_config_module

from moslora_core import MoSLoraConfig, launch
from moslora_core.errors import UserError
from moslora_core.knock_out import knock_out_adapter
from visual_instruction import evaluate, knock_out
from visual_instruction.config import CONF_MODULE, Config, locate

from .test_evaluate import PROJECTOR, TARGETS, save_adapter


@pytest.fixture(scope="module")
def adapter_dir(tmp_path_factory, tiny_llava_dir):
    """Ranks that differ between the towers, and mixers in one of them, as the published InternLM2 has them."""
    vision = r".*vision_tower.*"
    config = MoSLoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=TARGETS,
        rank_pattern={vision: 2},
        mixer_pattern={vision: "identity"},
        modules_to_save=[PROJECTOR],
    )
    return save_adapter(tiny_llava_dir, tmp_path_factory.mktemp("adapter"), config)


@pytest.fixture
def make_config(tmp_path, prepared_dir, tiny_llava_dir):
    def make(*overrides: str) -> Config:
        launch.register(Config)
        common = [
            *(f"data.dir={prepared_dir}", f"model.path={tiny_llava_dir}", f"runs_dir={tmp_path / 'runs'}"),
            *("method=moslora", "data.benchmarks=[smoke_existence,smoke_colour]", "model.template=llama3"),
            *("evaluation.max_new_tokens=8", "evaluation.knock_out.steps=2", "evaluation.knock_out.unit=ranks"),
        ]
        with initialize_config_module(CONF_MODULE, version_base="1.3"):
            return launch.instantiate(Config, compose("config", overrides=[*common, *overrides]))

    return make


def test_the_points_are_the_evaluations_of_such_adapters(make_config, adapter_dir):
    config = make_config("evaluation.knock_out.orders=[strongest]")
    record = locate(config)
    shutil.copytree(adapter_dir, record.adapter_path)
    evaluate.main(config)
    before = record.results(), record.predictions()
    knock_out.main(config)
    assert (record.results(), record.predictions()) == before
    curve = record.knock_outs()["exact+ranks"]
    points = {point.order: point for point in curve.points}
    assert list(points) == ["none", "strongest", "all"]
    whole = before[0].evaluations["exact"].tasks
    assert points["none"].tasks == {task: result.value for task, result in whole.items()}
    # Two of four ranks of the language model and one of two of the vision tower.
    assert points["strongest"].removed * 2 == points["all"].removed == curve.subspaces
    other = make_config("seed=1")
    knock_out_adapter(adapter_dir, locate(other).adapter_path, keep=0)
    evaluate.main(other)
    nothing = locate(other).results().evaluations["exact"].tasks
    assert points["all"].tasks == {task: result.value for task, result in nothing.items()}


def test_what_only_a_judge_can_score_is_refused(make_config):
    with pytest.raises(UserError, match="all of them need a judge"):
        knock_out.main(make_config("data.benchmarks=[mmvet]"))
