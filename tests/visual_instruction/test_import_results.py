"""Results of VLMEvalKit and lmms-eval: from files in their layout into the run record, and what is refused."""

from __future__ import annotations

import csv
import json
import logging
from pathlib import Path

import pytest
from hydra import compose, initialize_config_module

from moslora_core import launch
from moslora_core.errors import UserError
from moslora_core.record import Evaluation, Prediction, RunRecord, TaskResult, write_atomic
from visual_instruction.config import CONF_MODULE, Config
from visual_instruction.import_results import import_results, main

MMBENCH = {"split": "dev", "Overall": 0.7345, "AR": 0.75, "CP": 0.8, "FP-C": 0.6, "FP-S": 0.78, "LR": 0.4, "RR": 0.7}
MMVET = [("rec", 187, 40.1), ("ocr", 108, 30.5), ("math", 26, 11.5), ("Overall", 218, 35.2)]
MATHVISTA = [("Overall", 1000, 31.5), ("scientific reasoning", 122, 41.0), ("figure question answering", 269, 30.1)]
JUDGE = {"judge": "gpt-4-1106-preview", "date": "2026-03-01"}


@pytest.fixture
def run(tmp_path: Path) -> RunRecord:
    """A run folder with the configuration that train would have recorded."""
    launch.register(Config)
    with initialize_config_module(CONF_MODULE, version_base="1.3"):
        config = launch.instantiate(Config, compose("config", overrides=["method=moslora", "seed=1"]))
    record = RunRecord(tmp_path / "runs" / "visual_instruction" / "smoke" / "moslora" / "default" / "seed-1")
    write_atomic(record.config_path, launch.dump(config))
    return record


def write_csv(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), quoting=csv.QUOTE_ALL)
        writer.writeheader()
        writer.writerows(rows)


@pytest.fixture
def vlmevalkit(tmp_path: Path) -> Path:
    """A folder as VLMEvalKit leaves it for a model with all nine benchmarks."""
    folder = tmp_path / "outputs" / "merged"
    for name, overall in (("EN", 0.7345), ("CN", 0.701)):
        row = MMBENCH | {"Overall": overall, "action_recognition": 0.9}
        write_csv(folder / f"merged_MMBench_DEV_{name}_acc.csv", [row])
    for name, overall in (("SEEDBench_IMG", 0.69), ("AI2D_TEST", 0.661), ("ScienceQA_TEST", 0.76)):
        write_csv(folder / f"merged_{name}_acc.csv", [{"split": "none", "Overall": overall, "Other": 0.5}])
    write_csv(folder / "merged_TextVQA_VAL_acc.csv", [{"Overall": 50.2}])
    write_csv(folder / "merged_MME_score.csv", [{"perception": 1450.5, "reasoning": 340.0, "OCR": 125.0}])
    rows = [{"Category": name, "tot": n, "acc": acc} for name, n, acc in MMVET]
    write_csv(folder / "merged_MMVet_gpt-4-turbo_score.csv", rows)
    write_csv(folder / "merged_MMVet_gpt-4-turbo_score_fine.csv", rows)
    columns = [("Task&Skill", "tot", "prefetch", "hit", "prefetch_rate", "acc")]
    rows = [dict(zip(*columns, (name, n, 1, 2, 0.1, acc), strict=True)) for name, n, acc in MATHVISTA]
    write_csv(folder / "merged_MathVista_MINI_gpt-4-turbo_score.csv", rows)
    (folder / "merged_MMBench_DEV_EN_exact_matching_result.xlsx").write_bytes(b"PK")
    return folder


def results(run: RunRecord, name: str = "vlmevalkit") -> dict[str, TaskResult]:
    return run.results().evaluations[name].tasks


# ---------------------------------------------------------------------------------------------------------- VLMEvalKit


