"""What is wrong with a model, in words, from what was measured of it.

A score that is c times what it should be has the slope 1/c at every level. One that takes a level for another has its
least loss where it is told another, the same multiple of sigma everywhere, or the same number of steps of its own
levels; as both look alike where noise is far above or below the data's scale, that is asked of the loss by the best
multiple of eps_hat, which no scale changes. What all trained models have is no fault: a network that has not learnt its
lowest levels to the end is off in slope there, and nowhere else.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any, NamedTuple

import torch

from scorelab.evaluation import Estimate
from scorelab.health.levels import Level
from scorelab.health.samples import SampleHealth

__all__ = ["NORMAL", "Finding", "Health", "judged", "level_told"]

_SURE = 4.0
"""Standard errors."""
_BY_LEVELS = 3.0
"""Standard errors of what follows from some levels that are told apart."""
_AGREE = 0.75
"""The share of levels that say the same."""
_NOTED = 0.05
"""The logarithm of a factor from which on it is one."""
_WEAK = 1.25
"""Of the best linear denoiser's loss."""
_LEARNT = 0.3
"""Of the way from the loss on held-out data to the least possible one on training data."""
_LAGS = 0.1
"""Of the logarithm of the loss, on average over levels."""
_COPIED = 1e-3
_BEYOND = 0.02
"""Of the data's values."""
_FAR = 0.25
"""Of the data's deviation, and of the logarithm of contrast."""
_SCARCE = 0.25
"""Of what a class has in the data."""


class Finding(NamedTuple):
    """A fault by name, what shows it, and what to do."""

    fault: str
    seen: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.fault}: {self.seen}; {self.remedy}"


NORMAL = {
    "loss": "below linear, the best linear denoiser's; above it a network has learnt nothing there: train longer, or "
    "look at its input scale",
    "train_loss": "within two errors of loss; lower is overfitting: fewer steps, dropout, more data",
    "best": "the least possible on training data, of a score that knows it by heart; train_loss should stay far above",
    "memorised": "near 0; 1 has learnt the training data by heart",
    "slope": "1 within some errors where sigma is neither least nor most; elsewhere by how much eps is over- or "
    "underestimated",
    "offset": "0 within some errors; the share of the error that is the same for all data",
    "trace": "1 within some errors; what the derivative says of the error of x0_hat beside that error",
    "dimension": "falls with sigma from the number of values to 0, flat where data lies on so many dimensions; below 0 "
    "where a network is wrong about clean data, which it never saw with so much noise told",
    "asymmetry": "0 of a gradient; of good networks below .1 at small sigma, up to .35 at large ones",
    "fokker_planck": "0 of one law at all levels; below .4 of good networks but at the least sigma",
    "fisher": "small beside 1; the squared error of sigma s beside the truth, per dimension",
}
"""What is normal of each number of a level, and what to do."""


@dataclass(frozen=True)
class Health:
    """What was measured at each level and of samples, ``told`` by ``level_told``, what other weights do better
    (``lags``), and what is wrong, causes first."""

    levels: list[Level]
    samples: SampleHealth | None
    told: Estimate | None
    lags: dict[str, Estimate]
    findings: list[Finding]

    @property
    def verdict(self) -> str:
        """In a line."""
        if not self.findings:
            return "nothing wrong was found"
        more = len(self.findings) - 1
        return f"{self.findings[0]}{f' (and {more} more, which may follow from it)' if more else ''}"

    def __str__(self) -> str:
        return "\n".join([self.verdict, *map(str, self.findings[1:])])

    def record(self) -> dict[str, Any]:
        """All of it as JSON can hold it."""
        return {
            "verdict": self.verdict,
            "findings": [f._asdict() for f in self.findings],
            "levels": [_plain(asdict(level)) for level in self.levels],
            "samples": None if self.samples is None else _plain(asdict(self.samples)),
            "told": _plain(self.told),
            "loss_beside": {k: _plain(v) for k, v in self.lags.items()},
        }


def judged(
    levels: Sequence[Level], samples: SampleHealth | None = None, lags: Mapping[str, Estimate] | None = None
) -> Health:
    """What is wrong by these measures. lags: by name, how much less the loss of other weights is (``lag``)."""
    found = [
        *_of_range(samples),
        # what is known by heart is best told more noise on other data
        *_of_memory(levels, samples),
        *_of_score(levels),
        *_of_weights(lags or {}),
        *_of_strength(levels),
        *_of_samples(samples),
    ]
    return Health(list(levels), samples, level_told(levels), dict(lags or {}), found)


