r"""Chat templates: the language model's own, taught to take content lists, media and the assistant mask.

alula never writes another prompt than the model was trained on. A template is adapted around, not rewritten:

1. *Flatten.* Before the original template runs, every content list becomes the string it stands for: text parts as
   they are, an image (film, sound) as its placeholder token. The original sees what it was written for, plain strings.
2. *Mark.* Where the original has no ``{% generation %}`` markers, the answers in what it renders are marked with the
   stop token that follows, see :mod:`alula.answers`.

:func:`adapt` renders probe conversations through the original and the adapted template and refuses to go on unless the
text is the same character for character.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from alula.answers import captured, literal
from alula.chat_template import DATE, fixed
from alula.errors import HostError
from alula.media import MEDIA

logger = logging.getLogger(__name__)

_FLATTEN = r"""{#- alula: content lists become plain strings; an image (film, sound) becomes its placeholder -#}
{%- set alula = namespace(messages=[], text='') -%}
{%- for message in messages -%}
    {%- if message['content'] is defined and message['content'] is iterable and message['content'] is not mapping -%}
        {%- set alula.text = '' -%}
        {%- if message['content'] is string -%}
            {%- set alula.text = message['content'] -%}
        {%- else -%}
            {%- for part in message['content'] -%}
                {%- if part is string -%}
                    {%- set alula.text = alula.text + part -%}
@MEDIA@                {%- elif part['text'] is defined -%}
                    {%- set alula.text = alula.text + part['text'] -%}
                {%- else -%}
                    {{- raise_exception('this model takes @TAKEN@, not ' + part['type']) -}}
                {%- endif -%}
            {%- endfor -%}
        {%- endif -%}
@MARK@        {%- set alula.messages = alula.messages + [dict(message, content=@CONTENT@)] -%}
    {%- else -%}
        {%- set alula.messages = alula.messages + [message] -%}
    {%- endif -%}
{%- endfor -%}
{%- set messages = alula.messages %}
"""

_MARK = r"""        {%- if message['role'] == 'assistant' and alula.text.strip() -%}
            {%- set alula.text = alula_marked(alula.text, true, true) -%}
        {%- endif -%}
"""

# for base models that came without a template; made of words every vocabulary has
_PLAIN = r"""{%- if @BOS@ -%}{{- bos_token -}}{%- endif -%}
{%- for message in messages -%}
    {%- if message['role'] == 'system' -%}{{- message['content'] + '\n\n' -}}
    {%- elif message['role'] == 'user' -%}{{- 'USER: ' + message['content'] + '\n' -}}
    {%- else -%}{{- 'ASSISTANT: ' -}}
        {%- generation -%}{{- message['content'] + eos_token -}}{%- endgeneration -%}
        {{- '\n' -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- 'ASSISTANT:' -}}{%- endif -%}
"""

_CHATML = r"""{%- for message in messages -%}
    {{- '<|im_start|>' + message['role'] + '\n' -}}
    {%- if message['role'] == 'assistant' -%}
        {%- generation -%}{{- message['content'] + '<|im_end|>' -}}{%- endgeneration -%}
    {%- else -%}{{- message['content'] + '<|im_end|>' -}}
    {%- endif -%}
    {{- '\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}
"""

_MEDIUM = r"""                {%- elif part['type'] == '@TYPE@' -%}
                    {%- set alula.text = alula.text + @TOKEN@ -%}
"""

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")

_ASK, _ANSWER, _AGAIN, _FINAL = "first question?", "first answer.", " second question\nof two lines ", " the end "


def adapt(tokenizer: PreTrainedTokenizerBase, placeholders: Mapping[str, str], stops: Sequence[str]) -> str:
    """A chat template for a host whose text-only prompts are those of ``tokenizer``'s own template.

    The original is returned untouched when it already takes content lists, renders media parts as their placeholders
    and marks the assistant's words.

    Args:
        tokenizer: the language model's tokenizer, which has a chat template.
        placeholders: type of a content part (``image``, ``video``, ``audio``) -> text of its placeholder token.
        stops: texts of the tokens that end an answer; they belong to the assistant mask.

    Raises:
        HostError: the adapted template does not reproduce the original's prompts.
    """
    original = tokenizer.chat_template
    if isinstance(original, dict):
        original = original.get("default") or next(iter(original.values()))
    special = tokenizer.special_tokens_map
    if _complete(original, placeholders, special):
        return original
    # most templates take strings and some only lists; what the original says in its own form is the reference
    lists = not _says(_render(original, [{"role": "user", "content": _ASK}], special, True))
    reference = _render_all(original, special, lists=lists)
    candidates = [_flatten(original, placeholders, lists=lists)]
    if not _GENERATION.search(original):
        candidates.insert(0, _mark(original, placeholders, stops, lists=lists))
    for candidate in candidates:
        rendered = [_render_all(candidate, special, lists=form) for form in (False, True)]
        if _says(reference[0]) and rendered == [reference, reference]:
            if not _GENERATION.search(candidate):
                logger.warning("the chat template rewrites answers: no assistant mask can be had from it")
            return candidate
    raise HostError(
        "the adapted chat template does not reproduce the original's prompts",
        where="chat template",
        remedy="set tokenizer.chat_template to one that takes content lists and has {% generation %} markers",
    )


def default_template(tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """A template for a base model that came without one, and the token that ends its answers.

    ChatML where the vocabulary has ChatML's tokens, else plain ``USER: / ASSISTANT:`` lines; no new tokens either way.

    Raises:
        HostError: no ChatML and no end-of-sequence token.
    """
    vocabulary = tokenizer.get_vocab()
    if "<|im_start|>" in vocabulary and "<|im_end|>" in vocabulary:
        return _CHATML, "<|im_end|>"
    if tokenizer.eos_token is None:
        raise HostError("has neither a chat template nor an end-of-sequence token", where="tokenizer")
    starts = tokenizer.bos_token_id is not None and tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id]
    return _PLAIN.replace("@BOS@", "true" if starts else "false"), str(tokenizer.eos_token)


def _flatten(original: str, placeholders: Mapping[str, str], mark: str = "", lists: bool = False) -> str:
    """``original`` behind a prelude; ``lists`` for one that wants content as a list of (one) text part."""
    content = "[{'type': 'text', 'text': alula.text}]" if lists else "alula.text"
    media = "".join(
        _MEDIUM.replace("@TYPE@", kind).replace("@TOKEN@", literal(token)) for kind, token in placeholders.items()
    )
    *most, last = ["text", *(MEDIA[kind].plural for kind in placeholders)]
    filled = _FLATTEN.replace("@MEDIA@", media).replace("@TAKEN@", f"{', '.join(most)} and {last}")
    return filled.replace("@MARK@", mark).replace("@CONTENT@", content) + original


def _mark(original: str, placeholders: Mapping[str, str], stops: Sequence[str], lists: bool) -> str:
    return captured(_flatten("", placeholders, _MARK, lists), original, stops)


def _probes(lists: bool) -> list[tuple[list[dict[str, Any]], bool]]:
    def say(role: str, text: str) -> dict[str, Any]:
        return {"role": role, "content": [{"type": "text", "text": text}] if lists else text}

    ask, answer = say("user", _ASK), say("assistant", _ANSWER)
    again, final = say("user", _AGAIN), say("assistant", _FINAL)
    system = say("system", "be brief")
    return [
        ([ask], True),
        ([ask], False),
        ([ask, answer], False),
        ([ask, answer, again], True),
        ([ask, answer, again, final], False),
        ([system, ask], True),
        ([system, ask, answer, again, final], False),
    ]


def _render(template: str, messages: list[dict[str, Any]], special: dict[str, Any], prompt: bool) -> str | None:
    """The rendered text, or None where the template itself refuses (no system role, strict alternation)."""
    try:
        still = fixed(template, DATE)  # or a template that writes the time would differ from itself
        out: Any = render_jinja_template([messages], chat_template=still, add_generation_prompt=prompt, **special)
    except (jinja2.TemplateError, TypeError, KeyError):
        return None
    return out[0][0]


def _render_all(template: str, special: dict[str, Any], lists: bool) -> list[str | None]:
    return [_render(template, messages, special, prompt) for messages, prompt in _probes(lists)]


def _says(rendered: str | None) -> bool:
    return rendered is not None and _ASK in rendered


def _complete(template: str, placeholders: Mapping[str, str], special: dict[str, Any]) -> bool:
    """Whether a template takes strings, lists and media and marks exactly what the assistant says."""
    if not _GENERATION.search(template):
        return False
    if _render_all(template, special, lists=True) != _render_all(template, special, lists=False):
        return False
    text = {"type": "text", "text": _ASK}
    without = _render(template, [{"role": "user", "content": [text]}], special, True)
    for kind, token in placeholders.items():
        shown = _render(template, [{"role": "user", "content": [{"type": kind}, text]}], special, True)
        if shown is None or without is None or token not in shown or shown.replace(token, "", 1) != without:
            return False
    return True
