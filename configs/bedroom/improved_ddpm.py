"""LSUN bedrooms at 256 px by improved DDPM: Nichol and Dhariwal, 2021, arXiv:2102.09672.

data.path is a folder of the images.
"""

from ml_collections import ConfigDict

from scorelab.experiments import improved_ddpm


def get_config() -> ConfigDict:
    c = improved_ddpm(schedule="ddpm", steps=1000)
    c.data.source, c.data.size = "folder", (256, 256)
    c.model.net.update(multipliers=(1, 1, 2, 2, 4, 4), blocks=2, attention=(4,), heads=1, time="added")
    c.training.steps = 1_200_000
    return c
