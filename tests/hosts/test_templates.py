"""Chat templates of a host: text prompts stay the language model's own, images and the assistant mask come on top."""

from __future__ import annotations

from typing import Any

import pytest
from PIL import Image
from tokenizers.processors import TemplateProcessing
from transformers import AutoProcessor, AutoTokenizer, PreTrainedTokenizerFast

from alula.errors import HostError
from alula.hosts import Host, build_host, save_host
from tests.hosts import tiny

IMAGE = {"type": "image", "image": Image.new("RGB", (40, 40), (0, 128, 0))}

# the idioms of published templates, in miniature
TEMPLATES = {
    # trims, names the turns
    "chatml": tiny.CHATML,
    # starts with BOS; trims; a block over several lines with white space control left to the environment
    "llama-3": """{{ bos_token }}
{% for message in messages %}
    {%- set content = '<|im_start|>' + message['role'] + '\n\n' + message['content'] | trim + '<|im_end|>' %}
{{- content }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n\n' }}
{%- endif %}
""",
    # system folded into the first user turn by slicing `messages`; strict alternation; EOS glued to the answer
    "mistral": (
        "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}"
        "{% set messages = messages[1:] %}{% else %}{% set system = '' %}{% endif %}"
        "{% for message in messages %}"
        "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('must alternate') }}{% endif %}"
        "{% if message['role'] == 'user' %}{{ '[INST] ' + (system + ' ' if loop.first and system else '') }}"
        "{{ message['content'] + ' [/INST]' }}{% else %}{{ ' ' + message['content'].strip() + '</s>' }}{% endif %}"
        "{% endfor %}"
    ),
    # refuses a system role; other role name
    "gemma": """{{- bos_token -}}
{%- if messages[0]['role'] == 'system' -%}{{ raise_exception('System role not supported') }}{%- endif -%}
{%- for message in messages -%}
{%- set role = 'model' if message['role'] == 'assistant' else message['role'] -%}
{{ '<|im_start|>' + role + '\n' + message['content'] | trim + '<|im_end|>\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>model\n' }}{%- endif -%}""",
    # looks into answers for thoughts, walks backwards, keeps a namespace and a macro
    "qwen3": """{%- set ns = namespace(last=-1) -%}
{%- macro shown(text) -%}{{- text -}}{%- endmacro -%}
{%- for message in messages[::-1] -%}
{%- if message.role == 'user' and ns.last < 0 -%}{%- set ns.last = messages | length - 1 - loop.index0 -%}{%- endif -%}
{%- endfor -%}
{%- for message in messages -%}
{%- set content = message.content if message.content is string else '' -%}
{%- if message.role == 'assistant' -%}
{%- if '</think>' in content -%}{%- set content = content.split('</think>')[-1].lstrip('\n') -%}{%- endif -%}
{{- '<|im_start|>assistant\n' -}}
{%- if loop.index0 > ns.last -%}{{- '<think>\n\n</think>\n\n' -}}{%- endif -%}
{{- shown(content.lstrip('\n')) + '<|im_end|>\n' -}}
{%- else -%}{{- '<|im_start|>' + message.role + '\n' + content + '<|im_end|>\n' -}}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}""",
    # marks the answers itself, strings only
    "marked": (
        "{%- for m in messages -%}{{- '<|im_start|>' + m['role'] + '\n' -}}{%- if m['role'] == 'assistant' -%}"
        "{%- generation -%}{{- m['content'] + '<|im_end|>' -}}{%- endgeneration -%}"
        "{%- else -%}{{- m['content'] + '<|im_end|>' -}}{%- endif -%}{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"
    ),
    # written for content lists alone, with another model's placeholder
    "lists": (
        "{%- for m in messages -%}{{- '<|im_start|>' + m['role'] + '\n' -}}{%- for part in m['content'] -%}"
        "{%- if part['type'] == 'image' -%}{{- '<other>' -}}{%- elif part['type'] == 'text' -%}{{- part['text'] -}}"
        "{%- endif -%}{%- endfor -%}{{- '<|im_end|>\n' -}}{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"
    ),
}
COMPLETE = (
    "{%- for m in messages -%}{{- '<|im_start|>' + m['role'] + '\n' -}}{%- generation -%}"
    "{%- if m['content'] is string -%}{{- m['content'] -}}{%- else -%}{%- for part in m['content'] -%}"
    "{%- if part['type'] == 'image' -%}{{- '<image>' -}}{%- else -%}{{- part['text'] -}}{%- endif -%}"
    "{%- endfor -%}{%- endif -%}{{- '<|im_end|>' -}}{%- endgeneration -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"
)

TALKS = [
    [("user", "what do you see?")],
    [("user", " two words "), ("assistant", "red\n")],
    [("user", "a"), ("assistant", "  first\nsecond  "), ("user", "b {{ c }}"), ("assistant", "third")],
    [("system", "be brief"), ("user", "how many?"), ("assistant", "two"), ("user", "of what?")],
    [("user", "again"), ("assistant", "so <think>\nwords\n</think>\n\nanswer"), ("user", "end")],
]


def host_for(tokenizer: PreTrainedTokenizerFast) -> Host:
    return build_host(tiny.decoder("llama"), tiny.TOWERS["siglip"][0], tokenizer=tokenizer)


