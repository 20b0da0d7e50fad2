"""CIFAR-10 by EDM's published settings and its DDPM++, but for its augmentation.

data.path is the folder of the binary version. Karras et al., Elucidating the Design Space of Diffusion-Based Generative
Models, 2022, arXiv:2206.00364.
"""

from ml_collections import ConfigDict

from scorelab.training import default_config


def get_config() -> ConfigDict:
    c = default_config()
    c.data.source, c.data.flip = "cifar10", True
    c.process.name, c.process.sigma_min, c.process.sigma_max = "ve", 0.002, 80.0
    c.model.prediction, c.model.input_scale, c.model.sigma_data = "edm", "unit_variance", 0.5
    c.model.label, c.model.label_scale = "log_sigma", 0.25
    c.model.net.name, c.model.net.embedding, c.model.net.fir, c.model.net.inputs = "ncsnpp", "positional", (), "none"
    c.model.net.width, c.model.net.multipliers, c.model.net.blocks, c.model.net.dropout = 128, (2, 2, 2), 4, 0.13
    c.training.sigmas.name, c.training.sigmas.mean, c.training.sigmas.std = "log_normal", -1.2, 1.2
    c.training.weighting.name = "edm"
    # 200 million images
    c.training.steps, c.training.batch_size = 390_625, 512
    c.training.checkpoint_every, c.training.sample_every = 5000, 5000
    # a warm-up of 10 million images, and averages of half-life 500,000
    c.optim.lr, c.optim.warmup, c.optim.clip, c.optim.ema = 1e-3, 19_531, None, (0.5 ** (512 / 500_000),)
    c.sampling.sampler.name = "heun"
    c.sampling.grid.name, c.sampling.grid.n, c.sampling.grid.rho = "karras", 18, 7.0
    return c
