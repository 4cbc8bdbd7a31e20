"""Modules: mixers, residual blocks, embeddings and pooling.

After `to_empty`, of a model that was made on meta, each module's `reset_parameters` draws what it owns, and what it
begins in another way than the part that owns it: parts first, as `reversed(list(model.modules()))` has them.
"""

from .attention import Attention
from .block import MLP, Block, DropPath, LayerScale
from .channel_mixer import ChannelMixer
from .embedding import NucleotideEmbedding, PatchEmbedding, PixelEmbedding, Positions
from .mamba2 import BiMamba2, Mamba2, RMSNormGated
from .pooling import AttentionPooling, ClassTokenPooling, MaxPooling, MeanPooling, Pooling, TokenPooling
from .stem import ConvStem, PixelConvEmbedding

__all__ = [
    "MLP",
    "Attention",
    "AttentionPooling",
    "BiMamba2",
    "Block",
    "ChannelMixer",
    "ClassTokenPooling",
    "ConvStem",
    "DropPath",
    "LayerScale",
    "Mamba2",
    "MaxPooling",
    "MeanPooling",
    "NucleotideEmbedding",
    "PatchEmbedding",
    "PixelConvEmbedding",
    "PixelEmbedding",
    "Pooling",
    "Positions",
    "RMSNormGated",
    "TokenPooling",
]
