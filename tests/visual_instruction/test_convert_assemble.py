"""A LLaVA of parts computes what its parts compute, and bad parts leave nothing behind."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoProcessor, AutoTokenizer, CLIPImageProcessorPil, LlavaForConditionalGeneration
from transformers.models.clip.modeling_clip import CLIPVisionModel

from moslora_core.errors import UserError
from visual_instruction.convert import assemble as module
from visual_instruction.convert.assemble import assemble
from visual_instruction.convert.checkpoint import ShardWriter, open_checkpoint

from .convert_parts import left_over, renamed, save_clip, save_llm, save_projector, save_tokenizer

TEXT = "<s><|im_start|>user\nWhat colour?<|im_end|>\n"


@pytest.fixture
def parts(tmp_path: Path) -> dict[str, Path]:
    folders = {name: tmp_path / name for name in ("llm", "vision", "projector")}
    save_llm(folders["llm"])
    save_clip(folders["vision"])
    save_projector(folders["projector"])
    return folders


def loaded(folder: Path, dtype="auto") -> LlavaForConditionalGeneration:
    model, report = LlavaForConditionalGeneration.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    return model.eval()


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return dict(open_checkpoint(folder).tensors("tensors"))


def ids_of(folder: Path, text: str = TEXT) -> torch.Tensor:
    return AutoTokenizer.from_pretrained(folder)(text, add_special_tokens=False, return_tensors="pt").input_ids


@pytest.mark.parametrize("tied", [False, True])
def test_text_has_the_logits_of_the_language_model(tmp_path, tied):
    llm = save_llm(tmp_path / "llm", tie_word_embeddings=tied)
    save_clip(tmp_path / "vision")
    model = loaded(assemble(tmp_path / "llm", tmp_path / "vision", None, tmp_path / "out"))
    ids = ids_of(tmp_path / "llm")
    assert torch.equal(ids, ids_of(tmp_path / "out"))
    with torch.no_grad():
        ours, theirs = model(input_ids=ids).logits, llm(input_ids=ids).logits
    assert torch.equal(ours[..., :261], theirs)
    tied_now = model.lm_head.weight.data_ptr() == model.get_input_embeddings().weight.data_ptr()
    assert tied_now is tied


def test_new_rows_are_never_the_largest_logit(parts, tmp_path):
    model = loaded(assemble(**parts, out=tmp_path / "out"))
    assert model.config.image_token_index == 261
    assert model.lm_head.weight.shape == (320, 48)  # 262 and the next multiple of 64
    with torch.no_grad():
        logits = model.lm_head(torch.randn(2000, 48))
    assert (logits.argmax(-1) < 261).all()
    mean = logits[:, :261].mean(-1, keepdim=True)
    assert torch.allclose(logits[:, 261:], mean.expand(-1, 59), atol=1e-4)


def test_images_pass_tower_and_projector(parts, tmp_path):
    """Against the parts on their own: the tower's last state but one, the projector by hand, the language model."""
    model = loaded(assemble(**parts, out=tmp_path / "out"))
    processor = AutoProcessor.from_pretrained(tmp_path / "out")
    image = Image.effect_noise((40, 30), 90).convert("RGB")
    batch = processor(text=f"<image>{TEXT}", images=image, return_tensors="pt", add_special_tokens=False)
    ids = batch["input_ids"]
    assert (ids == 261).sum() == 4
    tower = CLIPVisionModel.from_pretrained(parts["vision"]).eval()
    llm = module.LlamaForCausalLM.from_pretrained(parts["llm"]).eval()
    projector = load_file(parts["projector"] / "model.safetensors")
    with torch.no_grad():
        features = tower(batch["pixel_values"], output_hidden_states=True).hidden_states[-2][:, 1:]
        hidden = torch.nn.functional.linear(features, projector["linear_1.weight"], projector["linear_1.bias"])
        hidden = torch.nn.functional.gelu(hidden)
        hidden = torch.nn.functional.linear(hidden, projector["linear_2.weight"], projector["linear_2.bias"])
        embedded = torch.cat([hidden, llm.get_input_embeddings()(ids[:, 4:])], dim=1)
        assert (ids[:, :4] == 261).all()
        expected = llm(inputs_embeds=embedded).logits
        assert torch.equal(model(**batch).logits[..., :261], expected)


