"""A LLaVA of the hub, under old and new names, keeps its logits bit for bit; so do the parts that it is taken into."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoProcessor, AutoTokenizer, LlavaForConditionalGeneration, LlavaProcessor

from moslora_core.errors import UserError
from visual_instruction.convert import llava_hf as module
from visual_instruction.convert.__main__ import main
from visual_instruction.convert.assemble import assemble
from visual_instruction.convert.llava_hf import convert_llava_hf

from .convert_parts import left_over, renamed, save_clip, save_llm


def published(name: str) -> str:
    """llava-hf's names, of those that transformers 5 saves."""
    return name.replace("vision_tower.", "vision_tower.vision_model.")


def in_memory(name: str) -> str:
    """Names of the modules since transformers 4.52."""
    name = name.replace("language_model.lm_head", "lm_head").replace("language_model.model.", "language_model.")
    return name if name.startswith("lm_head") else f"model.{name}"


NAMINGS = {"saved by transformers 5": lambda name: name, "llava-hf": published, "in memory": in_memory}


@pytest.fixture
def source(tiny_llava_dir, tmp_path) -> Path:
    return Path(shutil.copytree(tiny_llava_dir, tmp_path / "source"))


def logits(folder: Path, processor: LlavaProcessor) -> torch.Tensor:
    model, report = LlavaForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    image = Image.effect_noise((40, 30), 90).convert("RGB").resize((28, 28))
    image.putpixel((3, 3), (255, 0, 0))
    torch.manual_seed(0)
    batch = processor(text="<image>\nWhat colour is the circle?", images=image, return_tensors="pt")
    batch["pixel_values"] = torch.randn_like(batch["pixel_values"])
    with torch.no_grad():
        return model.eval()(**batch).logits


@pytest.mark.parametrize("naming", NAMINGS)
def test_logits_stay(naming, source, tiny_llava_dir, tmp_path):
    renamed(source, NAMINGS[naming])
    tensors = load_file(source / "model.safetensors")
    tensors["vision_tower.vision_model.embeddings.position_ids"] = torch.arange(5)[None]  # old versions saved it
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    out = convert_llava_hf(source, tmp_path / "out")
    processor = AutoProcessor.from_pretrained(out)
    expected = logits(tiny_llava_dir, AutoProcessor.from_pretrained(tiny_llava_dir))
    assert torch.equal(logits(out, processor), expected)
    names = set(load_file(out / "model.safetensors"))
    original = load_file(tiny_llava_dir / "model.safetensors")
    assert names == {published(name) for name in original}


def test_parts_assemble_to_the_same_logits(source, tiny_llava_dir, tmp_path):
    parts = convert_llava_hf(source, tmp_path / "parts", parts=True)
    out = assemble(parts / "llm", parts / "vision", parts / "projector", tmp_path / "out")
    expected = logits(tiny_llava_dir, AutoProcessor.from_pretrained(tiny_llava_dir))
    assert torch.equal(logits(out, AutoProcessor.from_pretrained(out)), expected)


def test_an_old_processor_is_completed(source, tmp_path):
    """Processors of llava-hf's first checkpoints do not say what an image expands to."""
    settings = json.loads((source / "processor_config.json").read_text())
    (source / "preprocessor_config.json").write_text(json.dumps(settings["image_processor"]))
    (source / "processor_config.json").unlink()
    processor = AutoProcessor.from_pretrained(convert_llava_hf(source, tmp_path / "out"))
    assert (processor.patch_size, processor.num_additional_image_tokens) == (14, 1)
    assert processor.vision_feature_select_strategy == "default"
    ids = processor(text="<image>", images=Image.new("RGB", (28, 28)), return_tensors="pt").input_ids
    assert (ids == processor.image_token_id).sum() == 4


def test_a_tied_head_stays_tied(tmp_path):
    save_llm(tmp_path / "llm", tie_word_embeddings=True)
    save_clip(tmp_path / "vision")
    first = assemble(tmp_path / "llm", tmp_path / "vision", None, tmp_path / "first")
    out = convert_llava_hf(first, tmp_path / "out")
    assert "language_model.lm_head.weight" not in load_file(out / "model.safetensors")
    model = LlavaForConditionalGeneration.from_pretrained(out)
    assert model.lm_head.weight.data_ptr() == model.get_input_embeddings().weight.data_ptr()


