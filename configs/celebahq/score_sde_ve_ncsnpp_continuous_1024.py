"""CelebA-HQ at 1024 px, NCSN++ and VE in continuous time: score_sde's configs/ve/celebahq_ncsnpp_continuous.py.

data.path is a folder of the images.
"""

from ml_collections import ConfigDict

from scorelab.experiments import score_sde_ve


def get_config() -> ConfigDict:
    c = score_sde_ve(3 * 1024 * 1024, sigma_max=1348.0, levels=2000, snr=0.15, ema=0.9999)
    c.data.source, c.data.size, c.data.flip = "folder", (1024, 1024), True
    c.model.net.name, c.model.net.width, c.model.net.multipliers = "ncsnpp", 16, (1, 2, 4, 8, 16, 32, 32, 32)
    c.model.net.blocks, c.model.net.attention, c.model.net.dropout = 1, (6,), 0.0
    c.model.net.inputs, c.model.net.outputs = "skip", "skip"
    c.training.steps, c.training.batch_size = 2_400_001, 8
    return c
