"""score_sde's checkpoints: what their shapes tell, in the order in which the release builds its modules."""

from __future__ import annotations

import warnings
from itertools import pairwise, product

import pytest
import torch

from scorelab import sample
from scorelab.interop.loading import load
from scorelab.interop.unets import from_score_sde, score_sde_settings
from scorelab.nn import ddpm, ncsnpp
from scorelab.samplers import Ancestral, LangevinCorrector, PredictorCorrector, ReverseDiffusion

SHAPE = (3, 16, 16)


def conv(name: str, channels: int, out: int, kernel: int = 3) -> dict[str, tuple[int, ...]]:
    return {f"{name}weight": (out, channels, kernel, kernel), f"{name}bias": (out,)}


def norm(name: str, channels: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}weight": (channels,), f"{name}bias": (channels,)}


def linear(name: str, channels: int, out: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}weight": (out, channels), f"{name}bias": (out,)}


def nin(name: str, channels: int, out: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}W": (channels, out), f"{name}b": (out,)}


def checkpoint(
    *,
    width: int,
    multipliers: tuple[int, ...],
    blocks: int,
    attention: tuple[int, ...],
    plain: bool = False,
    gaussian: bool = True,
    inputs: str = "none",
    outputs: str = "none",
    combine: str = "sum",
    fir: bool = True,
) -> dict[str, torch.Tensor]:
    """Weights of score_sde's NCSNpp, or with ``plain`` of its DDPM, by the order and the names of its constructor.

    Modules without weights have a number, too.
    """
    modules: list[dict[str, tuple[int, ...]]] = []
    inner, channels, resampling = 4 * width, SHAPE[0], "Conv2d_0." if fir and not plain else "Conv_0."

    def residual(into: int, out: int, moved: bool = False) -> None:
        skip = nin("NIN_0.", into, out) if plain else conv("Conv_2.", into, out, 1)
        made = norm("GroupNorm_0.", into) | conv("Conv_0.", into, out) | linear("Dense_0.", inner, out)
        made |= norm("GroupNorm_1.", out) | conv("Conv_1.", out, out)
        modules.append(made | (skip if into != out or moved else {}))

    def attend(now: int) -> None:
        modules.append(
            norm("GroupNorm_0.", now) | {k: v for i in range(4) for k, v in nin(f"NIN_{i}.", now, now).items()}
        )

    if gaussian:
        modules.append({"W": (width,)})
    modules.append(linear("", width * (1 + gaussian), inner))
    modules.append(linear("", inner, inner))
    modules.append(conv("", channels, width))
    now, kept, pyramid, deepest = width, [width], channels, len(multipliers) - 1
    for i, m in enumerate(multipliers):
        for _ in range(blocks):
            residual(now, width * m)
            now = width * m
            if i in attention:
                attend(now)
            kept.append(now)
        if i < deepest:
            if plain:
                modules.append(conv("Conv_0.", now, now))
            else:
                residual(now, now, moved=True)
            if inputs == "skip":
                modules.append({})
                modules.append(conv("Conv.", channels, now, 1))
                now *= 1 + (combine == "cat")
            elif inputs == "residual":
                modules.append(conv(resampling, pyramid, now))
                pyramid = now
            kept.append(now)
    residual(now, now)
    attend(now)
    residual(now, now)
    for i in reversed(range(deepest + 1)):
        for _ in range(blocks + 1):
            residual(now + kept.pop(), width * multipliers[i])
            now = width * multipliers[i]
        if i in attention:
            attend(now)
        if outputs == "skip":
            modules.extend([{}] if i < deepest else [])
            modules.extend([norm("", now), conv("", now, channels)])
        elif outputs == "residual":
            modules.extend([norm("", now), conv("", now, now)] if i == deepest else [conv(resampling, pyramid, now)])
            pyramid = now
        if i and plain:
            modules.append(conv("Conv_0.", now, now))
        elif i:
            residual(now, now, moved=True)
    if outputs != "skip":
        modules.extend([norm("", now), conv("", now, channels)])
    generator = torch.Generator().manual_seed(0)
    return {
        f"all_modules.{n}.{k}": torch.randn(shape, generator=generator) * 0.1
        for n, module in enumerate(modules)
        for k, shape in module.items()
    }


