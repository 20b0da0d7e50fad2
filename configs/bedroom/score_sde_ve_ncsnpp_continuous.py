"""LSUN bedrooms at 256 px, NCSN++ and VE in continuous time: score_sde's configs/ve/bedroom_ncsnpp_continuous.py.

data.path is a folder of the images.
"""

from ml_collections import ConfigDict

from scorelab.experiments import score_sde_ve


def get_config() -> ConfigDict:
    c = score_sde_ve(3 * 256 * 256, sigma_max=378.0, levels=2000, snr=0.075)
    c.data.source, c.data.size, c.data.flip = "folder", (256, 256), True
    c.model.net.name, c.model.net.multipliers, c.model.net.blocks = "ncsnpp", (1, 1, 2, 2, 2, 2, 2), 2
    c.model.net.attention, c.model.net.dropout, c.model.net.inputs, c.model.net.outputs = (4,), 0.0, "skip", "skip"
    c.training.steps, c.training.batch_size = 2_400_001, 64
    return c
