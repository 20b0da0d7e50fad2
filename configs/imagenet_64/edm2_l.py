"""ImageNet at 64 px by class, by EDM2-L: Karras et al., 2024, arXiv:2312.02696, table 6.

data.path is a folder with a folder of images for each class.
"""

from ml_collections import ConfigDict

from scorelab.experiments import edm2


def get_config() -> ConfigDict:
    c = edm2(3 * 64 * 64, width=320, lr=0.008, decay_from=35_000, images=1024, mean=-0.8, std=1.6, dropout=0.1)
    c.data.source, c.data.size = "folder", (64, 64)
    return c
