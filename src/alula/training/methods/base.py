"""What a way to tune is: its parts and rates, its settings, its losses, how it is put on a host, what it leaves."""

from __future__ import annotations

import abc
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from torch import nn
from transformers import PreTrainedModel

from alula.anatomy import HostParts
from alula.data import Collator
from alula.data.collate import Beside
from alula.files import atomic_directory
from alula.grafts import Graft
from alula.hosts import Host, save_host
from alula.hosts.quiet import quiet_loading
from alula.loading import load_peft
from alula.training.losses import Loss
from alula.training.parts import Named


@dataclass
class Tunable:
    """A model with a method's parts on it.

    Attributes:
        model: what is trained: the host itself, or PEFT's wrapper around it.
        processor: the host's.
        base: directory or hub id that an adapter of it refers to.
        graft: the graft that is trained, of methods that have one.
        modules_to_save: paths of host modules that belong into a graft's adapter: the projector, once any stage has
            trained it.
        parts: trained parameters by part; found once the method's own are on the model.
    """

    model: nn.Module
    processor: Any
    base: str
    graft: Graft | None = None
    modules_to_save: tuple[str, ...] = ()
    parts: Mapping[str, Named] = field(default_factory=dict)


class Method(abc.ABC):
    """A way to tune a host. Subclasses say what they are in class attributes; recipes read nothing else."""

    name: ClassVar[str]
    """what recipes call it, and the section its settings stand in"""
    settings: ClassVar[Any] = None
    """type of its settings, which is built without arguments where a stage has none; None where there is nothing to
    set"""
    parts: ClassVar[Mapping[str, float | None]]
    """parts it may train, with the learning rates used where a recipe names none; None: only where it is named"""
    defining: ClassVar[tuple[str, ...]]
    """parts (or beginnings of their names) without one of which it would be another method"""
    leaves_adapter: ClassVar[bool] = False
    """whether its output is an adapter on a base, which only the same method can go on training"""
    continued: ClassVar[tuple[str, ...]] = ()
    """settings that a stage which goes on with its adapter may change; the others are those of the stage before"""
    needs_layers: ClassVar[bool] = True
    """whether it has to know what the decoder's layers are made of (`alula.anatomy.Anatomy`)"""
    packs: ClassVar[bool] = False
    """whether its batches may be without padding, and have logits of some positions alone"""
    no_checkpointing: ClassVar[str | None] = None
    """why blocks cannot be recomputed under it"""
    no_validation: ClassVar[str | None] = None
    """why held-out samples cannot be put to it as they are"""

    def rates(self, settings: Any) -> dict[str, float]:
        """Part -> learning rate where the recipe names none."""
        return {part: rate for part, rate in self.parts.items() if rate is not None}

    def expand(self, train: Mapping[str, Any], settings: Any) -> Mapping[str, Any]:
        """``train`` with the method's abbreviations written out.

        Args:
            settings: of the stage, as they were given.
        """
        return train

    def idle_parts(self, settings: Any) -> Collection[str]:
        """Those of its parts that do nothing under these settings, and so cannot be trained."""
        return ()

    def misplaced(self, settings: Any, rates: Collection[str], before: Any) -> str | None:
        """Why a stage makes no sense at its place; None: it does.

        Args:
            settings: the stage's.
            rates: names of the parts it trains.
            before: settings of the stage whose adapter it goes on with; None: it starts afresh.
        """
        return None

    def no_retention(self, settings: Any) -> str | None:
        """Why a budget of text skill means nothing in a stage; None: it does."""
        return None

    def describes(self, settings: Any) -> bool:
        """Whether batches hold captions once more, alone (`Collator` with descriptions)."""
        return False

    def collator(self, settings: Any) -> Callable[..., Collator]:
        """What makes its batches: a class of `Collator`, or something called as one is."""
        return Collator

    def beside(self, settings: Any, prompts: Collator, *, seed: int) -> Beside | None:
        """What stands beside its batches, and what of the samples is in them; None: nothing.

        Args:
            prompts: makes batches of prompts, as training batches are made.
            seed: of what is drawn.
        """
        return None

    def token_weight(self, settings: Any) -> float:
        """Factor on the next-token loss."""
        return 1.0

    def check(self, anatomy: Any, settings: Any) -> None:  # noqa: B027 (a method may have nothing to refuse)
        """Refuse a host that does not have what the settings name.

        Args:
            anatomy: the `Anatomy` of the host; its `HostParts` where the method needs no more (`needs_layers`).

        Raises:
            RecipeError: with the key below the stage as ``where``.
        """

    def check_sources(self, settings: Any, names: Collection[str]) -> None:  # noqa: B027 (as above)
        """Refuse settings that name a source which a stage does not have.

        Args:
            names: of its sources, in order.

        Raises:
            RecipeError: with the key below the stage as ``where``.
        """

    @abc.abstractmethod
    def put_on(
        self, host: Host, settings: Any, *, base: str, previous: Path | None, train_projector: bool, seed: int
    ) -> Tunable:
        """Put the method's parts on a host; nothing is frozen or unfrozen yet.

        Args:
            base: directory or hub id of the host.
            previous: an adapter directory to go on with, or None for a fresh one.
            train_projector: whether the stage trains the projector too.
            seed: of what is drawn.
        """

    def losses(self, tuned: Tunable, settings: Any) -> Mapping[str, Loss]:
        """Auxiliary losses by name, beside the next-token loss; their weights are the settings' to say."""
        return {}

    @abc.abstractmethod
    def export(self, tuned: Tunable, directory: Path, host: Path) -> None:
        """Write the tuned model to ``directory``, complete or not at all.

        Args:
            host: where the tuned host goes when an adapter was trained together with the decoder it is on.
        """


