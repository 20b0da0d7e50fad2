"""LSUN bedrooms at 256 px by ADM: Dhariwal and Nichol, 2021, arXiv:2105.05233, appendix I.

data.path is a folder of the images.
"""

from ml_collections import ConfigDict

from scorelab.experiments import adm


def get_config() -> ConfigDict:
    c = adm(sampled=1000)
    c.data.source, c.data.size = "folder", (256, 256)
    c.model.net.width, c.model.net.blocks = 256, 2
    c.model.net.multipliers, c.model.net.attention = (1, 1, 2, 2, 4, 4), (3, 4, 5)
    return c
