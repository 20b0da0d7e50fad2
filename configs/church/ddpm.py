"""LSUN churches at 256 px by DDPM: Ho et al., 2020, arXiv:2006.11239, appendix B.

data.path is a folder of the images.
"""

from ml_collections import ConfigDict

from scorelab.experiments import ddpm


def get_config() -> ConfigDict:
    c = ddpm(lr=2e-5, variance="posterior")
    c.data.source, c.data.size, c.data.flip = "folder", (256, 256), True
    c.model.net.multipliers, c.model.net.attention, c.model.net.dropout = (1, 1, 2, 2, 4, 4), (4,), 0.0
    c.training.steps, c.training.batch_size = 1_200_000, 64
    return c
