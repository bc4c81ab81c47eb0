"""A host's processor that gives codes in the place of pixels and spectra."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AddedToken, AutoTokenizer, PreTrainedTokenizerBase, ProcessorMixin
from transformers.image_utils import make_flat_list_of_images

from alula.codes.base import CodeTokenizer, load_codes
from alula.codes.vocabulary import JointVocabulary
from alula.errors import CodesError
from alula.files import read_json

_SIGN = "\ufdd2"
"""a noncharacter, which no text holds, in front of the names of codes: who types <image:3> means these letters"""
_FOLDER = "codes"
_FACTS = "processor_config.json"


class _Reader:
    """What a processor is asked about items before they are coded, which here is nothing."""

    def __init__(self, codes: CodeTokenizer) -> None:
        self.sampling_rate = codes.sampling_rate

    def fetch_images(self, images: Any) -> Any:
        return images

    def fetch_audio(self, audio: Any, sampling_rate: int | None = None) -> Any:
        return audio


class CodesProcessor(ProcessorMixin):
    """Messages with images and sounds to ids of a joint vocabulary, and ids back to items.

    Its tokenizer is a copy of the text model's that knows every code by name, so that templates, masks of answers and
    padding are the stock ones. Inputs are ``input_ids`` and ``attention_mask`` alone.

    Args:
        tokenizer: with the codes (`extended`).
        text: token embeddings of the text model.
        codes: tokenizers by the name of their range. An image or sound of a prompt is coded by the first of its kind.
        image_token, audio_token: placeholders in the chat template.
    """

    def __init__(
        self,
        tokenizer: Any = None,
        chat_template: str | None = None,
        text: int = 0,
        codes: Mapping[str, CodeTokenizer] | None = None,
        image_token: str | None = None,
        audio_token: str | None = None,
    ) -> None:
        self._codes = dict(codes or {})
        self.text = text
        self.image_token, self.audio_token = image_token, audio_token
        for kind in ("image", "audio"):
            token = getattr(self, f"{kind}_token")
            setattr(self, f"{kind}_token_id", None if token is None else tokenizer.convert_tokens_to_ids(token))
        super().__init__(tokenizer, chat_template=chat_template)

    @classmethod
    def over(cls, processor: Any, text: int, codes: Mapping[str, CodeTokenizer]) -> CodesProcessor:
        """Of a host's own processor, which stays as it is.

        Args:
            processor: with a tokenizer, a chat template and placeholders.
            text: token embeddings of the host.
            codes: tokenizers by the name of their range, in order.

        Raises:
            CodesError: a kind of codes for which the host's template has no placeholder, or more tokens than
                embeddings.
        """
        tokens = {f"{kind}_token": getattr(processor, f"{kind}_token", None) for kind in ("image", "audio")}
        for name, each in codes.items():
            if tokens[f"{each.kind}_token"] is None:
                raise CodesError(
                    f"codes {name!r} are of {each.kind}, for which the host's chat template has no placeholder",
                    where=type(processor).__name__,
                    remedy="build the host with that kind of input (alula.build_host(audio=...))",
                )
        vocabulary = vocabulary_of(text, codes)
        tokenizer = extended(processor.tokenizer, vocabulary, spaced=not _ends_in_space(processor))
        return cls(tokenizer, processor.chat_template, text, codes, **tokens)

    @property
    def codes(self) -> dict[str, CodeTokenizer]:
        """Tokenizers by the name of their range."""
        return self._codes

    @property
    def vocabulary(self) -> JointVocabulary:
        """Of text and codes."""
        return vocabulary_of(self.text, self._codes)

    @property
    def image_processor(self) -> Any:
        """Who asks whether it takes images finds something here; None: it takes none."""
        return self._reader("image")

    @property
    def feature_extractor(self) -> Any:
        """Likewise of sounds; it says their sampling rate."""
        return self._reader("audio")

    @property
    def model_input_names(self) -> list[str]:
        return ["input_ids", "attention_mask"]

    def written(self, name: str, item: Any) -> str:
        """An item as text, which the tokenizer reads as the codes of that range; a short sound with silence behind it,
        since what is generated is as long as an item is.

        Raises:
            CodesError: a sound that is too short for codes that know no silence.
        """
        its = self._codes[name]
        (codes,) = its.encode([item])
        if len(codes) < its.tokens_per_item and its.samples is not None:
            (codes,) = its.encode([np.pad(np.asarray(item, dtype=np.float32), (0, its.samples - len(item)))])
        if len(codes) < its.tokens_per_item:
            raise CodesError(
                f"a sound of {len(codes)} codes is to be written, and items have {its.tokens_per_item}",
                where=name,
                remedy="write sounds of one length, or write them in VQ codes, which put silence behind short ones",
            )
        return self._text(name, codes.tolist())

    def written_by(self, kind: str) -> str | None:
        """Name of the codes that items of a kind are written in: the last of that kind. None: there are none."""
        return next((name for name, each in reversed(self._codes.items()) if each.kind == kind), None)

    def items(self, ids: Any) -> list[tuple[str, Any]]:
        """The images and sounds among ids, in order, each with the name of its range; incomplete ones are left out.

        Args:
            ids: a row of ids of the joint vocabulary, (S,).
        """
        row = ids.tolist() if hasattr(ids, "tolist") else list(ids)
        found = [each for each in self.vocabulary.found(row) if each.complete]
        return [(each.name, self._codes[each.name].decode(each.codes[None])[0]) for each in found]

    def save_pretrained(self, save_directory: str | os.PathLike[str], push_to_hub: bool = False, **kwargs: Any) -> Any:
        """As of any processor, with the tokenizers of codes in folders of their own."""
        written = super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)
        for name, each in self._codes.items():
            folder = Path(save_directory) / _FOLDER / name
            folder.mkdir(parents=True, exist_ok=True)
            each.write(folder)
        return written

    def to_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """JSON values."""
        facts = {"processor_class": type(self).__name__, "text": self.text, "names": list(self._codes)}
        return {**facts, "image_token": self.image_token, "audio_token": self.audio_token}

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Inverse of `save_pretrained`.

        Raises:
            CodesError: the tokenizers of codes are not there, or damaged.
        """
        path = Path(pretrained_model_name_or_path)
        facts = read_json(path / _FACTS)
        codes = {name: load_codes(path / _FOLDER / name) for name in facts["names"]}
        tokenizer = AutoTokenizer.from_pretrained(path)
        template = getattr(tokenizer, "chat_template", None)
        given = {key: facts[key] for key in ("text", "image_token", "audio_token")}
        return cls(tokenizer, template, codes=codes, **given)

    def _reader(self, kind: str) -> _Reader | None:
        return next((_Reader(each) for each in self._codes.values() if each.kind == kind), None)

    def _coded(self, kind: str, items: list[Any]) -> list[str]:
        name = next(name for name, each in self._codes.items() if each.kind == kind)
        return [self._text(name, codes.tolist()) for codes in self._codes[name].encode(items)]

    def _text(self, name: str, codes: list[int]) -> str:
        return "".join([begin_of(name), *(code_of(name, code) for code in codes), end_of(name)])

    def _check_special_mm_tokens(self, text: Any, text_inputs: Any, modalities: Any) -> None:
        """No placeholder is left among the ids: codes stand there."""

    def _process_images(self, images: Any, **kwargs: Any) -> tuple[dict[str, Any], list[str]]:
        flat: Any = make_flat_list_of_images(images)
        return {}, self._coded("image", list(flat))

    def _process_audio(self, audio: Any, **kwargs: Any) -> tuple[dict[str, Any], list[str]]:
        return {}, self._coded("audio", list(audio))


