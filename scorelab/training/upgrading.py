"""Configs of runs from before there were parts."""

from __future__ import annotations

import copy
from typing import Any

from scorelab.training.settings import PARTS

__all__ = ["upgraded"]


def upgraded(recorded: dict[str, Any]) -> dict[str, Any]:
    """A config that an earlier version wrote, all parts' settings in one list, as it would be written now."""
    if not isinstance(recorded.get("model", {}).get("net"), str):
        return recorded
    old, found = copy.deepcopy(recorded), copy.deepcopy(recorded)
    m, o, t, s = (found[group] for group in ("model", "optim", "training", "sampling"))

    def chosen(path: str, name: str, settings: dict[str, Any]) -> dict[str, Any]:
        kind = PARTS[path]
        known = kind.settings(kind.maker(name, f"config.{path}"))
        return {"name": name, **{k: v for k, v in settings.items() if k in known}}

    found["process"] = chosen("process", old["process"]["name"], old["process"])
    net = {k: m.pop(k) for k in tuple(m) if k not in ("net", "prediction", "label", "input_scale", "conditional")}
    m["net"] = chosen("model.net", old["model"]["net"], net)
    if old["model"]["net"] == "mlp":
        m["label"] = m["input_scale"] = ""
    decay = {"decay_from": o.pop("decay_from", 10_000)}
    o["schedule"] = chosen("optim.schedule", old["optim"]["schedule"], decay)
    count = old["sampling"]["levels"]
    t["sigmas"] = chosen("training.sigmas", old["training"]["sigmas"], {"levels": count})
    t["weighting"] = {"name": old["training"]["weighting"]}
    t["objective"] = {"name": "denoising", "reference": t.pop("stable_target", 0)}
    ends = {k: s.pop(k, 0.0) or None for k in ("sigma_min", "sigma_max")}
    s["grid"] = chosen("sampling.grid", old["sampling"]["grid"], {"n": count, "steps": count, **ends})
    of = {k: s.pop(k) for k in ("levels", "steps", "step_size", "eta", "variance") if k in s}
    of["step_size"] = of.get("step_size") or None
    if old["sampling"]["sampler"] == "reverse_sde":
        # it had no eta of its own
        of.pop("eta", None)
    s["sampler"] = chosen("sampling.sampler", old["sampling"]["sampler"], of)
    if old["model"]["label"] == "index" and not old["process"]["name"].startswith("ddpm"):
        t["sigmas"] = chosen("training.sigmas", "sequence", {"levels": count})
    return found