def test_vlmevalkits_files_become_one_evaluation(run, vlmevalkit):
    import_results(run.path, "vlmevalkit", vlmevalkit, **JUDGE)
    found = results(run)
    assert list(found) == [
        *("mmbench_en", "mmbench_cn", "seed_bench", "ai2d", "sciqa", "textvqa", "mathvista", "mmvet", "mme")
    ], "in the order of the paper's table"
    values = {name: result.value for name, result in found.items()}
    assert values == pytest.approx(
        {"mmbench_en": 0.7345, "mmbench_cn": 0.701, "seed_bench": 0.69, "ai2d": 0.661, "sciqa": 0.76}
        | {"textvqa": 0.502, "mathvista": 0.315, "mmvet": 0.352, "mme": 1790.5 / 2800}
    )
    assert found["mmbench_en"].metric == "circular_accuracy" and found["mmbench_en"].n == 1164
    assert found["ai2d"].stderr == pytest.approx((0.661 * 0.339 / 3087) ** 0.5)
    evaluation = run.results().evaluations["vlmevalkit"]
    assert evaluation.protocol == "vlmevalkit"
    assert evaluation.settings["judge"] == "gpt-4-1106-preview" and evaluation.settings["judge_date"] == "2026-03-01"
    assert evaluation.settings["judged"] == ["mathvista", "mmvet"]
    assert evaluation.settings["base"] == "smoke" and evaluation.settings["quantization"] == "none"
    assert evaluation.settings["sources"]["mme"] == "merged_MME_score.csv"
    assert run.status().state == "finished" and run.status().stage == "import_results"


def test_abilities_are_kept_under_the_names_of_the_questions(run, vlmevalkit):
    import_results(run.path, "vlmevalkit", vlmevalkit, **JUDGE)
    abilities = results(run)["mmbench_en"].breakdown
    assert {name: part.value for name, part in abilities.items()} == {
        "attribute_reasoning": 0.75,
        "coarse_perception": 0.8,
        "finegrained_perception (cross-instance)": 0.6,
        "finegrained_perception (instance-level)": 0.78,
        "logic_reasoning": 0.4,
        "relation_reasoning": 0.7,
    }
    assert sum(part.n for part in abilities.values()) == 1164
    mme = results(run)["mme"].breakdown
    assert mme["perception"].value == pytest.approx(1450.5 / 2000)
    assert mme["cognition"].value == pytest.approx(340 / 800)
    assert results(run)["mmvet"].breakdown["ocr"].value == pytest.approx(0.305)
    assert results(run)["mathvista"].breakdown["scientific reasoning"].n == 122


def test_without_judged_benchmarks_no_judge_is_asked_for(run, vlmevalkit):
    for path in vlmevalkit.glob("*gpt*"):
        path.unlink()
    import_results(run.path, "vlmevalkit", vlmevalkit)
    assert run.results().evaluations["vlmevalkit"].settings["judge"] is None
    assert "mmvet" not in results(run) and len(results(run)) == 7


@pytest.mark.parametrize("given", [{}, {"judge": "gpt-4"}, {"date": "2026-03-01"}])
def test_a_judge_and_its_date_are_required(given, run, vlmevalkit):
    with pytest.raises(UserError, match=r"mathvista, mmvet: a judge took part.*--judge NAME --date"):
        import_results(run.path, "vlmevalkit", vlmevalkit, **given)
    assert not run.results().evaluations and run.status() is None


def test_options_matched_by_a_judge_need_its_name_too(run, vlmevalkit):
    for path in vlmevalkit.glob("*gpt*"):
        path.unlink()
    (vlmevalkit / "merged_AI2D_TEST_openai_result.xlsx").write_bytes(b"PK")
    with pytest.raises(UserError, match="ai2d: a judge took part"):
        import_results(run.path, "vlmevalkit", vlmevalkit)


def test_a_date_is_a_day(run, vlmevalkit):
    with pytest.raises(UserError, match=r"--date last week: expected a day as YYYY-MM-DD"):
        import_results(run.path, "vlmevalkit", vlmevalkit, judge="gpt-4", date="last week")


def test_other_benchmarks_and_versions_are_named_and_left_out(run, vlmevalkit, caplog):
    for name in ("POPE_score", "MMBench_DEV_EN_V11_acc", "Video-MME_score", "MMVet_Hard_gpt-4-turbo_score"):
        write_csv(vlmevalkit / f"merged_{name}.csv", [{"split": "dev", "Overall": 0.1}])
    import_results(run.path, "vlmevalkit", vlmevalkit, **JUDGE)
    assert results(run)["mmbench_en"].value == 0.7345 and len(results(run)) == 9
    for name in ("POPE", "V11", "Video-MME", "Hard"):
        assert name in caplog.text
    assert "score_fine" not in caplog.text and "AI2D" not in caplog.text


