"""ImageNet at 64 px by improved DDPM: Nichol and Dhariwal, 2021, arXiv:2102.09672.

data.path is a folder with a folder of images for each class.
"""

from ml_collections import ConfigDict

from scorelab.experiments import improved_ddpm


def get_config() -> ConfigDict:
    c = improved_ddpm()
    c.data.source, c.data.size = "folder", (64, 64)
    c.training.steps = 1_500_000
    return c
