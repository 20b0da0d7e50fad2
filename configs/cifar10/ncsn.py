"""CIFAR-10 by NCSN: Song and Ermon, 2019, arXiv:1907.05600.

data.path is the folder of the binary version.
"""

from ml_collections import ConfigDict

from scorelab.experiments import ncsn


def get_config() -> ConfigDict:
    c = ncsn(3 * 32 * 32)
    c.data.source, c.data.flip = "cifar10", True
    return c
