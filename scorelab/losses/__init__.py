"""How a score is learnt: denoising, implicit and sliced score matching."""

from scorelab.losses.denoising import WEIGHTINGS, Denoising, Losses, denoising_loss, weighting
from scorelab.losses.implicit import implicit_loss, sliced_loss

__all__ = ["WEIGHTINGS", "Denoising", "Losses", "denoising_loss", "implicit_loss", "sliced_loss", "weighting"]
