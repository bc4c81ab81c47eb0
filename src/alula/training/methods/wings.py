"""Method wings: a Wings graft, and the projector; the decoder where it is named."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from transformers import PreTrainedModel

from alula.anatomy import Anatomy
from alula.errors import RecipeError, UsageError
from alula.grafts import WingsConfig, attach, load_adapter, save_adapter
from alula.grafts.storage import read_config
from alula.grafts.wings.config import LEARNERS
from alula.hosts import Host, save_host
from alula.hosts.quiet import quiet_loading
from alula.training.methods.base import Method, Tunable


class Wings(Method):
    """Learners beside attention, and what routes them. The rates are the paper's, for 7B decoders."""

    name: ClassVar[str] = "wings"
    settings: ClassVar[Any] = WingsConfig
    parts: ClassVar[Mapping[str, float | None]] = {
        "wings.visual": 1e-3,
        "wings.textual": 1e-3,
        "wings.router": 1e-3,
        "projector": 1e-3,
        "llm": None,
    }
    defining: ClassVar[tuple[str, ...]] = ("wings.",)
    leaves_adapter: ClassVar[bool] = True

    def rates(self, settings: WingsConfig) -> dict[str, float]:
        there = {*_graft_parts(settings.learners), "projector"}
        return {part: rate for part, rate in super().rates(settings).items() if part in there}

    def expand(self, train: Mapping[str, Any], settings: Any) -> Mapping[str, Any]:
        """`train: {wings: 1e-3}` is short for all parts of the graft at that rate."""
        if self.name not in train:
            return train
        rest = {part: rate for part, rate in train.items() if part != self.name}
        learners = settings.get("learners") if isinstance(settings, Mapping) else getattr(settings, "learners", None)
        if not isinstance(learners, list | tuple):  # none named, or refused where it stands
            learners = LEARNERS
        return {**dict.fromkeys(_graft_parts(learners), train[self.name]), **rest}

    def check(self, anatomy: Anatomy, settings: WingsConfig) -> None:
        try:
            anatomy.layer_indices(settings.layers)
        except UsageError as error:
            raise RecipeError(error.message, where="wings.layers", remedy=error.remedy) from None
        most = max(
            anatomy.hidden_size, WingsConfig.model_fields["rank"].default
        )  # tiny decoders are narrower than the default
        if settings.rank > most:
            raise RecipeError(
                f"{settings.rank} is more than the decoder is wide, beyond which a rank adds nothing",
                where="wings.rank",
                remedy=f"at most {most}",
            )

    def put_on(
        self,
        host: Host,
        settings: WingsConfig,
        *,
        base: str,
        previous: Path | None,
        train_projector: bool,
        seed: int,
    ) -> Tunable:
        model, modules = host.model, set[str]()
        if previous is not None:
            graft = load_adapter(model, previous)
            modules.update(read_config(previous)["modules"])
        else:
            graft = attach(model, settings)
        if train_projector:
            projector = Anatomy.of(model).projector
            modules.update(name for name, module in model.named_modules() if module is projector)
        return Tunable(model, host.processor, base, graft, tuple(sorted(modules)))

    def export(self, tuned: Tunable, directory: Path, host: Path) -> None:
        base = tuned.base
        if "llm" in tuned.parts:
            assert isinstance(tuned.model, PreTrainedModel)
            with quiet_loading():
                base = str(save_host(Host(tuned.model, tuned.processor), host))
        save_adapter(tuned.model, directory, base=base, modules=tuned.modules_to_save, processor=tuned.processor)


def _graft_parts(learners: Any) -> list[str]:
    """The parts of a graft with these learners: a router chooses between two, so one alone has none."""
    names = [str(name) for name in learners]
    return [*(f"wings.{name}" for name in names), *(["wings.router"] if len(names) > 1 else [])]
