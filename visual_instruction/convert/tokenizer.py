"""InternLM2's tokenizer as a plain ``tokenizer.json``: a sentencepiece model (BPE) and special tokens in place of
reserved pieces, which its repository reads with Python code of its own.

Written after that code (tokenization_internlm2_fast.py): pieces are merged in the order of their scores, bytes stand
in for unknown characters, ``▁`` for spaces; a dummy prefix, which InternLM2's model does not ask for, would go in
front of every stretch of text between special tokens. Text is encoded as sentencepiece encodes it (tested).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, processors
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from moslora_core.errors import UserError
from moslora_core.record import read_json

MODEL_FILE = "tokenizer.model"
SETTINGS_FILE = "tokenizer_config.json"

_SPACE = "▁"
# Of sentencepiece's enumeration of kinds of pieces; only normal ones are made by merging others.
_NORMAL, _USER_DEFINED = 1, 4


def convert_tokenizer(source: Path, out: Path) -> None:
    """Writes the tokenizer of an InternLM2 folder to the folder ``out``.

    Raises:
        UserError: no tokenizer, or one that is not a sentencepiece BPE model.
    """
    path = source / MODEL_FILE
    model = _read_model(path)
    settings = _read_settings(source / SETTINGS_FILE)
    added = _added_tokens(settings, source / SETTINGS_FILE)
    tokenizer = _build(model, added, path)
    names = {f"{name}_token": _text(settings.get(f"{name}_token")) for name in ("unk", "bos", "eos", "pad")}
    names = {key: text for key, text in names.items() if text is not None}
    for key, text in names.items():
        if tokenizer.token_to_id(text) is None:
            raise UserError(f"{source / SETTINGS_FILE}: {key} is {text!r}, which {MODEL_FILE} has not")
    if settings.get("add_bos_token", True):
        bos = names.get("bos_token", "<s>")
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    plain = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, padding_side="left", **names
    )
    plain.chat_template = settings.get("chat_template")
    plain.save_pretrained(out)


def _read_model(path: Path) -> Any:
    from google.protobuf.message import DecodeError
    from sentencepiece import sentencepiece_model_pb2

    if not path.is_file():
        raise UserError(f"{path.parent}: has no {path.name}; expected the sentencepiece model of an InternLM2")
    model = sentencepiece_model_pb2.ModelProto()
    try:
        model.ParseFromString(path.read_bytes())
    except (DecodeError, OSError):
        raise UserError(f"{path}: damaged, or not a sentencepiece model") from None
    if (kind := model.trainer_spec.model_type) != model.trainer_spec.BPE:
        raise UserError(f"{path}: a {model.trainer_spec.ModelType.Name(kind)} model; expected BPE, as InternLM2's is")
    return model


def _read_settings(path: Path) -> dict[str, Any]:
    settings = read_json(path)
    if not isinstance(settings, dict):
        raise UserError(f"{path}: holds a JSON {type(settings).__name__}; expected an object")
    return settings


def _added_tokens(settings: Mapping[str, Any], path: Path) -> dict[int, AddedToken]:
    """Id -> token of the settings' ``added_tokens_decoder``."""
    flags = ("lstrip", "rstrip", "single_word", "normalized", "special")
    try:
        return {
            int(number): AddedToken(token["content"], **{flag: token[flag] for flag in flags if flag in token})
            for number, token in settings.get("added_tokens_decoder", {}).items()
        }
    except (AttributeError, KeyError, TypeError, ValueError):
        raise UserError(f"{path}: added_tokens_decoder is damaged; expected {{id: {{'content': token}}}}") from None


def _build(model: Any, added: Mapping[int, AddedToken], path: Path) -> Tokenizer:
    pieces = {number: piece.piece for number, piece in enumerate(model.pieces)}
    for number in sorted(added):
        if number > len(pieces):
            raise UserError(
                f"{path}: has {len(model.pieces)} pieces; {SETTINGS_FILE} adds {added[number].content!r} as {number}, "
                f"but nothing as {len(pieces)}"
            )
        pieces[number] = added[number].content
    normal = [
        (piece.piece, piece.score)
        for number, piece in enumerate(model.pieces)
        if piece.type == _NORMAL and number not in added
    ]
    tokenizer = Tokenizer(
        BPE(
            vocab={text: number for number, text in pieces.items()},
            merges=_merges(normal),
            unk_token=model.trainer_spec.unk_piece,
            fuse_unk=True,
            byte_fallback=model.trainer_spec.byte_fallback,
        )
    )
    spec = model.normalizer_spec
    steps = _character_map(spec.precompiled_charsmap) if spec.precompiled_charsmap else []
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex(" {2,}"), " "), normalizers.Replace(Regex(r"\A | \z"), "")]
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend(_SPACE))
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", _SPACE)])
    after = [decoders.Strip(" ", 1, 0)] if spec.add_dummy_prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *after]
    )
    tokenizer.add_tokens(
        [
            AddedToken(piece.piece, normalized=False, special=False)
            for number, piece in enumerate(model.pieces)
            if piece.type == _USER_DEFINED and number not in added
        ]
    )
    tokenizer.add_special_tokens([added[number] for number in sorted(added)])
    return tokenizer


def _character_map(charsmap: bytes) -> list[normalizers.Normalizer]:
    """sentencepiece's map of characters as steps of a normalizer."""
    mapped = normalizers.Precompiled(charsmap)
    if mapped.normalize_str("\r") != mapped.normalize_str("\n"):
        return [mapped]
    # sentencepiece maps either character of a line end. tokenizers looks the two up as one, and finds the first.
    return [normalizers.Replace("\r\n", "\n\n"), mapped]


def _merges(pieces: Sequence[tuple[str, float]]) -> list[tuple[str, str]]:
    """Pairs of pieces that make a piece, those of higher scores first."""
    known = {text for text, _ in pieces}
    found = [
        (-score, -cut, text)
        for text, score in pieces
        for cut in range(1, len(text))
        if text[:cut] in known and text[cut:] in known
    ]
    return [(text[:-back], text[-back:]) for _, back, text in sorted(found)]


def _text(token: Any) -> str | None:
    """A token of the settings: a string, or a dictionary with its content."""
    return token.get("content") if isinstance(token, dict) else token
