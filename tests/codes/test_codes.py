"""Discrete tokenizers: exact, deterministic, and kept as directories."""

from __future__ import annotations

import itertools
import json
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import alula
from alula.codes import CodesProcessor, KMeansCodes, ShippedCodes, VQCodes, VQConfig, fit_centroids, load_codes, nearest
from alula.codes.features import EncoderFeatures
from alula.codes.training import train_painter, train_vq
from alula.errors import CodesError, UsageError
from alula.hosts.audio_tower import audio_part
from tests.codes import tiny
from tests.hosts import tiny as hosts


def pictures(count: int, side: int = 12) -> list[Image.Image]:
    draw = np.random.default_rng(0)
    return [Image.fromarray(draw.integers(0, 256, (side, side, 3), dtype=np.uint8)) for _ in range(count)]


def sounds(*lengths: int) -> list[np.ndarray]:
    draw = np.random.default_rng(0)
    return [draw.uniform(-1, 1, length).astype(np.float32) for length in lengths]


def by_loop(frames: torch.Tensor, centroids: torch.Tensor) -> torch.Tensor:
    """One centroid after the other, in float64; of equally near ones the first."""
    best = torch.full((len(frames),), torch.inf, dtype=torch.float64)
    found = torch.zeros(len(frames), dtype=torch.int64)
    for number, centroid in enumerate(centroids.double()):
        gap = (frames.double() - centroid).square().sum(dim=1)
        found[gap < best] = number
        best = torch.minimum(best, gap)
    return found


@pytest.mark.parametrize("offset", [0.0, 300.0], ids=["centred", "far from zero"])
def test_nearest_is_that_of_a_loop_over_centroids(offset: float) -> None:
    # far from zero float32 products lose what tells centroids apart
    generator = torch.Generator().manual_seed(0)
    frames = torch.randn(3000, 12, generator=generator) + offset
    centroids = torch.randn(65, 12, generator=generator) + offset
    centroids[40] = centroids[3]  # a tie
    assert torch.equal(nearest(frames, centroids), by_loop(frames, centroids))
    assert nearest(centroids, centroids).tolist() == [*range(40), 3, *range(41, 65)]
    halves = frames.to(torch.bfloat16)
    assert torch.equal(nearest(halves, centroids), by_loop(halves, centroids))


def test_memory_of_a_block_is_all_that_is_taken() -> None:
    seen: list[int] = []

    class Watching(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            seen.extend(each.numel() for each in torch.utils._pytree.tree_leaves(out) if torch.is_tensor(each))
            return out

    frames = torch.zeros(1, 4).expand(100_000, 4)  # a view: the frames themselves are the caller's
    with Watching():
        nearest(frames, torch.randn(1024, 4))
    assert max(seen) < 2 * 2**24 < 100_000 * 1024


def test_centroids_are_those_of_well_parted_clusters() -> None:
    generator = torch.Generator().manual_seed(0)
    true = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0], [10.0, 10.0]])
    frames = true.repeat(200, 1) + 0.1 * torch.randn(800, 2, generator=generator)
    chunks = list(frames[torch.randperm(800, generator=generator)].split(100))
    found = fit_centroids(chunks, 4, seed=0, passes=3)
    assert torch.cdist(true, found).amin(dim=1).max() < 0.2
    assert torch.equal(found, fit_centroids(chunks, 4, seed=0, passes=3))
    with pytest.raises(CodesError, match="3 frames for 4 centroids"):
        fit_centroids([frames[:3]], 4, seed=0)
    with pytest.raises(CodesError, match="NaN or infinite"):
        fit_centroids([torch.full((9, 2), torch.nan)], 4, seed=0)
    assert torch.equal(fit_centroids(iter(chunks), 4, seed=0), fit_centroids(chunks, 4, seed=0))
    with pytest.raises(CodesError, match="gone through once, and 2 passes"):
        fit_centroids(iter(chunks), 4, seed=0, passes=2)


