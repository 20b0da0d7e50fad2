"""ADM's classifier of noised ImageNet at 128 px: Dhariwal and Nichol, 2021, arXiv:2105.05233, appendix H.

data.path is a folder with a folder of images for each class.
"""

from ml_collections import ConfigDict

from scorelab.experiments import classifier


def get_config() -> ConfigDict:
    c = classifier()
    c.data.source, c.data.size = "folder", (128, 128)
    c.model.net.multipliers, c.model.net.blocks, c.model.net.attention = (1, 1, 2, 3, 4), 2, (2, 3, 4)
    return c
