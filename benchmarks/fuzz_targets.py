"""What the fuzz run gives damaged files to: for each kind of file, what the commands read it with."""

from __future__ import annotations

import base64
import io
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from common import configuration
from fuzz_inputs import CSV, JSON, JSONL, LINES, OVERRIDES, SAFETENSORS, TSV, YAML, Form
from omegaconf import OmegaConf
from PIL import Image
from safetensors.torch import save_file

from analysis import human_study as exported
from analysis.contents import gather
from analysis.load import load_runs
from analysis.paper import load_paper_numbers
from analysis.study import listing
from analysis.study_plan import Progress
from analysis.study_plan import read_study as read_plan
from analysis.subspace_files import load_trace
from commonsense_reasoning import prepare_data as commonsense
from commonsense_reasoning.config import DataConfig as CommonsenseData
from commonsense_reasoning.data import check_prepared
from commonsense_reasoning.extraction import first_answer, last_answer
from commonsense_reasoning.items import read_prepared
from commonsense_reasoning.lm_eval_tasks.functions import read_items
from commonsense_reasoning.tasks import TASKS
from moslora_core import launch
from moslora_core.adapter_files import CONFIG_NAME, PICKLE_NAME, WEIGHTS_NAME, write_adapter
from moslora_core.drawn_images import FACTS, MANIFEST, SCORES, drawing_settings, read_drawn, read_scores, verified
from moslora_core.errors import UserError
from moslora_core.fold import fold_adapter
from moslora_core.knock_out import knock_out_adapter
from moslora_core.methods import AdapterConfig, peft_config
from moslora_core.official import convert_folder
from moslora_core.prepared import sha256
from moslora_core.record import RunRecord, append_jsonl, read_log, write_atomic, write_json
from moslora_core.running import total_steps, training_arguments
from subject_driven_t2i import prepare_data as subjects
from subject_driven_t2i.config import DataConfig as SubjectData
from subject_driven_t2i.human_study import server, store
from subject_driven_t2i.human_study.study import (
    IMAGES_FOLDER,
    STUDY_FILE,
    Method,
    Pair,
    ShownSubject,
    Study,
    read_study,
    screens,
)
from subject_driven_t2i.subjects import PROMPTS_FILE, prompt_texts, read_subjects
from visual_instruction import prepare_data as visual
from visual_instruction.benchmarks import scoring
from visual_instruction.benchmarks.registry import BENCHMARKS, JUDGED, Benchmark
from visual_instruction.benchmarks.toolkits import read_lmms_eval, read_vlmevalkit
from visual_instruction.benchmarks.tsv import ImageSource, Item, read_tsv
from visual_instruction.config import DataConfig as VisualData
from visual_instruction.conversations import read_questions

EXPERIMENTS = ("commonsense_reasoning", "visual_instruction", "subject_driven_t2i")
ITEM = {"instruction": "Is the sky blue?\n\nAnswer format: true/false", "input": ""}
ITEM |= {"output": "the correct answer is true", "answer": "true"}
DREAMBOOTH = """Object Prompts
prompt_list = [
'a {0} {1} in the jungle'.format(unique_token, class_token),
]
Live Subject Prompts
"a {0} {1}".format(unique_token, class_token)
Classes
toy,can
"""
CONFIG = {"peft_type": "MOSLORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"], "mixer": "learned"}
CONFIG |= {"mixer_init": "orthogonal", "rank_pattern": {}, "alpha_pattern": {"v_proj": 2}, "lora_dropout": 0.0}
# Two runs as they are kept, without their answers, and a study that asks for such.
KEPT = Path(__file__).parents[1] / "results" / "runs"
RUN = Path("commonsense_reasoning/smoke/moslora/training.learning_rate=0.004/seed-0")
PLAN = "studies/commonsense_smoke.yaml"


@dataclass(frozen=True)
class Target:
    """One kind of input.

    Attributes:
        name: ``<area>: <file>``.
        form: how it is taken apart; None where it has no parts.
        examples: valid ones.
        read: what a command does with one. A UserError refuses it.
        weight: its share of the inputs: less for what is slow.
    """

    name: str
    form: Form | None
    examples: Sequence[bytes]
    read: Callable[[bytes], object]
    weight: float = 1.0

    @property
    def area(self) -> str:
        return self.name.split(":")[0]