def change(folder: Path, name: str, **values) -> None:
    path = folder / f"merged_{name}.csv"
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    rows[0] |= values
    write_csv(path, [{k: v for k, v in row.items() if v is not None} for row in rows])


@pytest.mark.parametrize(
    "name, values, complaint",
    [
        (
            "AI2D_TEST_acc",
            {"Overall": "66.1"},
            r"AI2D_TEST_acc\.csv: Overall is '66\.1'; expected a number from 0",
        ),
        ("AI2D_TEST_acc", {"Overall": "-0.1"}, "expected a number from 0 to 1"),
        ("AI2D_TEST_acc", {"Overall": "nan"}, "expected a number from 0 to 1"),
        ("AI2D_TEST_acc", {"Overall": ""}, "expected a number from 0 to 1"),
        ("AI2D_TEST_acc", {"Overall": None}, r"has no column 'Overall'; found split, Other"),
        ("MMBench_DEV_CN_acc", {"LR": "1.01"}, r"MMBench_DEV_CN_acc\.csv: LR is '1\.01'"),
        ("TextVQA_VAL_acc", {"Overall": "101"}, "expected a number from 0 to 100"),
        ("MME_score", {"perception": "2001"}, "perception is '2001'; expected a number from 0 to 2000"),
        ("MME_score", {"reasoning": None}, "reasoning is None"),
        ("MMVet_gpt-4-turbo_score", {"acc": "inf"}, "rec, acc is 'inf'; expected a number from 0 to 100"),
        ("MMVet_gpt-4-turbo_score", {"tot": "0"}, "rec, tot is '0'; expected a positive count"),
        ("MathVista_MINI_gpt-4-turbo_score", {"Task&Skill": "All"}, "has no row 'Overall'; found All, scientific"),
    ],
)
def test_a_faulty_result_leaves_the_record_as_it_was(name, values, complaint, run, vlmevalkit):
    change(vlmevalkit, name, **values)
    with pytest.raises(UserError, match=complaint) as raised:
        import_results(run.path, "vlmevalkit", vlmevalkit, **JUDGE)
    assert "\n" not in str(raised.value)
    assert sorted(path.name for path in run.path.iterdir()) == ["config.yaml"]


def test_results_of_two_models_are_refused(run, vlmevalkit):
    write_csv(vlmevalkit / "other_MME_score.csv", [{"perception": 1, "reasoning": 1}])
    with pytest.raises(UserError, match=r"mme is in merged_MME_score\.csv and in other_MME_score\.csv"):
        import_results(run.path, "vlmevalkit", vlmevalkit, **JUDGE)


def test_several_rows_are_refused(run, vlmevalkit):
    write_csv(vlmevalkit / "merged_MMBench_DEV_EN_acc.csv", [MMBENCH, MMBENCH | {"split": "test"}])
    with pytest.raises(UserError, match="2 rows of results; expected 1"):
        import_results(run.path, "vlmevalkit", vlmevalkit, **JUDGE)


# ----------------------------------------------------------------------------------------------------------- lmms-eval

LMMS = {
    "mmbench_en_dev": {"alias": "mmbench_en_dev", "gpt_eval_score,none": 71.5, "submission,none": None},
    "mmbench_cn_dev": {"gpt_eval_score,none": 68.0},
    "seedbench": {"seed_image,none": 0.68, "seed_video,none": 0.4, "seed_all,none": 0.61},
    "ai2d": {"exact_match,flexible-extract": 0.655, "exact_match_stderr,flexible-extract": 0.008},
    "scienceqa_img": {"exact_match,none": 0.74},
    "textvqa_val": {"exact_match,none": 0.498, "exact_match_stderr,none": "N/A"},
    "mathvista_testmini_format": {"llm_as_judge_eval,none": 30.0},
    "mmvet": {"gpt_eval_score,none": 33.3},
    "mme": {"mme_perception_score,none": 1400.0, "mme_cognition_score,none": 300.0},
}
SAMPLES = {"mmbench_en_dev": (4329, 4329), "seedbench": (17990, 17990), "ai2d": (3088, 3088), "mmvet": (218, 100)}


