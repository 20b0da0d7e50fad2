"""CelebA at 64 px by NCSNv2: Song and Ermon, 2020, arXiv:2006.09011, appendix B.

data.path is a folder of the aligned images, cropped to their middle 140 pixels as the paper has them.
"""

from ml_collections import ConfigDict

from scorelab.experiments import ncsnv2


def get_config() -> ConfigDict:
    c = ncsnv2(3 * 64 * 64, sigma_max=90.0, levels=500, steps=5, step_size=2 * 3.3e-6)
    c.data.source, c.data.size, c.data.flip = "folder", (64, 64), True
    return c