def of_file(
    area: str, path: Path, form: Form | None, read: Callable[[], object], weight: float = 1.0, out: Path | None = None
) -> Target:
    """A target that puts inputs in the place of a valid file.

    Args:
        out: what ``read`` writes, of which nothing may be there after a refusal.
    """
    example = path.read_bytes()

    def replaced(content: bytes) -> None:
        path.write_bytes(content)
        try:
            read()
        except UserError:
            assert out is None or not out.exists(), f"refused, and {out.name} is there"
            raise
        finally:
            path.write_bytes(example)
            if out is not None:
                shutil.rmtree(out, ignore_errors=True)

    return Target(f"{area}: {path.parent.name}/{path.name}", form, [example], replaced, weight)


def targets(home: Path) -> list[Target]:
    """All targets; ``home`` is an empty folder for what they read."""
    makers = (configurations, data, visual_data, subject_data, toolkits, adapters, records, images, votes)
    return [*answers(), *(target for make in makers for target in make(home / make.__name__))]


def png() -> bytes:
    buffer = io.BytesIO()
    Image.effect_noise((16, 12), 50).convert("RGB").save(buffer, format="PNG")
    return buffer.getvalue()


# ------------------------------------------------------------------------------------------------------ configurations


def configurations(home: Path) -> Iterator[Target]:
    for experiment in EXPERIMENTS:
        yield from _configurations(home / experiment, import_module(f"{experiment}.config"))


def _configurations(home: Path, module: ModuleType) -> Iterator[Target]:
    path = home / "config.yaml"
    plain = configuration(module, ["method=moslora"])
    write_atomic(path, launch.dump(plain))

    def checked(config: Any) -> None:
        """What a training looks at before it reads data and model."""
        record, steps = module.locate(config), total_steps(config.training, 100)
        adapter = config.adapter if isinstance(config.adapter, AdapterConfig) else AdapterConfig()
        peft_config(config.method, adapter, seed=config.seed, total_steps=steps)
        training_arguments(config.training, record, seed=config.seed, steps=steps)

    def composed(content: bytes) -> None:
        given = content.decode("utf-8", "surrogateescape").split("\n")
        given = [entry for entry in given if not entry.startswith(("-", "hydra"))]  # those are Hydra's own
        launch.register(module.Config)
        launch._check(module.CONF_MODULE, None, given)
        checked(configuration(module, given))

    def recorded() -> None:
        launch.register(module.Config)
        launch._check(module.CONF_MODULE, *launch._rerun([f"--rerun={home}"]))
        launch.differences(plain, path)
        checked(launch.instantiate(module.Config, OmegaConf.load(path)))

    keys = launch._flat(OmegaConf.to_container(OmegaConf.structured(plain)))
    lines = [f"{key}={json.dumps(value)}" for key, value in keys.items() if isinstance(value, int | float | list)]
    examples = ["\n".join(["method=moslora", *lines[at : at + 6]]).encode() for at in range(0, len(lines), 6)]
    yield Target(f"configurations: {module.EXPERIMENT} overrides", OVERRIDES, examples, composed, weight=0.05)
    yield of_file("configurations", path, YAML, recorded, weight=0.05)


# ---------------------------------------------------------------------------------------------------------------- data


def data(home: Path) -> Iterator[Target]:
    source, out, done = home / "source", home / "out", home / "prepared"
    write_json(source / "commonsense_170k.json", [ITEM, {**ITEM, "instruction": "Is it?"}])
    write_json(source / "boolq" / "test.json", [ITEM])
    asked = CommonsenseData(str(out), "folder", str(source), tasks=["boolq"])

    def prepared() -> None:
        commonsense.prepare(asked)
        read_items(out, "boolq")

    for file in ("commonsense_170k.json", "boolq/test.json"):
        yield of_file("commonsense data", source / file, JSON, prepared, weight=0.4, out=out)
    there = replace(asked, dir=str(done))
    commonsense.prepare(there)
    reads = {"manifest.json": lambda: check_prepared(there), "test/boolq.json": lambda: read_items(done, "boolq")}
    for file, read in (reads | {"train.json": lambda: read_prepared(done / "train.json")}).items():
        yield of_file("commonsense data", done / file, JSON, read)


