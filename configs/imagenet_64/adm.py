"""ImageNet at 64 px by class, by ADM: Dhariwal and Nichol, 2021, arXiv:2105.05233, appendix I.

data.path is a folder with a folder of images for each class.
"""

from ml_collections import ConfigDict

from scorelab.experiments import adm


def get_config() -> ConfigDict:
    c = adm(schedule="ddpm_cosine", lr=3e-4)
    c.data.source, c.data.size = "folder", (64, 64)
    c.model.conditional, c.training.steps, c.training.batch_size = True, 540_000, 2048
    return c
