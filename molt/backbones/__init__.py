"""timm networks as sources of Features."""

from molt.backbones.cnn import CNNBackbone
from molt.backbones.vit import ViTBackbone

__all__ = ["CNNBackbone", "ViTBackbone"]
