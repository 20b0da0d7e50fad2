"""CIFAR-10 by NCSNv2: Song and Ermon, 2020, arXiv:2006.09011, appendix B.

data.path is the folder of the binary version.
"""

from ml_collections import ConfigDict

from scorelab.experiments import ncsnv2


def get_config() -> ConfigDict:
    c = ncsnv2(3 * 32 * 32, sigma_max=50.0, levels=232, steps=5, step_size=2 * 6.2e-6)
    c.data.source, c.data.flip = "cifar10", True
    return c
