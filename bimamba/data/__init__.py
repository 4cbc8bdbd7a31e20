"""LightningDataModules for images and sequences, and the sources they read."""

from bimamba.data.genome import GenomeDataModule
from bimamba.data.sequence import SequenceDataModule
from bimamba.data.vision import VisionDataModule

__all__ = ["GenomeDataModule", "SequenceDataModule", "VisionDataModule"]
