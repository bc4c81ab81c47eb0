"""What can be said of a recipe before anything is built, loaded or written.

Models are read by their configurations alone, and built without memory (on PyTorch's meta device) where names of layers
are asked for.
"""

from __future__ import annotations

import contextlib
import errno
import inspect
import os
from pathlib import Path

from transformers import AutoModelForImageTextToText, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

from alula.anatomy import Anatomy, HostParts
from alula.chat_template import TemplateSettings
from alula.data import Collator
from alula.errors import FilesError, HostError, RecipeError, UsageError
from alula.files import telling
from alula.hosts.build import foresee
from alula.hosts.configs import read_config
from alula.hosts.directories import locate
from alula.hosts.host import read_processor
from alula.hosts.parts import weightless
from alula.seam import check_packs
from alula.training.methods import METHODS
from alula.training.recipe import HostSpec, Recipe, Stage
from alula.training.trackers import check_trackers


def check_feasible(recipe: Recipe) -> None:
    """Refuse a recipe that its models or directories would end later, perhaps after hours.

    Raises:
        RecipeError: a setting that the host or the disk does not go with, by its key. HostError, UsageError: a model
            that cannot be found, built or trained.
    """
    _check_writable(recipe.output_dir, "output_dir")
    check_trackers(recipe.report_to)
    for stage in recipe.stages:
        if stage.feature_cache is not None and stage.feature_cache.disk is not None:
            _check_writable(stage.feature_cache.disk, f"stages.{stage.name}.feature_cache.disk")
        if stage.distill is not None and stage.distill.cache is not None:
            _check_writable(stage.distill.cache, f"stages.{stage.name}.distill.cache")
    model = _host(recipe.host)
    if model is None:
        return
    parts, oddity = _anatomy(model)
    if oddity is not None and recipe.retention is not None and recipe.retention.probes:
        raise RecipeError(f"probes: {oddity.message}", where="retention.probes", remedy="probes: false")
    for stage in recipe.stages:
        try:
            _check_stage(stage, parts, oddity)
        except RecipeError as error:
            raise RecipeError(error.message, where=f"stages.{stage.name}.{error.where}", remedy=error.remedy) from None
    if recipe.host.path is not None:
        _check_template(recipe, locate(recipe.host.path, "host"))


def _host(spec: HostSpec) -> PreTrainedModel | None:
    """The host, or the language model it is to be joined from, without weights."""
    if spec.path is None:
        assert spec.llm is not None
        assert spec.vision is not None
        return foresee(
            spec.llm,
            spec.vision,
            spec.connector,
            feature_layer=spec.feature_layer,
            audio=spec.audio,
            video=spec.video,
            shared=spec.shared,
            connector_options=spec.connector_options,
            audio_stack=spec.audio_stack,
            feature_extractor=spec.feature_extractor,
            encoder=spec.encoder,
            modalities=spec.modalities,
            modality_options=spec.modality_options,
        )
    where = locate(spec.path, "host")
    config = read_config(where)
    if type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        raise HostError(
            f"{config.model_type!r} takes no images", where=where, remedy="name it as `llm`, with a `vision`"
        )
    return weightless(AutoModelForImageTextToText, config)


def _check_template(recipe: Recipe, where: str) -> None:
    """Refuse a host whose chat template does not say what is to be learnt, or does not read the recipe's settings."""
    try:
        Collator(read_processor(where), template=TemplateSettings(recipe.template or {}))
    except UsageError as error:
        told = f"{error.where}: {error.message}" if error.where else error.message
        raise RecipeError(told, where="host.path", remedy=error.remedy) from error


def _anatomy(model: PreTrainedModel) -> tuple[HostParts, HostError | None]:
    """What is known of a host: all of it, or its parts and why no more."""
    try:
        return Anatomy.of(model), None
    except HostError as error:
        return HostParts.of(model), error


def _check_stage(stage: Stage, parts: HostParts, oddity: HostError | None) -> None:
    """Refuse what the decoder does not have or is too narrow for; keys are those below the stage.

    Args:
        oddity: why no more than its parts are known.
    """
    method = METHODS[stage.method]
    if oddity is not None and method.needs_layers:
        free = ", ".join(name for name, other in METHODS.items() if not other.needs_layers)
        raise RecipeError(
            f"{stage.method} has to know the decoder's layers: {oddity.message}",
            where="method",
            remedy=f"{free} train any decoder; {oddity.remedy or 'or take another'}",
        )
    method.check(parts, stage.settings)
    if stage.packing:
        try:
            check_packs(parts)
        except HostError as error:
            raise RecipeError(error.message, where="packing", remedy=error.remedy) from None
    if stage.logits == "supervised" and "logits_to_keep" not in inspect.signature(parts.host.forward).parameters:
        raise RecipeError(
            f"{type(parts.host).__name__} makes logits of all positions, whatever it is asked for",
            where="logits",
            remedy="leave logits out for this host",
        )


def _check_writable(directory: str, where: str) -> None:
    """Refuse a directory that cannot be made or written to."""
    path = Path(directory).absolute()
    try:
        with telling(path):
            with contextlib.suppress(FileNotFoundError):
                os.stat(path)  # names that are too long, files among its parents
            nearest = next(found for found in (path, *path.parents) if found.exists())
            refused = (
                errno.ENOTDIR if not nearest.is_dir() else 0 if os.access(nearest, os.W_OK | os.X_OK) else errno.EACCES
            )
            if refused:
                raise OSError(refused, os.strerror(refused), str(nearest))
    except FilesError as error:
        raise RecipeError(f"{error.where}: {error.message}", where=where, remedy=error.remedy) from error
