"""CIFAR-10, DDPM's network and VE in 1,000 levels: score_sde's configs/ve/cifar10_ddpm.py.

data.path is the folder of the binary version.
"""

from ml_collections import ConfigDict

from scorelab.experiments import score_sde_ve


def get_config() -> ConfigDict:
    c = score_sde_ve(3 * 32 * 32, continuous=False)
    c.data.source, c.data.flip = "cifar10", True
    c.model.net.name, c.model.net.attention_up = "ddpm", "last"
    return c
