"""LSUN bedrooms at 128 px by NCSNv2: Song and Ermon, 2020, arXiv:2006.09011, appendix B.

data.path is a folder of the images.
"""

from ml_collections import ConfigDict

from scorelab.experiments import ncsnv2


def get_config() -> ConfigDict:
    c = ncsnv2(3 * 128 * 128, sigma_max=190.0, levels=1086, steps=3, step_size=2 * 1.8e-6, depth=5)
    c.data.source, c.data.size, c.data.flip = "folder", (128, 128), True
    return c