def write_lmms(folder: Path, content: dict, name: str = "20260301_101010", model: str = "out__merged", **more) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    samples = {task: dict(zip(("original", "effective"), n, strict=True)) for task, n in SAMPLES.items()}
    whole = {"results": content, "n-samples": samples, "model_name": model, "lmms_eval_version": "0.7.3"} | more
    (folder / f"{name}_results.json").write_text(json.dumps(whole))
    return folder


def test_lmms_evals_file_becomes_one_evaluation(run, tmp_path):
    folder = write_lmms(tmp_path / "out__merged", LMMS)
    import_results(run.path, "lmms_eval", folder, **JUDGE)
    found = results(run, "lmms_eval")
    assert len(found) == 9
    values = {name: result.value for name, result in found.items()}
    assert values == pytest.approx(
        {"mmbench_en": 0.715, "mmbench_cn": 0.68, "seed_bench": 0.68, "ai2d": 0.655, "sciqa": 0.74}
        | {"textvqa": 0.498, "mathvista": 0.3, "mmvet": 0.333, "mme": 1700 / 2800}
    )
    assert {name: found[name].n for name in ("mmbench_en", "seed_bench", "ai2d", "mmvet", "mme")} == {
        "mmbench_en": 1164,
        "seed_bench": 14233,
        "ai2d": 3088,
        "mmvet": 100,
        "mme": 2374,
    }
    assert found["mme"].breakdown["cognition"].value == pytest.approx(0.375)
    settings = run.results().evaluations["lmms_eval"].settings
    assert settings["lmms_eval"] == "0.7.3" and settings["judge"] == JUDGE["judge"]
    assert set(settings["judged"]) == {"mmbench_en", "mmbench_cn", "mathvista", "mmvet"}
    assert settings["sources"]["mathvista"] == "20260301_101010_results.json: mathvista_testmini_format"


def test_several_files_of_one_model_are_read_together(run, tmp_path, caplog):
    folder = write_lmms(tmp_path / "out", {"ai2d": LMMS["ai2d"]}, "1")
    write_lmms(folder, {"mme": LMMS["mme"], "pope": {"f1,none": 0.8}}, "2")
    import_results(run.path, "lmms_eval", folder)
    assert list(results(run, "lmms_eval")) == ["ai2d", "mme"] and "pope" in caplog.text
    write_lmms(folder, {"ai2d": LMMS["ai2d"]}, "3")
    with pytest.raises(UserError, match=r"ai2d is in 1_results\.json: ai2d and in 3_results\.json: ai2d"):
        import_results(run.path, "lmms_eval", folder, on_finished="overwrite")
    assert len(results(run, "lmms_eval")) == 2


def test_results_of_several_models_are_refused(run, tmp_path):
    folder = write_lmms(tmp_path / "out", {"ai2d": LMMS["ai2d"]}, "1")
    write_lmms(folder, {"mme": LMMS["mme"]}, "2", model="other")
    with pytest.raises(UserError, match=r"several models \(other, out__merged\)"):
        import_results(run.path, "lmms_eval", folder)


@pytest.mark.parametrize(
    "content, complaint",
    [
        ({"ai2d": {"exact_match,none": 66.1}}, r"ai2d, exact_match is 66\.1; expected a number from 0 to 1"),
        ({"ai2d": {"exact_match,none": True}}, "exact_match is True"),
        ({"ai2d": {"acc,none": 0.5}}, "expected one value of exact_match, found 0 in acc,none"),
        ({"ai2d": {"exact_match,a": 0.5, "exact_match,b": 0.5}}, "expected one value of exact_match, found 2"),
        ({"ai2d": 0.5}, r"expected one value of exact_match, found 0 in 0\.5"),
        ({"mme": {"mme_perception_score,none": 1.0}}, "expected one value of mme_cognition_score"),
        ({"mmvet": {"gpt_eval_score,none": 33.0}}, "mmvet: a judge took part"),
        ({"mathvista_testmini_cot": {"llm_as_judge_eval,none": None}}, "llm_as_judge_eval is None"),
        ({"gqa": {"exact_match,none": 0.5}}, "holds no result of lmms-eval for a known task"),
    ],
)
def test_faulty_results_of_lmms_eval(content, complaint, run, tmp_path):
    folder = write_lmms(tmp_path / "out", content)
    with pytest.raises(UserError, match=complaint) as raised:
        import_results(run.path, "lmms_eval", folder)
    assert "\n" not in str(raised.value) and not run.results().evaluations


