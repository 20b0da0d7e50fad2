"""CelebA at 64 px, NCSN++ and VE in 1,000 levels: score_sde's configs/ve/celeba_ncsnpp.py.

data.path is a folder of the aligned images, cropped to their middle 140 pixels as the paper has them.
"""

from ml_collections import ConfigDict

from scorelab.experiments import score_sde_ve


def get_config() -> ConfigDict:
    c = score_sde_ve(3 * 64 * 64, sigma_max=90.0, snr=0.17, continuous=False)
    c.data.source, c.data.size, c.data.flip = "folder", (64, 64), True
    c.model.net.name, c.model.net.embedding, c.model.net.attention = "ncsnpp", "positional", (2,)
    return c
