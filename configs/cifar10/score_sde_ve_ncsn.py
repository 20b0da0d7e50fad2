"""CIFAR-10, NCSN: score_sde's configs/ve/ncsn/cifar10.py.

data.path is the folder of the binary version.
"""

from ml_collections import ConfigDict

from scorelab.experiments import ncsn


def get_config() -> ConfigDict:
    c = ncsn(3 * 32 * 32, snr=0.316)
    c.data.source, c.data.flip = "cifar10", True
    return c
