"""Methods that train a graft, and leave it as an adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from transformers import PreTrainedModel

from alula.anatomy import Anatomy
from alula.errors import RecipeError, UsageError
from alula.grafts import attach, load_adapter, save_adapter
from alula.grafts.storage import read_config
from alula.hosts import Host, save_host
from alula.hosts.quiet import quiet_loading
from alula.training.methods.base import Method, Tunable


class GraftMethod(Method):
    """Trains a graft whose settings are those of the method, the projector beside it, and the decoder where named."""

    leaves_adapter: ClassVar[bool] = True

    def check(self, anatomy: Anatomy, settings: Any) -> None:
        try:
            anatomy.layer_indices(settings.layers)
        except UsageError as error:
            raise RecipeError(error.message, where=f"{self.name}.layers", remedy=error.remedy) from None
        # tiny decoders are narrower than the default
        most = max(anatomy.hidden_size, type(settings).model_fields["rank"].default)
        if settings.rank is not None and settings.rank > most:
            raise RecipeError(
                f"{settings.rank} is more than the decoder is wide, beyond which a rank adds nothing",
                where=f"{self.name}.rank",
                remedy=f"at most {most}",
            )

    def put_on(
        self,
        host: Host,
        settings: Any,
        *,
        base: str,
        previous: Path | None,
        train_projector: bool,
        seed: int,
    ) -> Tunable:
        model, modules = host.model, set[str]()
        if previous is not None:
            graft = load_adapter(model, previous, **self._changed(settings))
            modules.update(read_config(previous)["modules"])
        else:
            graft = attach(model, settings)
        if train_projector:
            projector = Anatomy.of(model).projector
            modules.update(name for name, module in model.named_modules() if module is projector)
        return Tunable(model, host.processor, base, graft, tuple(sorted(modules)))

    def _changed(self, settings: Any) -> dict[str, Any]:
        """Settings of the graft that this stage has in the place of its adapter's."""
        return {name: getattr(settings, name) for name in self.continued if name in type(settings).free}

    def export(self, tuned: Tunable, directory: Path, host: Path) -> None:
        base = tuned.base
        if "llm" in tuned.parts:
            assert isinstance(tuned.model, PreTrainedModel)
            with quiet_loading():
                base = str(save_host(Host(tuned.model, tuned.processor), host))
        save_adapter(tuned.model, directory, base=base, modules=tuned.modules_to_save, processor=tuned.processor)
