"""ImageNet at 128 px by class, by ADM: Dhariwal and Nichol, 2021, arXiv:2105.05233, appendix I.

data.path is a folder with a folder of images for each class.
"""

from ml_collections import ConfigDict

from scorelab.experiments import adm


def get_config() -> ConfigDict:
    c = adm()
    c.data.source, c.data.size = "folder", (128, 128)
    c.model.conditional, c.training.steps = True, 4_360_000
    c.model.net.width, c.model.net.blocks, c.model.net.dropout = 256, 2, 0.0
    c.model.net.multipliers, c.model.net.attention, c.model.net.heads = (1, 1, 2, 3, 4), (2, 3, 4), 4
    return c
