from bimamba.ops.ssd import mamba_chunk_scan_combined

__all__ = ["mamba_chunk_scan_combined"]
