"""InternLM2 in Llama's layout: bit for bit what was packed, and what InternLM2's own computation gives."""

from __future__ import annotations

import io
import json
import math
import random
import re
from pathlib import Path

import pytest
import sentencepiece
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from moslora_core.errors import UserError
from visual_instruction.chat import TEMPLATES, check_template
from visual_instruction.convert import internlm2 as module
from visual_instruction.convert.assemble import assemble
from visual_instruction.convert.internlm2 import convert_internlm2

from .convert_parts import left_over, save_clip

SIZES = {
    "vocab_size": 384,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 16,
    "rms_norm_eps": 1e-5,
}
HEADS, GROUPS, SIZE = 6, 2, 8
PLACES = {
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.up_proj": "feed_forward.w3",
    "mlp.down_proj": "feed_forward.w2",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
}
SPECIAL = ("<|plugin|>", "<|im_end|>", "<|im_start|>")


def packed(llama: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Llama's tensors under InternLM2's names, the fused matrix filled row by row."""
    out = {
        "model.tok_embeddings.weight": llama["model.embed_tokens.weight"],
        "model.norm.weight": llama["model.norm.weight"],
        "output.weight": llama["lm_head.weight"],
    }
    for name, tensor in llama.items():
        match = re.fullmatch(r"model\.layers\.(\d+)\.(.+)\.(weight|bias)", name)
        if match and match[2] in PLACES:
            out[f"model.layers.{match[1]}.{PLACES[match[2]]}.{match[3]}"] = tensor
        elif match and match[2] == "self_attn.q_proj":
            read = {part: llama[name.replace("q_proj", f"{part}_proj")] for part in "qkv"}
            rows = []
            for group in range(GROUPS):
                per_group = HEADS // GROUPS
                for head in range(group * per_group, (group + 1) * per_group):
                    rows += [read["q"][head * SIZE + row] for row in range(SIZE)]
                rows += [read["k"][group * SIZE + row] for row in range(SIZE)]
                rows += [read["v"][group * SIZE + row] for row in range(SIZE)]
            out[f"model.layers.{match[1]}.attention.wqkv.{match[3]}"] = torch.stack(rows)
    return out


def trained_pieces(dummy_prefix: bool = False, shuffled: bool = False, normalization: str = "identity") -> bytes:
    """A sentencepiece model of 384 pieces with bytes and three reserved ones at its end, as InternLM2's has them."""
    words = ["the", "image", "shows", "a", "red", "circle", "blue", "square", "what", "colour", "left", "of", "above"]
    chosen = random.Random(0)
    lines = [" ".join(chosen.choices(words, k=8)) for _ in range(300)]
    buffer = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=buffer,
        model_type="bpe",
        vocab_size=381,
        byte_fallback=True,
        normalization_rule_name=normalization,
        add_dummy_prefix=dummy_prefix,
        remove_extra_whitespaces=False,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto.FromString(buffer.getvalue())
    if shuffled:  # scores stay with their pieces: the order of the ids is no longer that of the merges
        first = next(i for i, piece in enumerate(model.pieces) if piece.type == 1)
        normal = [(piece.piece, piece.score) for piece in model.pieces[first:]]
        chosen.shuffle(normal)
        for piece, (text, score) in zip(model.pieces[first:], normal, strict=True):
            piece.piece, piece.score = text, score
    while len(model.pieces) < SIZES["vocab_size"]:
        model.pieces.add(piece=f"[UNUSED_TOKEN_{len(model.pieces)}]", score=0.0, type=4)
    return model.SerializeToString()


def write_source(folder: Path, model: LlamaForCausalLM, pieces: bytes | None = None, **config) -> Path:
    """An InternLM2 checkpoint of ``model``'s weights in two shards, with a chat model's tokenizer."""
    folder.mkdir()
    tensors = packed(model.state_dict())
    names = sorted(tensors)
    files = {name: f"model-0000{1 + (i % 2)}-of-00002.safetensors" for i, name in enumerate(names)}
    for file in set(files.values()):
        save_file({name: tensors[name].contiguous() for name in names if files[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    values = SIZES | {
        "model_type": "internlm2",
        "architectures": ["InternLM2ForCausalLM"],
        "auto_map": {"AutoConfig": "configuration_internlm2.InternLM2Config"},
        "bias": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
        "rope_theta": 10000,
        "rope_scaling": None,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
    }
    (folder / "config.json").write_text(json.dumps(values | config))
    (folder / "tokenizer.model").write_bytes(trained_pieces() if pieces is None else pieces)
    size = SIZES["vocab_size"]
    added = {str(number): text for number, text in enumerate(("<unk>", "<s>", "</s>"))}
    added |= {str(size - len(SPECIAL) + number): text for number, text in enumerate(SPECIAL)}
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    tokenizer = {
        "added_tokens_decoder": {number: {"content": text, **flags} for number, text in added.items()},
        "additional_special_tokens": list(SPECIAL),
        "auto_map": {"AutoTokenizer": ["tokenization_internlm2.InternLM2Tokenizer", None]},
        "add_bos_token": True,
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "</s>",
        "unk_token": "<unk>",
        "tokenizer_class": "InternLM2Tokenizer",
        "chat_template": "{{ messages }}",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    return folder


def random_llama(dtype: torch.dtype = torch.float32, **config) -> LlamaForCausalLM:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = LlamaForCausalLM(LlamaConfig(**SIZES | {"initializer_range": 0.3} | config)).eval()
        for name, parameter in model.named_parameters():
            parameter.data = parameter.data.to(dtype)  # not .to() of the model: its rotary frequencies stay float32
            if name.endswith("bias") or "norm" in name:  # transformers begins with zeros and ones
                torch.nn.init.uniform_(parameter.data, 0.5, 1.5)
    return model


@pytest.fixture(scope="module")
def pieces() -> bytes:
    return trained_pieces()


# ------------------------------------------------------------------------------------------------------------- weights


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
def test_round_trip_is_exact(tmp_path, pieces, bias, dtype):
    model = random_llama(dtype, attention_bias=bias)
    out = convert_internlm2(write_source(tmp_path / "source", model, pieces, bias=bias), tmp_path / "out")
    again, report = LlamaForCausalLM.from_pretrained(out, dtype="auto", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    expected = model.state_dict()
    assert again.state_dict().keys() == expected.keys()
    for name, tensor in again.state_dict().items():
        assert tensor.dtype == dtype and torch.equal(tensor, expected[name]), name
    ids = torch.randint(SIZES["vocab_size"], (2, 12))
    with torch.no_grad():
        assert torch.equal(again.eval()(ids).logits, model(ids).logits)


def internlm2_forward(tensors: dict[str, torch.Tensor], ids: torch.Tensor, theta: float, scaling) -> torch.Tensor:
    """InternLM2's computation in plain torch on its own tensors, after its modelling code. ids (n,) -> (n, vocab)."""
    length, group = len(ids), HEADS // GROUPS

    def norm(states, weight):
        return states / (states.pow(2).mean(-1, keepdim=True) + SIZES["rms_norm_eps"]).sqrt() * weight

    positions = torch.arange(length, dtype=torch.float64)
    if scaling and scaling["type"] == "dynamic" and length > SIZES["max_position_embeddings"]:
        factor = scaling["factor"]
        stretch = factor * length / SIZES["max_position_embeddings"] - (factor - 1)
        theta = theta * stretch ** (SIZE / (SIZE - 2))
    if scaling and scaling["type"] == "linear":
        positions = positions / scaling["factor"]
    angles = positions[:, None] * theta ** (-torch.arange(0, SIZE, 2) / SIZE)
    turn = torch.polar(torch.ones_like(angles), angles)

    def rotate(states):  # (n, heads, size): the halves are the real and the imaginary parts
        turned = torch.complex(states[..., : SIZE // 2], states[..., SIZE // 2 :]) * turn[:, None]
        return torch.cat([turned.real, turned.imag], dim=-1)

    states = tensors["model.tok_embeddings.weight"][ids]
    hidden = torch.full((length, length), -math.inf).triu(1)
    for layer in range(SIZES["num_hidden_layers"]):
        own = {
            name.removeprefix(f"model.layers.{layer}."): tensor
            for name, tensor in tensors.items()
            if name.startswith(f"model.layers.{layer}.")
        }
        fused = norm(states, own["attention_norm.weight"]) @ own["attention.wqkv.weight"].T
        fused = fused.view(length, GROUPS, group + 2, SIZE)
        mixed = torch.empty(length, HEADS, SIZE, dtype=states.dtype)
        for head in range(HEADS):
            place = head // group
            query = rotate(fused[:, place : place + 1, head % group])[:, 0]
            key = rotate(fused[:, place : place + 1, group])[:, 0]
            weights = (query @ key.T / SIZE**0.5 + hidden).softmax(-1)
            mixed[:, head] = weights @ fused[:, place, group + 1]
        states = states + mixed.flatten(1) @ own["attention.wo.weight"].T
        inner = norm(states, own["ffn_norm.weight"])
        gate = inner @ own["feed_forward.w1.weight"].T
        inner = gate * gate.sigmoid() * (inner @ own["feed_forward.w3.weight"].T)
        states = states + inner @ own["feed_forward.w2.weight"].T
    return norm(states, tensors["model.norm.weight"]) @ tensors["output.weight"].T


@pytest.mark.parametrize("length", [11, 40], ids=["within", "beyond"])
@pytest.mark.parametrize("scaling", [None, {"type": "dynamic", "factor": 2.0}, {"type": "linear", "factor": 4.0}])
def test_computes_what_internlm2_computes(tmp_path, pieces, scaling, length):
    """Beyond ``max_position_embeddings`` too, where the dynamic scaling changes the base."""
    model = random_llama()
    source = write_source(tmp_path / "source", model, pieces, rope_theta=1000, rope_scaling=scaling)
    converted = LlamaForCausalLM.from_pretrained(convert_internlm2(source, tmp_path / "out")).double().eval()
    ids = torch.randint(SIZES["vocab_size"], (length,), generator=torch.Generator().manual_seed(1))
    tensors = {name: tensor.double() for name, tensor in packed(model.state_dict()).items()}
    with torch.no_grad():
        found, expected = converted(ids[None]).logits[0], internlm2_forward(tensors, ids, 1000.0, scaling)
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()


def test_configuration(tmp_path, pieces):
    source = write_source(
        tmp_path / "source", random_llama(), pieces, rope_theta=1e6, rope_scaling={"type": "dynamic", "factor": 2.0}
    )
    config = LlamaConfig.from_pretrained(convert_internlm2(source, tmp_path / "out"))
    assert config.rope_parameters == {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e6}
    assert {name: getattr(config, name) for name in SIZES} == SIZES
    assert (config.bos_token_id, config.eos_token_id, config.hidden_act) == (1, 2, "silu")
    assert config.architectures == ["LlamaForCausalLM"]
    assert "auto_map" not in json.loads((tmp_path / "out" / "config.json").read_text())


# ----------------------------------------------------------------------------------------------------------- tokenizer


@pytest.fixture(scope="module", params=["plain", "dummy prefix", "shuffled", "nmt_nfkc"])
def tokenizers(request, tmp_path_factory):
    """The converted tokenizer, as it is loaded from the folder, and sentencepiece's own."""
    folder = tmp_path_factory.mktemp("tokenizer")
    normalization = request.param if request.param == "nmt_nfkc" else "identity"
    content = trained_pieces(request.param == "dummy prefix", request.param == "shuffled", normalization)
    source = write_source(folder / "source", random_llama(), content)
    converted = AutoTokenizer.from_pretrained(convert_internlm2(source, folder / "out"))
    return converted, sentencepiece.SentencePieceProcessor(model_proto=content)


TEXTS = st.one_of(
    st.text(st.characters(blacklist_categories=("Cs",), blacklist_characters="\0▁<[")),
    st.text("aeilmoqrst  \n\t").filter(bool),
)


@settings(max_examples=300, deadline=None)
@example(text="\r\n")
@example(text="two\r\nlines\n\rand more\r")
@given(text=TEXTS)
def test_reads_text_as_sentencepiece_does(tokenizers, text):
    converted, reference = tokenizers
    assert converted(text, add_special_tokens=False).input_ids == reference.encode(text)


@pytest.mark.parametrize("text", ["what colour is the red circle?", "  two  spaces\n\nand lines ", "你好, 世界 😀"])
def test_text_comes_back(tokenizers, text):
    converted, reference = tokenizers
    ids = reference.encode(text)
    assert converted.decode(ids) == reference.decode(ids)


def test_special_tokens_take_the_places_of_reserved_pieces(tokenizers):
    converted, reference = tokenizers
    size = SIZES["vocab_size"]
    assert len(converted) == size
    assert converted.convert_tokens_to_ids(list(SPECIAL)) == [size - 3, size - 2, size - 1]
    assert (converted.bos_token_id, converted.eos_token_id) == (1, 2)
    check = converted("red<|im_end|>\n", add_special_tokens=False).input_ids
    assert check == [*reference.encode("red"), size - 2, *reference.encode("\n")]
    assert converted("red").input_ids == [1, *reference.encode("red")]
    assert converted.decode(check, skip_special_tokens=True).split() == ["red"]
    assert converted.chat_template == "{{ messages }}"


def test_a_llava_of_it_fits_the_template(tmp_path, pieces):
    source = write_source(tmp_path / "source", random_llama(), pieces)
    save_clip(tmp_path / "vision")
    llm = convert_internlm2(source, tmp_path / "llm")
    out = assemble(llm, tmp_path / "vision", None, tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(out)
    check_template(TEMPLATES["internlm2"], tokenizer)
    assert tokenizer.convert_tokens_to_ids("<image>") == SIZES["vocab_size"]
    before = AutoTokenizer.from_pretrained(llm)
    text = "<s><|im_start|>user\nwhat colour<|im_end|>\n"
    assert tokenizer(text).input_ids == before(text).input_ids


# ----------------------------------------------------------------------------------------------------------- bad input


def _set(**values):
    def spoil(source):
        path = source / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return spoil


def _no_config(source):
    (source / "config.json").unlink()


def _missing_shard(source):
    (source / "model-00002-of-00002.safetensors").unlink()


def _pickles(source):
    for path in source.glob("model*"):
        path.unlink()
    (source / "pytorch_model-00001-of-00002.bin").write_bytes(b"")


def _other_shape(source):
    for path in source.glob("*.safetensors"):
        tensors = load_file(path)
        for name in [name for name in tensors if name.endswith("1.attention.wqkv.weight")]:
            tensors[name] = tensors[name][:-SIZE]
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)


def _no_tokenizer(source):
    (source / "tokenizer.model").unlink()


def _no_model(source):
    (source / "tokenizer.model").write_bytes(b"\xff" * 50)


def _far_token(source):
    path = source / "tokenizer_config.json"
    tokenizer = json.loads(path.read_text())
    tokenizer["added_tokens_decoder"]["9999"] = {"content": "<|far|>", "special": True}
    path.write_text(json.dumps(tokenizer))


BAD = [
    (_no_config, r"source: has no config\.json"),
    (_set(model_type="llama"), r"model_type is 'llama'; expected internlm2"),
    (_set(num_key_value_heads=4), r"config\.json: .*num_attention_heads.* 6.*num_key_value_heads.* 4"),
    (_set(num_attention_heads=5, num_key_value_heads=5), r"config\.json: .*hidden_size.* 48.*num_attention_heads.* 5"),
    (_set(rope_scaling={"type": "yarn", "factor": 2.0}), r"config\.json: rope_scaling .*yarn"),
    (_set(vocab_size=None), r"config\.json: .*vocab_size"),
    (
        _missing_shard,
        r"model\.safetensors\.index\.json: names the file 'model-00002-of-00002\.safetensors', which is not in ",
    ),
    (_pickles, r"source: holds pytorch_model-00001-of-00002\.bin, a pickle, which is not read; .*safetensors/convert"),
    (_other_shape, r"layers\.1\.attention\.wqkv\.weight has shape \(72, 48\); expected \(80, 48\)"),
    (_no_tokenizer, r"tokenizer\.model"),
    (_no_model, r"tokenizer\.model: .*sentencepiece model"),
    (_far_token, r"<\|far\|>.* 9999"),
]


@pytest.mark.parametrize(("spoil", "message"), BAD, ids=[str(number) for number in range(len(BAD))])
def test_bad_checkpoints_are_refused_in_a_line(spoil, message, tmp_path, pieces):
    source = write_source(tmp_path / "source", random_llama(), pieces)
    spoil(source)
    with pytest.raises(UserError, match=message) as caught:
        convert_internlm2(source, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert left_over(tmp_path) == ["source"]


def test_an_output_that_is_not_empty_is_refused(tmp_path, pieces):
    source = write_source(tmp_path / "source", random_llama(), pieces)
    with pytest.raises(UserError, match="exists and is not empty"):
        convert_internlm2(source, source)


def test_an_exception_in_the_middle_leaves_nothing(tmp_path, pieces, monkeypatch):
    def stopped(*_, **__):
        raise KeyboardInterrupt

    source = write_source(tmp_path / "source", random_llama(), pieces)
    monkeypatch.setattr(module, "convert_tokenizer", stopped)
    with pytest.raises(KeyboardInterrupt):
        convert_internlm2(source, tmp_path / "out")
    assert left_over(tmp_path) == ["source"]
