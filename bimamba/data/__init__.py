"""LightningDataModules for images and sequences, and the sources they read."""

from bimamba.data.sequence import SequenceDataModule
from bimamba.data.vision import VisionDataModule

__all__ = ["SequenceDataModule", "VisionDataModule"]