def talk(turns: list[tuple[str, str]], lists: bool) -> list[dict[str, Any]]:
    return [{"role": role, "content": [{"type": "text", "text": text}] if lists else text} for role, text in turns]


@pytest.mark.parametrize("name", TEMPLATES)
def test_text_prompts_are_the_tokenizers_own(name: str, tmp_path) -> None:
    tokenizer = tiny.tokenizer(TEMPLATES[name])
    save_host(host_for(tokenizer), tmp_path / "host")
    processor = AutoProcessor.from_pretrained(tmp_path / "host", backend="pil")
    extended = AutoTokenizer.from_pretrained(tmp_path / "host")
    compared = 0
    for turns in TALKS:
        for prompt in (False, True):
            try:
                own: Any = tokenizer.apply_chat_template(
                    talk(turns, lists=name == "lists"), add_generation_prompt=prompt, return_dict=False
                )
            except Exception as refusal:
                with pytest.raises(type(refusal)):
                    processor.apply_chat_template(talk(turns, lists=True), add_generation_prompt=prompt)
                continue
            for lists in (False, True):
                options = {"tokenize": True, "add_generation_prompt": prompt}
                (ids,) = processor.apply_chat_template([talk(turns, lists)], return_dict=True, **options)["input_ids"]
                assert ids == own
                assert extended.apply_chat_template(talk(turns, lists), return_dict=False, **options) == own
                compared += 1
    assert compared >= 12


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_mask_covers_answers_and_their_stop_token(name: str) -> None:
    tokenizer = tiny.tokenizer(TEMPLATES[name], eos_token="</s>" if name == "mistral" else "<|im_end|>")
    processor = host_for(tokenizer).processor
    chat = talk([("user", "what?"), ("assistant", " two words \n"), ("user", "and?"), ("assistant", "red")], lists=True)
    chat[2]["content"] = [IMAGE, *chat[2]["content"], IMAGE]
    options = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
    inputs = processor.apply_chat_template([chat], **options)
    (ids,), (mask,) = inputs["input_ids"], inputs["assistant_masks"]
    stop = tokenizer.eos_token
    said = processor.tokenizer.decode([token for token, spoken in zip(ids, mask, strict=True) if spoken])
    assert "".join(said.split()) == f"twowords{stop}red{stop}"
    assert ids.count(processor.image_token_id) == 2 * 16


def test_a_complete_template_is_kept_as_it_is() -> None:
    assert host_for(tiny.tokenizer(COMPLETE)).processor.chat_template == COMPLETE


def test_image_parts_render_the_token_where_they_stand() -> None:
    processor = host_for(tiny.tokenizer()).processor
    text = {"type": "text", "text": "left"}
    shown = processor.apply_chat_template([{"role": "user", "content": [text, IMAGE, text, IMAGE]}])
    assert "left<image>left<image><|im_end|>" in shown
    with pytest.raises(Exception, match="takes text and images, not audio"):
        processor.apply_chat_template([{"role": "user", "content": [{"type": "audio", "audio": "a.wav"}]}])


ANSWERED = talk([("user", "hi"), ("assistant", "yes")], lists=True)


def test_a_base_model_that_knows_chatml_gets_chatml_and_its_stop_token() -> None:
    llm = tiny.decoder("llama", eos_token_id=2)
    host = build_host(llm, tiny.TOWERS["siglip"][0], tokenizer=tiny.tokenizer(None, eos_token="</s>"))
    shown = host.processor.apply_chat_template(ANSWERED)
    assert shown == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nyes<|im_end|>\n"
    assert host.model.generation_config.eos_token_id == [2, 4]
    assert llm.generation_config.eos_token_id == 2


@pytest.mark.parametrize("automatic_bos", [False, True])
def test_other_base_models_get_plain_lines(automatic_bos: bool) -> None:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tiny.without_chat_tokens(), pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )
    if automatic_bos:
        start = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)])
        tokenizer.backend_tokenizer.post_processor = start
    processor = host_for(tokenizer).processor
    shown = processor.apply_chat_template(ANSWERED)
    assert shown == ("<s>" if automatic_bos else "") + "USER: hi\nASSISTANT: yes</s>\n"
    ids = processor.apply_chat_template(ANSWERED, tokenize=True, return_dict=True)["input_ids"][0]
    assert ids == tokenizer(shown, add_special_tokens=False).input_ids


def test_no_bos_that_the_template_does_not_have(tmp_path) -> None:
    tokenizer = tiny.tokenizer(add_bos_token=True)  # ChatML, which has none, as in many Llama derivatives
    assert tokenizer("a").input_ids[0] == tokenizer.bos_token_id
    save_host(host_for(tokenizer), tmp_path / "host")
    processor = AutoProcessor.from_pretrained(tmp_path / "host", backend="pil")
    chat = talk([("user", "hi")], lists=False)
    own: Any = tokenizer.apply_chat_template(chat, return_dict=False)
    assert processor.apply_chat_template([chat], tokenize=True, return_dict=True)["input_ids"] == [own]


def test_a_template_that_cannot_be_kept_is_refused() -> None:
    with pytest.raises(HostError, match="does not reproduce"):
        host_for(tiny.tokenizer("{{- 'the same whatever is said' -}}"))
