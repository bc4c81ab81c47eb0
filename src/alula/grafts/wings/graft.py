"""The Wings graft: a `WingsLayer` for each chosen decoder layer."""

from __future__ import annotations

from torch import nn
from torch.utils.hooks import RemovableHandle

from alula.grafts.base import Graft
from alula.grafts.wings.config import WingsConfig
from alula.grafts.wings.layer import WingsLayer
from alula.grafts.wings.published import PublishedLayer
from alula.grafts.wings.router import ConstantRouter
from alula.seam import Seam


class WingsGraft(Graft):
    """Wings attached to a host; see `WingsConfig`."""

    config: WingsConfig

    def __init__(self, seam: Seam, name: str, config: WingsConfig) -> None:
        super().__init__(seam, name, config)
        seam.keep_inputs(name)

    def build_layer(self, index: int) -> WingsLayer:
        kind = WingsLayer if self.config.compat is None else PublishedLayer
        return kind(self.seam, self.name, self.config, index)

    def hook_layer(self, index: int, module: WingsLayer) -> list[RemovableHandle]:
        if module.router is not None and not isinstance(module.router, ConstantRouter):
            # first, since a host whose attention cannot be asked is refused
            self.seam.ask(index, module, gated=self.config.gate == "exact")
        anatomy = self.seam.anatomy
        attention, out = anatomy.attention(index), anatomy.attention_out(index)
        handles = [anatomy.layers[index].register_forward_pre_hook(module.enter, with_kwargs=True)]
        if out is attention:
            handles.append(attention.register_forward_hook(module.after_attention, with_kwargs=True))
        else:
            handles.append(attention.register_forward_hook(module.between, with_kwargs=True))
            handles.append(out.register_forward_hook(module.after_norm))
        return handles

    def unhook(self) -> None:
        for index, module in self.layers.items():
            if module in self.seam.askers(index):
                self.seam.cancel_sums(index, module)  # type: ignore[arg-type]

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        parts = [*self.config.learners, "router"]
        groups = {
            f"{self.config.graft_type}.{part}": [
                parameter
                for module in self.layers.values()
                for name, parameter in module.named_parameters()
                if name.split(".")[0] == part
            ]
            for part in parts
        }
        return {part: parameters for part, parameters in groups.items() if parameters}