def _of_range(samples: SampleHealth | None) -> Iterator[Finding]:
    for c, channel in enumerate(samples.channels if samples else []):
        if max(channel.below, channel.above) > _BEYOND:
            side = "below" if channel.below > channel.above else "above"
            yield Finding(
                "clipped",
                f"{max(channel.below, channel.above):.1%} of the data's values lie {side} all of the samples' in "
                f"channel {c}",
                "look at the range that training data was clipped to, and at sampling.clip",
            )


def _of_score(levels: Sequence[Level]) -> Iterator[Finding]:
    """Wrong sign, scale or level."""
    if not levels:
        return
    slopes = [level.slope.value for level in levels]
    if median(slopes) < 0:
        yield Finding("sign", f"eps is {median(slopes):.3g} times what it predicts", "take -s")
        return
    told = level_told(levels)
    own = any(isinstance(k, int) for k, _ in levels[0].profile)
    if told is not None and abs(told.value) > max(_BY_LEVELS * told.stderr, 0.5 if own else _NOTED):
        way = "more" if told.value > 0 else "less"
        if own and abs(told.value) < 4:
            yield Finding(
                "time",
                f"it is best when told {abs(told.value):.2g} of its levels {way} noise than there is",
                "look for an index that begins at 1, or a level taken before or after its step",
            )
        else:
            factor = (
                f"{abs(told.value):.2g} of its levels {way} noise than"
                if own
                else f"{math.exp(told.value):.3g} times the noise"
            )
            yield Finding(
                "level",
                f"it is best when told {factor} there is",
                "look at what it takes for sigma: a time, a variance, or the levels of another process",
            )
        return
    scale = _common([(math.log(s.value), s.stderr / s.value) for s in (v.slope for v in levels) if s.value > 0])
    if scale is not None:
        yield Finding(
            "scale",
            f"eps is {math.exp(scale):.3g} times what it predicts, at most levels",
            "look at the scale of data and inputs, or divide the score by as much",
        )


_ROUNDING = 1e-5
"""Differences of mean logarithms of losses that tell nothing, of losses in single precision."""


def level_told(levels: Sequence[Level]) -> Estimate | None:
    """By how much sigma would have to be multiplied before the score is told it (its logarithm, or steps of the score's
    own levels) for the least loss by the best multiple of eps_hat; None where that can be asked at fewer than 3 levels,
    or makes no difference, as for normal data of one variance in all directions.

    The logarithms of all levels' losses are summed, and the parabola through the least of the sums and its neighbours
    has its vertex there. The error is what the slopes of the single levels' parabolas, which make up 0 there, tell of
    how far apart levels, and samples of a level, are. At an end, beyond which nothing was asked, it is 0 where the gain
    over sigma itself is four errors of the sampling, and infinite where not.
    """
    asked = [k for k, _ in max((v.profile for v in levels), key=len, default=())]
    whole = [[losses for _, losses in v.profile] for v in levels if len(v.profile) == len(asked)]
    if len(whole) < 3 or len(asked) < 3:
        return None
    # of each level (L), part of its samples (P) and what the score was told (R)
    logs = torch.tensor(whole, dtype=torch.float64).clamp_min(1e-12).log().movedim(2, 1)
    means = logs.mean((0, 1))
    if float(means.max() - means.min()) < _ROUNDING:
        return None
    k = int(means.argmin())
    if k in (0, len(asked) - 1):
        gains = logs[:, :, asked.index(0)] - logs[:, :, k]
        sure = float(gains.mean()) > _SURE * float(gains.var(1).sum().sqrt()) / gains.numel() ** 0.5 / len(gains) ** 0.5
        return Estimate(asked[k], 0.0 if sure else math.inf)
    below, at, above = asked[k - 1 : k + 2]
    left = (logs[:, :, k] - logs[:, :, k - 1]) / (at - below)
    right = (logs[:, :, k + 1] - logs[:, :, k]) / (above - at)
    # the derivative halfway to either neighbour, so linear in between
    bends = (right - left) / ((above - below) / 2)
    bend = float(bends.sum())
    if bend <= 0:
        return Estimate(at, math.inf)
    value = (below + at) / 2 - float(left.sum()) / bend
    slopes = left + bends * (value - (below + at) / 2)
    between, within = float(slopes.sum(1).square().sum()), float(slopes.var(1).sum()) * slopes.shape[1]
    return Estimate(value, math.sqrt(between + within) / bend)


