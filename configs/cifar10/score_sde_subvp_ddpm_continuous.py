"""CIFAR-10, DDPM's network and sub-VP in continuous time: score_sde's configs/subvp/cifar10_ddpm_continuous.py.

data.path is the folder of the binary version.
"""

from ml_collections import ConfigDict

from scorelab.experiments import score_sde_vp


def get_config() -> ConfigDict:
    c = score_sde_vp("subvp")
    c.data.source, c.data.flip = "cifar10", True
    c.model.net.name, c.model.net.attention_up = "ddpm", "last"
    return c
