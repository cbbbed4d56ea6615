"""Exports: loaded by transformers and PEFT alone they answer as the run does, in both toolkits' ways of asking."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoProcessor, LlavaForConditionalGeneration

from moslora_core.errors import UserError
from moslora_core.record import RunRecord
from visual_instruction import export as exporting
from visual_instruction.benchmarks.questions import question_text
from visual_instruction.benchmarks.registry import find
from visual_instruction.benchmarks.tsv import load_image, read_tsv
from visual_instruction.chat import IMAGE, TEMPLATES
from visual_instruction.chat_markup import chat_markup
from visual_instruction.config import Config
from visual_instruction.data import Collator, encode_prompt
from visual_instruction.export import export, main
from visual_instruction.generation import Responder
from visual_instruction.images import image_token_count, pixel_values
from visual_instruction.models import load_adapted, load_processor

from .placed_runs import PROJECTOR, place_run


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_llava_dir) -> RunRecord:
    return place_run(tmp_path_factory.mktemp("run") / "seed-0", tiny_llava_dir)


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory) -> Path:
    return export(run.path, tmp_path_factory.mktemp("exports") / "interleave-moslora")


def config_of(record: RunRecord) -> Config:
    return exporting.recorded_config(record)


def batch_of(record: RunRecord, image: Image.Image, question: str = "What colour?") -> dict[str, torch.Tensor]:
    config = config_of(record)
    processor = load_processor(config.model)
    template = TEMPLATES[config.model.template]
    turns = [{"from": "human", "value": f"{IMAGE}\n{question}"}]
    row = encode_prompt(turns, processor.tokenizer, template, image_token_count(processor))
    row["pixel_values"] = pixel_values([image], processor, config.data.square_padding)[0]
    return Collator(processor.tokenizer.pad_token_id)([row])


def logits(model, batch) -> torch.Tensor:
    with torch.inference_mode():
        return model.eval()(**batch).logits


@pytest.fixture
def image() -> Image.Image:
    return Image.effect_noise((60, 33), 90).convert("RGB")


# -------------------------------------------------------------------------------------------------------------- merged


def test_the_merged_model_is_plain_and_has_the_logits_of_the_run(run, exported, image):
    batch = batch_of(run, image)
    wanted = logits(load_adapted(config_of(run).model, run.adapter_path), batch)
    model = LlavaForConditionalGeneration.from_pretrained(exported / "merged")
    torch.testing.assert_close(logits(model, batch), wanted, rtol=1e-4, atol=1e-4)
    base = logits(load_adapted(config_of(run).model, None), batch)
    assert (base - wanted).abs().max() > 0.1, "the adapter should matter"
    names = load_file(exported / "merged" / "model.safetensors")
    assert not any("lora" in name or "modules_to_save" in name for name in names)
    assert "language_model.model.embed_tokens.weight" in names, "the layout of llava-hf's checkpoints"


def test_the_merged_model_answers_as_the_run_does(run, exported, prepared_dir):
    items = read_tsv(prepared_dir / "benchmarks" / "smoke_colour.tsv", find("smoke_colour"))
    config = config_of(run)
    ours = Responder(
        load_adapted(config.model, run.adapter_path), load_processor(config.model), TEMPLATES["llama3"]
    ).respond(items, 2, 8)
    model = LlavaForConditionalGeneration.from_pretrained(exported / "merged").eval()
    processor = AutoProcessor.from_pretrained(exported / "merged")
    theirs = []
    for item in items:
        content = [{"type": "image"}, {"type": "text", "text": question_text(item)}]
        prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        inputs = processor(images=load_image(item), text=prompt, return_tensors="pt")
        output = model.generate(**inputs, max_new_tokens=8, eos_token_id=processor.tokenizer.eos_token_id)
        answer = output[0, inputs["input_ids"].shape[1] :]
        theirs.append(processor.tokenizer.decode(answer, skip_special_tokens=True).strip())
    assert theirs == ours and len(set(ours)) > 2


@pytest.mark.parametrize("way", ["lmms_eval", "vlmevalkit"])
@pytest.mark.parametrize("question", ["What colour?\nA. red\nB. blue\nAnswer.", "  padded  ", "图中?"])
def test_both_toolkits_ask_in_the_tokens_of_the_training(way, question, run, exported, image):
    """lmms-eval's llava_hf renders a string by the tokenizer, VLMEvalKit's LLaVA_Next parts by the processor."""
    processor = AutoProcessor.from_pretrained(exported / "merged")
    if way == "lmms_eval":
        messages = [{"role": "user", "content": f"<image>\n{question}"}]
        text = processor.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    else:
        messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
        text = processor.apply_chat_template(messages, add_generation_prompt=True)
    found = processor(images=[image], text=text, return_tensors="pt")
    wanted = batch_of(run, image, question)
    assert found["input_ids"].tolist() == wanted["input_ids"].tolist()
    torch.testing.assert_close(found["pixel_values"], wanted["pixel_values"])
    assert processor.tokenizer.eos_token == "<|eot_id|>"


def test_generation_needs_no_settings(exported):
    model = LlavaForConditionalGeneration.from_pretrained(exported / "merged")
    tokenizer = AutoProcessor.from_pretrained(exported / "merged").tokenizer
    settings = model.generation_config
    assert not settings.do_sample and tokenizer.convert_tokens_to_ids("<|eot_id|>") in settings.eos_token_id
    assert settings.pad_token_id == tokenizer.pad_token_id


def test_without_square_padding_the_processor_crops(tiny_llava_dir, tmp_path, image):
    record = place_run(tmp_path / "run", tiny_llava_dir, "data.square_padding=false")
    out = export(record.path, tmp_path / "out")
    processor = AutoProcessor.from_pretrained(out / "merged")
    found = processor.image_processor([image], return_tensors="pt")["pixel_values"]
    base = AutoProcessor.from_pretrained(tiny_llava_dir)
    torch.testing.assert_close(found, pixel_values([image], base, square=False))
    assert not torch.allclose(found, pixel_values([image], base, square=True), atol=0.1)


def test_a_16_bit_base_gives_a_16_bit_export_merged_in_float32(tiny_llava_dir, tmp_path, image):
    record = place_run(tmp_path / "run", tiny_llava_dir, "model.dtype=bfloat16")
    out = export(record.path, tmp_path / "out")
    weights = load_file(out / "merged" / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    base = LlavaForConditionalGeneration.from_pretrained(tiny_llava_dir, dtype=torch.bfloat16).float()
    exact = PeftModel.from_pretrained(base, record.adapter_path).merge_and_unload().state_dict()
    model = LlavaForConditionalGeneration.from_pretrained(out / "merged", dtype=torch.bfloat16)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, exact[name].to(torch.bfloat16)), name


def test_an_nf4_base_is_merged_dequantised(tiny_llava_dir, tmp_path, image, caplog):
    record = place_run(tmp_path / "run", tiny_llava_dir, "model.quantization=nf4")
    with caplog.at_level(logging.WARNING):
        out = export(record.path, tmp_path / "out")
    assert "quantising the export again would round the adapter too" in caplog.text
    assert "quantization_config" not in json.loads((out / "merged" / "config.json").read_text())
    weights = load_file(out / "merged" / "model.safetensors")
    assert all(tensor.dtype == torch.float32 for tensor in weights.values())
    batch = batch_of(record, image)
    adapted = load_adapted(config_of(record).model, record.adapter_path)
    with torch.inference_mode():
        # In training mode (no dropout here): else some CPUs' NF4 kernels compute in bfloat16.
        quantised = adapted.train()(**batch).logits
    found = logits(load_plain(out / "merged"), batch)
    torch.testing.assert_close(found, quantised, rtol=1e-3, atol=1e-3)
    unquantised = logits(PeftModel.from_pretrained(load_plain(tiny_llava_dir), record.adapter_path), batch)
    assert (found - unquantised).abs().max() > 0.1, "quantising should matter"


def test_an_int8_base_is_merged_dequantised(tiny_llava_dir, tmp_path):
    record = place_run(tmp_path / "run", tiny_llava_dir, "model.quantization=int8")
    out = export(record.path, tmp_path / "out")
    before, after = (load_file(folder / "model.safetensors") for folder in (tiny_llava_dir, out / "merged"))
    name = "language_model.model.layers.1.self_attn.k_proj.weight"  # not adapted: quantised and back
    step = before[name].abs().amax(dim=1, keepdim=True) / 127
    assert 0 < ((after[name] - before[name]).abs() / step).max() <= 0.55  # half a step, and float16's rounding


def load_plain(folder: Path) -> LlavaForConditionalGeneration:
    return LlavaForConditionalGeneration.from_pretrained(folder)


# ------------------------------------------------------------------------------------------------------------- adapter


@pytest.mark.parametrize("mixer", [True, False])
def test_the_adapter_is_plain_lora_for_stock_peft(mixer, tiny_llava_dir, tmp_path, image):
    record = place_run(tmp_path / "run", tiny_llava_dir, mixer=mixer)
    out = export(record.path, tmp_path / "out")
    settings = json.loads((out / "adapter" / "adapter_config.json").read_text())
    assert settings["peft_type"] == "LORA" and settings["modules_to_save"] == [PROJECTOR]
    names = load_file(out / "adapter" / "adapter_model.safetensors")
    assert not any("mixer" in name or name.endswith("raw") for name in names)
    assert sum(PROJECTOR in name for name in names) == 4
    batch = batch_of(record, image)
    wanted = logits(load_adapted(config_of(record).model, record.adapter_path), batch)
    found = logits(PeftModel.from_pretrained(load_plain(tiny_llava_dir), out / "adapter"), batch)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_the_export_says_where_it_comes_from(run, exported):
    facts = json.loads((exported / "export.json").read_text())
    assert facts["run"] == str(run.path) and facts["method"] == "moslora" and facts["template"] == "llama3"
    assert set(facts["logit_differences"]) == {"merging", "writing"}
    assert all(difference <= 1e-4 for difference in facts["logit_differences"].values())
    assert facts["packages"]["transformers"] and len(facts["adapter_sha256"]) == 64


# ------------------------------------------------------------------------------------------------------- chat template


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_chat_template_renders_conversations_as_training_does(name, tiny_llava_dir):
    template, tokenizer = TEMPLATES[name], AutoProcessor.from_pretrained(tiny_llava_dir).tokenizer
    tokenizer.chat_template = chat_markup(template)
    for first in ("<image>\nWhat is it?", "What \"is\" 'it'\n{{ x }}?", "  spaces  ", "<image>", "Is <image> it?"):
        turns = [{"from": "human", "value": first}]
        messages = [{"role": "user", "content": first}]
        for number, said in enumerate(("A cat.", "Why?", "It purrs.\n", "Sure?")):
            assert tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=len(messages) % 2 == 1
            ) == "".join(text for text, _ in template.segments(turns))
            turns.append({"from": ("gpt", "human")[number % 2], "value": said})
            messages.append({"role": ("assistant", "user")[number % 2], "content": said})


def test_what_the_template_does_not_know_is_refused(tiny_llava_dir):
    tokenizer = AutoProcessor.from_pretrained(tiny_llava_dir).tokenizer
    tokenizer.chat_template = chat_markup(TEMPLATES["llama3"])
    for messages in ([{"role": "system", "content": "Be good."}], [{"role": "user", "content": "a"}] * 2):
        with pytest.raises(Exception, match="roles must alternate"):
            tokenizer.apply_chat_template(messages, tokenize=False)


# ------------------------------------------------------------------------------------------------------------ mistakes


def nothing_left(folder: Path) -> bool:
    return not folder.exists() or not any(folder.iterdir())


def test_an_export_whose_merge_changes_the_answers_is_not_written(run, tmp_path, monkeypatch):
    def lose_the_projector(model):
        merged = model.merge_and_unload()
        with torch.no_grad():
            merged.model.multi_modal_projector.linear_1.weight.mul_(1.01)
        return merged.eval()

    monkeypatch.setattr(exporting, "merge", lose_the_projector)
    with pytest.raises(UserError, match=r"export failed: merging changes the logits by .*expected 1e-04 at most"):
        export(run.path, tmp_path / "exports" / "out")
    assert nothing_left(tmp_path / "exports")


def test_an_export_that_reads_back_otherwise_is_not_written(run, tmp_path, monkeypatch):
    write = exporting._write_merged

    def harm(folder, *rest):
        write(folder, *rest)
        path = folder / "model.safetensors"
        weights = load_file(path)
        weights["language_model.lm_head.weight"] *= 1.01
        save_file(weights, path, metadata={"format": "pt"})

    monkeypatch.setattr(exporting, "_write_merged", harm)
    with pytest.raises(UserError, match="export failed: writing changes the logits"):
        export(run.path, tmp_path / "exports" / "out")
    assert nothing_left(tmp_path / "exports")


@pytest.mark.parametrize(
    "harm, complaint",
    [
        (lambda processor: setattr(processor, "chat_template", chat_markup(TEMPLATES["smoke"])), "other tokens"),
        (lambda processor: setattr(processor.image_processor, "do_pad", False), "other pixels"),
    ],
)
def test_an_export_that_would_ask_otherwise_is_not_written(harm, complaint, run, tmp_path, monkeypatch):
    make = exporting.exported_processor

    def spoil(*arguments):
        processor = make(*arguments)
        harm(processor)
        return processor

    monkeypatch.setattr(exporting, "exported_processor", spoil)
    with pytest.raises(UserError, match=complaint) as raised:
        export(run.path, tmp_path / "exports" / "out")
    assert "\n" not in str(raised.value) and nothing_left(tmp_path / "exports")


def test_a_diverged_adapter_is_told_in_a_line(tiny_llava_dir, tmp_path):
    record = place_run(tmp_path / "run", tiny_llava_dir)
    path = record.adapter_path / "adapter_model.safetensors"
    weights = load_file(path)
    weights[next(name for name in weights if "lora_A" in name)].fill_(float("nan"))
    save_file(weights, path)
    with pytest.raises(UserError, match="the adapter cannot be merged: NaNs detected") as raised:
        export(record.path, tmp_path / "exports" / "out")
    assert "\n" not in str(raised.value) and nothing_left(tmp_path / "exports")


def test_a_folder_that_holds_something_is_left_alone(run, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="exists and is not empty"):
        export(run.path, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]


def test_runs_without_an_adapter(tiny_llava_dir, tmp_path):
    with pytest.raises(UserError, match=r"has no config\.yaml; expected the folder of a run"):
        export(tmp_path, tmp_path / "out")
    record = place_run(tmp_path / "run", tiny_llava_dir, "seed=3")
    for path in record.adapter_path.iterdir():
        path.unlink()
    record.adapter_path.rmdir()
    with pytest.raises(
        UserError, match=r"no adapter at .*visual_instruction\.train scale=smoke method=moslora seed=3"
    ):
        export(record.path, tmp_path / "out")
    untrained = place_run(tmp_path / "base", tiny_llava_dir, "method=base")
    with pytest.raises(UserError, match="method=base has no adapter; nothing to export"):
        export(untrained.path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_base_that_moved(run, tiny_llava_dir, tmp_path):
    moved = place_run(tmp_path / "run", tiny_llava_dir)
    moved.config_path.write_text(moved.config_path.read_text().replace(str(tiny_llava_dir), str(tmp_path / "gone")))
    with pytest.raises(UserError, match="gone") as raised:
        export(moved.path, tmp_path / "out")
    assert "\n" not in str(raised.value)
    assert (export(moved.path, tmp_path / "out", base=str(tiny_llava_dir)) / "merged" / "config.json").exists()


def test_the_command(run, tmp_path, capsys):
    main(["--run", str(run.path), "--out", str(tmp_path / "out")])
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["adapter", "export.json", "merged"]
    with pytest.raises(SystemExit) as ended:
        main(["--run", str(run.path), "--out", str(tmp_path / "out")])
    assert ended.value.code == 2
    err = capsys.readouterr().err.splitlines()[-1]
    assert err.startswith("error: ") and "not empty" in err
