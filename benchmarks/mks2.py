"""What MKS2 costs beside PEFT's LoRA on the MLP at equal parameters: time and memory, side by side.

    python benchmarks/mks2.py                                      # everything, resuming where it stopped
    python benchmarks/mks2.py --only 0.5b/train --rounds 3         # one part; --list names them all
    python benchmarks/mks2.py --shrink --rounds 1 --output x.json  # the same code on tiny decoders, anywhere
    python benchmarks/mks2.py --table                              # the committed figures as Markdown

Decoders, workloads, clock and rounds are those of `wings.py`: every contender once per round, every second round
backwards, and ratios within rounds. One image stands behind 14 tokens of text.

- host: the decoder alone.
- lora: PEFT, on the linears of the MLP, of the rank at which it has as many parameters as `mix` adds in all.
- lora, trained alike: the same, with as many as `mix` trains in stage 2: its memory is frozen there.
- mix: memory and MLP with adapters on their linears, weighed by the router; adapters and router are trained.
- parallel: the same with an adapter beside each of the two as a whole.
- modality: memory for the image's tokens, MLP for text's; the memory's adapters are trained.
- store: stage 1, the memory in the MLP's place; it is trained.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import experts
import peft
import wings
from torch import nn

import alula
from alula.grafts import MKS2Config

RESULTS = Path(__file__).parent / "results" / "mks2-speed.json"
CONTENDERS = ("host", "lora", "lora, trained alike", "mix", "parallel", "modality", "store")
MKS2: dict[str, MKS2Config] = {
    "mix": MKS2Config(),
    "parallel": MKS2Config(lora="parallel"),
    "modality": MKS2Config(route="modality"),
    "store": MKS2Config(mode="store"),
}
MLP = ("gate_proj", "up_proj", "down_proj")


class Bench(wings.Bench):
    """A decoder and these contenders."""

    def completed(self, model: Any, contender: str) -> Any:
        if contender in MKS2:
            graft = alula.attach(model, MKS2[contender])
            self.awaken(graft)
            trained = ("mks2.memory",) if contender == "store" else ("mks2.lora", "mks2.router")
            for part, parameters in graft.parameters_by_part().items():
                for parameter in parameters:
                    parameter.requires_grad_(part in trained)
        elif contender.startswith("lora"):
            config = peft.LoraConfig(r=self.rank_of(contender), target_modules=list(MLP), init_lora_weights=False)
            return peft.get_peft_model(model, config)
        return model

    def rank_of(self, contender: str) -> int:
        """The rank at which LoRA on the MLP has as many parameters as `mix`, in all or of those that are trained."""
        mix = self.model("mix")
        counted = [
            parameter.numel()
            for parameter in alula.grafts_of(mix)["mks2"].parameters()
            if contender == "lora" or parameter.requires_grad
        ]
        linears = [each for path, each in self.host.named_modules() if path.endswith(MLP)]
        a_rank = sum(each.in_features + each.out_features for each in linears if isinstance(each, nn.Linear))
        return max(1, round(sum(counted) / a_rank))


if __name__ == "__main__":
    experts.benchmark(__doc__ or "", Bench, CONTENDERS, RESULTS)
