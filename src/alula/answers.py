r"""Answers in rendered chat templates: where they stand, and the token that ends them.

A template is never rewritten. Each assistant message is passed through it between two Unicode noncharacters (U+FDD0,
U+FDD1, reserved for process-internal use); its output is captured and cut at them, and the answers, with the stop token
that follows, are emitted inside ``{% generation %}``. The noncharacters never reach the rendered text.

A thought in front of an answer is marked apart, inside its tags: templates write it otherwise (Qwen3's and GLM's the
last one), or leave it out (all earlier ones). What they keep of it counts as generated, with its tags. Where an answer
comes out of a template with one of its two marks, it was cut; a template that is told ``refuse_cut_answers`` refuses it
then, since labels would be missing.
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

THOUGHTS = (
    ("<think>", "</think>"),
    ("<thinking>", "</thinking>"),
    ("<seed:think>", "</seed:think>"),
    ("[THINK]", "[/THINK]"),
    ("\u25c1think\u25b7", "\u25c1/think\u25b7"),
    ("<|channel|>analysis<|message|>", "<|channel|>final<|message|>"),
)
"""how model families mark a thought: Qwen, DeepSeek, GLM and most others; Seed-OSS; Magistral; Kimi; GPT-OSS"""

_EMIT = r"""{#- alula: emit what the template rendered; answers with their stop token count as generated -#}
{%- for piece in alula_rendered.split('\ufdd0') -%}
    {%- set alula.rest = piece -%}
    {%- if piece.split('\ufdd1') | length != (1 if loop.first else 2) -%}
        {%- if refuse_cut_answers is defined -%}
            {{- raise_exception('the chat template cuts an answer, or a text holds U+FDD0 or U+FDD1') -}}
        {%- endif -%}
        {%- set alula.rest = piece.replace('\ufdd1', '') -%}
    {%- elif not loop.first -%}
        {%- set answer, alula.rest = piece.split('\ufdd1')[0], piece.split('\ufdd1')[1] -%}
        {%- set alula.end = 0 -%}
        {%- if not loop.last and alula.rest.strip() in @CLOSING@ -%}
            {%- generation -%}{{- answer + alula.rest -}}{%- endgeneration -%}
            {%- set alula.end = alula.rest | length -%}
        {%- else -%}
            {%- set space = alula.rest | length - alula.rest.lstrip() | length -%}
            {%- for stop in @STOPS@ -%}
                {%- if alula.rest[space:].startswith(stop) and space + stop | length > alula.end -%}
                    {%- set alula.end = space + stop | length -%}
                {%- endif -%}
            {%- endfor -%}
            {%- if answer + @REST@ -%}
                {%- generation -%}{{- answer + @REST@ -}}{%- endgeneration -%}
            {%- endif -%}
        {%- endif -%}
        {%- set alula.rest = alula.rest[alula.end:] -%}
    {%- endif -%}
    {%- set alula.cut = alula.rest | length -%}
    {%- if not loop.last and loop.nextitem.split('\ufdd1')[-1].strip() in @CLOSING@ -%}
        {%- for tag in @OPENING@ -%}
            {%- if alula.rest.rstrip().endswith(tag) -%}
                {%- set alula.cut = alula.rest.rstrip() | length - tag | length -%}
            {%- endif -%}
        {%- endfor -%}
    {%- endif -%}
    {{- alula.rest[:alula.cut] -}}
    {%- if alula.rest[alula.cut:] -%}
        {%- generation -%}{{- alula.rest[alula.cut:] -}}{%- endgeneration -%}
    {%- endif -%}
{%- endfor -%}
"""

# the markers go inside surrounding white space, so that templates which strip an answer still do
_MARKED = r"""{#- alula: a text with markers where an answer begins and ends, and a thought in front of it -#}
{%- macro alula_around(text, first, last) -%}
    {%- set lead = text | length - text.lstrip() | length if first else 0 -%}
    {%- set said = [text.rstrip() | length, lead] | max if last else text | length -%}
    {{- text[:lead] + ('\ufdd0' if first else '') + text[lead:said] + ('\ufdd1' if last else '') + text[said:] -}}
{%- endmacro -%}
{%- macro alula_marked(text, first, last) -%}
    {%- set found = namespace(start=0, stop=-1, close='') -%}
    {%- for open, close in @THOUGHTS@ if first and found.stop < 0 and close in text -%}
        {%- set before = text[:text.rfind(close)] -%}
        {%- if before.lstrip().startswith(open) -%}
            {%- set found.start = before.find(open) + open | length -%}
        {%- endif -%}
        {%- set found.stop, found.close = before | length, close -%}
    {%- endfor -%}
    {%- if found.stop >= 0 -%}
        {{- text[:found.start] + alula_around(text[found.start:found.stop], true, true) + found.close -}}
        {%- set found.stop = found.stop + found.close | length -%}
        {{- alula_around(text[found.stop:], true, last) -}}
    {%- else -%}
        {{- alula_around(text, first, last) -}}
    {%- endif -%}
{%- endmacro -%}
"""

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
            {%- if loop.index0 == alula.first or loop.index0 == alula.last -%}
                {%- set alula.text = alula_marked(alula.text, loop.index0 == alula.first, loop.index0 == alula.last) -%}
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

REFUSE = "refuse_cut_answers"
"""variable with which a template is rendered for its marks"""

_GENERATION = re.compile(r"\{%(-?)\s*(?:end)?generation\s*(-?)%\}")

_ASK, _ANSWER, _AGAIN, _FINAL = "first question?", "first answer.", "second question", "the end"


def captured(prelude: str, original: str, stops: Sequence[str], end: str = "") -> str:
    """A template that emits what ``original`` renders of messages with marked answers, which count as generated.

    Args:
        prelude: template code that marks the answers in ``messages`` (``alula_marked(text, first, last)`` marks a text,
            at its beginning and its end) and makes the namespace ``alula``.
        original: the template.
        stops: texts of the tokens that end an answer; the one that follows an answer belongs to it.
        end: put behind answers that none of them follows.
    """
    # jinja drops one newline at the end of a template, so the original must lose its own before something follows it
    body = original[:-1] if original.endswith("\n") else original
    rest = f"(alula.rest[:alula.end] or {literal(end)})" if end else "alula.rest[:alula.end]"
    opening, closing = zip(*THOUGHTS, strict=True)
    emit = _EMIT.replace("@STOPS@", literal(list(stops))).replace("@REST@", rest)
    emit = emit.replace("@OPENING@", literal(opening)).replace("@CLOSING@", literal(closing))
    marked = _MARKED.replace("@THOUGHTS@", literal(THOUGHTS))
    return f"{marked}{prelude}{{% set alula_rendered %}}\n{body}{{% endset %}}\n{emit}"


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
    # of a template without markers, transformers warns when it is asked for its marks
    marks = _GENERATION.search(template) is not None
    rendered = _rendered(template, _messages(turns, lists), special, return_assistant_tokens_mask=marks)
    if rendered is None:
        return None
    text = rendered[0][0]
    spans = [text[first:stop] for first, stop in rendered[1][0]] if marks else []
    return _Spoken(text, spans) if spans or not marks else None


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
