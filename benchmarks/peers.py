"""The deterministic samplers of other libraries, behind one signature: ``run(denoise, x, nfe, low, high)``.

``denoise(x, sigma)`` is the problem's exact or trained denoiser; every row takes ``nfe`` evaluations of it from x at
sigma = high. A library that is not installed is left out, and said to be.

k-diffusion and smalldiffusion import torchvision for images when they are imported as a whole, and it does not import
beside the CPU build of torch. Only their modules with the samplers are loaded here, which don't use it.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import sys
import types
from collections.abc import Callable, Iterator
from types import ModuleType

import torch

Denoiser = Callable[[torch.Tensor, float], torch.Tensor]
Run = Callable[[Denoiser, torch.Tensor, int, float, float], torch.Tensor]


def submodule(package: str, name: str) -> ModuleType:
    """One module of a package without what the package imports besides; torchvision is an empty module to it."""
    spec = importlib.util.find_spec(package)
    assert spec is not None
    assert spec.submodule_search_locations is not None
    shell = types.ModuleType(package)
    shell.__path__ = list(spec.submodule_search_locations)
    shell.__spec__ = spec
    absent = {key: types.ModuleType(key) for key in ("torchvision", "torchvision.transforms")}
    absent["torchvision.transforms"].functional = None  # type: ignore[attr-defined]
    kept = {key: sys.modules.get(key) for key in absent}
    sys.modules.update({package: shell, **absent})
    try:
        return importlib.import_module(f"{package}.{name}")
    finally:
        for key, module in kept.items():
            if module is None:
                del sys.modules[key]
            else:
                sys.modules[key] = module


def azula() -> Iterator[tuple[str, Run]]:
    from azula.denoise import Denoiser as Base
    from azula.denoise import DiracPosterior
    from azula.noise import Schedule, VESchedule
    from azula.sample import REABSampler, vABSampler, xEABSampler, zEABSampler

    class Karras(Schedule):  # type: ignore[misc]
        def __init__(self, low, high):
            super().__init__()
            self.low, self.high = low ** (1 / 7), high ** (1 / 7)

        def __call__(self, t):
            return torch.ones_like(t), (self.low + t * (self.high - self.low)) ** 7

    class Given(Base):  # type: ignore[misc]
        def __init__(self, denoise, schedule):
            super().__init__()
            self.denoise, self.schedule = denoise, schedule

        def forward(self, x, t):
            return DiracPosterior(mean=self.denoise(x, float(self.schedule(t)[1])))

    for kind in (vABSampler, zEABSampler, xEABSampler, REABSampler):
        for order in (2, 3):
            for grid, schedule in (("karras 7", Karras), ("log-linear", VESchedule)):

                def run(denoise, x, nfe, low, high, kind=kind, order=order, schedule=schedule):
                    given = Given(denoise, schedule(low, high))
                    return denoise(kind(given, order=order, steps=nfe - 1, silent=True, dtype=x.dtype)(x), low)

                yield f"azula {kind.__name__.removesuffix('Sampler')}-{order}, {grid}", run


def diffusers() -> Iterator[tuple[str, Run]]:
    from diffusers import EDMDPMSolverMultistepScheduler, EDMEulerScheduler

    def run(denoise, x, nfe, low, high, kind, grid, options):
        scheduler = kind(sigma_min=low, sigma_max=high, sigma_data=0.5, sigma_schedule=grid, **options)
        scheduler.set_timesteps(nfe)
        x = x / high * float(scheduler.init_noise_sigma)
        for i, t in enumerate(scheduler.timesteps):
            s = float(scheduler.sigmas[i])
            scheduler.scale_model_input(x, t)
            # what a network with EDM's preconditioning returns
            skip, out = 0.25 / (s**2 + 0.25), s * 0.5 / math.sqrt(s**2 + 0.25)
            x = scheduler.step((denoise(x, s) - skip * x) / out, t, x).prev_sample
        return x

    for grid in ("karras", "exponential"):
        for name, kind, options in (
            ("Euler", EDMEulerScheduler, {}),
            ("DPM++ 2M", EDMDPMSolverMultistepScheduler, {"solver_order": 2}),
            ("DPM++ 3M", EDMDPMSolverMultistepScheduler, {"solver_order": 3}),
        ):
            yield (
                f"diffusers EDM {name}, {grid}",
                lambda d, x, n, low, high, a=kind, b=grid, c=options: run(d, x, n, low, high, a, b, c),
            )


def diffusers_unipc() -> Iterator[tuple[str, Run]]:
    """UniPC takes a variance-preserving x and eps: x / sqrt(1 + sigma^2) at levels handed to it."""
    from diffusers import UniPCMultistepScheduler

    def run(denoise, x, nfe, low, high, order):
        scheduler = UniPCMultistepScheduler(
            use_karras_sigmas=True, solver_order=order, prediction_type="epsilon", final_sigmas_type="zero"
        )
        scheduler.set_timesteps(nfe)
        ramp = torch.linspace(high ** (1 / 7), low ** (1 / 7), nfe, dtype=torch.float64) ** 7
        scheduler.sigmas = torch.cat([ramp, ramp.new_zeros(1)])
        x = x / math.sqrt(1 + high**2)
        for i, t in enumerate(scheduler.timesteps):
            s = float(scheduler.sigmas[i])
            y = x * math.sqrt(1 + s**2)
            x = scheduler.step((y - denoise(y, s)) / s, t, x).prev_sample
        return x

    for order in (2, 3):
        yield f"diffusers UniPC-{order}, karras", lambda d, x, n, low, high, k=order: run(d, x, n, low, high, k)


def k_diffusion() -> Iterator[tuple[str, Run]]:
    k = submodule("k_diffusion", "sampling")
    grids = {
        "karras": lambda n, low, high: k.get_sigmas_karras(n, low, high),
        "exponential": lambda n, low, high: k.get_sigmas_exponential(n, low, high),
    }
    # evaluations of a step
    methods = {
        "euler": (k.sample_euler, 1),
        "heun": (k.sample_heun, 2),
        "dpm_2": (k.sample_dpm_2, 2),
        "lms4": (k.sample_lms, 1),
        "dpmpp_2m": (k.sample_dpmpp_2m, 1),
    }
    for name, (method, cost) in methods.items():
        for grid, levels in grids.items():

            def run(denoise, x, nfe, low, high, method=method, cost=cost, levels=levels):
                sigmas = levels((nfe - 1) // cost + 1, low, high).double()
                sigmas[0] = high
                return method(lambda y, s: denoise(y, float(s[0])), x, sigmas, disable=True)

            yield f"k-diffusion {name}, {grid}", run


def smalldiffusion() -> Iterator[tuple[str, Run]]:
    small = submodule("smalldiffusion", "diffusion")

    class Given(torch.nn.Module):
        def __init__(self, denoise):
            super().__init__()
            self.denoise = denoise

        def rand_input(self, count):
            return torch.zeros(count, 1)

        def predict_eps_cfg(self, x, sigma, cond, scale):
            return (x - self.denoise(x, float(sigma))) / float(sigma)

    for name, gain in (("DDIM", 1.0), ("accelerated, gam = 2", 2.0)):

        def run(denoise, x, nfe, low, high, gain=gain):
            levels = torch.logspace(math.log10(high), math.log10(low), nfe, dtype=torch.float64)
            levels = torch.cat([levels, levels.new_zeros(1)])
            levels[0] = high
            *_, last = small.samples(Given(denoise), levels, gam=gain, xt=x)
            return last

        yield f"smalldiffusion {name}, log-linear", run


PEERS = {
    "azula": [azula],
    "diffusers": [diffusers, diffusers_unipc],
    "k_diffusion": [k_diffusion],
    "smalldiffusion": [smalldiffusion],
}


def peers() -> dict[str, Run]:
    """Every row of the peers that are installed."""
    found: dict[str, Run] = {}
    for module, families in PEERS.items():
        if importlib.util.find_spec(module) is None:
            print(f"{module} is not installed: its rows are left out", flush=True)
        else:
            for family in families:
                found.update(family())
    return found
