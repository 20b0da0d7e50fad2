"""LSUN bedrooms at 256 px, DDPM's network and steps: score_sde's configs/vp/ddpm/bedroom.py.

data.path is a folder of the images.
"""

from ml_collections import ConfigDict

from scorelab.experiments import score_sde_vp


def get_config() -> ConfigDict:
    c = score_sde_vp(continuous=False, lr=2e-5)
    c.data.source, c.data.size, c.data.flip = "folder", (256, 256), True
    c.model.net.name, c.model.net.attention_up = "ddpm", "last"
    c.model.net.multipliers, c.model.net.attention, c.model.net.dropout = (1, 1, 2, 2, 4, 4), (4,), 0.0
    c.training.steps, c.training.batch_size = 2_400_001, 64
    return c
