"""CIFAR-10, NCSNv2: score_sde's configs/ve/ncsnv2/cifar10.py.

data.path is the folder of the binary version.
"""

from ml_collections import ConfigDict

from scorelab.experiments import ncsnv2


def get_config() -> ConfigDict:
    c = ncsnv2(3 * 32 * 32, sigma_max=50.0, levels=232, steps=5, step_size=4 * 0.00176**2)
    c.data.source, c.data.flip = "cifar10", True
    return c
