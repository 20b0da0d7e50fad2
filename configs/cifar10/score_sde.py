"""CIFAR-10 by score_sde's continuous VE settings: NCSN++, predictor-corrector sampling.

The release's loss is half a sum over dimensions, here it is their mean, so its clipping at 1 acts on gradients that are
1,536 times as large: it clips nearly always, here only at first. The release has data in [0, 1], here it is in [-1, 1]:
noise levels are twice the published. data.path is the folder of the binary version. Song et al., Score-Based Generative
Modeling through SDEs, 2021, arXiv:2011.13456.
"""

from ml_collections import ConfigDict

from scorelab.training import default_config


def get_config() -> ConfigDict:
    c = default_config()
    c.data.source, c.data.flip = "cifar10", True
    c.process.name, c.process.sigma_min, c.process.sigma_max = "ve", 2 * 0.01, 2 * 50.0
    c.model.prediction, c.training.sigmas.name = "eps", "process"
    # its own settings are those of the release; c.model.net.blocks = 8 is the deep one
    c.model.net.name = "ncsnpp"
    c.training.steps, c.training.batch_size = 1_300_001, 128
    c.training.checkpoint_every, c.training.sample_every = 10_000, 50_000
    c.optim.lr, c.optim.warmup, c.optim.clip, c.optim.ema = 2e-4, 5000, 1.0, (0.999,)
    c.sampling.grid.name, c.sampling.grid.n = "process", 1000
    c.sampling.sampler.name, c.sampling.sampler.corrector_first = "predictor_corrector", True
    c.sampling.sampler.predictor = {"name": "reverse_diffusion"}
    c.sampling.sampler.corrector = {"name": "langevin", "snr": 0.16}
    return c
