"""Backbones and classifiers."""

from .classifier import Backbone, Classifier, Head

__all__ = ["Backbone", "Classifier", "Head"]
