"""What a host is made of, in numbers."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from transformers import LlavaProcessor, PreTrainedModel

from alula.hosts.host import Host
from alula.hosts.towers import processor_size


@dataclass(frozen=True)
class PartDescription:
    """One part: its place in the model, class, parameters and how many of them currently train."""

    name: str
    kind: str
    parameters: int
    trainable: int


@dataclass(frozen=True)
class Description:
    """A host in numbers.

    Args:
        model: class name.
        parts: the model's parts; parameters shared by two parts count in the first.
        dtype: floating-point type of the weights.
        tokens_per_image: decoder tokens of one image; None where it depends on the image.
        image_size: side in pixels of the images the tower sees; None where it depends on the image.
        vocabulary: rows of the embedding matrix.
        tied: whether input and output embeddings are one matrix.
    """

    model: str
    parts: tuple[PartDescription, ...]
    dtype: str
    tokens_per_image: int | None
    image_size: int | None
    vocabulary: int
    tied: bool

    @property
    def parameters(self) -> int:
        """Parameters of the whole model, each counted once."""
        return sum(part.parameters for part in self.parts)

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {**asdict(self), "parameters": self.parameters}

    def __str__(self) -> str:
        rows = [(part.name, part.kind, f"{part.parameters:,}", f"{part.trainable:,}") for part in self.parts]
        trainable = sum(part.trainable for part in self.parts)
        table = [("part", "class", "parameters", "trainable"), *rows]
        table.append(("total", self.model, f"{self.parameters:,}", f"{trainable:,}"))
        wide = [max(len(row[column]) for row in table) for column in range(4)]
        lines = [
            f"{name:<{wide[0]}}  {kind:<{wide[1]}}  {count:>{wide[2]}}  {train:>{wide[3]}}".rstrip()
            for name, kind, count, train in table
        ]
        per_image = "depends on the image" if self.tokens_per_image is None else str(self.tokens_per_image)
        size = "" if self.image_size is None else f" of {self.image_size}x{self.image_size} px"
        lines.append(f"tokens per image{size}: {per_image}; vocabulary {self.vocabulary:,}; {self.dtype}")
        return "\n".join(lines)


def describe(host: Host | tuple[Any, Any]) -> Description:
    """Parts, parameters, tokens per image and types of a host."""
    model: Any = host[0]
    processor: Any = host[1]
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tokens = size = None
    if isinstance(processor, LlavaProcessor):
        size = processor_size(processor.image_processor)
        tokens = (size // processor.patch_size) ** 2 + processor.num_additional_image_tokens
        tokens -= processor.vision_feature_select_strategy == "default"
    return Description(
        model=type(model).__name__,
        parts=_parts(model),
        dtype=str(model.dtype).removeprefix("torch."),
        tokens_per_image=tokens,
        image_size=size,
        vocabulary=embedding.weight.shape[0],
        tied=head is not None and head.weight is embedding.weight,
    )


def _parts(model: PreTrainedModel) -> tuple[PartDescription, ...]:
    inner = model.base_model
    children = list(inner.named_children()) + [
        (name, child) for name, child in model.named_children() if child is not inner
    ]
    seen: set[int] = set()
    parts = []
    for name, child in children:
        own = [p for p in child.parameters() if id(p) not in seen]
        seen |= {id(p) for p in own}
        count, trainable = sum(p.numel() for p in own), sum(p.numel() for p in own if p.requires_grad)
        parts.append(PartDescription(name, type(child).__name__, count, trainable))
    return tuple(parts)