def test_k_means_of_a_vision_encoder(tmp_path: Any) -> None:
    features, items = tiny.clip(), pictures(6)
    codes = KMeansCodes.fit(features, items, 5, seed=0, chunk=2)
    assert (codes.kind, codes.size, codes.tokens_per_item, codes.width) == ("image", 5, 9, 16)
    given = features.processor(images=items, return_tensors="pt")["pixel_values"]
    patches = features.model(given).last_hidden_state[:, 1:]  # behind the class token
    assert torch.equal(torch.stack(codes.encode(items)).flatten(), by_loop(patches.flatten(0, 1), codes.codebook()))
    with pytest.raises(CodesError, match="nothing of pixels"):
        codes.decode(torch.zeros(1, 9, dtype=torch.int64))

    others = [KMeansCodes(features, codes.codebook() + 1, 9), KMeansCodes(tiny.clip(1), codes.codebook(), 9)]
    retrained = tiny.clip()
    with torch.no_grad():
        next(retrained.parameters())[0] += 1
    others.append(KMeansCodes(retrained, codes.codebook(), 9))  # the same codebook, and other codes
    assert len({each.fingerprint() for each in (codes, *others)}) == 4
    assert KMeansCodes(tiny.clip(), codes.codebook(), 9).fingerprint() == codes.fingerprint()

    train_painter(codes, items, steps=3, side=12, hidden=8)
    again = load_codes(codes.save(tmp_path / "codes"))
    assert torch.equal(torch.stack(again.encode(items)), torch.stack(codes.encode(items)))
    drawn = [each.decode(torch.stack(each.encode(items[:2]))) for each in (codes, again)]
    assert drawn[0][0].size == (12, 12)
    assert [np.array(each).tobytes() for each in drawn[0]] == [np.array(each).tobytes() for each in drawn[1]]


@pytest.mark.parametrize("make", [tiny.whisper, tiny.hubert])
def test_frames_of_padding_are_dropped(make: Any, tmp_path: Any) -> None:
    features = make()
    long, short = features(sounds(3200, 1600))
    assert len(short) < len(long) <= 170
    if make is tiny.whisper:
        assert (len(long), len(short)) == (10, 5)  # 20 ms each, of a window of a second
        with pytest.raises(CodesError, match="16001 samples, and the encoder takes 16000"):
            features(sounds(16001))
    codes = KMeansCodes.fit(features, sounds(3200, 1600), 4, seed=0)
    assert codes.tokens_per_item == len(long)
    with pytest.raises(CodesError, match="NaN or infinite"):
        codes.encode([np.full(1600, np.nan, np.float32)])
    again = load_codes(codes.save(tmp_path / "codes"))
    assert [each.tolist() for each in again.encode(sounds(3200, 1600))] == [
        each.tolist() for each in codes.encode(sounds(3200, 1600))
    ]


def test_an_ear_taken_out_of_a_host_makes_the_frames_of_the_whisper_it_was() -> None:
    whole = tiny.whisper()
    ear = audio_part(whole.model, whole.processor, None, 0).model
    given = sounds(3200, 1600)
    for one, two in zip(EncoderFeatures(ear, whole.processor, 1)(given), whole(given), strict=True):
        torch.testing.assert_close(one, two)


def test_k_means_of_a_spectrogram_encoder_takes_every_layer() -> None:
    assert KMeansCodes.fit(tiny.ast(), sounds(2000, 2000), 3, seed=0).tokens_per_item == 4
    with pytest.raises(CodesError, match="the rest would be dropped"):
        tiny.ast()(sounds(16000))
    with pytest.raises(CodesError, match="layer 3 of 2"):
        tiny.clip(layer=3)


@pytest.mark.parametrize("codebook", ["ema", "loss"])
def test_a_vq_autoencoder_learns_and_is_kept(codebook: str, tmp_path: Any) -> None:
    config = VQConfig(size=8, width=4, hidden=8, grid=2, patch=4, codebook=codebook)
    codes, items, told = VQCodes(config, seed=0), [Image.new("RGB", (8, 8), c) for c in ("red", "blue", "white")], []
    train_vq(codes, items, steps=60, batch_size=12, rate=1e-2, told=lambda step, loss: told.append(loss))
    assert told[-1] < told[0] / 2
    found = torch.stack(codes.encode(items))
    assert len(found.unique()) > 1
    drawn = np.array(codes.decode(found)[1]).astype(int).mean(axis=(0, 1))
    assert drawn[2] > 120 > drawn[0]
    again = load_codes(codes.save(tmp_path / "codes"))
    assert torch.equal(torch.stack(again.encode(items)), found)
    with pytest.raises(CodesError, match="there are 0 to 7"):
        again.decode(found + 8)
    with pytest.raises(CodesError, match=r"shape \(3, 3\)"):
        again.decode(found[:, :3])


def test_gradients_pass_straight_through_the_bottleneck_and_dead_codes_come_back() -> None:
    config = VQConfig(size=4, width=2, hidden=8, grid=1, patch=2, commitment=0.5, codebook="loss")
    book, vectors = VQCodes(config, seed=0).book, torch.randn(3, 1, 2, requires_grad=True)
    quantized = book(vectors)
    quantized.vectors.sum().backward(retain_graph=True)
    assert torch.equal(vectors.grad, torch.ones_like(vectors))
    chosen = book.weight.detach()[quantized.codes]
    gap = (vectors.detach() - chosen).square().mean()
    torch.testing.assert_close(quantized.loss.detach(), 1.5 * gap)
    with torch.no_grad():
        book.weight[2] = 1e6
    book.counts[2] = 0
    generator = torch.Generator().manual_seed(0)
    book.learn(vectors, book(vectors).codes, generator)
    assert (torch.cdist(book.weight[2:3], vectors.detach()[:, 0]) == 0).any()


