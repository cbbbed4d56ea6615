"""From prepared items to tokens, labels, batches and their order."""

from __future__ import annotations

import json
import pickle
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import skip_first_batches
from accelerate.data_loader import BatchSamplerShard, DataLoaderShard
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.utils.data import BatchSampler, DataLoader, Dataset
from transformers import (
    AutoProcessor,
    AutoTokenizer,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
)

from moslora_core.errors import UserError
from visual_instruction.chat import TEMPLATES
from visual_instruction.config import DataConfig
from visual_instruction.data import (
    IGNORED,
    Collator,
    InstructionDataset,
    check_prepared,
    encode,
    encode_prompt,
    find_image_root,
    load_training,
)
from visual_instruction.images import open_image, pixel_values
from visual_instruction.sampling import FollowEpochs, GroupedByModalityAndLength

IMAGE_TOKENS = 4  # of the tiny model


@pytest.fixture(scope="module")
def tokenizer(tiny_llava_dir):
    return AutoTokenizer.from_pretrained(tiny_llava_dir)


@pytest.fixture(scope="module")
def processor(tiny_llava_dir):
    return AutoProcessor.from_pretrained(tiny_llava_dir)


@pytest.fixture(scope="module")
def model(tiny_llava_dir):
    return LlavaForConditionalGeneration.from_pretrained(tiny_llava_dir).eval()


@pytest.fixture
def data(prepared_dir) -> DataConfig:
    return DataConfig(dir=str(prepared_dir), source="folder", text_limit=1000)


@pytest.fixture
def items(prepared_dir) -> list[dict]:
    return json.loads((prepared_dir / "train.json").read_text())


def conversation(*texts: str) -> list[dict[str, str]]:
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]


def item(*texts: str) -> dict:
    return {"id": "0", "conversations": conversation(*texts)}


def refusal(data: DataConfig, tokenizer, processor, **changes) -> str:
    with pytest.raises(UserError) as caught:
        load_training(data, tokenizer, processor, TEMPLATES["llama3"], **changes)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# -------------------------------------------------------------------------------------------------------------- encode


def expected_tokens(turns, template, tokenizer) -> tuple[list[int], list[bool]]:
    """Tokens and whether each is the assistant's, by another way: the text as a whole, with the places of characters.

    The byte-level tokenizer gives each token its characters; a token is the assistant's if its first character is.
    """
    text, spans = template.bos, []
    for number in range(0, len(turns), 2):
        question, answer = turns[number]["value"], turns[number + 1]["value"]
        if "<image>" in question:
            question = "<image>" * IMAGE_TOKENS + template.after_image + question.replace("<image>", "").strip()
        text += (template.separator if number else "") + template.before + question + template.after
        spans.append((len(text), len(text) + len(answer) + len(template.end)))
        text += answer + template.end
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    starts = [start for start, _ in encoded["offset_mapping"]]
    return encoded["input_ids"], [any(first <= start < last for first, last in spans) for start in starts]


@pytest.mark.parametrize("name", TEMPLATES)
def test_labels_are_the_assistants_tokens_alone(name, tokenizer, items):
    template = TEMPLATES[name]
    for row in items:
        encoded = encode(row, tokenizer, template, IMAGE_TOKENS)
        tokens, answered = expected_tokens(row["conversations"], template, tokenizer)
        # A space before "assistant" may merge with it where the text is read as a whole.
        assert tokenizer.decode(encoded["input_ids"]) == tokenizer.decode(tokens)
        assert encoded["attention_mask"] == [1] * len(encoded["input_ids"]) == [1] * len(encoded["labels"])
        scored = [(token, label) for token, label in zip(*map(encoded.get, ("input_ids", "labels")), strict=True)]
        assert all(label in (IGNORED, token) for token, label in scored)
        if name != "smoke":
            assert encoded["input_ids"] == tokens
            assert [label != IGNORED for label in encoded["labels"]] == answered
        words = "".join(turn["value"] + template.end for turn in row["conversations"][1::2])
        assert tokenizer.decode([label for label in encoded["labels"] if label != IGNORED]) == words


