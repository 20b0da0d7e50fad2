"""CIFAR-10, NCSN with NCSNv2's techniques 1, 2, 4: score_sde's configs/ve/ncsn/cifar10_124.py.

data.path is the folder of the binary version.
"""

from ml_collections import ConfigDict

from scorelab.experiments import ncsn


def get_config() -> ConfigDict:
    c = ncsn(3 * 32 * 32, sigma_max=50.0, levels=232, steps=5, snr=0.176)
    c.data.source, c.data.flip = "cifar10", True
    return c
