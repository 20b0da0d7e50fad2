"""CelebA by NCSN: Song and Ermon, 2019, arXiv:1907.05600; here at 64 px.

data.path is a folder of the aligned images, cropped to their middle 140 pixels as the paper has them.
"""

from ml_collections import ConfigDict

from scorelab.experiments import ncsn


def get_config() -> ConfigDict:
    c = ncsn(3 * 64 * 64)
    c.data.source, c.data.size, c.data.flip = "folder", (64, 64), True
    return c
