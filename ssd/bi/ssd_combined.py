from bimamba.ops.ssd import bimamba_chunk_scan_combined

__all__ = ["bimamba_chunk_scan_combined"]
