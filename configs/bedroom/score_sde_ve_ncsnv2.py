"""LSUN bedrooms at 128 px, NCSNv2: score_sde's configs/ve/ncsnv2/bedroom.py.

data.path is a folder of the images.
"""

from ml_collections import ConfigDict

from scorelab.experiments import ncsnv2


def get_config() -> ConfigDict:
    c = ncsnv2(3 * 128 * 128, sigma_max=190.0, levels=1086, steps=3, step_size=4 * 0.00095**2, depth=5, ema=0.9999)
    c.data.source, c.data.size, c.data.flip = "folder", (128, 128), True
    return c
