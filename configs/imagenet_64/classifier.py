"""ADM's classifier of noised ImageNet at 64 px: Dhariwal and Nichol, 2021, arXiv:2105.05233, appendix H.

data.path is a folder with a folder of images for each class.
"""

from ml_collections import ConfigDict

from scorelab.experiments import classifier


def get_config() -> ConfigDict:
    c = classifier(schedule="ddpm_cosine")
    c.data.source, c.data.size = "folder", (64, 64)
    return c
