"""CIFAR-10, NCSN++ and VE in continuous time: score_sde's configs/ve/cifar10_ncsnpp_continuous.py.

data.path is the folder of the binary version.
"""

from ml_collections import ConfigDict

from scorelab.experiments import score_sde_ve


def get_config() -> ConfigDict:
    c = score_sde_ve(3 * 32 * 32)
    c.data.source, c.data.flip = "cifar10", True
    c.model.net.name = "ncsnpp"
    return c
