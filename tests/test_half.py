"""x in half precision: coefficients, levels and labels stay in single, so only x itself is rounded."""

from __future__ import annotations

import pytest
import torch

from scorelab import from_denoiser, from_eps, from_time_score, sample, sigmas
from scorelab.checks import broadcast, widened
from scorelab.distributions import Gaussian, GaussianMixture
from scorelab.losses import denoising_loss
from scorelab.models import ScoreModel
from scorelab.nn import MLP, UNet
from scorelab.nn.embedding import PositionalEmbedding
from scorelab.predictions import EPS, PREDICTIONS, SCORE, convert, edm
from scorelab.processes import VE, VP
from scorelab.samplers import (
    DDIM,
    RK4,
    AdamsBashforth,
    Ancestral,
    Churn,
    DPMSolverMultistep,
    DPMSolverSinglestep,
    Euler,
    Heun,
    Midpoint,
    ProbabilityFlow,
    SDEDPMSolver,
    UniPC,
)

HALVES = [torch.float16, torch.bfloat16]
SAMPLERS = [
    *(Euler(), Heun(), Midpoint(), RK4(), AdamsBashforth(), DPMSolverMultistep(), DPMSolverSinglestep(), UniPC()),
    *(Ancestral(), DDIM(0.5), SDEDPMSolver(), Churn(), ProbabilityFlow()),
]


def rounding(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps


def unit_eps(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """E[eps | x] for data N(0, I), in x's dtype, computed in float64."""
    s = broadcast(sigma, x).double()
    return (x.double() * s / (1 + s**2)).to(x.dtype)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("sampler", SAMPLERS, ids=lambda s: type(s).__name__)
def test_every_sampler_gives_the_float32_result_rounded(sampler, dtype):
    """From sigma = 500, where sigma^2 is past float16's largest number, 65504."""
    levels = sigmas.karras(8, sigma_min=0.01, sigma_max=500.0)
    seen = []

    def score(x, sigma):
        seen.append((x.dtype, sigma.dtype))
        return from_eps(unit_eps)(x, sigma)

    def drawn(score, dtype):
        generator = torch.Generator().manual_seed(0)
        return sample(score, (64, 3), levels, sampler, generator=generator, dtype=dtype)

    half, single = drawn(score, dtype), drawn(from_eps(unit_eps), torch.float32)
    assert half.dtype == dtype
    assert set(seen) == {(dtype, torch.float32)}
    # eps is rounded where it counts sigma times; what follows contracts
    assert (half.float() - single).norm() < 30 * rounding(dtype) * single.norm()


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("source", [*PREDICTIONS.values(), edm(0.5)], ids=lambda p: p.name)
def test_models_and_conversions_are_right_past_float16s_largest_square(source, dtype):
    """N(0, I): the score is -x/(1 + sigma^2), x0_hat x/(1 + sigma^2)."""
    x = (700 * torch.randn(5, 4, generator=torch.Generator().manual_seed(1))).to(dtype)
    for sigma in (torch.tensor(700.0), torch.full((5,), 700.0), torch.full((5,), 700.0, dtype=dtype)):
        s = sigma.double().flatten()[0]
        x0_hat = x.double() / (1 + s**2)
        f = ((x0_hat - source.skip(s) * x.double()) / source.out(s)).to(dtype)

        class Net(torch.nn.Module):
            def __init__(self, answer: torch.Tensor) -> None:
                super().__init__()
                self.answer = answer

            def forward(self, x, label):
                assert x.dtype == dtype
                assert label.dtype == torch.float32
                return self.answer

        model = ScoreModel(Net(f), VE(sigma_max=1000.0), source, data_shape=(4,), label="log_sigma")
        for target, method, value in ((SCORE, model, -x0_hat), (EPS, model.eps, s * x0_hat)):
            found = method(x, sigma)
            assert found.dtype == dtype
            torch.testing.assert_close(found.double(), value, rtol=4 * rounding(dtype), atol=0)
            converted = convert(f, x, sigma, source, target)
            assert converted.dtype == dtype
            torch.testing.assert_close(converted.double(), value, rtol=4 * rounding(dtype), atol=0)


@pytest.mark.parametrize("dtype", HALVES)
def test_adapters_distributions_and_losses_compute_in_float32(dtype):
    x = (600 * torch.randn(6, 2, generator=torch.Generator().manual_seed(2))).to(dtype)
    process = VP()
    mixture = GaussianMixture(torch.tensor([[1.0, 0.0], [-1.0, 0.5]]), 0.5)
    for sigma in (torch.tensor(600.0), torch.linspace(300.0, 900.0, 6)):
        var = (1 + broadcast(sigma, x.float()) ** 2).double()
        score = -x.double() / var
        made = {
            "denoiser": from_denoiser(lambda y, s: (y.double() / (1 + broadcast(s, y).double() ** 2)).to(y.dtype)),
            "lambda": lambda y, s: -y / (1 + broadcast(s, y) ** 2),
            "gaussian": Gaussian(torch.zeros(2), 1.0).score,
        }
        for name, fn in made.items():
            torch.testing.assert_close(fn(x, sigma).double(), score, rtol=4 * rounding(dtype), atol=0, msg=name)
        # the mixture's own float32 values, on the same rounded x
        torch.testing.assert_close(
            mixture.score(x, sigma), mixture.score(x.float(), sigma).to(dtype), rtol=rounding(dtype), atol=0
        )
    sigma = torch.full((6,), 600.0)
    timed = from_time_score(lambda y, t: (-y.double() / (1.0 + 0 * t.reshape(-1, 1))).to(y.dtype), process)
    alpha = process.alpha(process.time(torch.tensor(60.0, dtype=torch.float64)))
    found = timed(x[:, :1] / 64, torch.full((6,), 60.0))
    torch.testing.assert_close(
        found.double(), -(alpha**2) * x[:, :1].double() / 64, rtol=8 * rounding(dtype), atol=1e-6 * rounding(dtype)
    )
    noise = torch.randn(6, 2, generator=torch.Generator().manual_seed(3))
    loss = denoising_loss(lambda y, s: 0 * y, torch.zeros(6, 2, dtype=dtype), sigma, noise, lambda s: s**2)
    torch.testing.assert_close(loss, 600.0**2 * noise.square().mean(1))


def test_labels_are_embedded_in_full_precision():
    """bf16 has 8 bits: 999 becomes 1000, and a frequency's rounding is radians away at such a label."""
    label = torch.tensor([999.0, 3.0])
    right = torch.cat([f(label[:, None] * torch.logspace(0, -4, 8)) for f in (torch.cos, torch.sin)], 1)
    embedding = PositionalEmbedding(16)
    torch.testing.assert_close(embedding(label), right, rtol=0, atol=2e-4)
    torch.testing.assert_close(embedding.bfloat16()(label), right, rtol=0, atol=2e-4)
    for net, shape in ((UNet((1, 8, 8), width=8, blocks=1, embedding="positional"), (1, 8, 8)), (MLP((2,)), (2,))):
        torch.manual_seed(0)
        for p in net.parameters():
            torch.nn.init.normal_(p, std=0.1)
        x, label = torch.randn(2, *shape), torch.tensor([5.98, 5.99])
        single = net(x, label)
        half = net.bfloat16()(x.bfloat16(), label)
        assert half.dtype == torch.bfloat16
        assert widened(half - single).norm() < 0.05 * single.norm()
