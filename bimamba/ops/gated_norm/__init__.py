"""RMS normalisation with a gate, the last step of a Mamba-2 block before its output projection."""

from .api import rms_norm_gated

__all__ = ["rms_norm_gated"]