# -------------------------------------------------------------------------------------------------------------- record


def test_an_import_stands_beside_our_own_evaluation(run, vlmevalkit):
    ours = Evaluation("exact", {"ai2d": TaskResult("accuracy", 0.5, 2)}, 1.0)
    run.add_evaluation("exact", ours, [Prediction("exact", "ai2d", "ai2d/0", "A", "A", True)])
    import_results(run.path, "vlmevalkit", vlmevalkit, **JUDGE)
    assert list(run.results().evaluations) == ["exact", "vlmevalkit"]
    assert results(run, "exact")["ai2d"].value == 0.5 and len(run.predictions()) == 1


def test_a_second_import_is_refused_kept_or_replaced(run, vlmevalkit):
    import_results(run.path, "vlmevalkit", vlmevalkit, **JUDGE)
    change(vlmevalkit, "AI2D_TEST_acc", Overall="0.5")
    with pytest.raises(UserError, match="has the evaluation vlmevalkit already"):
        import_results(run.path, "vlmevalkit", vlmevalkit, **JUDGE)
    assert import_results(run.path, "vlmevalkit", vlmevalkit, on_finished="skip") is None
    assert results(run)["ai2d"].value == 0.661
    import_results(run.path, "vlmevalkit", vlmevalkit, **JUDGE, on_finished="overwrite")
    assert results(run)["ai2d"].value == 0.5


def test_wrong_folders(run, tmp_path, vlmevalkit):
    with pytest.raises(UserError, match=r"nowhere: no such folder"):
        import_results(run.path, "vlmevalkit", tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"holds no result of VLMEvalKit .*<model>_MMBench_DEV_EN_acc\.csv"):
        import_results(run.path, "vlmevalkit", tmp_path / "empty")
    with pytest.raises(UserError, match=r"empty: has no config\.yaml; expected the folder of a run"):
        import_results(tmp_path / "empty", "vlmevalkit", vlmevalkit)
    (tmp_path / "empty" / "config.yaml").write_text("protocol: paper\n")
    with pytest.raises(UserError, match="is no configuration of visual_instruction") as raised:
        import_results(tmp_path / "empty", "vlmevalkit", vlmevalkit)
    assert "\n" not in str(raised.value)
    with pytest.raises(UserError, match="expected one of vlmevalkit, lmms_eval"):
        import_results(run.path, "opencompass", vlmevalkit)


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b'"split","Overall"\n"dev","0.5'])
def test_a_damaged_file_is_told_in_a_line(content, run, vlmevalkit):
    (vlmevalkit / "merged_AI2D_TEST_acc.csv").write_bytes(content)
    with pytest.raises(UserError, match="AI2D_TEST_acc") as raised:
        import_results(run.path, "vlmevalkit", vlmevalkit, **JUDGE)
    assert "\n" not in str(raised.value)


def test_the_command(run, vlmevalkit, caplog, capsys):
    arguments = ["--run", str(run.path), "--from", "vlmevalkit", str(vlmevalkit)]
    with caplog.at_level(logging.INFO):
        main([*arguments, "--judge", JUDGE["judge"], "--date", JUDGE["date"]])
    assert "mmvet: judge_score 35.2%" in caplog.text and len(results(run)) == 9
    with pytest.raises(SystemExit) as ended:
        main([*arguments, "--judge", "gpt-4", "--date", "soon", "--on-finished", "overwrite"])
    assert ended.value.code == 2
    assert capsys.readouterr().err == "error: --date soon: expected a day as YYYY-MM-DD\n"
