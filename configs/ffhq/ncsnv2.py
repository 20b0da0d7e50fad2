"""FFHQ at 256 px by NCSNv2: Song and Ermon, 2020, arXiv:2006.09011, appendix B.

data.path is a folder of the images.
"""

from ml_collections import ConfigDict

from scorelab.experiments import ncsnv2


def get_config() -> ConfigDict:
    c = ncsnv2(3 * 256 * 256, sigma_max=348.0, levels=2311, steps=3, step_size=2 * 9e-7, depth=6)
    c.data.source, c.data.size, c.data.flip = "folder", (256, 256), True
    return c
