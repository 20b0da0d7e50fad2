"""The 2-D gallery: one file a figure, all of them with ``python -m toy``."""