SIZES = [
    {"width": 8, "multipliers": (1, 2, 2), "blocks": 1, "attention": (1,)},
    {"width": 8, "multipliers": (1, 1, 3), "blocks": 3, "attention": (0, 2)},
    {"width": 12, "multipliers": (2, 1), "blocks": 2, "attention": ()},
]
KINDS = ("none", "skip", "residual")


@pytest.mark.parametrize("sizes", SIZES)
def test_settings_of_ncsnpp_are_found_in_the_shapes(sizes):
    for gaussian, inputs, outputs, combine, fir in product((True, False), KINDS, KINDS, ("sum", "cat"), (True, False)):
        if combine == "cat" and inputs != "skip":
            continue
        state = checkpoint(**sizes, gaussian=gaussian, inputs=inputs, outputs=outputs, combine=combine, fir=fir)
        name, found = score_sde_settings(state)
        expected = {"embedding": "gaussian" if gaussian else "positional", "inputs": inputs, "outputs": outputs}
        assert name == "ncsnpp"
        expected |= {"combine": combine, "resampling": "block"}
        assert {k: v for k, v in found.items() if k != "fir"} == {**sizes, **expected}
        # and all of its weights have a place
        net = ncsnpp(SHAPE, **{**found, "fir": (1.0, 3.0, 3.0, 1.0) if fir else ()})
        net.load_state_dict(from_score_sde(net, state))


@pytest.mark.parametrize("sizes", SIZES)
def test_settings_of_ddpm_are_found_in_the_shapes(sizes):
    state = checkpoint(**sizes, plain=True, gaussian=False)
    name, found = score_sde_settings(state)
    assert name == "ddpm"
    assert found == {**sizes, "attention_up": "last", "resampling": "same"}
    net = ddpm(SHAPE, **found)
    net.load_state_dict(from_score_sde(net, state))


def test_a_checkpoint_of_256_px_needs_no_settings(tmp_path):
    """Its network has both pyramids; its levels are inside."""
    state = checkpoint(**SIZES[0], inputs="skip", outputs="skip")
    trained = [v for k, v in state.items() if not k.endswith("modules.0.W")]
    sigmas = torch.logspace(2, -2, 50)
    whole = {"optimizer": {}, "ema": {"shadow_params": trained}, "step": 1}
    whole["model"] = {f"module.{k}": v for k, v in state.items()} | {"module.sigmas": sigmas}
    torch.save(whole, tmp_path / "checkpoint_1.pth")
    model = load(tmp_path / "checkpoint_1.pth", "score_sde", image_size=32)
    # twice the release's, whose data is in [0, 1]
    assert model.sigma_range == pytest.approx((0.02, 200), rel=1e-5)
    assert model.data_shape == (3, 32, 32)
    assert (model.net.config["inputs"], model.net.config["outputs"]) == ("skip", "skip")
    # the release's output is the score of its data, of half the range: with 2x - 1 for x, and sigma doubled, half of it
    net = ncsnpp((3, 32, 32), **score_sde_settings(state)[1])
    net.load_state_dict(from_score_sde(net, state))
    x, sigma = torch.rand(2, 3, 32, 32), torch.tensor([0.5, 25.0])
    with torch.no_grad():
        expected = net.eval()(2 * x - 1, sigma.log()) / sigma.reshape(-1, 1, 1, 1)
        torch.testing.assert_close(2 * model(2 * x - 1, 2 * sigma), expected, rtol=1e-4, atol=1e-5)


def test_discrete_noise_levels_are_labels_from_the_largest_on(tmp_path):
    state = checkpoint(**SIZES[2], plain=True, gaussian=False)
    whole = {"ema": {"shadow_params": list(state.values())}, "step": 1}
    whole["model"] = {f"module.{k}": v for k, v in state.items()} | {"module.sigmas": torch.logspace(1, -2, 4)}
    torch.save(whole, tmp_path / "checkpoint_1.pth")
    model = load(tmp_path / "checkpoint_1.pth", "score_sde", sde="ve")
    seen = []
    model.net.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[1]))
    model(torch.randn(4, 3, 32, 32), 2 * torch.logspace(1, -2, 4))
    torch.testing.assert_close(seen[0], torch.arange(4.0), rtol=0, atol=1e-4)