def test_the_smoke_template_with_a_tokenizer_of_words(items):
    """Every word a token, as at the smoke scale: the tokens can be written down."""
    texts = [turn["value"].replace("<image>", "").split() for row in items for turn in row["conversations"]]
    special = ["<unk>", "<s>", "</s>", "<image>"]
    words = [*special, "user", ":", "assistant", *sorted({word for text in texts for word in text})]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=["<image>"],
    )
    for row in items:
        expected, scored = ["<s>"], [False]
        for turn in row["conversations"]:
            human = turn["from"] == "human"
            said = turn["value"].replace("<image>", "<image> " * IMAGE_TOKENS).split()
            piece = ["user", ":", *said, "assistant", ":"] if human else [*said, "</s>"]
            expected += piece
            scored += [not human] * len(piece)
        encoded = encode(row, fast, TEMPLATES["smoke"], IMAGE_TOKENS)
        assert fast.convert_ids_to_tokens(encoded["input_ids"]) == expected
        assert [label != IGNORED for label in encoded["labels"]] == scored


@pytest.mark.parametrize("name", TEMPLATES)
def test_image_tokens_are_expanded_and_carry_no_loss(name, tokenizer, items):
    image = tokenizer.convert_tokens_to_ids("<image>")
    for row in items:
        for count in (1, IMAGE_TOKENS, 576):
            encoded = encode(row, tokenizer, TEMPLATES[name], count)
            places = [i for i, token in enumerate(encoded["input_ids"]) if token == image]
            assert len(places) == (count if "image" in row else 0)
            assert places == list(range(places[0], places[0] + count)) if places else True
            assert image not in encoded["labels"]


@pytest.mark.parametrize("name", TEMPLATES)
def test_one_beginning_and_one_end_an_answer(name, tokenizer, items):
    template = TEMPLATES[name]
    end = tokenizer.convert_tokens_to_ids(template.end)
    for row in items:
        encoded = encode(row, tokenizer, template, IMAGE_TOKENS)
        if template.bos:
            bos = tokenizer.convert_tokens_to_ids(template.bos)
            assert encoded["input_ids"][0] == bos and encoded["input_ids"].count(bos) == 1
        assert encoded["labels"].count(end) == len(row["conversations"]) // 2
        assert encoded["labels"][-1] == end


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_prompt_is_the_beginning_of_the_training_tokens(name, tokenizer, items):
    template = TEMPLATES[name]
    for row in items:
        whole = encode(row, tokenizer, template, IMAGE_TOKENS)
        for asked in range(1, len(row["conversations"]), 2):
            prompt = encode_prompt(row["conversations"][:asked], tokenizer, template, IMAGE_TOKENS)
            length = len(prompt["input_ids"])
            assert whole["input_ids"][:length] == prompt["input_ids"] and prompt["attention_mask"] == [1] * length
            assert whole["labels"][length - 1] == IGNORED and whole["labels"][length] != IGNORED
    with pytest.raises(UserError, match="must end with a turn of 'human'"):
        encode_prompt(conversation("Q", "A"), tokenizer, template, IMAGE_TOKENS)


def test_the_tokens_are_those_of_the_processor(tokenizer, processor, items):
    """transformers' LlavaProcessor expands the same prompt to the same tokens."""
    prompt = TEMPLATES["llama3"].prompt(items[0]["conversations"][:1])
    by_processor = processor(
        images=[Image.new("RGB", (28, 28))], text=[prompt], add_special_tokens=False, return_tensors="pt"
    )
    ours = encode_prompt(items[0]["conversations"][:1], tokenizer, TEMPLATES["llama3"], IMAGE_TOKENS)
    assert by_processor["input_ids"][0].tolist() == ours["input_ids"]