def test_moving_averages_are_those_of_a_loop() -> None:
    config = VQConfig(size=3, width=2, hidden=8, grid=1, patch=2, decay=0.9, revive=0)
    book = VQCodes(config, seed=0).book
    vectors, generator = torch.randn(7, 1, 2), torch.Generator()
    counts, sums, weight = book.counts.clone(), book.sums.clone(), book.weight.clone()
    codes = book(vectors).codes
    book.learn(vectors, codes, generator)
    for code in range(3):
        mine = vectors[:, 0][codes[:, 0] == code]
        counts[code] = 0.9 * counts[code] + 0.1 * len(mine)
        sums[code] = 0.9 * sums[code] + 0.1 * mine.sum(dim=0)
        weight[code] = sums[code] / counts[code]
    torch.testing.assert_close(book.weight.detach(), weight.detach())


def test_a_vq_autoencoder_of_sounds_gives_sounds() -> None:
    config = VQConfig(
        kind="audio", size=8, width=4, hidden=8, sampling_rate=8000, samples=2048, hop=64, bands=16, spectra=4
    )
    time = np.arange(2048) / 8000
    tones = [np.sin(2 * np.pi * pitch * time).astype(np.float32) for pitch in (300, 1800)]
    codes = train_vq(VQCodes(config, seed=0), tones, steps=80, batch_size=8, rate=1e-2)
    assert codes.tokens_per_item == 8
    assert codes.sampling_rate == 8000
    made = codes.decode(torch.stack(codes.encode(tones)))
    peaks = [np.abs(np.fft.rfft(wave)).argmax() * 8000 / 2048 for wave in made]
    assert made[0].shape == (2048,)
    assert abs(peaks[0] - 300) < 150
    assert abs(peaks[1] - 1800) < 300
    with pytest.raises(CodesError, match="3000 samples"):
        codes.encode(sounds(3000))


