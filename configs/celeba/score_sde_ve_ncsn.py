"""CelebA at 64 px, NCSN: score_sde's configs/ve/ncsn/celeba.py.

data.path is a folder of the aligned images, cropped to their middle 140 pixels as the paper has them.
"""

from ml_collections import ConfigDict

from scorelab.experiments import ncsn


def get_config() -> ConfigDict:
    c = ncsn(3 * 64 * 64, snr=0.316)
    c.data.source, c.data.size, c.data.flip = "folder", (64, 64), True
    return c