class HostMethod(Method):
    """Methods that train the host's own weights and leave a host directory."""

    def put_on(
        self, host: Host, settings: Any, *, base: str, previous: Path | None, train_projector: bool, seed: int
    ) -> Tunable:
        return Tunable(host.model, host.processor, base)

    def export(self, tuned: Tunable, directory: Path, host: Path) -> None:
        assert isinstance(tuned.model, PreTrainedModel)
        with quiet_loading():
            save_host(Host(tuned.model, tuned.processor), directory)


class PeftMethod(Method):
    """Methods that PEFT computes and stores."""

    leaves_adapter: ClassVar[bool] = True

    @abc.abstractmethod
    def add(self, model: PreTrainedModel, settings: Any, *, train_projector: bool, seed: int) -> nn.Module:
        """Wrap the host with a fresh adapter; a trained projector goes into it as whole modules."""

    def put_on(
        self, host: Host, settings: Any, *, base: str, previous: Path | None, train_projector: bool, seed: int
    ) -> Tunable:
        if previous is not None:
            model: nn.Module = load_peft(host.model, previous, trainable=True)
        else:
            model = self.add(host.model, settings, train_projector=train_projector, seed=seed)
        return Tunable(model, host.processor, base)

    def export(self, tuned: Tunable, directory: Path, host: Path) -> None:
        model: Any = tuned.model
        # a relative path would mean another place for whoever loads the adapter from elsewhere
        base = str(Path(tuned.base).resolve()) if Path(tuned.base).is_dir() else tuned.base
        model.peft_config["default"].base_model_name_or_path = base
        with atomic_directory(directory) as partial:
            model.save_pretrained(str(partial))
            tuned.processor.save_pretrained(partial)


def projector_modules(model: PreTrainedModel) -> list[str] | None:
    """Paths of the modules PEFT is to save whole for a trained projector: the smallest that hold all its weights.

    Mostly linear layers and norms, since only leaves work in mixed-adapter batches; where weights are bare parameters
    (Gemma-3, learned queries) the module around them. None where there is no projector.
    """
    projector = HostParts.of(model).projector
    if projector is None:
        return None
    owners = [module for module in projector.modules() if any(True for _ in module.parameters(recurse=False))]
    inside = {id(module) for owner in owners for module in owner.modules() if module is not owner}
    paths = {id(module): name for name, module in model.named_modules()}
    return [paths[id(owner)] for owner in owners if id(owner) not in inside] or None
