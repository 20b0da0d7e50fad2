"""LSUN churches at 96 px by NCSNv2: Song and Ermon, 2020, arXiv:2006.09011, appendix B.

data.path is a folder of the images.
"""

from ml_collections import ConfigDict

from scorelab.experiments import ncsnv2


def get_config() -> ConfigDict:
    c = ncsnv2(3 * 96 * 96, sigma_max=140.0, levels=788, steps=4, step_size=2 * 4.9e-6, depth=5)
    c.data.source, c.data.size, c.data.flip = "folder", (96, 96), True
    return c