@pytest.mark.parametrize("layout", ["clip", "old names", "llava"])
def test_the_tower_is_found_in_every_layout(layout, parts, tmp_path, tiny_llava_dir):
    source = tmp_path / "source"
    if layout == "clip":
        whole = save_clip(source, whole=True)
        expected = {f"{name}": tensor for name, tensor in whole.vision_model.state_dict().items()}
    elif layout == "old names":
        tower = save_clip(source)
        expected = tower.state_dict()
        renamed(source, lambda name: f"vision_model.{name}")
        tensors = load_file(source / "model.safetensors")
        tensors["vision_model.embeddings.position_ids"] = torch.arange(5)[None]  # a buffer that old versions saved
        save_file(tensors, source / "model.safetensors")
    else:
        source = tiny_llava_dir
        llava = LlavaForConditionalGeneration.from_pretrained(source)
        expected = llava.model.vision_tower.state_dict()
    model = loaded(assemble(parts["llm"], source, None, tmp_path / "out"))
    found = model.model.vision_tower.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_a_known_image_token_is_kept(tiny_llava_dir, parts, tmp_path):
    """With rows for it, nothing grows; the tokenizer is the one of the LLaVA in the fixtures."""
    llm = tmp_path / "known"
    tokenizer = AutoTokenizer.from_pretrained(tiny_llava_dir)
    save_llm(llm, vocab_size=len(tokenizer))
    tokenizer.save_pretrained(llm)
    model = loaded(assemble(llm, parts["vision"], None, tmp_path / "out"))
    assert model.config.image_token_index == tokenizer.convert_tokens_to_ids("<image>")
    assert model.config.text_config.vocab_size == len(tokenizer)
    again = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert again.get_vocab() == tokenizer.get_vocab()


def test_dtype_is_kept_or_set(tmp_path):
    save_llm(tmp_path / "llm", dtype=torch.bfloat16)
    save_clip(tmp_path / "vision")
    kept = assemble(tmp_path / "llm", tmp_path / "vision", None, tmp_path / "kept")
    dtypes = {name.split(".")[0]: tensor.dtype for name, tensor in tensors_of(kept).items()}
    assert dtypes == {
        "language_model": torch.bfloat16,
        "multi_modal_projector": torch.bfloat16,
        "vision_tower": torch.float32,
    }
    assert loaded(kept).dtype == torch.bfloat16
    cast = assemble(tmp_path / "llm", tmp_path / "vision", None, tmp_path / "cast", dtype=torch.float16)
    assert {tensor.dtype for tensor in tensors_of(cast).values()} == {torch.float16}
    assert loaded(cast).dtype == torch.float16


def test_a_new_projector_follows_its_seed(parts, tmp_path):
    def projector(name: str, seed: int) -> torch.Tensor:
        folder = assemble(parts["llm"], parts["vision"], None, tmp_path / name, seed=seed)
        return tensors_of(folder)["multi_modal_projector.linear_1.weight"]

    before = torch.random.get_rng_state()
    first, again, other = projector("a", 0), projector("b", 0), projector("c", 1)
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert first.abs().max() <= 32**-0.5  # nn.Linear's bound
    assert torch.equal(torch.random.get_rng_state(), before)


def test_processor_comes_from_the_tower(parts, tmp_path):
    mean = [0.1, 0.2, 0.3]
    CLIPImageProcessorPil(
        size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}, image_mean=mean
    ).save_pretrained(parts["vision"])
    assemble(**parts, out=tmp_path / "out")
    processor = AutoProcessor.from_pretrained(tmp_path / "out")
    assert list(processor.image_processor.image_mean) == mean
    assert (processor.patch_size, processor.num_additional_image_tokens) == (14, 1)
    assert processor.vision_feature_select_strategy == "default"


def test_generation_settings_come_along_even_invalid_ones(parts, tmp_path):
    settings = {"eos_token_id": [2, 4], "temperature": 0.6, "do_sample": False}
    (parts["llm"] / "generation_config.json").write_text(json.dumps(settings))
    model = loaded(assemble(**parts, out=tmp_path / "out"))
    assert model.generation_config.eos_token_id == [2, 4]


def test_shards_hold_what_one_file_holds(tmp_path):
    tensors = {f"t{number}": torch.randn(10, 10) for number in range(5)}
    whole = torch.randn(20, 10)
    tensors["part"] = whole[:10]
    for name, limit in (("one", 10**6), ("many", 900)):
        (tmp_path / name).mkdir()
        writer = ShardWriter(tmp_path / name, shard_bytes=limit)
        for key, tensor in tensors.items():
            writer.add(key, tensor)
        writer.close()
        found = tensors_of(tmp_path / name)
        assert found.keys() == tensors.keys()
        assert all(torch.equal(found[key], tensor) for key, tensor in tensors.items())
    assert left_over(tmp_path / "one") == ["model.safetensors"]
    files = [file for file in left_over(tmp_path / "many") if file.endswith(".safetensors")]
    assert files == [f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]
    with safe_open(tmp_path / "many" / files[0], "pt") as file:
        assert file.metadata() == {"format": "pt"}