def saved(path, state: dict[str, torch.Tensor], sigmas: torch.Tensor | None = None) -> None:
    """A checkpoint of the release, with its averages."""
    trained = [v for k, v in state.items() if not k.endswith("modules.0.W")]
    model = {f"module.{k}": v for k, v in state.items()} | ({} if sigmas is None else {"module.sigmas": sigmas})
    torch.save({"optimizer": {}, "model": model, "ema": {"shadow_params": trained}, "step": 1}, path)


def test_ve_samples_by_the_releases_own_rules(tmp_path):
    """Langevin correction, then reverse diffusion, from the same noise, in the release's units: data in [0, 1]."""
    state, sigmas = checkpoint(**SIZES[0], inputs="residual"), torch.logspace(1, -2, 6, dtype=torch.float64)
    # an output as large as noise has, for the bound on the corrector's step, which the release lacks, to have no effect
    last = max(int(k.split(".")[1]) for k in state)
    for kind in ("weight", "bias"):
        state[f"all_modules.{last}.{kind}"] *= 40
    saved(tmp_path / "checkpoint.pth", state, sigmas.float())
    model = load(tmp_path / "checkpoint.pth", "score_sde", image_size=16)
    net = ncsnpp(SHAPE, **score_sde_settings(state)[1])
    net.load_state_dict(from_score_sde(net, state))
    start = torch.randn(1, *SHAPE, generator=torch.Generator().manual_seed(1)) * 10
    sampler = PredictorCorrector(ReverseDiffusion(model.process), LangevinCorrector(0.16), corrector_first=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "explicit steps as long as")
        found = sample(model, 2 * start - 1, 2 * sigmas, sampler, generator=torch.Generator().manual_seed(0))
    x, draws = start, torch.Generator().manual_seed(0)
    with torch.no_grad():
        for sigma, following in pairwise(sigmas.tolist()):
            for corrector in (True, False):
                score = net.eval()(2 * x - 1, torch.tensor([sigma]).log()) / sigma
                assert float(score.norm()) * sigma > 0.5 * x.numel() ** 0.5
                z = torch.randn(x.shape, generator=draws)
                if corrector:
                    step = (0.16 * z.norm() / score.norm()) ** 2 * 2
                    x = x + step * score + (2 * step).sqrt() * z
                else:
                    x = x + (sigma**2 - following**2) * score + (sigma**2 - following**2) ** 0.5 * z
    torch.testing.assert_close(found, 2 * x - 1, rtol=1e-3, atol=1e-3 * float(x.abs().max()))


def test_vp_samples_by_the_releases_own_rules(tmp_path):
    """Ancestral steps in scaled coordinates: (x + beta score) / sqrt(1 - beta) + sqrt(beta) z, the last without z."""
    state = checkpoint(**SIZES[2], plain=True, gaussian=False)
    saved(tmp_path / "checkpoint.pth", state)
    model = load(tmp_path / "checkpoint.pth", "score_sde", sde="vp", continuous=False, image_size=16)
    net = ddpm(SHAPE, **score_sde_settings(state)[1])
    net.load_state_dict(from_score_sde(net, state))
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    kept = torch.cumprod(1 - betas, 0)
    # the last ten steps, all of them
    first = 9
    sigmas = [float(((1 - kept[i]) / kept[i]).sqrt()) for i in range(first, -1, -1)]
    x = torch.randn(1, *SHAPE, generator=torch.Generator().manual_seed(1))
    levels, sampler = torch.tensor([*sigmas, 0.0], dtype=torch.float64), Ancestral("forward", model.process)
    start = x / float(kept[first].sqrt())
    found = sample(model, start, levels, sampler, generator=torch.Generator().manual_seed(0))
    draws = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for i in range(first, -1, -1):
            beta, std = float(betas[i]), float((1 - kept[i]).sqrt())
            score = -net.eval()(x, torch.tensor([float(i)])) / std
            x = (x + beta * score) / (1 - beta) ** 0.5
            if i:
                x = x + beta**0.5 * torch.randn(x.shape, generator=draws)
    torch.testing.assert_close(found, x, rtol=1e-3, atol=1e-3)
