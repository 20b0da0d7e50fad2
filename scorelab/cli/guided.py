"""Flags of what samples are conditioned on and how they are guided."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from absl import flags

__all__ = ["GUIDED", "define_guidance", "guidance_of", "guided_names"]

GUIDED: dict[str, str | None] = {"condition": "", "guidance_interval": None, "classifier": None}
"""Those that are texts, with their defaults."""


def define_guidance(values: flags.FlagValues) -> None:
    """Those that are numbers."""
    flags.DEFINE_float("guidance", None, "scale of guidance, 1: none", flag_values=values)
    flags.DEFINE_float("guidance_rescale", None, "share of its deviation that is taken back", flag_values=values)
    flags.DEFINE_integer("autoguidance", None, "guide away from this earlier step", flag_values=values)


def guidance_of(values: flags.FlagValues) -> dict[str, Any]:
    """What was asked for, None where nothing was."""
    names = ("condition", "guidance", "guidance_interval", "guidance_rescale", "autoguidance", "classifier")
    return {name: values[name].value for name in names}


def guided_names(values: flags.FlagValues) -> list[str]:
    """The same for the name of a file."""
    scale, interval, rescale, step = (
        values[name].value for name in ("guidance", "guidance_interval", "guidance_rescale", "autoguidance")
    )
    parts = [str(values["condition"].value), "" if scale is None else f"guided_{scale:g}"]
    parts += [str(interval or "").replace(",", "_"), "" if rescale is None else f"rescaled_{rescale:g}"]
    by = values["classifier"].value
    parts += ["" if step is None else f"from_{step}", f"by_{Path(by).name}" if by else ""]
    return [part.replace("/", "_") for part in parts]
