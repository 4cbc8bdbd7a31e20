"""Causal scan at the import path of Bi-Mamba2."""