@given(limit=st.integers(1, 60), image_turn=st.sampled_from([None, 0, 2]))
@settings(deadline=None)
def test_the_limit_keeps_the_left_and_never_cuts_an_image(tiny_llava_dir, limit, image_turn):
    tokenizer = _cached_tokenizer(tiny_llava_dir)
    image = tokenizer.convert_tokens_to_ids("<image>")
    texts = ["What is there?", "A square.", "And then?", "A circle."]
    if image_turn is not None:
        texts[image_turn] = f"<image>\n{texts[image_turn]}"
    whole = encode(item(*texts), tokenizer, TEMPLATES["internlm2"], IMAGE_TOKENS)
    cut = encode(item(*texts), tokenizer, TEMPLATES["internlm2"], IMAGE_TOKENS, limit)
    length = len(cut["input_ids"])
    for key, values in cut.items():
        assert values == whole[key][:length]
    words = length - cut["input_ids"].count(image)
    assert words == min(limit, len(whole["input_ids"]) - whole["input_ids"].count(image))
    assert cut["input_ids"].count(image) in (0, IMAGE_TOKENS)
    if image_turn == 0 and limit >= 6:
        assert cut["input_ids"].count(image) == IMAGE_TOKENS


_TOKENIZERS: dict[Path, object] = {}


def _cached_tokenizer(folder: Path):
    if folder not in _TOKENIZERS:
        _TOKENIZERS[folder] = AutoTokenizer.from_pretrained(folder)
    return _TOKENIZERS[folder]


# ------------------------------------------------------------------------------------------------------------- dataset


def test_items_are_tokenised_and_opened_when_asked(data, items, tokenizer, processor, prepared_dir):
    dataset = load_training(data, tokenizer, processor, TEMPLATES["llama3"])
    assert len(dataset) == len(items) and [dataset.item(i) for i in range(len(items))] == items
    assert dataset.has_image.tolist() == ["image" in row for row in items]
    assert dataset.lengths.tolist() == [sum(len(turn["value"]) for turn in row["conversations"]) for row in items]
    for index, row in enumerate(items):
        got = dataset[index]
        pixels = got.pop("pixel_values", None)
        assert got == encode(row, tokenizer, TEMPLATES["llama3"], IMAGE_TOKENS)
        assert (pixels is not None) == ("image" in row)
        if pixels is not None:
            image = open_image(prepared_dir / "images" / row["image"])
            assert torch.equal(pixels, pixel_values([image], processor)[0])
    with pytest.raises(IndexError):
        dataset[len(items)]
    (prepared_dir / "images" / items[0]["image"]).unlink()
    with pytest.raises(UserError, match=r"no image .*0\.png"):
        dataset[0]


def test_padding_to_a_square_is_a_setting(data, tokenizer, processor):
    square = load_training(data, tokenizer, processor, TEMPLATES["llama3"])
    cropped = load_training(replace(data, square_padding=False), tokenizer, processor, TEMPLATES["llama3"])
    assert torch.equal(square[0]["pixel_values"], cropped[0]["pixel_values"])  # a square image
    assert not torch.equal(square[5]["pixel_values"], cropped[5]["pixel_values"])


def test_workers_give_what_the_training_process_gives(data, tokenizer, processor):
    dataset = load_training(data, tokenizer, processor, TEMPLATES["llama3"])
    copy = pickle.loads(pickle.dumps(dataset))
    collator = Collator(tokenizer.pad_token_id)
    for ours, theirs in zip(
        DataLoader(dataset, batch_size=3, collate_fn=collator),
        DataLoader(copy, batch_size=3, collate_fn=collator, num_workers=1),
        strict=True,
    ):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_an_image_beyond_the_limit_goes_with_its_tokens(tokenizer, processor, prepared_dir):
    row = item("What is two and two?", "Four.", "<image>\nAnd this?", "A square.") | {"image": "train/0.png"}
    limit = len(encode_prompt(row["conversations"][:1], tokenizer, TEMPLATES["llama3"], 0)["input_ids"]) + 2
    arguments = ([row], prepared_dir / "images", tokenizer, processor, TEMPLATES["llama3"])
    assert "pixel_values" not in InstructionDataset(*arguments, text_limit=limit)[0]
    assert "pixel_values" in InstructionDataset(*arguments)[0]


# ------------------------------------------------------------------------------------------------------------ collator


