r"""Answers in rendered chat templates: where they stand, and the token that ends them.

A template is never rewritten. Each assistant message is passed through it between two Unicode noncharacters (U+FDD0,
U+FDD1, reserved for process-internal use); its output is captured and cut at them, and the answers, with the stop token
that follows, are emitted inside ``{% generation %}``. The noncharacters never reach the rendered text.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jinja2
from transformers.utils.chat_template_utils import render_jinja_template

from alula.errors import UsageError

logger = logging.getLogger(__name__)

OPEN, CLOSE = "\ufdd0", "\ufdd1"

_EMIT = r"""{#- alula: emit what the template rendered; answers with their stop token count as generated -#}
{%- for piece in alula_rendered.split('\ufdd0') -%}
    {%- if loop.first or '\ufdd1' not in piece -%}
        {{- piece.replace('\ufdd1', '') -}}
    {%- else -%}
        {%- set answer = piece.split('\ufdd1')[0] -%}
        {%- set rest = piece[answer | length + 1:].replace('\ufdd1', '') -%}
        {%- set space = rest | length - rest.lstrip() | length -%}
        {%- set alula.end = 0 -%}
        {%- for stop in @STOPS@ -%}
            {%- if rest[space:].startswith(stop) and space + stop | length > alula.end -%}
                {%- set alula.end = space + stop | length -%}
            {%- endif -%}
        {%- endfor -%}
        {%- generation -%}{{- answer + @REST@ -}}{%- endgeneration -%}
        {{- rest[alula.end:] -}}
    {%- endif -%}
{%- endfor -%}
"""

# the markers go inside surrounding white space, so that templates which strip an answer still do
_MARK = r"""{#- alula: mark where answers begin and end -#}
{%- set alula = namespace(messages=[], content=[], first=-1, last=-1, text='') -%}
{%- for message in messages -%}
    {%- if message['role'] != 'assistant' or not message['content'] or message['content'] is mapping -%}
        {%- set alula.messages = alula.messages + [message] -%}
    {%- else -%}
        {%- set plain = message['content'] is string -%}
        {%- set parts = [{'text': message['content']}] if plain else message['content'] -%}
        {%- set alula.content, alula.first, alula.last = [], -1, -1 -%}
        {%- for part in parts -%}
            {%- if part['text'] is defined and part['text'].strip() -%}
                {%- set alula.last = loop.index0 -%}
                {%- set alula.first = alula.last if alula.first < 0 else alula.first -%}
            {%- endif -%}
        {%- endfor -%}
        {%- for part in parts -%}
            {%- set alula.text = part['text'] if part['text'] is defined else '' -%}
            {%- if loop.index0 == alula.first -%}
                {%- set lead = alula.text | length - alula.text.lstrip() | length -%}
                {%- set alula.text = alula.text[:lead] + '\ufdd0' + alula.text[lead:] -%}
            {%- endif -%}
            {%- if loop.index0 == alula.last -%}
                {%- set said = alula.text.rstrip() | length -%}
                {%- set alula.text = alula.text[:said] + '\ufdd1' + alula.text[said:] -%}
            {%- endif -%}
            {%- set made = dict(part, text=alula.text) if part['text'] is defined else part -%}
            {%- set alula.content = alula.content + [made] -%}
        {%- endfor -%}
        {%- set said = alula.content[0]['text'] if plain else alula.content -%}
        {%- set alula.messages = alula.messages + [dict(message, content=said)] -%}
    {%- endif -%}
{%- endfor -%}
{%- set messages = alula.messages %}
"""

_GENERATION = re.compile(r"\{%(-?)\s*(?:end)?generation\s*(-?)%\}")

_ASK, _ANSWER, _AGAIN, _FINAL = "first question?", "first answer.", "second question", "the end"


def captured(prelude: str, original: str, stops: Sequence[str], end: str = "") -> str:
    """A template that emits what ``original`` renders of messages with marked answers, which count as generated.

    Args:
        prelude: template code that marks the answers in ``messages`` and makes the namespace ``alula``.
        original: the template.
        stops: texts of the tokens that end an answer; the one that follows an answer belongs to it.
        end: put behind answers that none of them follows.
    """
    # jinja drops one newline at the end of a template, so the original must lose its own before something follows it
    body = original[:-1] if original.endswith("\n") else original
    rest = f"(rest[:alula.end] or {literal(end)})" if end else "rest[:alula.end]"
    emit = _EMIT.replace("@STOPS@", literal(list(stops))).replace("@REST@", rest)
    return f"{prelude}{{% set alula_rendered %}}\n{body}{{% endset %}}\n{emit}"


def literal(value: Any) -> str:
    """``value`` as jinja writes it."""
    return json.dumps(value)  # jinja reads the same escapes


def ended(
    template: str,
    special: Mapping[str, Any],
    stops: Sequence[str],
    tokens: Sequence[str] = (),
    *,
    lists: bool,
    where: str,
) -> str:
    """``template``, in whose assistant mask every answer ends with a stop token.

    It is returned as it is where that is so already. One that marks no answers (most published ones) is marked. Where a
    stop token follows behind the marked text, the mask takes it in. Where a template writes none at all (LLaVA-1.5's
    published one), the first of ``stops`` is put behind every answer, and a warning says so: without it a model is
    never taught to stop.

    Args:
        template: a chat template, with ``{% generation %}`` markers or without.
        special: variables of the template that name special tokens.
        stops: texts of the tokens that end generation.
        tokens: texts of all special tokens; one that the template itself writes behind every answer ends it too.
        lists: whether it takes contents as lists of parts; else as strings.
        where: whose it is, for the error.

    Raises:
        UsageError: answers that are not marked, or do not end with a stop token, and cannot be made to.
    """
    told = _spoken(template, special, lists)
    if told is None:
        return template
    stops = [*stops, *(token for token in tokens if _follows(told.text, token))]
    if told.spans and _ends(told, stops):
        return template
    if not stops:
        raise UsageError("no stop token is known to end answers with", where=where, remedy="set tokenizer.eos_token")
    made = captured(_MARK, _GENERATION.sub(r"{#\1 \2#}", template), stops, stops[0])
    new = _spoken(made, special, lists)
    if (
        new is None
        or len(new.spans) != len(told.spans or (_ANSWER, _FINAL))
        or not _ends(new, stops)
        or _without(new.text, stops[0]) != _without(told.text, stops[0])
        or not all(_render(made, said, special) == _render(template, said, special) for said in _prompts(lists))
    ):
        if not told.spans:
            raise UsageError(
                "the chat template does not mark what the assistant says, and rewrites it, so that it cannot be marked",
                where=where,
                remedy="put {% generation %} ... {% endgeneration %} around the assistant's text in the template",
            )
        raise UsageError(
            f"marks answers without the token that ends them ({', '.join(stops)}): a model is never taught to stop",
            where=where,
            remedy="put the token inside, in front of {% endgeneration %}",
        )
    if not told.spans:
        logger.info("the chat template does not mark what the assistant says; for training it is marked")
    if new.text != told.text:
        logger.warning(
            "the chat template ends answers with no stop token; for training, %r is put behind each, or the model "
            "would never learn to stop",
            stops[0],
        )
    return made


class _Spoken(NamedTuple):
    """A dialogue of two answers as a template renders it."""

    text: str
    spans: list[str]  # the texts of which the assistant mask is made


def _spoken(template: str, special: Mapping[str, Any], lists: bool) -> _Spoken | None:
    """None where the template refuses the dialogue, or has markers and marks nothing in it."""
    turns = [("user", _ASK), ("assistant", _ANSWER), ("user", _AGAIN), ("assistant", _FINAL)]
    rendered = _rendered(template, _messages(turns, lists), special, return_assistant_tokens_mask=True)
    if rendered is None:
        return None
    text, spans = rendered[0][0], [rendered[0][0][first:stop] for first, stop in rendered[1][0]]
    return _Spoken(text, spans) if spans or not _GENERATION.search(template) else None


def _prompts(lists: bool) -> Iterator[list[dict[str, Any]]]:
    """Dialogues that end with a question, with and without a system prompt."""
    for before in ([], [("system", "be brief")]):
        yield _messages([*before, ("user", _ASK)], lists)


def _messages(turns: Sequence[tuple[str, str]], lists: bool) -> list[dict[str, Any]]:
    return [{"role": role, "content": [{"type": "text", "text": text}] if lists else text} for role, text in turns]


def _render(template: str, messages: list[dict[str, Any]], special: Mapping[str, Any]) -> str | None:
    rendered = _rendered(template, messages, special, add_generation_prompt=True)
    return None if rendered is None else rendered[0][0]


def _rendered(template: str, messages: list[dict[str, Any]], special: Mapping[str, Any], **options: Any) -> Any:
    """None where the template refuses: no system prompt, or contents in another form."""
    try:
        return render_jinja_template([messages], chat_template=template, **options, **special)
    except (jinja2.TemplateError, TypeError, KeyError):
        return None


def _ends(spoken: _Spoken, stops: Sequence[str]) -> bool:
    """Whether each marked answer has a stop token behind it, itself marked."""
    tails = [span.split(answer, 1)[1] for span in spoken.spans for answer in (_ANSWER, _FINAL) if answer in span]
    # answers that the template rewrites are not found: then each marked stretch has to hold one
    return all(any(stop in tail for stop in stops) for tail in tails or spoken.spans)


def _follows(text: str, token: str) -> bool:
    """Whether a token stands behind each answer of a dialogue, the last included, so that it begins no next turn."""
    return all(answer in text and text.split(answer, 1)[1].lstrip().startswith(token) for answer in (_ANSWER, _FINAL))


def _without(text: str, stop: str) -> str:
    """A rendered dialogue without the stop tokens right behind its answers."""
    return text.replace(_ANSWER + stop, _ANSWER).replace(_FINAL + stop, _FINAL)
