"""CIFAR-10, DDPM++ and DDPM's steps: score_sde's configs/vp/cifar10_ddpmpp.py.

data.path is the folder of the binary version.
"""

from ml_collections import ConfigDict

from scorelab.experiments import score_sde_vp


def get_config() -> ConfigDict:
    c = score_sde_vp(continuous=False)
    c.data.source, c.data.flip = "cifar10", True
    c.model.net.name = "ncsnpp"
    c.model.net.update(embedding="positional", fir=(), inputs="none")
    return c