def _common(found: Sequence[tuple[float, float]]) -> float | None:
    """The median of numbers, each with its error, where most are as far off and on the same side of 0."""
    if len(found) < 3:
        return None
    middle = median(value for value, _ in found)
    agree = [v / middle > 0.5 and abs(v) > _SURE * e for v, e in found] if abs(middle) > _NOTED else []
    return middle if sum(agree) >= _AGREE * len(found) else None


def _of_weights(lags: Mapping[str, Estimate]) -> Iterator[Finding]:
    for name, lag in lags.items():
        if lag.value > _LAGS and lag.value > _SURE * lag.stderr:
            yield Finding(
                "average",
                f"{name} have {1 - math.exp(-lag.value):.0%} less loss",
                "train longer, or let the average forget sooner (optim.ema)",
            )


def _of_memory(levels: Sequence[Level], samples: SampleHealth | None) -> Iterator[Finding]:
    by_heart = [v for v in levels if v.memorised and v.memorised.value - _SURE * v.memorised.stderr > _LEARNT]
    copied = samples.copies if samples else None
    is_copied = copied is not None and copied.p < _COPIED
    if not by_heart and not is_copied:
        return
    seen = []
    if by_heart:
        most = max(by_heart, key=lambda v: v.memorised.value if v.memorised else 0)
        assert most.memorised is not None
        seen.append(f"at sigma = {most.sigma:.3g} training data is known by heart to {most.memorised.value:.0%}")
    if is_copied and copied is not None:
        seen.append(
            f"{copied.share.value:.0%} more samples than chance are nearest to training data (p = {copied.p:.1g})"
        )
    yield Finding("memorised", ", and ".join(seen), "train less, on more data, with dropout or a smaller network")


def _of_strength(levels: Sequence[Level]) -> Iterator[Finding]:
    weak = [v for v in levels if v.loss.value - _SURE * v.loss.stderr > _WEAK * (v.linear or 1.0)]
    if weak:
        worst = max(weak, key=lambda v: v.loss.value / (v.linear or 1.0))
        yield Finding(
            "weak",
            f"at sigma = {worst.sigma:.3g} its loss is {worst.loss.value / (worst.linear or 1.0):.3g} times the best "
            f"linear denoiser's ({len(weak)} of {len(levels)} levels)",
            "train longer, on these levels too, and look at the scale of its inputs",
        )


def _of_samples(samples: SampleHealth | None) -> Iterator[Finding]:
    if samples is None:
        return
    for k, one in enumerate(samples.classes):
        gap = one.of_data.value - one.share.value
        error = math.hypot(one.share.stderr, one.of_data.stderr)
        if one.share.value < _SCARCE * one.of_data.value and gap > _SURE * error:
            by_class = samples.p_classes is None
            yield Finding(
                "class",
                f"of samples asked to be of class {k}, {one.share.value:.1%} look like it; of the data's own, "
                f"{one.of_data.value:.1%}"
                if by_class
                else f"class {k} has {one.share.value:.1%} of the samples and {one.of_data.value:.1%} of the data",
                "train longer, or look at its labels"
                if by_class
                else "look for it in the training data, and at its labels",
            )
    for c, channel in enumerate(samples.channels):
        far = abs(channel.mean.value) - _SURE * channel.mean.stderr > _FAR
        ratio = abs(math.log(max(channel.contrast.value, 1e-6)))
        if far or ratio - _SURE * channel.contrast.stderr / max(channel.contrast.value, 1e-6) > _FAR:
            yield Finding(
                "brightness" if far else "contrast",
                f"channel {c} of the samples is {channel.mean.value:+.2g} deviations off the data's, and deviates "
                f"{channel.contrast.value:.3g} times as much",
                "more steps, other levels, less guidance, or a longer training",
            )


def _plain(found: Any) -> Any:
    """Estimates as dictionaries, NaN as None."""
    if isinstance(found, Estimate):
        return {k: v if math.isfinite(v) else None for k, v in found._asdict().items()}
    if isinstance(found, dict):
        return {k: _plain(v) for k, v in found.items()}
    if isinstance(found, tuple) and hasattr(found, "_asdict"):
        return _plain(found._asdict())
    if isinstance(found, list):
        return [_plain(v) for v in found]
    return found