def is_codes_processor(directory: str | os.PathLike[str]) -> bool:
    """Whether `CodesProcessor.save_pretrained` wrote there."""
    path = Path(directory) / _FACTS
    if not path.is_file():
        return False
    facts = read_json(path)
    return isinstance(facts, dict) and facts.get("processor_class") == CodesProcessor.__name__


def vocabulary_of(text: int, codes: Mapping[str, CodeTokenizer]) -> JointVocabulary:
    """Of text ids and tokenizers in order."""
    return JointVocabulary.of(
        text, {name: (each.size, each.tokens_per_item, getattr(each, "codebooks", 1)) for name, each in codes.items()}
    )


def _ends_in_space(processor: Any) -> bool:
    """Whether what stands in front of an answer does: then a template puts no space of its own before the answer."""
    asked = [{"role": "user", "content": [{"type": "text", "text": "a"}]}]
    rendered: str = processor.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    return rendered[-1:].isspace()


def begin_of(name: str) -> str:
    """Name of the id in front of an item. Not ``<image>``: that is a host's placeholder, and hidden where it is written
    (`alula.literals`)."""
    return f"{_SIGN}<{name}:begin>"


def end_of(name: str) -> str:
    """Name of the id behind an item."""
    return f"{_SIGN}<{name}:end>"


def code_of(name: str, code: int) -> str:
    """Name of a code's id."""
    return f"{_SIGN}<{name}:{code}>"


def extended(
    tokenizer: PreTrainedTokenizerBase, vocabulary: JointVocabulary, *, spaced: bool = False
) -> PreTrainedTokenizerBase:
    """A copy of a tokenizer that knows the codes of a joint vocabulary under their ids, as special tokens.

    Embeddings that no token has (vocabularies are rounded up) get names of their own, so that ids agree.

    Args:
        spaced: a template puts a space before what is said, which belongs to the begin of an item that is said first:
            of an item that is generated at once none is there.

    Raises:
        CodesError: it has more tokens than the text model has embeddings.
    """
    own = len(tokenizer)
    if own > vocabulary.text:
        raise CodesError(
            f"the tokenizer has {own} tokens and the text model {vocabulary.text} embeddings",
            where=type(tokenizer).__name__,
            remedy="resize the host's embeddings first",
        )
    names: list[Any] = [f"{_SIGN}<unused:{number}>" for number in range(own, vocabulary.text)]
    for each in vocabulary.ranges:
        names += [AddedToken(begin_of(each.name), lstrip=spaced), end_of(each.name)]
        names += [code_of(each.name, code) for code in range(each.size)]
    found = copy.deepcopy(tokenizer)
    found.add_tokens(names, special_tokens=True)
    return found
