"""ImageNet at 64 px by class, by EDM's ADM: Karras et al., 2022, arXiv:2206.00364.

data.path is a folder with a folder of images for each class.
"""

from ml_collections import ConfigDict

from scorelab.experiments import edm


def get_config() -> ConfigDict:
    c = edm(3 * 64 * 64, batch_size=4096, lr=1e-4, n=256)
    c.data.source, c.data.size = "folder", (64, 64)
    c.model.conditional, c.model.net.name, c.model.net.group = True, "adm", 4
    # 2.5 billion images, and averages of half-life 50 million
    c.training.steps, c.optim.ema = 610_352, (0.5 ** (4096 / 50e6),)
    c.sampling.sampler = {"name": "churn", "s_churn": 40.0, "s_min": 0.05, "s_max": 50.0, "s_noise": 1.003}
    return c
