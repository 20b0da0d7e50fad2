"""CIFAR-10, the deep NCSN++ and sub-VP in continuous time: score_sde's configs/subvp/cifar10_ncsnpp_deep_continuous.py.

data.path is the folder of the binary version.
"""

from ml_collections import ConfigDict

from scorelab.experiments import score_sde_vp


def get_config() -> ConfigDict:
    c = score_sde_vp("subvp")
    c.data.source, c.data.flip = "cifar10", True
    c.model.net.name, c.model.net.embedding = "ncsnpp", "positional"
    c.model.net.blocks, c.training.steps = 8, 950_001
    return c
