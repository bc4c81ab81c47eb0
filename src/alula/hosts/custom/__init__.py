"""Vision towers of one's own: any PyTorch module that makes tokens of pixels.

Importing this package registers its classes with transformers' Auto classes.
"""

from transformers import AutoConfig, AutoModel

from alula.hosts.custom.configuration import CustomTowerConfig
from alula.hosts.custom.importing import trust_tower
from alula.hosts.custom.modeling import CustomTower

AutoConfig.register(CustomTowerConfig.model_type, CustomTowerConfig)
AutoModel.register(CustomTowerConfig, CustomTower)

__all__ = ["CustomTower", "CustomTowerConfig", "trust_tower"]
