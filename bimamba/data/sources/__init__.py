"""Where rows come from: one class a layout, each with `prepare`, `load` and `read` (see `records.Source`)."""

from bimamba.data.sources.digits import Digits
from bimamba.data.sources.fasta_bed import FastaBed
from bimamba.data.sources.fasta_classes import FastaClasses
from bimamba.data.sources.image_folder import ImageFolder
from bimamba.data.sources.image_table import ImageTable
from bimamba.data.sources.medmnist import MedMNIST
from bimamba.data.sources.motifs import Motifs
from bimamba.data.sources.sequence_table import SequenceTable

__all__ = [
    "Digits",
    "FastaBed",
    "FastaClasses",
    "ImageFolder",
    "ImageTable",
    "MedMNIST",
    "Motifs",
    "SequenceTable",
]
