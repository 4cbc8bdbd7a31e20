"""Depthwise convolution over the length with an activation, as Mamba blocks use it before the scan."""

from .api import MAX_WIDTH, depthwise_conv1d
from .reference import ACTIVATIONS

__all__ = ["ACTIVATIONS", "MAX_WIDTH", "depthwise_conv1d"]
