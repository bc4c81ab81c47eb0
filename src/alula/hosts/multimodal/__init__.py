"""Hosts for videos and audio clips beside images, and for connectors that a stock LLaVA model has no place for.

Importing this package registers its classes with transformers' Auto classes.
"""

from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM, AutoProcessor

from alula.hosts.multimodal.configuration import MEDIA, AlulaConfig
from alula.hosts.multimodal.connectors import Connector, Connectors, ConnectorShape
from alula.hosts.multimodal.modeling import AlulaForConditionalGeneration, AlulaModel
from alula.hosts.multimodal.processing import AlulaProcessor

AutoConfig.register(AlulaConfig.model_type, AlulaConfig)
AutoModel.register(AlulaConfig, AlulaModel)
AutoModelForImageTextToText.register(AlulaConfig, AlulaForConditionalGeneration)
AutoModelForMultimodalLM.register(AlulaConfig, AlulaForConditionalGeneration)
AutoProcessor.register(AlulaConfig, AlulaProcessor)

__all__ = [
    "MEDIA",
    "AlulaConfig",
    "AlulaForConditionalGeneration",
    "AlulaModel",
    "AlulaProcessor",
    "Connector",
    "ConnectorShape",
    "Connectors",
]
