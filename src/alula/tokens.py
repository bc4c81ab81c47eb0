"""TokenMap: what every position ("token") of a decoder's input is.

Shapes use B = batch, S = tokens. Every method of alula that treats images and words differently reads this map; nothing
else searches for placeholder tokens.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from alula.errors import UsageError
from alula.media import MEDIA

DESCRIBES = "describes"  # keyword of a forward: (B,) which of its images a sample is a caption of; -1: it is none
CONDITIONS = "conditions"  # keyword of a forward: (B, D) what is told to the connector of each sample's images
PROMPT_ENDS = "prompt_ends"  # keyword of a forward: (B,) index among its tokens of the last one of each prompt
TOKEN_ROLES = "token_roles"  # keyword of a forward: (B, S) values of `Role`, for what reads its inputs by itself

UNKNOWN = -2  # item of a perceptual token of which it cannot be told to which medium of its sample it belongs


class Modality(enum.IntEnum):
    """What a token holds. The non-negative values are those of transformers' ``mm_token_type_ids``.

    Numbers of media that are registered in `alula.media` later have members too: ``Modality(9)``.
    """

    PADDING = -1
    TEXT = 0
    IMAGE = 1
    VIDEO = 2
    AUDIO = 3
    POINTS = 4
    DEPTH = 5
    NORMALS = 6
    MOTION = 7
    RESPONSE = 8

    @classmethod
    def _missing_(cls, value: object) -> Modality | None:
        medium = MEDIA.numbered(value) if isinstance(value, int) else None
        if medium is None:
            return None
        member = int.__new__(cls, medium.modality)
        member._name_, member._value_ = medium.name.upper(), medium.modality
        return member

    @classmethod
    def of(cls, medium: str) -> Modality:
        """The modality of a medium by its name."""
        return cls(MEDIA[medium].modality)


class Role(enum.IntEnum):
    """Whose turn of the conversation a token belongs to."""

    UNKNOWN = -1
    SYSTEM = 0
    USER = 1
    ASSISTANT = 2


_COLUMNS = ("modality", "item", "position", "role")


@dataclass(frozen=True, eq=False)
class TokenMap:
    """The modality, item, true position and role of every token of a batch.

    Attributes:
        modality: (B, S) int64, values of `Modality`.
        item: (B, S) int64, index of the image, video or audio clip within its sample, counted from 0 over all
            perceptual modalities together; -1 for text and padding. `UNKNOWN` (-2) where a host's inputs do not say
            where one medium ends and the next begins; whoever needs items must refuse such a map.
        position: (B, S) int64, the token's place among its sample's valid tokens (padding does not count); -1 for
            padding.
        role: (B, S) int64, values of `Role`.
    """

    modality: Tensor
    item: Tensor
    position: Tensor
    role: Tensor

    def __post_init__(self) -> None:
        shape = self.modality.shape
        if len(shape) != 2 or not (self.item.shape == self.position.shape == self.role.shape == shape):
            shapes = {name: tuple(getattr(self, name).shape) for name in _COLUMNS}
            raise UsageError(f"TokenMap needs four tensors of one (batch, tokens) shape, got {shapes}")

    # -- construction ---------------------------------------------------------------------------------------------

    @classmethod
    def from_modalities(
        cls,
        modalities: Tensor,
        attention_mask: Tensor | None = None,
        *,
        tokens_per_item: Sequence[int] | None = None,
        roles: Tensor | None = None,
    ) -> TokenMap:
        """Build the map from a modality per token, as `mm_token_type_ids` gives it.

        Args:
            modalities: (B, S) integer tensor, values of `Modality` (padding may carry any value where `attention_mask`
                is 0).
            attention_mask: (B, S), 1 for valid tokens; None when nothing is padded.
            tokens_per_item: number of tokens of every item, in batch order (sample by sample, left to right). Needed
                only to tell adjacent items of one modality apart; without it a run of tokens of one is one item.
            roles: (B, S) values of `Role`.

        Raises:
            UsageError: shapes differ, or `tokens_per_item` does not add up to the perceptual tokens found.
        """
        modalities = modalities.to(torch.int64)
        if attention_mask is None:
            valid = modalities != Modality.PADDING
        else:
            if attention_mask.shape != modalities.shape:
                raise UsageError(
                    f"attention_mask {tuple(attention_mask.shape)} does not fit tokens {tuple(modalities.shape)}"
                )
            valid = attention_mask.to(torch.bool) & (modalities != Modality.PADDING)
        modality = torch.where(valid, modalities, int(Modality.PADDING))
        position = torch.where(valid, valid.to(torch.int64).cumsum(dim=1) - 1, -1)
        role = torch.full_like(modality, int(Role.UNKNOWN)) if roles is None else roles.to(torch.int64)
        return cls(modality=modality, item=_number_items(modality, tokens_per_item), position=position, role=role)

    @classmethod
    def from_input_ids(
        cls,
        input_ids: Tensor,
        placeholders: Mapping[Modality, int | Iterable[int]],
        attention_mask: Tensor | None = None,
        *,
        tokens_per_item: Sequence[int] | None = None,
        roles: Tensor | None = None,
    ) -> TokenMap:
        """Build the map from token ids, given which ids stand for tokens of which modality.

        Args:
            input_ids: (B, S) token ids after the processor expanded the placeholders to one id per token.
            placeholders: token id (or ids) per modality.
        """
        modalities = torch.zeros_like(input_ids, dtype=torch.int64)
        for modality, ids in placeholders.items():
            for token in (ids,) if isinstance(ids, int) else ids:
                modalities = torch.where(input_ids == token, int(modality), modalities)
        return cls.from_modalities(modalities, attention_mask, tokens_per_item=tokens_per_item, roles=roles)

    @classmethod
    def text(
        cls, batch: int, tokens: int, attention_mask: Tensor | None = None, *, device: torch.device | str | None = None
    ) -> TokenMap:
        """A map of `tokens` text tokens for each of `batch` samples, padded where a (batch, tokens) mask is 0."""
        nothing = torch.full((batch, tokens), -1, device=device)
        if attention_mask is None:
            modality = torch.zeros_like(nothing)
            position = modality if tokens == 1 else torch.arange(tokens, device=device).expand(batch, -1)
            return cls(modality=modality, item=nothing, position=position, role=nothing)
        valid = attention_mask.to(device=device, dtype=torch.bool)
        position = torch.where(valid, valid.cumsum(dim=1) - 1, nothing)
        return cls(modality=valid.to(torch.int64) - 1, item=nothing, position=position, role=nothing)

    # -- reading --------------------------------------------------------------------------------------------------

    @cached_property
    def shape(self) -> tuple[int, int]:
        """(B, S)."""
        return self.modality.shape[0], self.modality.shape[1]

    @cached_property
    def device(self) -> torch.device:
        return self.modality.device

    @property
    def valid(self) -> Tensor:
        """(B, S) bool: the token is not padding."""
        return self.modality >= 0

    @property
    def is_text(self) -> Tensor:
        """(B, S) bool."""
        return self.modality == Modality.TEXT

    @property
    def is_perceptual(self) -> Tensor:
        """(B, S) bool: the token holds part of an image, video or audio clip."""
        return self.modality > Modality.TEXT

    @property
    def has_seen(self) -> Tensor:
        """(B, S) bool: a perceptual token stands at or before this valid token, in its own sample."""
        return self.is_perceptual.cumsum(dim=1).to(torch.bool) & self.valid

    @property
    def has_seen_in_turn(self) -> Tensor:
        """(B, S) bool: a perceptual token stands at or before this valid token, and no user's turn began since.

        A user's turn begins where a token of the user's follows one that is not. What has no role belongs to the turn
        before it. The answer to a turn with an image is thus within it.
        """
        valid = self.valid
        is_users = (self.role == Role.USER) & valid
        # what stands before a token, padding left out: the number of valid tokens that are not the user's changes
        others = (valid & ~is_users).cumsum(dim=1)
        turn = torch.where(is_users, others + 1, 0).cummax(dim=1).values
        seen = torch.where(self.is_perceptual, turn + 1, 0).cummax(dim=1).values
        return (seen == turn + 1) & valid

    @cached_property
    def counts(self) -> Tensor:
        """(B, 1) int64: how many tokens of each sample are no padding."""
        return self.valid.sum(dim=1, keepdim=True)

    # -- change of shape ------------------------------------------------------------------------------------------

    def append(self, new: TokenMap, known: KnownTokens | None = None) -> TokenMap:
        """This map followed by `new` (same batch); positions of the new valid tokens continue this map's.

        Items that follow unknown ones are unknown too.

        Args:
            known: what the host knows of the new ones, which saves work on them.
        """
        return self.joined(self.followed_by(new, known), known)

    def joined(self, behind: TokenMap, known: KnownTokens | None = None) -> TokenMap:
        """This map and the tokens `followed_by` gave."""
        if not self.shape[1]:
            return behind
        whole = _Joined.of(self, behind)
        if known is not None and known.is_whole:  # or every step would count all tokens again
            whole.__dict__["counts"] = self.counts + behind.shape[1]
        return whole

    def followed_by(self, new: TokenMap, known: KnownTokens | None = None) -> TokenMap:
        """`new` as it stands behind this map, see `append`."""
        if not self.shape[1]:
            return new
        item, position = new.item, new.position + self.counts
        if known is None or not known.is_whole:
            position = torch.where(new.position >= 0, position, -1)
        if known is None or any(known.has_media):
            lowest, highest = self.item.aminmax(dim=1, keepdim=True)  # UNKNOWN is the lowest there is
            item = torch.where(lowest == UNKNOWN, UNKNOWN, new.item + highest + 1)
            item = torch.where(new.item >= 0, item, new.item)
        return TokenMap(modality=new.modality, item=item, position=position, role=new.role)

    def last(self, tokens: int) -> TokenMap:
        """The last `tokens` tokens, with the positions they have in this map."""
        start = self.shape[1] - tokens
        if not start:
            return self  # no views of it: torch.compile would guard their base beside them
        return TokenMap(**{name: getattr(self, name)[:, start:] for name in _COLUMNS})

    def with_roles(self, roles: Tensor) -> TokenMap:
        """This map with the (B, S) roles given for its valid tokens.

        Raises:
            UsageError: they are of another shape.
        """
        if roles.shape != self.modality.shape:
            raise UsageError(f"roles {tuple(roles.shape)} do not fit tokens {self.shape}")
        return replace(self, role=torch.where(self.valid, roles.to(self.role), int(Role.UNKNOWN)))

    def only(self, left: Tensor | None) -> TokenMap:
        """This map in which all but the (B, S) bool `left` tokens are padding; None: the map itself."""
        if left is None:
            return self
        return TokenMap(**{name: torch.where(left, getattr(self, name), -1) for name in _COLUMNS})

    def pick(self, index: Tensor) -> TokenMap:
        """The tokens at (B, M) `index`."""
        return TokenMap(**{name: getattr(self, name).gather(1, index) for name in _COLUMNS})

    def select(self, samples: Tensor) -> TokenMap:
        """The samples named by the index tensor, in its order (beams, sub-batches)."""
        return TokenMap(**{name: getattr(self, name).index_select(0, samples) for name in _COLUMNS})

    def to(self, device: torch.device | str) -> TokenMap:
        if self.device == device:
            return self
        return TokenMap(**{name: getattr(self, name).to(device) for name in _COLUMNS})

    def stack(self) -> Tensor:
        """(B, S, 4) int64: modality, item, position, role."""
        return torch.stack([self.modality, self.item, self.position, self.role], dim=-1)

    @classmethod
    def unstack(cls, stacked: Tensor) -> TokenMap:
        """Inverse of `stack`."""
        modality, item, position, role = stacked.to(torch.int64).unbind(dim=-1)
        return cls(modality=modality, item=item, position=position, role=role)


class _Joined(TokenMap):
    """Maps one behind the other. Their columns are put together when one is asked for: in steps of generation nobody
    may ever ask."""

    @classmethod
    def of(cls, before: TokenMap, behind: TokenMap) -> TokenMap:
        """Two maps of one batch."""
        (batch, first), (batch_behind, second) = before.shape, behind.shape
        if batch != batch_behind or before.device != behind.device:  # torch knows what is to be said
            torch.cat([before.modality, behind.modality], dim=1)
        whole, parts = cls.__new__(cls), vars(before).get("_parts", (before,))
        vars(whole).update(_parts=(*parts, behind), shape=(batch, first + second), device=behind.device)
        if len(parts) >= _MANY:
            whole.__getattr__("modality")
        return whole

    def __getattr__(self, name: str) -> Any:
        own = vars(self)
        parts = own.get("_parts") if name in _COLUMNS else None
        if parts is not None:
            own.update({each: torch.cat([getattr(part, each) for part in parts], dim=1) for each in _COLUMNS})
            own.pop("_parts", None)
        if name not in own:  # else another thread was here
            raise AttributeError(name)
        return own[name]


_MANY = 64
"""maps that are put together at once"""


@dataclass(frozen=True, eq=False)
class KnownTokens:
    """What the host knows of a batch's tokens, so that it can plan without waiting for the device.

    Attributes:
        first: (B, S - text_behind) int8, values of `Modality`.
        is_exact: False: where it says text, padding may stand.
        text_behind: how many tokens of text follow, which every step adds to.
    """

    first: np.ndarray
    is_exact: bool = True
    text_behind: int = 0

    @classmethod
    def read(cls, tokens: TokenMap) -> KnownTokens:
        """From the device, which the host waits for."""
        return cls(tokens.modality.to(torch.int8).cpu().numpy())

    @classmethod
    def of(cls, modality: np.ndarray) -> KnownTokens:
        """From (B, S) values of `Modality` that the host has."""
        return cls(modality.astype(np.int8))

    @classmethod
    def text(cls, batch: int, tokens: int, *, is_exact: bool) -> KnownTokens:
        """Of text alone."""
        known = cls(_nothing(batch), is_exact, tokens)
        known.__dict__.update(has_media=(False,) * batch, is_whole=is_exact)  # every step asks, and need not look
        return known

    @cached_property
    def modality(self) -> np.ndarray:
        """(B, S) int8, values of `Modality`."""
        return np.pad(self.first, ((0, 0), (0, self.text_behind))) if self.text_behind else self.first

    @cached_property
    def is_perceptual(self) -> np.ndarray:
        """(B, S) bool."""
        return self.modality > Modality.TEXT

    @cached_property
    def valid(self) -> np.ndarray:
        """(B, S) bool: the token is not padding; to be asked where that is exactly known."""
        return self.modality >= 0

    @cached_property
    def is_whole(self) -> bool:
        """Whether it is known that none of them is padding."""
        return self.is_exact and bool(self.valid.all())

    @cached_property
    def has_media(self) -> tuple[bool, ...]:
        """Per sample, whether any token is perceptual."""
        return tuple(np.any(self.is_perceptual, axis=1).tolist())

    def append(self, new: KnownTokens) -> KnownTokens:
        """These followed by `new`."""
        is_exact = self.is_exact and new.is_exact
        if not new.first.shape[1]:
            return KnownTokens(self.first, is_exact, self.text_behind + new.text_behind)
        return KnownTokens(np.concatenate([self.modality, new.first], axis=1), is_exact, new.text_behind)


@lru_cache(maxsize=8)
def _nothing(batch: int) -> np.ndarray:
    """(batch, 0)."""
    return np.zeros((batch, 0), dtype=np.int8)


def on_device(array: np.ndarray, device: torch.device) -> Tensor:
    """What the host knows, on a device, for which the host does not wait."""
    made = torch.from_numpy(array)
    if device.type != "cuda":
        return made.to(device)
    return made.pin_memory().to(device, non_blocking=True)  # of memory that may be paged, CUDA copies in step


def _number_items(modality: Tensor, tokens_per_item: Sequence[int] | None) -> Tensor:
    """(B, S) index of each perceptual token's item within its sample."""
    perceptual = modality > Modality.TEXT
    previous = torch.nn.functional.pad(modality, (1, 0), value=int(Modality.PADDING))[:, :-1]
    starts = perceptual & (modality != previous)
    if tokens_per_item is not None:
        starts = starts | _declared_starts(perceptual, tokens_per_item)
    return torch.where(perceptual, starts.to(torch.int64).cumsum(dim=1) - 1, -1)


def _declared_starts(perceptual: Tensor, tokens_per_item: Sequence[int]) -> Tensor:
    """(B, S) bool: the tokens at which the declared items begin."""
    counts = torch.as_tensor(list(tokens_per_item), dtype=torch.int64)
    total, found = int(counts.sum()), int(perceptual.sum())
    if total != found:
        raise UsageError(
            f"{len(counts)} items of {total} tokens in all were given, but the prompt holds {found} perceptual tokens",
            remedy="let the processor expand one placeholder per image, and do not truncate its output",
        )
    flat_starts = torch.zeros(found + 1, dtype=torch.bool, device=perceptual.device)
    flat_starts[torch.cat([counts.new_zeros(1), counts.cumsum(0)]).to(perceptual.device)] = True
    starts = torch.zeros_like(perceptual)
    starts[perceptual] = flat_starts[:found]
    return starts