def test_rows_are_padded_and_the_padding_is_masked():
    rows = [
        {"input_ids": [5, 6, 7], "attention_mask": [1, 1, 1], "labels": [IGNORED, 6, 7]},
        {"input_ids": [8], "attention_mask": [1], "labels": [8], "pixel_values": torch.ones(3, 2, 2)},
    ]
    right = Collator(9)(rows)
    assert right["input_ids"].tolist() == [[5, 6, 7], [8, 9, 9]]
    assert right["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert right["labels"].tolist() == [[IGNORED, 6, 7], [8, IGNORED, IGNORED]]
    assert right["pixel_values"].shape == (1, 3, 2, 2)
    left = Collator(9, side="left")([{k: v for k, v in row.items() if k != "labels"} for row in rows])
    assert left["input_ids"].tolist() == [[5, 6, 7], [9, 9, 8]]
    assert left["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 1]]
    assert "labels" not in left
    assert "pixel_values" not in Collator(9)(rows[:1])


def test_the_model_gives_a_batch_the_loss_of_its_rows(data, tokenizer, processor, model):
    """Rows with and without images in one batch: each image goes to its own row, and padding counts nothing."""
    dataset = load_training(data, tokenizer, processor, TEMPLATES["llama3"])
    collator = Collator(tokenizer.pad_token_id)
    chosen = [dataset[index] for index in (6, 1, 2, 7)]
    with torch.no_grad():
        together = model(**collator(chosen)).loss
        alone = [(model(**collator([row])).loss, sum(label != IGNORED for label in row["labels"])) for row in chosen]
    expected = sum(loss * count for loss, count in alone) / sum(count for _, count in alone)
    assert torch.allclose(together, expected, rtol=1e-5)


def test_generation_from_a_batch_is_that_of_each_row(items, tokenizer, processor, model, prepared_dir):
    rows = []
    for row in (items[0], items[6], items[2]):
        turns = row["conversations"][:1]
        rows.append(encode_prompt(turns, tokenizer, TEMPLATES["llama3"], IMAGE_TOKENS))
        if "image" in row:
            image = open_image(prepared_dir / "images" / row["image"])
            rows[-1]["pixel_values"] = pixel_values([image], processor)[0]
    collator = Collator(tokenizer.pad_token_id, side="left")
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}

    def answers(chosen) -> list[list[int]]:
        batch = collator(chosen)
        return model.generate(**batch, **options)[:, batch["input_ids"].shape[1] :].tolist()

    assert answers(rows) == [answers([row])[0] for row in rows]


# ------------------------------------------------------------------------------------------------------------- sampler


@given(
    modalities=st.lists(st.booleans(), max_size=120),
    batch=st.integers(1, 9),
    mega=st.integers(1, 5),
    seed=st.integers(0, 3),
    epoch=st.integers(0, 3),
)
def test_every_item_once_and_batches_of_one_modality(modalities, batch, mega, seed, epoch):
    lengths = [(7 * i) % 31 for i in range(len(modalities))]
    sampler = GroupedByModalityAndLength(lengths, modalities, batch, seed, mega)
    sampler.set_epoch(epoch)
    order = list(sampler)
    assert sorted(order) == list(range(len(modalities))) and len(sampler) == len(modalities)
    counts = Counter(modalities)
    whole = counts[True] // batch + counts[False] // batch
    for start in range(0, whole * batch, batch):
        assert len({modalities[index] for index in order[start : start + batch]}) == 1


def test_lengths_are_grouped_and_the_longest_come_first():
    random = np.random.default_rng(0)
    lengths, has_image = random.integers(1, 1000, 960), random.random(960) < 0.5
    order = list(GroupedByModalityAndLength(lengths, has_image, 16, seed=0))
    batches = [lengths[order[start : start + 16]] for start in range(0, 896, 16)]
    spread = np.mean([batch.max() - batch.min() for batch in batches])
    assert spread < 100  # of 1000; of batches drawn at random it is about 880
    assert batches[0].sum() == max(batch.sum() for batch in batches)
    firsts = [batch.mean() for batch in batches[1:]]
    assert abs(np.corrcoef(firsts, range(len(firsts)))[0, 1]) < 0.5  # the batches themselves are shuffled


def test_the_order_is_of_seed_and_epoch():
    lengths, has_image = list(range(64)), [i % 3 > 0 for i in range(64)]

    def order(seed: int, epoch: int) -> list[int]:
        sampler = GroupedByModalityAndLength(lengths, has_image, 4, seed)
        sampler.set_epoch(epoch)
        torch.manual_seed(seed + epoch)  # neither torch's state nor an earlier pass matters
        list(sampler)
        return list(sampler)

    assert order(0, 0) == order(0, 0)
    assert len({tuple(order(seed, epoch)) for seed in range(3) for epoch in range(3)}) == 9


def test_bad_sizes_are_refused():
    with pytest.raises(UserError, match="found 2 and 1"):
        GroupedByModalityAndLength([1, 2], [True], 4, seed=0)
    with pytest.raises(UserError, match="must be positive, found 0"):
        GroupedByModalityAndLength([1], [True], 0, seed=0)


class _Numbers(Dataset):
    """Items that are their own index, and a sampler of them."""

    def __init__(self, count: int):
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"x": torch.tensor([float(index)])}


