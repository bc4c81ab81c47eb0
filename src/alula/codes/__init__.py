"""Discrete codes of images and sounds: tokenizers that give them, and one vocabulary of text and codes.

"TEAL: Tokenize and Embed ALL" (Yang et al., arXiv 2311.04589; docs/methods/teal.md).
"""

from alula.codes.base import CodeTokenizer, load_codes
from alula.codes.features import EncoderFeatures
from alula.codes.kmeans import KMeansCodes, fit_centroids, nearest
from alula.codes.processing import CodesProcessor
from alula.codes.shipped import ShippedCodes
from alula.codes.vocabulary import CodeRange, Found, JointVocabulary
from alula.codes.vq import VQCodes, VQConfig

__all__ = [
    "CodeRange",
    "CodeTokenizer",
    "CodesProcessor",
    "EncoderFeatures",
    "Found",
    "JointVocabulary",
    "KMeansCodes",
    "ShippedCodes",
    "VQCodes",
    "VQConfig",
    "fit_centroids",
    "load_codes",
    "nearest",
]
