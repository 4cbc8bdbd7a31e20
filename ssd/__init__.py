"""Bi-Mamba2's import paths (https://github.com/Hprairie/Bi-Mamba2), served by `bimamba`."""