def visual_data(home: Path) -> Iterator[Target]:
    area, source, out = "visual data", home / "source", home / "out"
    write_atomic(source / "images" / "a.png", png())
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "Noise."}]
    spoken = [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Hi"}]
    instructions = [{"id": "1", "image": "a.png", "conversations": turns}, {"id": 2, "conversations": spoken * 2}]
    path = source / "train.json"
    write_json(path, instructions)
    asked = VisualData(str(out), "folder", str(path), str(source / "images"), str(source), benchmarks=[])
    for file, form in ((path, JSON), (source / "images" / "a.png", None)):
        yield of_file(area, file, form, lambda: visual.prepare(asked), weight=0.3, out=out)

    image, header = base64.b64encode(png()).decode(), ["index", "question", "image", "answer"]
    short = [header, ["1", "What?", image, "['a', 'b', 'a']"], ["2", "Who?", "1", "x"]]
    yes_no = [[*header, "category"], ["1", "Is it?", image, "Yes", "count"], ["2", "Is it not?", "1", "No", "count"]]
    letters = [[*header, "hint", "A", "B", "C", "l2-category"]]
    letters += [[index, "Which?", image, "A", "nan", "one", "two", "", "c"] for index in ("0", "1000000")]
    for name, rows in {"textvqa": short, "mmbench_en": letters, "mme": yes_no, "mathvista": short}.items():
        benchmark = BENCHMARKS[name]
        path = source / f"{benchmark.file}.tsv"
        write_atomic(path, TSV.dump(rows))

        def scored(benchmark: Benchmark = benchmark) -> None:
            visual.prepare(replace(asked, benchmarks=[benchmark.name], test_items=1))
            items = read_tsv(out / "benchmarks" / f"{benchmark.name}.tsv", benchmark)
            found = [scoring.answer(item, "A yes one") for item in items]
            if benchmark.kind != JUDGED:
                scoring.task_result(benchmark, items, found)

        yield of_file(area, path, TSV, scored, weight=0.3, out=out)

    questions = source / "questions.jsonl"
    append_jsonl(questions, [{"question_id": i, "image": "a.png", "text": "?", "category": "c"} for i in (1, 2)])
    yield of_file(area, questions, JSONL, lambda: read_questions(questions))


def toolkits(home: Path) -> Iterator[Target]:
    tables = {
        "m_MMBench_DEV_EN_acc": [["split", "Overall", "AR", "CP"], ["dev", "0.5", "0.25", "0.75"]],
        "m_MME_score": [["perception", "reasoning"], ["1500.5", "300"]],
        "m_MMVet_gpt-4_score": [["Category", "tot", "acc"], ["ocr", "10", "30.0"], ["Overall", "218", "40.5"]],
    }
    for name, rows in tables.items():
        write_atomic(home / f"{name}.csv", CSV.dump(rows))
        yield of_file("results of toolkits", home / f"{name}.csv", CSV, lambda: read_vlmevalkit(home))
    counts = {"mme": {"original": 2374, "effective": 10}, "ai2d": {"original": 1, "effective": 1}}
    scores = {"mme": {"mme_perception_score,none": 1500, "mme_cognition_score,none": 300}}
    scores["ai2d"] = {"exact_match,none": 1}
    path = home / "1_results.json"
    write_json(path, {"results": scores, "n-samples": counts, "lmms_eval_version": "0.7", "model_name": "m"})
    yield of_file("results of toolkits", path, JSON, lambda: read_lmms_eval(home))


def subject_data(home: Path) -> Iterator[Target]:
    area, source, out, done = "subject data", home / "source", home / "out", home / "prepared"
    write_atomic(source / PROMPTS_FILE, DREAMBOOTH)
    write_atomic(source / "toy" / "0.png", png())
    asked = SubjectData(str(out), "folder", str(source), min_size=8)

    def read(folder: Path) -> None:
        for subject in read_subjects(folder).values():
            prompt_texts(subject)
            [prompt.text_without(subject.class_name) for prompt in subject.prompts]

    def prepare() -> None:
        subjects.prepare(asked)
        read(out)

    for file, form in ((PROMPTS_FILE, LINES), ("toy/0.png", None)):
        yield of_file(area, source / file, form, prepare, weight=0.4, out=out)
    subjects.prepare(replace(asked, dir=str(done)))
    yield of_file(area, done / "subjects.json", JSON, lambda: read(done))


# ------------------------------------------------------------------------------------------------------------ adapters


def tensors(*leaves: str, prefix: str = "base_model.model") -> dict[str, torch.Tensor]:
    """A, B and the mixer of four modules under these names."""
    shapes = zip(leaves, ((2, 4), (3, 2), (2, 2)), strict=True)
    modules = [f"{prefix}.layers.{layer}.{name}" for layer in (0, 1) for name in ("q_proj", "v_proj")]
    return {f"{module}.{leaf}": torch.ones(shape) for leaf, shape in shapes for module in modules}


def adapters(home: Path) -> Iterator[Target]:
    out, given = home / "out", tensors("lora_A.weight", "lora_B.weight", "lora_AB.weight")
    ours = write_adapter(home / "ours", CONFIG, tensors("lora_A.weight", "lora_B.raw", "lora_B.mixer"))
    theirs = write_adapter(home / "theirs", {**CONFIG, "peft_type": "LORA", "lora_use_mixer": True}, given)
    pickled, images = (write_adapter(home / name, {**CONFIG, "peft_type": "LORA"}, {}) for name in ("bin", "SDXL"))
    (pickled / WEIGHTS_NAME).unlink()
    torch.save(given, pickled / PICKLE_NAME)
    renamed = tensors("lora.down.weight", "lora.up.weight", "lora.downB.weight", prefix="unet")
    save_file(renamed, images / "pytorch_lora_weights.safetensors")

    def used() -> None:
        knock_out_adapter(ours, out, zero_pairs=1)
        shutil.rmtree(out)
        fold_adapter(ours, out)

    for file, form in ((CONFIG_NAME, JSON), (WEIGHTS_NAME, SAFETENSORS)):
        yield of_file("adapters", ours / file, form, used, out=out)
        yield of_file("adapters", theirs / file, form, lambda: convert_folder(theirs, out), out=out)
    yield of_file("adapters", pickled / PICKLE_NAME, None, lambda: convert_folder(pickled, out), out=out)
    file = images / "pytorch_lora_weights.safetensors"
    yield of_file("adapters", file, SAFETENSORS, lambda: convert_folder(images, out), out=out)


# --------------------------------------------------------------------------------------------------------- run records


def reported(runs: Path, experiment: str) -> None:
    """The report of the runs without its figures; a record that it leaves out is a refusal."""
    contents = gather(runs, (experiment,), load_paper_numbers(), figures=False)
    for part in contents.parts:
        part.document.files()
    for found in contents.found:
        for entry in found.left_out:
            raise UserError(entry.reason)


def records(home: Path) -> Iterator[Target]:
    for method in ("lora", "moslora"):
        run = Path(str(RUN).replace("/moslora/", f"/{method}/"))
        shutil.copytree(KEPT / run, home / run)
    record = RunRecord(home / RUN)
    record.predictions_path.write_bytes(read_log(record.predictions_file()))
    (run,) = (run for run in load_runs(home, EXPERIMENTS[0])[0] if run.method == "moslora")

    def read() -> None:
        reported(home, EXPERIMENTS[0])
        record.status(), record.results(), record.metrics(), record.predictions()

    files = {"status.json": JSON, "results.json": JSON, "environment.json": JSON, "config.yaml": YAML}
    for file, form in (files | {"metrics.jsonl": JSONL, "predictions.jsonl": JSONL}).items():
        yield of_file("run records", record.path / file, form, read, weight=0.05)
    (curve,) = record.path.glob("knock_out/*.json")
    yield of_file("run records", curve, JSON, record.knock_outs)
    yield of_file("run records", record.subspaces_path, JSON, lambda: load_trace(run, record), weight=0.1)
    shutil.copytree(KEPT / "studies", home / "studies")
    plan = home / PLAN
    yield of_file("run records", plan, YAML, lambda: listing(Progress(read_plan(plan), home)), weight=0.1)


def images(home: Path) -> Iterator[Target]:
    record = RunRecord(home)
    write_atomic(home / "a.png", png())
    row = {"prompt_index": 0, "index": 0, "prompt": "a sks can", "class_prompt": "a can", "noise_seed": 1}
    append_jsonl(home / MANIFEST, [row | {"file": "a.png", "sha256": sha256(home / "a.png")}])
    append_jsonl(home / SCORES, [{"evaluation": "dreambooth", "prompt_index": 0, "index": 0, "dino": 0.5}])
    write_json(home / FACTS, {"finished": True, "fingerprint": "f", "settings": {"steps": 4}})

    def read() -> None:
        [verified(record, image) for image in read_drawn(record)]
        drawing_settings(record), read_scores(record)

    for name, form in {MANIFEST: JSONL, SCORES: JSONL, FACTS: JSON}.items():
        yield of_file("run records", home / name, form, read)


# --------------------------------------------------------------------------------------------------------- human study


def votes(home: Path) -> Iterator[Target]:
    folder = home / EXPERIMENTS[2] / "smoke" / "human_study" / "test"
    sides = [Method(name, name, "default", {"toy": name}) for name in ("moslora", "lora")]
    kinds = [("0", "pair", {}), ("1", "pair", {}), ("2", "same", {"subject_similarity": "tie"})]
    pairs = tuple(Pair(i, kind, "toy", 0, 0, "a can", ("a.png", "b.png"), ("", ""), right) for i, kind, right in kinds)
    shown = {"toy": ShownSubject("can", ("a.png",))}
    write_json(folder / STUDY_FILE, asdict(Study("test", 0, 2, 1, 1, *sides, shown, (16, 12), pairs)))
    for name in ("a.png", "b.png"):
        write_atomic(folder / IMAGES_FOLDER / name, png())
    rows = ["rater,pair,question,choice,winner,expected", "1,0,subject_similarity,left,first,"]
    write_atomic(folder / "votes.csv", "\n".join([*rows, "1,2,subject_similarity,tie,tie,tie\n"]))

    def read() -> None:
        exported.read_study(folder, home)
        reported(home, EXPERIMENTS[2])

    def served() -> None:
        screens(read_study(folder), 1)
        server.create_app(folder)
        read()

    yield of_file("human study", folder / "votes.csv", CSV, read, weight=0.2)
    yield of_file("human study", folder / STUDY_FILE, JSON, served, weight=0.2)

    app = server.create_app(folder)
    app.testing = True  # an exception is raised, instead of becoming a page
    client, code = app.test_client(), store.add_rater(folder, read_study(folder))
    example = {"number": "1", "type": "application/json", "origin": "http://localhost"}
    example |= {"code": code, "body": {"question": "subject_similarity", "choice": "left"}}

    def vote(content: bytes) -> None:
        try:
            given = {key: str(value) for key, value in {**example, **json.loads(content)}.items() if key != "body"}
            body = json.dumps(json.loads(content)["body"]).encode()
        except (ValueError, KeyError, TypeError, RecursionError):  # no description of a request, but its body
            given, body = example, content
        try:
            answer = client.post(
                f"/rate/{given['code']}/{given['number']}/votes",
                data=body,
                headers={"Content-Type": given["type"], "Origin": given["origin"]},
            )
        except (UnicodeError, ValueError) as error:
            if "werkzeug/test" in error.__traceback__.tb_next.tb_frame.f_code.co_filename:
                raise UserError("no such request can be sent") from None
            raise
        if answer.status_code >= 400:
            assert answer.status_code < 500
            raise UserError(answer.get_data(as_text=True))

    yield Target("human study: vote", JSON, [json.dumps(example).encode()], vote, weight=0.5)


# ------------------------------------------------------------------------------------------------------------- answers


def answers() -> Iterator[Target]:
    """Responses of a model, none of which may be refused."""

    def of_labels(response: str) -> None:
        for task in TASKS:
            first_answer(task, response), last_answer(task, response)

    def of_questions(response: str) -> None:
        head, _, tail = response.partition("\n")
        options = {"A": head, "B": tail, "C": "a cat"}
        for kind, right in (("multiple_choice", "A"), ("yes_no", "Yes"), ("short_answer", head), ("judged", "")):
            item = Item("i", kind, "?", ImageSource(Path("x")), options=options, answers=(right,) * 3)
            scoring.answer(item, response), scoring.gold(item)

    said = [f"the correct answer is {task.labels[-1]}\n\n### Response:\nno".encode() for task in TASKS.values()]
    asked = [b"The answer is B.\nA. cat", b"Yes, it is not.", b"3,000 o'clock\tdont", b"(A) one\nB) two"]
    for name, examples, read in (("labels", said, of_labels), ("questions", asked, of_questions)):

        def never_refused(content: bytes, read: Callable[[str], None] = read) -> None:
            try:
                read(content.decode("utf-8", "surrogateescape"))
            except UserError as error:
                raise AssertionError("a response was refused") from error

        yield Target(f"answers: {name}", LINES, examples, never_refused, weight=6)