class _Seen(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.seen: list[list[int]] = []

    def forward(self, x):
        self.seen.append(x.flatten().int().tolist())
        return {"loss": (self.weight * x).mean()}


class _Trainer(Trainer):
    def _get_train_sampler(self, train_dataset=None):
        lengths = [(7 * i) % 31 for i in range(len(self.train_dataset))]
        sampler = GroupedByModalityAndLength(lengths, [i % 3 > 0 for i in range(len(lengths))], 4, seed=0)
        self.add_callback(FollowEpochs(sampler))
        return sampler


@pytest.mark.parametrize("stop", [3, 6, 8])
def test_a_resumed_training_sees_what_the_stopped_one_would_have(tmp_path, stop):
    """24 items, 2 a batch, 2 batches a step: 6 steps an epoch, stopped within the first, at its end and beyond."""

    def train(folder: Path, resume: bool) -> list[list[int]]:
        arguments = TrainingArguments(
            str(folder),
            num_train_epochs=2,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            save_steps=stop,
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
            logging_steps=100,
            dataloader_pin_memory=False,
        )
        trainer = _Trainer(_Seen(), arguments, train_dataset=_Numbers(24))
        trainer.train(resume_from_checkpoint=str(folder / f"checkpoint-{stop}") if resume else None)
        return trainer.model.seen

    whole = train(tmp_path, resume=False)
    assert len(whole) == 24
    for epoch in (whole[:12], whole[12:]):
        assert sorted(index for batch in epoch for index in batch) == list(range(24))
    assert whole[:12] != whole[12:]
    assert train(tmp_path, resume=True) == whole[2 * stop :]


def test_processes_that_resume_within_an_epoch_follow_it():
    """accelerate does not reach a sampler through its own wrappers there; the callback does."""

    def shard(process: int, skipped: int) -> tuple[GroupedByModalityAndLength, list[list[int]]]:
        sampler = GroupedByModalityAndLength(list(range(24)), [i % 2 > 0 for i in range(24)], 4, seed=0)
        batches = BatchSamplerShard(BatchSampler(sampler, 2, drop_last=False), 2, process)
        loader = skip_first_batches(DataLoaderShard(_Numbers(24), batch_sampler=batches), skipped)
        FollowEpochs(sampler).on_epoch_begin(None, SimpleNamespace(epoch=1 + skipped / 6), None)
        loader.set_epoch(1)
        return [batch["x"].flatten().int().tolist() for batch in loader]

    sampler = GroupedByModalityAndLength(list(range(24)), [i % 2 > 0 for i in range(24)], 4, seed=0)
    sampler.set_epoch(1)
    order = list(sampler)
    pairs = [order[start : start + 2] for start in range(0, 24, 2)]
    for process in (0, 1):
        assert shard(process, 0) == pairs[process::2]
        assert shard(process, 3) == pairs[process::2][3:]


# ------------------------------------------------------------------------------------------------------- load_training


def test_over_long_items_are_cut_aloud_skipped_or_refused(data, items, tokenizer, processor, caplog):
    lengths = [len(encode(row, tokenizer, TEMPLATES["llama3"], 0)["input_ids"]) for row in items]
    limit = sorted(lengths)[-2]  # one item is longer: that of two turns
    (longest,) = [index for index, length in enumerate(lengths) if length > limit]
    data = replace(data, text_limit=limit)
    cut = load_training(data, tokenizer, processor, TEMPLATES["llama3"])
    assert len(cut) == len(items)
    kept = [token for token in cut[longest]["input_ids"] if token != processor.image_token_id]
    assert len(kept) == limit
    named = (
        f"train.json[{longest}]: over_long: found {lengths[longest]} tokens, expected at most data.text_limit={limit}"
    )
    assert f"1 of {len(items)} rows (over_long 1), cut at the right" in caplog.text and named in caplog.text
    caplog.clear()
    skipped = load_training(data, tokenizer, processor, TEMPLATES["llama3"], over_long="skip")
    assert len(skipped) == len(items) - 1
    assert [skipped.item(i)["id"] for i in range(len(skipped))] == [
        row["id"] for index, row in enumerate(items) if index != longest
    ]
    assert f"1 of {len(items)} rows (over_long 1) are faulty and skipped" in caplog.text
    message = refusal(data, tokenizer, processor, over_long="refuse")
    assert named in message and "data.over_long=skip" in message


def test_an_item_without_a_word_of_an_answer_is_a_fault(data, items, tokenizer, processor):
    path = Path(data.dir) / "train.json"
    path.write_text(json.dumps([*items, item("Why? " * 200, "Because.")]))
    data = replace(data, text_limit=100)
    message = refusal(data, tokenizer, processor)
    assert f"train.json[{len(items)}]: no_answer_left: found" in message and "data.on_fault=skip" in message
    kept = load_training(replace(data, on_fault="skip"), tokenizer, processor, TEMPLATES["llama3"])
    assert len(kept) == len(items)
    assert all(any(label != IGNORED for label in kept[index]["labels"]) for index in range(len(kept)))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"dir": "nowhere"}, "data.dir=nowhere: no prepared data; run python -m visual_instruction.prepare_data"),
        ({"text_limit": 1}, "data.text_limit must be at least 2 tokens, found 1"),
        ({"train_items": 8}, "data.train_items=8, but"),
        ({"image_root": "nowhere"}, "no folder of images nowhere"),
    ],
    ids=str,
)
def test_bad_settings_are_named(data, tokenizer, processor, changes, expected):
    assert expected in refusal(replace(data, **changes), tokenizer, processor)


