"""Device placement without a GPU: fake tensors on "cuda" raise when devices mix and at any hidden synchronisation."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call

from scorelab import (
    VE,
    VP,
    DiscreteVP,
    SubVP,
    broadcast,
    classifier_free,
    clipped,
    combined,
    from_denoiser,
    from_eps,
    from_time_score,
    sigmas,
)
from scorelab.guidance import Projected, Thresholded, autoguidance, classifier
from scorelab.inverse import Inpainting, Measurement, dps, pseudo_inverse
from scorelab.losses import Denoising, Implicit, Sliced, denoising_loss, implicit_loss, sliced_loss
from scorelab.losses.denoising import posterior_mean
from scorelab.models import Constant, LogSigma, ScoreModel
from scorelab.nn import EDM2, MLP, RefineNet, UNet
from scorelab.predictions import edm
from scorelab.processes import linear_betas
from scorelab.samplers import (
    DDIM,
    RK4,
    AdamsBashforth,
    Ancestral,
    AnnealedCorrector,
    AnnealedLangevin,
    Churn,
    ConsistentLangevin,
    Context,
    DPMSolverMultistep,
    DPMSolverSinglestep,
    Euler,
    Heun,
    Langevin,
    LangevinCorrector,
    Midpoint,
    PredictorCorrector,
    ReverseDiffusion,
    ReverseSDE,
    SDEDPMSolver,
    StochasticHeun,
    UnderdampedLangevin,
    UniPC,
)
from scorelab.typing import Batch

SAMPLERS = [
    Euler(),
    Heun(),
    Midpoint(),
    RK4(),
    AdamsBashforth(2),
    AdamsBashforth(3, "x0"),
    DPMSolverMultistep(3),
    DPMSolverSinglestep(3),
    UniPC(2),
    Churn(),
    SDEDPMSolver(),
    StochasticHeun(VP()),
    DDIM(0.5),
    Ancestral(),
    Ancestral("forward"),
    ReverseSDE(VP()),
    ReverseSDE(SubVP(), 0.0),
    ReverseDiffusion(VE()),
    Langevin(2, 0.1),
    AnnealedLangevin(2, 0.1),
    ConsistentLangevin(1, 0.3),
    UnderdampedLangevin(2, 0.1),
    PredictorCorrector(Euler(), LangevinCorrector()),
    PredictorCorrector(ReverseDiffusion(VE()), AnnealedCorrector(process=DiscreteVP(linear_betas()))),
]
NETWORKS = {
    "mlp": (MLP((2,), width=8), (2,), {"input_scale": Constant(2.0), "label": LogSigma(0.5)}),
    "unet": (UNet((1, 5, 4), width=8, attention=(1,), head=8), (1, 5, 4), {"label": "index"}),
    "refinenet": (RefineNet((1, 6, 4), width=8), (1, 6, 4), {}),
    "classes": (UNet((1, 5, 4), width=8, num_classes=3, null_class=True), (1, 5, 4), {"label": "index"}),
    "edm2": (
        EDM2((1, 6, 4), width=8, multipliers=(1, 2), attention=(1,), head=8, num_classes=3, null_class=True),
        (1, 6, 4),
        {"label": "log_sigma", "label_scale": 0.25},
    ),
    "points of classes": (
        MLP((2,), width=8, num_classes=3, null_class=True),
        (2,),
        {"input_scale": Constant(2.0), "label": LogSigma(0.5)},
    ),
}


def linear(x, sigma):
    return -x / (1 + broadcast(sigma, x) ** 2)


def run(sampler, score, x):
    state, levels = sampler.init(x, [2.0, 1.0, 0.5, 0.0]), [2.0, 1.0, 0.5, 0.0]
    for a, b in zip(levels, levels[1:], strict=False):
        x, state = sampler.step(Context(score, x, a, b, state, torch.randn_like))
    return x


@pytest.mark.parametrize("sampler", SAMPLERS, ids=repr)
def test_samplers_stay_on_the_device_without_synchronising(sampler):
    # coefficients are Python floats, computed once from float64 tensors on the CPU, which the mode would fake too
    run(sampler, linear, torch.randn(3, 2))
    with FakeTensorMode():
        x = run(sampler, linear, torch.randn(3, 2, device="cuda"))
        assert x.device.type == "cuda"
        assert x.dtype == torch.float32


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_and_models(name):
    net, shape, settings = NETWORKS[name]
    model = ScoreModel(net, DiscreteVP(linear_betas()), edm(0.5), data_shape=shape, **settings)
    # without gradients: a CPU build has no autograd for "cuda"
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        state = {k: torch.empty(v.shape, dtype=v.dtype, device="cuda") for k, v in model.state_dict().items()}
        state |= {k: torch.empty(v.shape, device="cuda") for k, v in model.named_buffers()}
        x = torch.randn(3, *shape, device="cuda")
        for sigma in (torch.full((), 0.5, device="cuda"), torch.full((3,), 0.5, device="cuda")):
            out = functional_call(model, state, (x, sigma))
            assert out.device.type == "cuda"
            assert out.dtype == torch.float32


@pytest.mark.parametrize(
    "score",
    [
        from_eps(linear),
        from_eps(linear, DiscreteVP(linear_betas())),
        from_denoiser(linear),
        from_time_score(linear, VP()),
        clipped(linear, -1.0, 1.0),
        combined(lambda x, sigma, a, b: a - b, linear, linear),
        classifier_free(linear, lambda x, s: 2 * linear(x, s), 3.0),
        classifier_free(linear, lambda x, s: 2 * linear(x, s), 3.0, interval=(0.1, 1.0)),
    ],
)
def test_adapters(score):
    with FakeTensorMode(allow_non_fake_inputs=True):
        x = torch.randn(3, 2, device="cuda")
        for sigma in (torch.full((), 0.5, device="cuda"), torch.full((3,), 0.5, device="cuda")):
            out = score(x, sigma)
            assert out.device.type == "cuda"
            assert out.dtype == torch.float32
        assert run(Euler(), score, x).device.type == "cuda"


GUIDED = {
    "autoguidance": lambda: autoguidance(linear, lambda x, s: -x, 2.0, rescale=0.7, threshold=Thresholded(0.9)),
    "projected": lambda: autoguidance(linear, lambda x, s: -x, 2.0, interval=(0.2, 5.0), projected=Projected(0.0, 2.0)),
    "classifier": lambda: classifier(linear, lambda x, s: -x.square().flatten(1).sum(1), 2.0),
    "dps": lambda: dps(linear, inpainted()),
    "pseudo-inverse": lambda: pseudo_inverse(linear, inpainted(), 0.5),
}


def inpainted() -> Measurement:
    """Two of four numbers."""
    return Measurement(Inpainting(torch.tensor([True, False, True, False])), torch.zeros(1, 2), 0.1)


@pytest.mark.parametrize("name", GUIDED)
def test_steered_scores_stay_on_the_device(name):
    """On "meta", for a CPU build has no gradients on "cuda"; the measurement comes to the samples."""
    x, sigma = torch.randn(3, 4, device="meta"), torch.full((3,), 0.7, device="meta")
    found = GUIDED[name]()(x, sigma)
    assert found.device.type == "meta"
    assert (found.shape, found.dtype) == (x.shape, torch.float32)


@pytest.mark.parametrize("objective", [Denoising, Implicit, Sliced])
def test_objectives_make_their_levels_on_the_device(objective):
    made = objective(sigmas.FromSigmas([2.0, 1.0, 0.5]))
    with FakeTensorMode(allow_non_fake_inputs=True):
        x, u = torch.randn(3, 2, device="cuda"), torch.rand(3, device="cuda")
        assert made.levels(u).device.type == "cuda"
        if objective is Denoising:
            labels = torch.zeros(3, dtype=torch.long, device="cuda")
            batch = Batch(x, labels, Batch(x, labels))
            assert made.losses(lambda x, s, c: linear(x, s), batch, u, x).device.type == "cuda"


def test_losses_and_noise_distributions():
    with FakeTensorMode():
        x, sigma = torch.randn(3, 2, device="cuda"), torch.full((3,), 0.5, device="cuda")

        def score(y, s):
            return -y / (1 + s.reshape(-1, 1) ** 2)

        assert denoising_loss(score, x, sigma, torch.randn_like(x)).device.type == "cuda"
        assert posterior_mean(x, sigma, torch.randn(9, 2, device="cuda")).device.type == "cuda"
        u = torch.rand(3, device="cuda")
        for distribution in (
            sigmas.LogUniform(0.1, 1.0),
            sigmas.Tapered(0.1, 0.5, 1.0),
            sigmas.LogNormal(),
            sigmas.FromProcess(VP()),
        ):
            assert distribution(u).dtype == torch.float32
    # a CPU build cannot run backward passes of "cuda" tensors: meta tensors stand in for them
    x, sigma, probes = (torch.empty(s, device="meta") for s in ((3, 2), (3,), (2, 3, 2)))
    for loss in (
        implicit_loss(score, x, sigma),
        implicit_loss(score, x, sigma, probes=probes),
        sliced_loss(score, x, sigma, probes),
    ):
        assert loss.device.type == "meta"


def test_mixing_devices_is_an_error_here():
    """The mode does catch what these tests look for."""
    with FakeTensorMode():
        x = torch.randn(3, 2, device="cuda")
        with pytest.raises(RuntimeError, match="device"):
            run(Euler(), lambda y, s: y + torch.ones(3, 2), x)
        with pytest.raises((RuntimeError, NotImplementedError)):
            run(Euler(), lambda y, s: y * float(y.sum()), x)
