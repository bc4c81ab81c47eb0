"""Recipes of discrete codes: what is fitted, on which items, and where it goes. `alula codes fit` runs one."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, ValidationError, model_validator
from transformers import AutoConfig, AutoModel

from alula.codes import CodeTokenizer, EncoderFeatures, KMeansCodes, VQCodes, VQConfig
from alula.codes.features import processor_of
from alula.codes.training import train_painter, train_vq
from alula.data import SourceSpec, open_source
from alula.data.samples import MEDIA, parts
from alula.data.specs import UndrawnSpec
from alula.errors import RecipeError
from alula.files import unreadable
from alula.hosts import names
from alula.hosts.quiet import quiet_loading
from alula.settings import Bool, Int, problems
from alula.training.fields import ITEMS, MANY, Count, PathText, Rate, Section, Seed, Size
from alula.training.notation import read_yaml


class Fitting(Section):
    """Steps of AdamW on batches of items."""

    steps: Count = 800
    batch_size: Size = 32
    rate: Rate = 3e-3


class PainterSpec(Fitting):
    """A painter of pictures from centroids; without one k-means codes are read and never drawn."""

    side: Count = Field(description="pixels of a drawn picture by side")
    hidden: Size = 64


class KMeansSpec(Section):
    """k-means over the frames of one layer of an encoder."""

    encoder: PathText = Field(description="directory or hub id of a vision or audio encoder, or `fledgling`")
    layer: Int = Field(default=-1, description="of its hidden states; 0: embeddings, negative ones from the last")
    random: Bool = Field(default=False, description="take the encoder's shape with random weights")
    size: Int = Field(default=256, ge=1, le=MANY, description="centroids")
    passes: Count = Field(default=1, description="how often the items are gone through")
    painter: PainterSpec | None = None


class VQSpec(VQConfig, Fitting):
    """A VQ autoencoder and how it is trained."""

    def of_codes(self) -> VQConfig:
        """The autoencoder's own settings."""
        return VQConfig(**{name: getattr(self, name) for name in VQConfig.model_fields})


class CodesRecipe(Section):
    """One tokenizer: of what, how, and where it goes."""

    output_dir: PathText = Field(description="the directory of codes")
    seed: Seed = 0
    kind: Literal["image", "audio"] = "image"
    source: UndrawnSpec
    items: Int = Field(default=1500, ge=1, le=ITEMS, description="how many of the source's images or sounds")
    k_means: KMeansSpec | None = None
    vq: VQSpec | None = None

    @model_validator(mode="after")
    def _one(self) -> CodesRecipe:
        if (self.k_means is None) == (self.vq is None):
            raise ValueError("give `k_means` or `vq`, exactly one of them")
        if self.vq is not None and self.vq.kind != self.kind:
            raise ValueError(f"kind: items are of {self.kind}, and vq.kind says {self.vq.kind}")
        return self


def load_codes_recipe(path: str | os.PathLike[str], overrides: Iterable[str] = ()) -> CodesRecipe:
    """Read and validate the recipe at `path`.

    Args:
        overrides: `key=value` for keys at the top, the value in YAML.

    Raises:
        RecipeError: it cannot be read, or does not say something runnable.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise unreadable(error, path, RecipeError, remedy="name a YAML file") from None
    raw, lines = read_yaml(text, where=str(path))
    if not isinstance(raw, dict):
        raise RecipeError("a recipe of codes is a mapping with output_dir, source and k_means or vq", where=str(path))
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals:
            raise RecipeError(f"--set {override!r} is not of the form key=value", remedy="e.g. --set items=200")
        raw = {**raw, key: read_yaml(value, where=f"--set {override!r}")[0]}
        lines = None
    try:
        return CodesRecipe.model_validate(raw)
    except ValidationError as error:
        raise RecipeError(
            "\n  ".join(str(problem) for problem in problems(error, CodesRecipe, raw, lines)), where=str(path)
        ) from None


def items_of(spec: SourceSpec, kind: str, count: int, *, rate: int | None = None) -> list[Any]:
    """The first so many images or sounds of a source, decoded.

    Raises:
        RecipeError: it has fewer. DataError: one that cannot be read.
    """
    source = open_source(spec, key="source")
    found: list[Any] = []
    loading = {"rate": rate} if kind == "audio" and rate is not None else {}
    for index in range(source.size if source.size is not None else 20 * count):
        for part in parts(source[index].messages):
            if part["type"] == kind and len(found) < count:
                found.append(MEDIA[kind].from_object(part[kind]).load(**loading))
        if len(found) == count:
            return found
    raise RecipeError(
        f"{source.name} has {len(found)} items of {kind}, not {count}", where="items", remedy="ask for fewer"
    )


def fit_codes(recipe: CodesRecipe, *, told: Callable[[int, float], None] | None = None) -> CodeTokenizer:
    """Fit what a recipe says and write it to its directory.

    Args:
        told: called after every step of training.
    """
    made: CodeTokenizer
    if recipe.vq is not None:
        items = items_of(recipe.source, recipe.kind, recipe.items, rate=recipe.vq.sampling_rate)
        made = train_vq(
            VQCodes(recipe.vq.of_codes(), seed=recipe.seed),
            items,
            steps=recipe.vq.steps,
            batch_size=recipe.vq.batch_size,
            rate=recipe.vq.rate,
            seed=recipe.seed,
            told=told,
        )
    else:
        assert recipe.k_means is not None
        features = encoder_features(recipe.k_means, recipe.kind, recipe.seed)
        items = items_of(recipe.source, recipe.kind, recipe.items, rate=features.sampling_rate)
        spec = recipe.k_means
        made = KMeansCodes.fit(features, items, spec.size, seed=recipe.seed, passes=spec.passes)
        if spec.painter is not None:
            own = spec.painter.model_dump()
            made = train_painter(made, items, seed=recipe.seed, told=told, **own)
    made.save(recipe.output_dir)
    return made


def encoder_features(spec: KMeansSpec, kind: Literal["image", "audio"], seed: int) -> EncoderFeatures:
    """The encoder that a recipe names.

    Raises:
        HostError, CodesError: there is none, or it has no such layer.
    """
    where = Path(names.resolve(spec.encoder, "vision" if kind == "image" else "audio"))
    with quiet_loading():
        if spec.random:
            with torch.random.fork_rng(devices=()):
                torch.manual_seed(seed)
                model: Any = AutoModel.from_config(AutoConfig.from_pretrained(where), dtype=torch.float32)
        else:
            model = AutoModel.from_pretrained(where, dtype=torch.float32)
    return EncoderFeatures(model, processor_of(where, kind), spec.layer)
