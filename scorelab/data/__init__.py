"""Data as batches: scikit-learn's digits and the 2-D targets."""

from scorelab.data.sources import Arrays, Drawn, Source, digits, load

__all__ = ["Arrays", "Drawn", "Source", "digits", "load"]
