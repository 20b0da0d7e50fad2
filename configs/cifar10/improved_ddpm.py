"""CIFAR-10 by improved DDPM: Nichol and Dhariwal, 2021, arXiv:2102.09672.

data.path is the folder of the binary version.
"""

from ml_collections import ConfigDict

from scorelab.experiments import improved_ddpm


def get_config() -> ConfigDict:
    c = improved_ddpm()
    c.data.source, c.data.flip = "cifar10", True
    c.model.net.update(multipliers=(1, 2, 2, 2), attention=(1, 2), dropout=0.3)
    return c
