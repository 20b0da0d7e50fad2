"""Data as batches: images and arrays in files, scikit-learn's digits, and the 2-D targets."""

from scorelab.data.decoding import Files
from scorelab.data.files import FORMATS, load, read_idx
from scorelab.data.samples import StoredSamples, read_samples
from scorelab.data.sources import Arrays, Coded, Drawn, Images, Source, digits
from scorelab.data.values import Values

__all__ = [
    "FORMATS",
    "Arrays",
    "Coded",
    "Drawn",
    "Files",
    "Images",
    "Source",
    "StoredSamples",
    "Values",
    "digits",
    "load",
    "read_idx",
    "read_samples",
]
