"""CIFAR-10, NCSN with averaged weights, technique 5: score_sde's configs/ve/ncsn/cifar10_5.py.

data.path is the folder of the binary version.
"""

from ml_collections import ConfigDict

from scorelab.experiments import ncsn


def get_config() -> ConfigDict:
    c = ncsn(3 * 32 * 32, snr=0.316, ema=0.999)
    c.data.source, c.data.flip = "cifar10", True
    return c
