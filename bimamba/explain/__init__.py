"""Seeing what a trained network does: `stage=explain`."""

from bimamba.explain.stage import Explanation

__all__ = ["Explanation"]
