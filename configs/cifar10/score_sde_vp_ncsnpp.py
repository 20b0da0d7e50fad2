"""CIFAR-10, NCSN++ and DDPM's steps: score_sde's configs/vp/cifar10_ncsnpp.py.

data.path is the folder of the binary version.
"""

from ml_collections import ConfigDict

from scorelab.experiments import score_sde_vp


def get_config() -> ConfigDict:
    c = score_sde_vp(continuous=False, sampler="reverse_diffusion")
    c.data.source, c.data.flip = "cifar10", True
    c.model.net.name, c.model.net.embedding = "ncsnpp", "positional"
    return c