# ----------------------------------------------------------------------------------------------------------- bad input


def _edit(**values):
    def spoil(source):
        path = source / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return spoil


def _without(source):
    tensors = load_file(source / "model.safetensors")
    del tensors["multi_modal_projector.linear_2.bias"]
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})


def _foreign(source):
    renamed(source, lambda name: name.replace("vision_tower.post_layernorm.bias", "image_newline"))


def _smaller(source):
    path = source / "config.json"
    config = json.loads(path.read_text())
    config["text_config"]["intermediate_size"] = 40
    path.write_text(json.dumps(config))


def _tokenizer(source):
    for path in source.glob("tokenizer*"):
        path.unlink()


BAD = [
    (_edit(model_type="llava_next"), r"config\.json: model_type is 'llava_next'; expected llava"),
    (_edit(vision_config={"model_type": "siglip_vision_model"}), r"expected clip_vision_model"),
    (
        _edit(image_token_index=7),
        r"source: image_token_index=7 is '<\|eot_id\|>' in its tokenizer; expected '<image>'",
    ),
    (_without, r"source: has no tensor multi_modal_projector\.linear_2\.bias"),
    (_foreign, r"source: (has no tensor vision_tower.*post_layernorm\.bias|image_newline is not a tensor)"),
    (_smaller, r"gate_proj\.weight has shape \(64, 32\); expected \(40, 32\)"),
    (_tokenizer, r"source: "),
]


@pytest.mark.parametrize(("spoil", "message"), BAD, ids=[str(number) for number in range(len(BAD))])
def test_bad_checkpoints_are_refused_in_a_line(spoil, message, source, tmp_path):
    spoil(source)
    with pytest.raises(UserError, match=message) as caught:
        convert_llava_hf(source, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert left_over(tmp_path) == ["source"]


def test_an_exception_in_the_middle_leaves_nothing(source, tmp_path, monkeypatch):
    def stopped(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "write_processor", stopped)
    with pytest.raises(KeyboardInterrupt):
        convert_llava_hf(source, tmp_path / "out")
    assert left_over(tmp_path) == ["source"]


# ------------------------------------------------------------------------------------------------------------ commands


def test_commands_take_a_llava_apart_and_put_it_together(source, tiny_llava_dir, tmp_path, capsys):
    main(["llava-hf", str(source), str(tmp_path / "parts"), "--parts"])
    main(["projector", str(tmp_path / "parts" / "projector"), str(tmp_path / "projector")])
    parts = [f"--{name}={tmp_path / 'parts' / name}" for name in ("llm", "vision")]
    main(["assemble", *parts, f"--projector={tmp_path / 'projector'}", str(tmp_path / "out")])
    assert capsys.readouterr().out.splitlines()[-1] == str(tmp_path / "out")
    expected = logits(tiny_llava_dir, AutoProcessor.from_pretrained(tiny_llava_dir))
    assert torch.equal(logits(tmp_path / "out", AutoProcessor.from_pretrained(tmp_path / "out")), expected)
    before = AutoTokenizer.from_pretrained(tiny_llava_dir).get_vocab()
    assert AutoTokenizer.from_pretrained(tmp_path / "out").get_vocab() == before


@pytest.mark.parametrize(
    "command",
    [
        ["internlm2", "SOURCE", "OUT"],
        ["projector", "NOWHERE", "OUT"],
        ["llava-hf", "SOURCE", "SOURCE"],
        ["assemble", "--llm", "SOURCE", "--vision", "SOURCE", "OUT"],
    ],
    ids=lambda command: command[0],
)
def test_commands_end_with_one_line(command, source, tmp_path, capsys):
    names = {"SOURCE": source, "OUT": tmp_path / "out", "NOWHERE": tmp_path / "nowhere"}
    with pytest.raises(SystemExit) as caught:
        main([str(names.get(word, word)) for word in command])
    error = capsys.readouterr().err
    assert caught.value.code == 2
    assert error.startswith(f"error: {tmp_path}") and error.count("\n") == 1
    assert left_over(tmp_path) == ["source"]