@pytest.mark.parametrize("name", tiny.SHIPPED)
def test_tokenizers_of_transformers(name: str, tmp_path: Any) -> None:
    make, extent, books = tiny.SHIPPED[name]
    torch.manual_seed(0)
    model = make().eval()
    codes = ShippedCodes(model, extent, books)
    items: Any = pictures(3, extent) if codes.kind == "image" else sounds(extent, extent, extent)
    found = codes.encode(items)
    assert {len(each) for each in found} == {codes.tokens_per_item}
    assert len(torch.stack(found).unique()) > 1
    assert codes.codebook().shape[0] == codes.size == books * (11 if codes.kind == "image" else 16)
    # one alone is as among others
    assert torch.equal(codes.encode(items[1:2])[0], found[1])
    own = independent(name, model, items, books)
    assert torch.equal(torch.stack(found), own)
    if codes.can_decode:
        made = codes.decode(torch.stack(found))
        assert len(made) == 3
        assert made[0].size == (extent, extent) if codes.kind == "image" else made[0].shape == (extent,)
    else:
        with pytest.raises(CodesError, match="no decoder"):
            codes.decode(torch.stack(found))
    if books > 1:
        assert len(codes.encode([items[0][: extent // 2]])[0]) == codes.tokens_per_item // 2
        with pytest.raises(CodesError, match="take turns"):
            codes.decode(torch.stack(found).flip(1))
    again = load_codes(codes.save(tmp_path / "codes"))
    assert torch.equal(torch.stack(again.encode(items)), torch.stack(found))


def independent(name: str, model: Any, items: Any, books: int) -> torch.Tensor:
    """Codes by the class's own words, laid out number by number."""
    with torch.no_grad():
        if name in ("chameleon", "janus", "emu3"):
            pixels = torch.stack([torch.tensor(np.array(each)).permute(2, 0, 1) for each in items]).float() / 255
            if name == "emu3":
                mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
                std = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
                told = model.encode((pixels - mean) / std, torch.tensor([[8, 8]] * 3)).image_tokens
                return torch.stack([torch.stack([row for line in each for row in line]) for each in told])
            return model.encode(pixels * 2 - 1).image_tokens.reshape(3, -1)
        waves = torch.tensor(np.stack(items))[:, None]
        if name == "encodec":
            laid = model.encode(waves, bandwidth=8.0).audio_codes[0]
        elif name == "dac":
            laid = model.encode(waves, n_quantizers=books).audio_codes
        else:
            laid = model.encode(waves, num_quantizers=books).audio_codes
    rows = [[int(laid[n, q, moment]) + 16 * q for moment in range(laid.shape[2]) for q in range(books)]
            for n in range(3)]  # fmt: skip
    return torch.tensor(rows)


def test_short_sounds_are_written_with_silence_behind_them() -> None:
    config = VQConfig(kind="audio", size=8, width=4, hidden=8, sampling_rate=8000, samples=2048, hop=64, spectra=4)
    shipped = ShippedCodes(tiny.encodec(), 2000)
    heard = KMeansCodes.fit(tiny.ast(), sounds(2000, 2000), 3, seed=0)
    kinds = {"vq": VQCodes(config, seed=0).eval(), "shipped": shipped, "heard": heard}
    processor = CodesProcessor(hosts.tokenizer(), None, 0, kinds)
    assert shipped.samples is not None
    for name, samples in (("vq", 2048), ("shipped", shipped.samples)):
        short = np.linspace(-1, 1, samples // 3, dtype=np.float32)
        whole = np.pad(short, (0, samples - len(short)))
        assert processor.written(name, short) == processor.written(name, whole)
        assert processor.written(name, short).count(":") == kinds[name].tokens_per_item + 2  # begin and end
    with pytest.raises(CodesError, match="items have 4"):
        processor.written("heard", sounds(600)[0])


def test_places_have_codes_of_their_own(tmp_path: Any) -> None:
    settings: dict[str, Any] = {"size": 4, "width": 2, "hidden": 8, "grid": 2, "patch": 4}
    plain, placed = (VQCodes(VQConfig(**settings, places=places), seed=0).eval() for places in (False, True))
    assert (placed.size, placed.tokens_per_item, placed.codebooks, placed.width) == (16, 4, 4, 6)
    items = pictures(5, side=8)
    told, apart = (torch.stack(each.encode(items)) for each in (plain, placed))
    assert torch.equal(apart, told + 4 * torch.arange(4))
    book = placed.codebook()
    for place, code in itertools.product(range(4), range(4)):
        row = book[4 * place + code]
        assert torch.equal(row[:2], plain.codebook()[code])
        assert row[2:].nonzero()[:, 0].tolist() == [place]
    drawn = [np.array(each.decode(codes)[0]) for each, codes in ((plain, told), (placed, apart))]
    assert np.array_equal(*drawn)
    again = load_codes(placed.save(tmp_path / "codes"))
    assert torch.equal(torch.stack(again.encode(items)), apart)
    vocabulary = alula.TealConfig.of({"image": placed}).codes["image"]
    assert (vocabulary.size, vocabulary.streams) == (16, 4)


@pytest.mark.parametrize("kind", ["own", "encoder", "model"])
def test_codes_are_saved_over_codes_and_over_nothing_else(kind: str, tmp_path: Any) -> None:
    shipped, *sizes = next(iter(tiny.SHIPPED.values()))
    made: Any = {
        "own": lambda: VQCodes(VQConfig(size=4, width=2, hidden=8, grid=1, patch=2), seed=0),
        "encoder": lambda: KMeansCodes.fit(tiny.clip(), pictures(6), 5, seed=0),
        "model": lambda: ShippedCodes(shipped().eval(), *sizes),
    }[kind]()
    made.save(made.save(tmp_path / "codes"))
    for held, told in (("notes", "other things than codes"), ("codes/notes", "notes/ beside codes")):
        (tmp_path / held).mkdir()
        (tmp_path / held / "kept").write_text("kept")
        with pytest.raises(UsageError, match=told):
            made.save((tmp_path / held).parent if "/" in held else tmp_path / held)
        assert (tmp_path / held / "kept").read_text() == "kept"


def test_what_is_no_directory_of_codes_is_refused(tmp_path: Any) -> None:
    path = VQCodes(VQConfig(size=4, width=2, hidden=8, grid=1, patch=2), seed=0).save(tmp_path / "codes")
    with pytest.raises(CodesError, match=r"no codes_config\.json"):
        load_codes(tmp_path)
    facts = json.loads((path / "codes_config.json").read_text())
    for changed, words in (
        ({**facts, "codes_type": "dalle"}, "known type"),
        ({**facts, "fingerprint": "0"}, "not what was saved"),
        ({**facts, "config": {**facts["config"], "width": 3}}, "do not fit"),
        ({**facts, "config": {**facts["config"], "depth": 3}}, "depth"),
    ):
        (path / "codes_config.json").write_text(json.dumps(changed))
        with pytest.raises(Exception, match=words):
            load_codes(path)
    (path / "codes_config.json").write_text(json.dumps(facts))
    (path / "codes_model.safetensors").write_bytes(b"no")
    with pytest.raises(CodesError, match="damaged"):
        load_codes(path)
