"""ADM's classifier of noised ImageNet at 512 px: Dhariwal and Nichol, 2021, arXiv:2105.05233, appendix H.

data.path is a folder with a folder of images for each class.
"""

from ml_collections import ConfigDict

from scorelab.experiments import classifier


def get_config() -> ConfigDict:
    c = classifier()
    c.data.source, c.data.size = "folder", (512, 512)
    c.model.net.multipliers, c.model.net.blocks, c.model.net.attention = (0.5, 1, 1, 2, 2, 4, 4), 2, (4, 5, 6)
    return c
