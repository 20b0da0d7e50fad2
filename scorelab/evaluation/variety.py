"""How varied one set is: the Inception score (Salimans et al., 2016, arXiv:1606.03498), and the Vendi score (Friedman
and Dieng, 2022, arXiv:2210.02410)."""

from __future__ import annotations

import math

import torch

from scorelab.evaluation.estimates import GROUPS, Estimate, as_features, jackknifed, parts, rows
from scorelab.typing import Tensor

__all__ = ["inception_score", "vendi_score"]


def inception_score(logits: Tensor, splits: int = 10) -> Estimate:
    """exp E KL(p(class | x) || p(class)) of a classifier's logits (N, K), the mean over ``splits`` parts as published;
    its value depends on the number of rows in a part (5,000 as published).

    The error is that of a mean over parts: their spread over sqrt(splits), where releases give the spread itself. The
    release's parts are consecutive, these are random. Raises ValueError for fewer than 2 rows in a part.
    """
    logits = as_features(logits, "logits")
    if not 1 <= splits <= len(logits) // 2:
        raise ValueError(f"splits is {splits} of {len(logits)} rows; expected at least 1, and 2 rows in each")
    logs = logits.double().log_softmax(1)
    part, found = parts(len(logits), splits), []
    for k in range(splits):
        some = logs[part.to(logs.device) == k]
        mean = some.exp().mean(0)
        found.append(math.exp(float((some.exp() * (some - mean.log())).nan_to_num(0.0).sum(1).mean())))
    values = torch.tensor(found, dtype=torch.float64)
    return Estimate(float(values.mean()), float(values.std()) / math.sqrt(splits) if splits > 1 else math.nan)


def vendi_score(x: Tensor) -> Estimate:
    """The exponential of the entropy of the eigenvalues of X X'/N, rows of features (N, D) normalised: the number of
    kinds that would be as varied, from 1 to min(N, D).

    Value and error are the jackknife's over 20 groups of rows. Raises ValueError for rows of zeros, or fewer than 40.
    """
    x = as_features(x, "x")
    if len(x) < 2 * GROUPS:
        raise ValueError(f"x has {len(x)} rows; expected at least {2 * GROUPS}")
    group, first, sums = parts(len(x), GROUPS), 0, torch.zeros(GROUPS, x.shape[1], x.shape[1], dtype=torch.float64)
    for part in rows(x):
        part = part.cpu()
        sizes = part.norm(dim=1, keepdim=True)
        if not bool((sizes > 0).all()):
            raise ValueError("a row of features is all 0; expected directions")
        mine, part = group[first : first + len(part)], part / sizes
        first += len(part)
        for k in range(GROUPS):
            sums[k] += part[mine == k].T @ part[mine == k]
    total = sums.sum(0)
    return jackknifed(_diversity(total), [_diversity(total - s) for s in sums])


def _diversity(second: Tensor) -> float:
    share = torch.linalg.eigvalsh(second / second.trace()).clamp_min(0)
    return math.exp(float(torch.special.entr(share).sum()))
