"""Hosts whose media all pass one frozen vision transformer, after OneLLM (arXiv 2312.03700).

Importing this package registers its classes with transformers' Auto classes.
"""

from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM, AutoProcessor

from alula.hosts.universal.configuration import UniversalConfig
from alula.hosts.universal.growing import grow_experts
from alula.hosts.universal.modeling import UniversalForConditionalGeneration, UniversalModel
from alula.hosts.universal.processing import UniversalProcessor
from alula.hosts.universal.projection import UniversalConnectors
from alula.hosts.universal.shapes import ProjectionShape, shape_of

AutoConfig.register(UniversalConfig.model_type, UniversalConfig)
AutoModel.register(UniversalConfig, UniversalModel)
AutoModelForImageTextToText.register(UniversalConfig, UniversalForConditionalGeneration)
AutoModelForMultimodalLM.register(UniversalConfig, UniversalForConditionalGeneration)
AutoProcessor.register(UniversalConfig, UniversalProcessor)

__all__ = [
    "ProjectionShape",
    "UniversalConfig",
    "UniversalConnectors",
    "UniversalForConditionalGeneration",
    "UniversalModel",
    "UniversalProcessor",
    "grow_experts",
    "shape_of",
]
