"""TokenMap: kinds, items, true positions and roles, from every source it can be built from."""

from __future__ import annotations

import copy
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from alula import TokenMap
from alula.errors import UsageError
from alula.tokens import KnownTokens, Modality, Role
from tests import zoo


def naive(kinds: list[list[int]], valid: list[list[int]]) -> tuple[list, list]:
    """Items and positions by a plain loop, runs of one kind being one item."""
    items, positions = [], []
    for token_kinds, token_valid in zip(kinds, valid, strict=True):
        item, position, previous, out_items, out_positions = -1, -1, None, [], []
        for kind, ok in zip(token_kinds, token_valid, strict=True):
            kind = kind if ok else -1
            position += bool(ok)
            if kind > 0 and kind != previous:
                item += 1
            out_items.append(item if kind > 0 else -1)
            out_positions.append(position if ok else -1)
            previous = kind
        items.append(out_items)
        positions.append(out_positions)
    return items, positions


@pytest.mark.parametrize("seed", range(20))
def test_items_and_positions_equal_a_plain_loop(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    kinds = torch.randint(0, 4, (3, 17), generator=generator)
    pads = torch.randint(0, 6, (3,), generator=generator)
    left = bool(seed % 2)
    valid = torch.arange(17)[None] >= pads[:, None] if left else torch.arange(17)[None] < 17 - pads[:, None]
    tokens = TokenMap.from_modalities(kinds, valid.long())
    items, positions = naive(kinds.tolist(), valid.tolist())
    assert tokens.item.tolist() == items
    assert tokens.position.tolist() == positions
    assert torch.equal(tokens.modality == Modality.PADDING, ~valid)


@pytest.mark.parametrize("side", ["left", "right"])
def test_placeholder_ids_and_token_type_ids_agree(side: str) -> None:
    batch = zoo.batch("llava-llama", "3I4", "II2", "I", "5", "2I1I3", side=side)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    from_ids = TokenMap.from_input_ids(ids, {Modality.IMAGE: zoo.IMAGE}, mask)
    from_types = TokenMap.from_modalities((ids == zoo.IMAGE).long(), mask)
    assert torch.equal(from_ids.stack(), from_types.stack())
    assert from_ids.is_perceptual.sum().item() == 6 * zoo.TOKENS_PER_IMAGE


def test_adjacent_images_are_told_apart_by_their_sizes() -> None:
    kinds = torch.tensor([[1, 1, 1, 1, 0, 1], [0, 1, 1, 0, 1, 1]])
    assert TokenMap.from_modalities(kinds).item.tolist() == [[0, 0, 0, 0, -1, 1], [-1, 0, 0, -1, 1, 1]]
    told = TokenMap.from_modalities(kinds, tokens_per_item=[1, 3, 1, 2, 2])
    assert told.item.tolist() == [[0, 1, 1, 1, -1, 2], [-1, 0, 0, -1, 1, 1]]


def test_sizes_that_do_not_add_up_are_refused() -> None:
    with pytest.raises(UsageError, match=r"2 items of 5 tokens.*4 perceptual tokens"):
        TokenMap.from_modalities(torch.tensor([[1, 1, 1, 1, 0]]), tokens_per_item=[2, 3])


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(UsageError, match="does not fit"):
        TokenMap.from_modalities(torch.zeros(1, 4), torch.ones(1, 5))
    ok = TokenMap.text(1, 4)
    with pytest.raises(UsageError, match="one \\(batch, tokens\\) shape"):
        TokenMap(modality=ok.modality, item=ok.item[:, :2], position=ok.position, role=ok.role)


@pytest.mark.parametrize("cut", [1, 3, 4, 8, 10, 11])  # never inside an image: no host splits one
def test_append_equals_the_whole(cut: int) -> None:
    kinds = torch.tensor([[0, 1, 1, 0, 0, 1, 1, 1, 0, 0, 0, 0], [-1, -1, 0, 0, 1, 1, 0, 0, 2, 2, 0, 0]])
    roles = torch.randint(-1, 3, kinds.shape)
    whole = TokenMap.from_modalities(kinds, roles=roles)
    parts = [TokenMap.from_modalities(kinds[:, s], roles=roles[:, s]) for s in (slice(cut), slice(cut, None))]
    assert torch.equal(parts[0].append(parts[1]).stack(), whole.stack())
    assert torch.equal(whole.last(3).stack(), whole.stack()[:, -3:])
    text = TokenMap.text(2, 2)
    longer = parts[0].append(text, KnownTokens.text(2, 2, is_exact=True)).append(text)
    expected = torch.cat([kinds[:, :cut], torch.zeros(2, 4, dtype=kinds.dtype)], dim=1)
    assert torch.equal(longer.position, TokenMap.from_modalities(expected).position)


def test_has_seen_starts_at_the_first_perceptual_row_and_never_at_padding() -> None:
    tokens = TokenMap.from_modalities(torch.tensor([[0, 1, 0, 0], [-1, -1, 0, 0], [1, 0, 0, -1]]))
    assert tokens.has_seen.tolist() == [[False, True, True, True], [False] * 4, [True, True, True, False]]


def test_stack_select_and_roles_round_trip() -> None:
    tokens = TokenMap.from_modalities(torch.tensor([[0, 1], [0, 0]]), roles=torch.tensor([[0, 1], [2, 2]]))
    assert tokens.role[0].tolist() == [Role.SYSTEM, Role.USER]
    again = TokenMap.unstack(tokens.stack().float())
    assert torch.equal(again.stack(), tokens.stack())
    assert torch.equal(tokens.select(torch.tensor([1, 1, 0])).modality, tokens.modality[[1, 1, 0]])


def test_a_map_of_text_is_that_of_its_kinds() -> None:
    mask = torch.tensor([[0, 1, 1, 1], [1, 1, 0, 0], [0, 0, 0, 0]])
    for given in (None, mask):
        expected = TokenMap.from_modalities(torch.zeros(3, 4, dtype=torch.int64), given)
        assert torch.equal(TokenMap.text(3, 4, given).stack(), expected.stack())


@pytest.mark.parametrize("looks", [False, True])
def test_a_map_that_grows_word_by_word_is_that_of_all_words(looks: bool) -> None:
    """Whether anybody looks at it on the way; a copy on the way is its own."""
    kinds = torch.tensor([[0, 1, 1, 0], [2, 2, 0, 0]])
    grown, known = TokenMap.from_modalities(kinds), KnownTokens.of(kinds.numpy())
    for count in range(150):
        word = KnownTokens.text(2, 1, is_exact=True)
        grown, known = grown.append(TokenMap.text(2, 1), word), known.append(word)
        assert grown.shape == (2, 5 + count)
        if looks:
            assert grown.role.shape == (2, 5 + count)
        if count == 70:
            early = copy.deepcopy(grown)
    whole = TokenMap.from_modalities(torch.nn.functional.pad(kinds, (0, 150)))
    assert torch.equal(grown.stack(), whole.stack())
    assert torch.equal(grown.counts, whole.counts)
    assert torch.equal(early.stack(), whole.stack()[:, :75])
    assert known.modality.tolist() == whole.modality.tolist()
    assert (
        known.append(KnownTokens.of(kinds.numpy())).modality.tolist() == torch.cat([whole.modality, kinds], 1).tolist()
    )
    with pytest.raises(AttributeError):
        grown.nothing


def test_threads_look_at_a_map_that_grew() -> None:
    """Whoever is first puts its columns together, and all find the same."""
    text = TokenMap.text(1, 3)
    for _ in range(50):
        grown, start = text.append(text).append(text), threading.Barrier(4)

        def look(_: int, grown: TokenMap = grown, start: threading.Barrier = start) -> list[list[int]]:
            start.wait()
            return grown.position.tolist()

        with ThreadPoolExecutor(4) as pool:
            assert list(pool.map(look, range(4))) == [[[*range(9)]]] * 4
