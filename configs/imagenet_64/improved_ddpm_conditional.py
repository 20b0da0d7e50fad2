"""ImageNet at 64 px by class, by improved DDPM, 270 million weights: Nichol and Dhariwal, 2021, arXiv:2102.09672.

data.path is a folder with a folder of images for each class.
"""

from ml_collections import ConfigDict

from scorelab.experiments import improved_ddpm


def get_config() -> ConfigDict:
    c = improved_ddpm(lr=3e-4)
    c.data.source, c.data.size = "folder", (64, 64)
    c.model.conditional, c.model.net.width, c.model.label_scale = True, 192, 1.0
    # the bound's term weighs 1 beside the error, as without the release's rescaling, and not T / 1000
    c.training.objective.bound = 1 / 4000
    c.training.steps, c.training.batch_size = 250_000, 2048
    return c
