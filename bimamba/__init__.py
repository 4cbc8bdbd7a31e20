"""BiMamba: bidirectional Mamba-2 for images and DNA."""

__version__ = "0.1.0"
