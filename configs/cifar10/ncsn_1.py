"""CIFAR-10 by NCSN with the largest noise of NCSNv2's technique 1: arXiv:2006.09011, section 3.1.

data.path is the folder of the binary version.
"""

from ml_collections import ConfigDict

from scorelab.experiments import ncsn


def get_config() -> ConfigDict:
    c = ncsn(3 * 32 * 32, sigma_max=50.0)
    c.data.source, c.data.flip = "cifar10", True
    return c