# ----------------------------------------------------------------------------------------------------------- bad input


def _no_config(parts):
    (parts["llm"] / "config.json").unlink()


def _not_json(parts):
    (parts["llm"] / "config.json").write_text("{")


def _wrong_type(parts):
    path = parts["llm"] / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_type": "gpt2"}))


def _missing_shard(parts):
    next(iter(sorted(parts["llm"].glob("model-*.safetensors")))).unlink()


def _cut_shard(parts):
    path = next(iter(sorted(parts["llm"].glob("model-*.safetensors"))))
    path.write_bytes(path.read_bytes()[:100])


def _pickle(parts):
    (parts["vision"] / "model.safetensors").rename(parts["vision"] / "pytorch_model.bin")


def _other_shape(parts):
    path = parts["vision"] / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"intermediate_size": 40}))


def _no_tensor(parts):
    renamed(parts["vision"], lambda name: name.replace("post_layernorm.bias", "other"))


def _no_tower(parts):
    renamed(parts["vision"], lambda name: name.replace("patch_embedding", "other"))


def _other_tower(parts):
    path = parts["vision"] / "config.json"
    path.write_text(json.dumps({"model_type": "llava", "vision_config": {"model_type": "siglip_vision_model"}}))


def _other_width(parts):
    save_projector(parts["projector"], text_width=40)


def _no_projector(parts):
    shutil.rmtree(parts["projector"])


def _no_tokenizer(parts):
    for path in parts["llm"].glob("*token*"):
        path.unlink()


def _other_size(parts):
    CLIPImageProcessorPil(crop_size={"height": 336, "width": 336}).save_pretrained(parts["vision"])


def _heads(parts):
    path = parts["llm"] / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_attention_heads": 5}))


BAD = [
    (_no_config, r"llm: has no config\.json; expected a model's folder \(llama or internlm2\)"),
    (_not_json, r"llm/config\.json is damaged: expected JSON"),
    (_wrong_type, r"config\.json: model_type is 'gpt2'; expected llama or internlm2"),
    (
        _missing_shard,
        r"model\.safetensors\.index\.json: names the file 'model-00001-of-\d+\.safetensors', which is not in ",
    ),
    (_cut_shard, r"model-00001-of-\d+\.safetensors: not a complete safetensors file"),
    (_pickle, r"vision: holds pytorch_model\.bin, a pickle, which is not read"),
    (_other_shape, r"fc1\.(weight|bias) has shape \(48.*\); expected \(40.*\)"),
    (_no_tensor, r"vision: has no tensor post_layernorm\.bias"),
    (_no_tower, r"vision: has no tensor embeddings\.patch_embedding\.weight; expected one of shape \(32, 3, 14, 14\)"),
    (_other_tower, r"vision tower is 'siglip_vision_model'; expected clip_vision_model"),
    (_other_width, r"projector: leads from 32 to 40; expected from 32 \(.*vision\) to 48 \(.*llm\)"),
    (_no_projector, r"projector: no such file or folder"),
    (_no_tokenizer, r"llm: "),
    (_other_size, r"crops to \(336, 336\); its vision tower takes \(28, 28\)"),
    (_heads, r"llm/config\.json: .*hidden size \(48\) is not a multiple of the number of attention heads \(5\)"),
]


@pytest.mark.parametrize(("spoil", "message"), BAD, ids=lambda value: getattr(value, "__name__", ""))
def test_bad_parts_are_refused_in_a_line(spoil, message, parts, tmp_path):
    spoil(parts)
    before = left_over(tmp_path)
    with pytest.raises(UserError, match=message) as caught:
        assemble(**parts, out=tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert left_over(tmp_path) == before


def test_an_output_that_is_not_empty_is_refused(parts, tmp_path):
    save_tokenizer(tmp_path / "out")
    before = left_over(tmp_path / "out")
    with pytest.raises(UserError, match=re.escape(f"{tmp_path / 'out'}: exists and is not empty")):
        assemble(**parts, out=tmp_path / "out")
    assert left_over(tmp_path / "out") == before


def test_an_exception_in_the_middle_leaves_nothing(parts, tmp_path, monkeypatch):
    def stopped(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "write_processor", stopped)
    before = left_over(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        assemble(**parts, out=tmp_path / "out")
    assert left_over(tmp_path) == before
