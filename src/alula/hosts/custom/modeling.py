"""A vision tower of one's own: any module that makes tokens of pixels, as a transformers model.

Shapes: N pictures, C channels, H and W their height and width in pixels, T tokens, D their width.
"""

from __future__ import annotations

import contextlib
import copy
import json
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from transformers import PreTrainedModel
from transformers.image_processing_utils import BaseImageProcessor
from transformers.modeling_outputs import BaseModelOutputWithPooling

from alula.errors import HostError
from alula.hosts.configs import first_line
from alula.hosts.custom.configuration import CustomTowerConfig
from alula.hosts.custom.importing import class_at, path_of, trust_tower
from alula.hosts.quiet import quiet_loading
from alula.seam import evaluating

_BESIDE = "pass what its constructor was given: CustomTower.of(module, image_processor, arguments={...})"


class CustomTower(PreTrainedModel):
    """A module of one's own in the place of a vision tower. Build it with `CustomTower.of`.

    It is saved as a configuration, which names the module's class, and safetensors.
    """

    config_class: Any = CustomTowerConfig
    main_input_name = "pixel_values"
    input_modalities: Any = "image"
    # the module attends as it pleases; a host may be asked for any way
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(self, config: CustomTowerConfig) -> None:
        super().__init__(config)
        with _plainly() as dtype:
            self.module = class_at(config.source)(**copy.deepcopy(config.arguments)).to(dtype)
        if ties := _ties(self.module):
            # loading gives every name a parameter of its own, unless transformers knows which are one
            config.tie_word_embeddings = True
            self._tied_weights_keys = ties
        _check_emits(self.module, config)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """The module's own beginning stands."""

    def train(self, mode: bool = True) -> CustomTower:
        """Training mode only where it is trained, and never of batch norms: their averages are no parameters, so that
        neither adapters nor checkpoints would have what training made of them."""
        super().train(mode and any(parameter.requires_grad for parameter in self.parameters()))
        for module in self.modules():
            if isinstance(module, _NormBase) and module.track_running_stats:
                module.training = False
        return self

    @classmethod
    def of(
        cls, module: nn.Module, image_processor: BaseImageProcessor, arguments: Mapping[str, Any] | None = None
    ) -> CustomTower:
        """A copy of a module as a tower, after the proof that it can be saved and made again.

        Args:
            module: takes pixels (N, C, H, W) and gives a feature map (N, D, h, w), whose places become tokens, line
                by line, or tokens (N, T, D), which stand nowhere in the picture. Its class can be imported.
            image_processor: its preprocessing; makes square pictures of one size.
            arguments: of its constructor, plain JSON values.

        Returns:
            In evaluation mode, on the module's device and of its type.

        Raises:
            HostError: the class cannot be imported or made of these arguments; the module made anew from its weights
                does not give the same tokens; it emits something else; the processor makes no square pictures.
        """
        source, given = path_of(trust_tower(type(module))), _plain(arguments or {})
        blank = _blank(image_processor)
        place = next(module.parameters(), blank)
        pixels = torch.cat([blank, torch.rand(blank.shape, generator=torch.Generator().manual_seed(0))]).to(place)
        output = _output(module, pixels)
        tokens, side = _shaped(output), blank.shape[-1]
        config = CustomTowerConfig(
            source=source,
            arguments=given,
            image_size=side,
            num_channels=blank.shape[1],
            tokens=tokens.shape[1],
            hidden_size=tokens.shape[2],
            is_grid=_on_grid(output, side),
        )
        if odd := [name for name, value in module.state_dict().items() if not isinstance(value, Tensor)]:
            raise HostError(f"{odd[0]} of its state_dict is no tensor, which safetensors do not hold", where="vision")
        state = {f"module.{name}": value.detach().clone() for name, value in module.state_dict().items()}
        try:
            with quiet_loading():  # by the road of every saved tower
                made: Any = cls.from_pretrained(
                    None, config=config, state_dict=state, dtype=place.dtype, output_loading_info=True
                )
        except HostError as error:  # `_check_emits`
            raise HostError(
                f"{source} made of {given or 'nothing'} is another module: {error.message}",
                where="vision",
                remedy=_BESIDE,
            ) from error
        except TypeError as error:
            raise HostError(
                f"{source} cannot be made of {given or 'nothing'} ({first_line(error)})", where="vision", remedy=_BESIDE
            ) from error
        except RuntimeError as error:
            raise HostError(
                f"{source} made of {given or 'nothing'} does not take its weights ({first_line(error)})",
                where="vision",
                remedy=_BESIDE,
            ) from error
        tower, info = made
        odd = sorted(info["missing_keys"]) + sorted(info["unexpected_keys"]) + sorted(map(str, info["mismatched_keys"]))
        if odd:
            raise HostError(
                f"{source} made of {given or 'nothing'} has other weights than the module, the first {odd[0]}",
                where="vision",
                remedy=_BESIDE,
            )
        tower = tower.to(place.device).eval()
        if not torch.equal(_output(tower.module, pixels), output):
            raise HostError(
                f"{source} made anew from its weights gives other tokens: it keeps something that state_dict has not",
                where="vision",
                remedy="register what it keeps as buffers (register_buffer, persistent), or give it as arguments",
            )
        return tower

    def _checked(self, pixels: Tensor, tokens: Tensor) -> Tensor:
        config = self.config
        if tokens.shape[1:] != (config.tokens, config.hidden_size):
            raise HostError(
                f"of pixels {tuple(pixels.shape[1:])} it makes {tokens.shape[1]} tokens {tokens.shape[2]} wide, and "
                f"its configuration says {config.tokens} of {config.hidden_size}",
                where="vision",
                remedy=f"pictures of {config.image_size} pixels, or the configuration it was saved with",
            )
        return tokens

    def forward(self, pixel_values: Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        """Pixels (N, C, H, W) -> tokens (N, T, D), as ``last_hidden_state`` and the only one of ``hidden_states``."""
        # processors give float32, and towers of transformers cast what they are given
        weight = next(self.module.parameters(), pixel_values)
        tokens = self._checked(pixel_values, _shaped(self.module(pixel_values.to(weight.dtype))))
        return BaseModelOutputWithPooling(last_hidden_state=tokens, hidden_states=(tokens,))


def _ties(module: nn.Module) -> dict[str, str]:
    """Names of parameters that are another's, by the name that comes first: ``module.decoder.weight`` -> its twin's."""
    first: dict[int, str] = {}
    ties: dict[str, str] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        twin = first.setdefault(id(parameter), name)
        if twin != name:
            ties[f"module.{name}"] = f"module.{twin}"
    return ties


def _check_emits(module: nn.Module, config: CustomTowerConfig) -> None:
    """Refuse a configuration that says otherwise than its module does, as far as shapes tell without computing.

    Raises:
        HostError: it does.
    """
    side = config.image_size
    pixels = torch.empty(2, config.num_channels, side, side, device="meta", dtype=torch.get_default_dtype())
    state = {
        name: torch.empty_like(value, device="meta", dtype=pixels.dtype if value.is_floating_point() else None)
        for name, value in (*module.named_parameters(), *module.named_buffers())
    }
    try:
        with evaluating(module), torch.no_grad():
            output = torch.func.functional_call(module, state, (pixels,))
        tokens, on_grid = _shaped(output), _on_grid(output, side)
    except Exception:  # it looks at numbers, or keeps tensors that are no parameters: forward finds out
        return
    found = {"tokens": tokens.shape[1], "hidden_size": tokens.shape[2], "is_grid": on_grid}
    said = {name: getattr(config, name) for name in found}
    if found != said:
        odd = [f"{name} is {said[name]}, and it makes {value}" for name, value in found.items() if said[name] != value]
        raise HostError(
            f"of pictures of {side} pixels {config.source} makes something else than its configuration says: "
            f"{'; '.join(odd)}",
            where="vision",
            remedy="restore the config.json it was saved with",
        )


def _on_grid(output: Tensor, side: int) -> bool:
    """Whether what a module gave stands on a square grid over pictures of so many pixels a side."""
    return output.dim() == 4 and output.shape[2] == output.shape[3] and side % output.shape[3] == 0


@contextlib.contextmanager
def _plainly() -> Iterator[torch.dtype]:
    """Have constructors compute as they do outside of loading, which makes models without storage and in the type they
    are loaded in: neither takes all that initialization does. Yields that type."""
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.device("cpu"):
            yield dtype
    finally:
        torch.set_default_dtype(dtype)


def _shaped(output: Any) -> Tensor:
    """Tokens (N, T, D) of what a module gave: such, or a feature map (N, D, h, w)."""
    if not isinstance(output, Tensor) or output.dim() not in (3, 4):
        shape = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise HostError(
            f"it gives {shape}, not tokens (pictures, tokens, width) or a feature map (pictures, width, height, width)",
            where="vision",
            remedy="wrap it in a module whose forward returns one of these",
        )
    return output.flatten(2).transpose(1, 2) if output.dim() == 4 else output


@torch.no_grad()
def _output(module: nn.Module, pixels: Tensor) -> Tensor:
    """What the module gives in evaluation mode for pixels, refused where no tokens can be made of it."""
    try:
        with evaluating(module):
            output: Tensor = module(pixels)
    except Exception as error:  # the module is anybody's
        shape = tuple(pixels.shape)
        raise HostError(f"it does not run on pixels {shape} ({first_line(error)})", where="vision") from error
    if (given := len(_shaped(output))) != len(pixels):
        raise HostError(f"of {len(pixels)} pictures it makes tokens of {given}", where="vision")
    return output


def _blank(image_processor: BaseImageProcessor) -> Tensor:
    """A gray picture (1, C, H, W) as the processor hands it on."""
    gray = np.full((64, 96, 3), 128, np.uint8)
    pixels: Any = image_processor(images=[gray], return_tensors="pt")["pixel_values"]
    if pixels.dim() != 4 or pixels.shape[-1] != pixels.shape[-2]:
        raise HostError(
            f"{type(image_processor).__name__} makes {tuple(pixels.shape[1:])} of a picture, not a square of one size",
            where="vision",
            remedy="pass image_processor= with a fixed square size or crop size",
        )
    return pixels


def _plain(arguments: Mapping[str, Any]) -> dict[str, Any]:
    try:
        plain: dict[str, Any] = json.loads(json.dumps(dict(arguments), allow_nan=False))
    except (TypeError, ValueError) as error:
        raise HostError(f"its arguments are no plain JSON values ({error})", where="vision") from error
    return plain
