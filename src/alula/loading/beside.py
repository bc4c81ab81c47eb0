"""What lies beside an adapter's weights: the processor, tokenizer or chat template that it was trained with."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase, ProcessorMixin

from alula.errors import AdapterError
from alula.grafts import grafts_of
from alula.hosts.host import read_processor, read_tokenizer, tokenizer_of
from alula.media import MEDIA

_PROCESSOR = ("processor_config.json", "preprocessor_config.json")
_TOKENIZER = ("tokenizer_config.json", "tokenizer.json")
_TEMPLATE = "chat_template.jinja"
_SHOWN = 3


def processor_beside(path: Path, base: Any) -> Any | None:
    """What the adapter in `path` was trained with to prepare its inputs; None where nothing lies there.

    Trainers save what they were given, the whole processor or the tokenizer alone; the rest is the base's.

    Args:
        path: the adapter's directory.
        base: the base's processor, or its tokenizer if it is a text model.

    Raises:
        AdapterError: a placeholder has another token id than for the base. HostError: files that cannot be read.
    """
    where = str(path)
    if isinstance(base, ProcessorMixin) and any((path / name).is_file() for name in _PROCESSOR):
        found: Any = read_processor(where)
    elif any((path / name).is_file() for name in _TOKENIZER):
        found = read_tokenizer(where)
        if isinstance(base, ProcessorMixin):
            found = _with_tokenizer(base, found)
    elif (path / _TEMPLATE).is_file():
        found = _with_template(base, (path / _TEMPLATE).read_text(encoding="utf-8"))
    else:
        return None
    for kind in MEDIA:
        theirs = getattr(base, f"{kind}_token_id", None)
        ours = _placeholder(found, kind)
        if theirs is not None and ours != theirs:
            raise AdapterError(
                f"the tokenizer beside the adapter gives the {kind} placeholder the id {ours}, the base's {theirs}",
                where=where,
                remedy="save the processor that the adapter was trained with there, or remove its files",
            )
    return found


def check_vocabulary(model: Any, processor: Any, base: Any, *, where: str) -> None:
    """Raise an AdapterError if the tokenizer has tokens that neither the model has embeddings for nor `base` knows.

    Those that the base's own tokenizer has too say nothing of the adapter (Gemma-3's text models name an image token).
    """
    tokenizer, known = map(tokenizer_of, (processor, base))
    rows = int(model.get_input_embeddings().weight.shape[0])
    rows += sum(graft.further_tokens for graft in grafts_of(model).values())
    before = known.get_vocab()
    new = {number: token for token, number in tokenizer.get_vocab().items() if before.get(token) != number}
    beyond = [new[number] for number in sorted(new) if number >= rows]
    if beyond:
        raise AdapterError(
            f"its tokenizer has {len(tokenizer)} tokens and the model {rows} embeddings: none for "
            f"{', '.join(map(repr, beyond[:_SHOWN]))}{', ...' if len(beyond) > _SHOWN else ''}",
            where=where,
            remedy="save the base with its resized embeddings (save_host, save_pretrained) and name it as "
            "base_model_name_or_path; or train the embeddings with the adapter: "
            'modules_to_save=["embed_tokens", "lm_head"]',
        )


def _with_tokenizer(base: ProcessorMixin, tokenizer: PreTrainedTokenizerBase) -> Any:
    found: Any = copy.copy(base)
    found.tokenizer = tokenizer
    if tokenizer.chat_template is not None:
        found.chat_template = tokenizer.chat_template
    return found


def _with_template(base: Any, template: str) -> Any:
    """The base's, with another chat template; a processor's tokenizer, which is asked in words alone, gets it too."""
    found: Any = copy.copy(base)
    found.chat_template = template
    if isinstance(base, ProcessorMixin):
        found.tokenizer = copy.copy(found.tokenizer)
        found.tokenizer.chat_template = template
    return found


def _placeholder(processor: Any, kind: str) -> int | None:
    """The id that the processor's tokenizer gives to the placeholder of a kind of media."""
    token = getattr(processor, f"{kind}_token", None)
    tokenizer = tokenizer_of(processor)
    if isinstance(token, str):
        return int(tokenizer.convert_tokens_to_ids(token))
    return getattr(processor, f"{kind}_token_id", None)
