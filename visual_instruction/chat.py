"""Prompt templates: one object renders conversations for training and questions for evaluation.

Sources. ``llama3`` and ``internlm2`` give the bytes that XTuner trains on with ``PROMPT_TEMPLATE.llama3_chat`` and
``internlm2_chat``: its ``llava_map_fn`` puts the image in front of the turn that has one, ``template_map_fn`` adds the
end token and, between turns alone, the separator, and ``encode`` writes the beginning token once and puts the loss on
answers and their end tokens. No system turn is rendered, as in the published configurations.

Against the chat templates that come with the models: LLaMA-3-Instruct's strips white space around every turn; the
ChatML ones (InternLM2, SmolLM2) write a line break after the last answer too, which carries no loss here or there; and
SmolLM2's puts a system turn of its own before a conversation that has none. ``chatml`` is ``internlm2`` without the
beginning token, which SmolLM2 has not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from moslora_core.errors import UserError

IMAGE = "<image>"
HUMAN, ASSISTANT = "human", "gpt"  # LLaVA's names of the speakers

Turn = Mapping[str, str]  # {"from": HUMAN | ASSISTANT, "value": text}


@dataclass(frozen=True)
class Template:
    """How a conversation reads.

    Attributes:
        bos: once, before the first turn.
        before: before the words of the human.
        after: between the words of the human and those of the assistant.
        end: after the words of the assistant; a generated answer stops there.
        separator: between an answer and the next turn.
        after_image: between the image and the words of its turn.
        special_tokens: what must be one token each.
    """

    name: str
    bos: str
    before: str
    after: str
    end: str
    separator: str = ""
    after_image: str = "\n"
    special_tokens: tuple[str, ...] = ()

    def user(self, text: str) -> str:
        """A turn of the human, up to where the assistant's words begin; its image, if any, comes first."""
        if IMAGE in text:
            words = text.replace(IMAGE, "").strip()
            text = f"{IMAGE}{self.after_image}{words}" if words else IMAGE
        return f"{self.before}{text}{self.after}"

    def segments(self, turns: Sequence[Turn]) -> list[tuple[str, bool]]:
        """The conversation in pieces, each with whether it carries loss: the answers with their end do.

        Raises:
            UserError: turns that are not of the human and the assistant by turns.
        """
        pieces = []
        for number, turn in enumerate(turns):
            expected = (HUMAN, ASSISTANT)[number % 2]
            if turn["from"] != expected:
                raise UserError(f"turn {number} of a conversation must be of {expected!r}, found {turn['from']!r}")
            if expected == ASSISTANT:
                pieces.append((turn["value"] + self.end, True))
            else:
                pieces.append(((self.separator if number else self.bos) + self.user(turn["value"]), False))
        return pieces

    def prompt(self, turns: Sequence[Turn]) -> str:
        """The conversation up to where the assistant's next words begin; ``turns`` end with the human's."""
        if len(turns) % 2 == 0:
            raise UserError(f"a prompt must end with a turn of {HUMAN!r}, found {len(turns)} turns")
        return "".join(text for text, _ in self.segments(turns))


def _chatml(name: str, bos: str) -> Template:
    return Template(
        name=name,
        bos=bos,
        before="<|im_start|>user\n",
        after="<|im_end|>\n<|im_start|>assistant\n",
        end="<|im_end|>",
        separator="\n",
        special_tokens=(*((bos,) if bos else ()), "<|im_start|>", "<|im_end|>"),
    )


_LLAMA3 = Template(
    name="llama3",
    bos="<|begin_of_text|>",
    before="<|start_header_id|>user<|end_header_id|>\n\n",
    after="<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    end="<|eot_id|>",
    special_tokens=("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
)
_SMOKE = Template(
    name="smoke",
    bos="<s>",
    before="user : ",
    after=" assistant : ",
    end="</s>",
    after_image=" ",
    special_tokens=("<s>", "</s>"),
)

TEMPLATES = {
    template.name: template
    for template in (_LLAMA3, _chatml("internlm2", bos="<s>"), _chatml("chatml", bos=""), _SMOKE)
}


def check_template(template: Template, tokenizer: PreTrainedTokenizerBase) -> None:
    """Checks that every special token of the template, and ``<image>``, is one known token of ``tokenizer``.

    Raises:
        UserError: a token that the tokenizer would read as text or does not know.
    """
    vocabulary = tokenizer.get_vocab()
    for token in (*template.special_tokens, IMAGE):
        found = tokenizer(token, add_special_tokens=False)["input_ids"]
        if token not in vocabulary or found != [vocabulary[token]]:
            raise UserError(
                f"model.template={template.name} does not fit the tokenizer {tokenizer.name_or_path}: "
                f"{token!r} is not a token of its own there; expected a template of that model"
            )
