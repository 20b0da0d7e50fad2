"""CIFAR-10 by DDPM: Ho et al., 2020, arXiv:2006.11239, appendix B.

data.path is the folder of the binary version.
"""

from ml_collections import ConfigDict

from scorelab.experiments import ddpm


def get_config() -> ConfigDict:
    c = ddpm()
    c.data.source, c.data.flip = "cifar10", True
    return c
