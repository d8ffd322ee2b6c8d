"""Heatmap Service: class confidences and heatmaps of image classifiers over HTTP."""

__version__ = "0.1.0"
