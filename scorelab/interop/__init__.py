"""What others have trained."""

from scorelab.interop.bridges import as_sampler, as_scheduler
from scorelab.interop.diffusers import from_diffusers, to_diffusers
from scorelab.interop.loading import PRETRAINED, load
from scorelab.interop.releases import RELEASES, load_classifier
from scorelab.interop.schedulers import from_scheduler

__all__ = [
    "PRETRAINED",
    "RELEASES",
    "as_sampler",
    "as_scheduler",
    "from_diffusers",
    "from_scheduler",
    "load",
    "load_classifier",
    "to_diffusers",
]
