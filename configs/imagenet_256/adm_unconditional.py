"""ImageNet at 256 px, by ADM: Dhariwal and Nichol, 2021, arXiv:2105.05233, appendix I.

data.path is a folder with a folder of images for each class.
"""

from ml_collections import ConfigDict

from scorelab.experiments import adm


def get_config() -> ConfigDict:
    c = adm()
    c.data.source, c.data.size = "folder", (256, 256)
    c.training.steps = 1_980_000
    c.model.net.width, c.model.net.blocks, c.model.net.dropout = 256, 2, 0.0
    c.model.net.multipliers, c.model.net.attention = (1, 1, 2, 2, 4, 4), (3, 4, 5)
    return c
