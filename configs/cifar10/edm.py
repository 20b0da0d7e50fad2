"""CIFAR-10 by EDM's DDPM++: Karras et al., 2022, arXiv:2206.00364.

data.path is the folder of the binary version.
"""

from ml_collections import ConfigDict

from scorelab.experiments import edm


def get_config() -> ConfigDict:
    c = edm(3 * 32 * 32)
    c.data.source, c.data.flip = "cifar10", True
    c.model.net.name, c.model.net.embedding, c.model.net.fir, c.model.net.inputs = "ncsnpp", "positional", (), "none"
    c.model.net.multipliers, c.model.net.dropout = (2, 2, 2), 0.13
    return c
