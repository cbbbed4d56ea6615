"""A prompt template as the Jinja that transformers keeps with a tokenizer, so that other tools ask in the same way."""

from __future__ import annotations

import json

from .chat import IMAGE, Template

# Content is a string with the image's placeholder in it (lmms-eval), or a list of parts (VLMEvalKit, transformers).
_MARKUP = (
    "{%- for message in messages -%}"
    "{%- set whole = namespace(images=0, text='') -%}"
    "{%- if message['content'] is string -%}"
    "{%- set whole.images = message['content'].count(IMAGE) -%}"
    "{%- set whole.text = message['content'].replace(IMAGE, '') -%}"
    "{%- else -%}"
    "{%- for part in message['content'] -%}"
    "{%- if part['type'] == 'image' -%}{%- set whole.images = whole.images + 1 -%}"
    "{%- else -%}{%- set whole.text = whole.text + part['text'] -%}{%- endif -%}"
    "{%- endfor -%}"
    "{%- endif -%}"
    "{%- if message['role'] == 'user' and loop.index0 % 2 == 0 -%}"
    "{{- BOS if loop.first else SEPARATOR -}}{{- BEFORE -}}"
    "{%- if whole.images -%}"
    "{{- IMAGE * whole.images -}}"
    "{%- set words = whole.text | trim -%}{{- AFTER_IMAGE + words if words else '' -}}"
    "{%- else -%}{{- whole.text -}}{%- endif -%}"
    "{{- AFTER -}}"
    "{%- elif message['role'] == 'assistant' and loop.index0 % 2 == 1 -%}{{- whole.text + END -}}"
    "{%- else -%}{{- raise_exception('roles must alternate user/assistant, without a system turn') -}}"
    "{%- endif -%}"
    "{%- endfor -%}"
)


def chat_markup(template: Template) -> str:
    """Jinja that renders messages as ``template`` renders turns.

    A turn of the user always ends where the assistant's words begin, whether a generation prompt is asked for or not.
    """
    values = {
        "AFTER_IMAGE": template.after_image,
        "SEPARATOR": template.separator,
        "BEFORE": template.before,
        "AFTER": template.after,
        "IMAGE": IMAGE,
        "BOS": template.bos,
        "END": template.end,
    }
    settings = "".join(f"{{%- set {name} = {json.dumps(value)} -%}}" for name, value in values.items())
    return settings + _MARKUP
