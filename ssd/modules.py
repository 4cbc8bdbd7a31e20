"""Modules at the import path of Bi-Mamba2."""

from bimamba.nn import BiMamba2, Mamba2

__all__ = ["BiMamba2", "Mamba2"]
