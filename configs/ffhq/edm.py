"""FFHQ at 64 px by EDM's DDPM++: Karras et al., 2022, arXiv:2206.00364.

data.path is a folder of the images.
"""

from ml_collections import ConfigDict

from scorelab.experiments import edm


def get_config() -> ConfigDict:
    c = edm(3 * 64 * 64, batch_size=256, lr=2e-4, n=40)
    c.data.source, c.data.size, c.data.flip = "folder", (64, 64), True
    c.model.net.name, c.model.net.embedding, c.model.net.fir, c.model.net.inputs = "ncsnpp", "positional", (), "none"
    c.model.net.multipliers, c.model.net.attention, c.model.net.dropout = (1, 2, 2, 2), (2,), 0.05
    return c
