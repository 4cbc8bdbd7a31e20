"""State-space dual operators: the bidirectional and the causal Mamba-2 scan."""

from .api import bimamba_chunk_scan_combined, choose_backend, mamba_chunk_scan_combined

__all__ = ["bimamba_chunk_scan_combined", "choose_backend", "mamba_chunk_scan_combined"]