def test_an_unknown_treatment_of_long_items_is_named(data, tokenizer, processor):
    assert "must be one of cut, skip, refuse, found 'drop'" in refusal(data, tokenizer, processor, over_long="drop")


def test_a_template_of_another_model_is_refused(data, tokenizer, processor):
    template = replace(TEMPLATES["llama3"], special_tokens=("<|other|>",))
    with pytest.raises(UserError, match="does not fit the tokenizer"):
        load_training(data, tokenizer, processor, template)


def test_a_damaged_training_file_is_named_by_row(data, items, tokenizer, processor):
    items[3]["conversations"][0]["from"] = "user"
    (Path(data.dir) / "train.json").write_text(json.dumps(items))
    message = refusal(replace(data, on_fault="skip"), tokenizer, processor)
    assert "train.json[3]: unknown_speaker: found turn 0 from 'user'" in message


def test_text_alone_needs_no_images(data, items, tokenizer, processor):
    path = Path(data.dir) / "train.json"
    path.write_text(json.dumps([row for row in items if "image" not in row]))
    dataset = load_training(replace(data, image_root="nowhere"), tokenizer, processor, TEMPLATES["llama3"])
    assert not dataset.has_image.any() and "pixel_values" not in dataset[0]


def test_images_lie_where_the_configuration_or_the_manifest_says(data, tmp_path):
    manifest = check_prepared(data)
    assert find_image_root(data, manifest) == Path(data.dir) / "images"
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
    manifest = {"image_root": str(tmp_path / "one")}
    assert find_image_root(data, manifest) == tmp_path / "one"
    assert find_image_root(replace(data, image_root=str(tmp_path / "two")), manifest) == tmp_path / "two"
