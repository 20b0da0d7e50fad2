from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from problems import F64, PROCESSES, REFERENCE, correlated, generator, mixture, randn, ring

from scorelab import VE, VP, DiscreteVP, SubVP, sample, sigmas, trajectory
from scorelab.distributions import Gaussian
from scorelab.samplers import (
    DDIM,
    RK4,
    AdamsBashforth,
    Ancestral,
    AnnealedCorrector,
    AnnealedLangevin,
    Calibrated,
    Context,
    DPMSolverSinglestep,
    Euler,
    Heun,
    Langevin,
    LangevinCorrector,
    Midpoint,
    PredictorCorrector,
    ProbabilityFlow,
    ReverseDiffusion,
    ReverseSDE,
    Sampler,
    StochasticHeun,
    UniPC,
    Wrapper,
)
from scorelab.samplers.corrected import corrector_step_size
from scorelab.samplers.langevin import langevin_step

GRID = sigmas.geometric(30, sigma_min=0.05, sigma_max=20.0)
FIXED: dict[str, Sampler] = {
    "euler": Euler(),
    "heun": Heun(),
    "ddim": DDIM(),
    "ddim eta": DDIM(0.5),
    "ancestral": Ancestral(),
    "ancestral forward": Ancestral("forward"),
    "ancestral ve": Ancestral("forward", VE()),
    "reverse sde": ReverseSDE(VP()),
    "ode in time": ReverseSDE(SubVP(), 0.0),
    "reverse diffusion": ReverseDiffusion(VE(0.01, 50)),
    "langevin": Langevin(3, 1e-3),
    "annealed": AnnealedLangevin(3, 1e-3),
    "pc": PredictorCorrector(Euler(), LangevinCorrector(0.05)),
}


def rates(sampler: Sampler, counts: list[int], grid, exact) -> float:
    """Slope of log error against log steps, starting from exact values at the first level."""
    errors = []
    for n in counts:
        levels = grid(n)
        x = sample(GAUSSIAN.score, exact(levels[0]), levels, sampler)
        errors.append(float((x - exact(levels[-1])).abs().max()))
    return -np.polyfit(np.log(counts), np.log(errors), 1)[0]


GAUSSIAN = Gaussian(torch.tensor([1.0, -0.5], dtype=F64), torch.tensor([0.5, 2.0], dtype=F64))


def flow(sigma) -> torch.Tensor:
    """The exact ODE on a Gaussian: (x - mean) / sqrt(var + sigma^2) is constant."""
    return (
        GAUSSIAN.mean
        + torch.tensor([[1.0, -2.0], [0.3, 0.7]], dtype=F64) * (GAUSSIAN.variances + float(sigma) ** 2).sqrt()
    )


@pytest.mark.parametrize(
    ("sampler", "order"),
    [(Euler(), 1), (Heun(), 2), (DDIM(), 1), (ReverseSDE(VP(), 0.0, True), 1), (ReverseSDE(SubVP(), 0.0, True), 1)],
)
def test_order(sampler, order):
    assert sampler.order == order
    measured = rates(sampler, [40, 80, 160, 320], lambda n: sigmas.geometric(n + 1, sigma_min=0.1, sigma_max=10), flow)
    assert measured == pytest.approx(order, abs=0.1)


def test_order_from_a_cold_start_to_zero():
    """Ending on the denoised sample costs Heun nothing when the last level shrinks with the grid."""
    errors = []
    for n in (20, 40, 80):
        levels = sigmas.karras(n, sigma_min=0.2 / n**2, sigma_max=10)
        errors.append(float((sample(GAUSSIAN.score, flow(10.0), levels, Heun()) - flow(0.0)).abs().max()))
    assert np.log2(errors[0] / errors[1]) > 1.7
    assert np.log2(errors[1] / errors[2]) > 1.7


class Affine:
    """Propagates mean and covariance of x exactly through samplers whose steps are affine in (x, noise)."""

    def __init__(self, sampler: Sampler, levels: list[float]) -> None:
        self.sampler, self.levels = sampler, levels

    def moments(self, d: Gaussian) -> tuple[torch.Tensor, torch.Tensor]:
        levels = self.levels
        mean, var = d.mean, d.variances + levels[0] ** 2
        for a, b in zip(levels[:-1], levels[1:], strict=True):

            def step(x: torch.Tensor, z: float, a=a, b=b) -> torch.Tensor:
                return self.sampler.step(Context(d.score, x[None], a, b, None, lambda y: torch.full_like(y, z)))[0][0]

            zero = step(torch.zeros(2, dtype=F64), 0.0)
            slope = step(torch.ones(2, dtype=F64), 0.0) - zero
            kick = step(torch.zeros(2, dtype=F64), 1.0) - zero
            mean, var = zero + slope * mean, slope**2 * var + kick**2
        return mean, var


@pytest.mark.parametrize(
    "name",
    [
        "ddim",
        "ddim eta",
        "ancestral",
        "ancestral forward",
        "ancestral ve",
        "reverse sde",
        "ode in time",
        "euler",
        "heun",
    ],
)
def test_moments_converge_to_the_gaussian(name):
    """Exact moments of the sampler's output approach the target's at first order or better in the number of steps."""
    target, gaps = torch.tensor([0.5, 2.0], dtype=F64) + 0.02**2, []
    for n in (400, 800, 1600):
        mean, var = Affine(FIXED[name], sigmas.geometric(n, sigma_min=0.02, sigma_max=100).tolist()).moments(GAUSSIAN)
        gaps.append(max(float((var - target).abs().max()), float((mean - GAUSSIAN.mean).abs().max())))
    assert gaps[2] < 0.02
    assert gaps[0] / gaps[2] > 3.5


def test_ancestral_on_a_gaussian_is_exact_in_its_variances():
    """With the posterior mean and variance of point data the sampler's variance is the closed form, step by step."""
    point = Gaussian(torch.zeros(2, dtype=F64), 0.0)
    _, var = Affine(Ancestral(), [5.0, 2.0, 1.0, 0.3]).moments(point)
    torch.testing.assert_close(var, torch.full((2,), 0.09, dtype=F64))


def constant_field(value: torch.Tensor):
    return lambda x, sigma: value.expand_as(x)


def scaled_score(process, t: float, x: torch.Tensor) -> torch.Tensor:
    """The score that the release was fed: of N(0, 0.25 I) data, at t, in scaled coordinates."""
    time = torch.tensor(t, dtype=F64)
    return -x / (0.25 * process.alpha(time) ** 2 + process.std(time) ** 2)


RELEASE = {"ve": VE(0.01, 50.0), "vp": VP(), "subvp": SubVP()}


def reference_step(name: str, key: str, sampler: Sampler, process, t: float, t_next: float) -> None:
    """One step of the release at t, in scaled coordinates: score, noise and state are the stored ones."""
    ref = np.load(REFERENCE / "score_sde_sdes.npz")
    x, z = (torch.tensor(ref[k], dtype=F64) for k in ("x", "z"))
    score_t = scaled_score(RELEASE[name], 0.37, x)
    times = torch.tensor([t, t_next], dtype=F64)
    alpha, sigma = process.alpha(times), process.sigma(times)
    for noise, stored in ((z, "x_next"), (torch.zeros_like(z), "x_mean")):
        found, _ = sampler.step(
            Context(
                constant_field(alpha[0] * score_t),
                x / alpha[0],
                float(sigma[0]),
                float(sigma[1]),
                None,
                lambda y, n=noise: n,
            )
        )
        expected = torch.tensor(ref[f"{name}/{key}/{stored}"], dtype=F64)
        torch.testing.assert_close(alpha[1] * found, expected, rtol=1e-5, atol=1e-5)


N = 1000
VP_STEPS = DiscreteVP(torch.linspace(0.1 / N, 20 / N, N, dtype=F64))


@pytest.mark.parametrize("name", ["ve", "vp", "subvp"])
def test_score_sde_euler_maruyama(name):
    process = RELEASE[name]
    ref = np.load(REFERENCE / "score_sde_sdes.npz")
    x, z = (torch.tensor(ref[k], dtype=F64) for k in ("x", "z"))
    times = torch.tensor([0.37, 0.37 - 1 / N], dtype=F64)
    alpha, sigma = process.alpha(times), process.sigma(times)
    for noise, stored in ((z, "x_next"), (torch.zeros_like(z), "x_mean")):
        score = constant_field(alpha[0] * scaled_score(process, 0.37, x))
        sampler = ReverseSDE(process, explicit=True)
        found, _ = sampler.step(
            Context(score, x / alpha[0], float(sigma[0]), float(sigma[1]), None, lambda y, n=noise: n)
        )
        expected = torch.tensor(ref[f"{name}/euler_maruyama/{stored}"], dtype=F64)
        torch.testing.assert_close(alpha[1] * found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("ode", [False, True])
@pytest.mark.parametrize("name", ["ve", "vp"])
def test_score_sde_reverse_diffusion(name, ode):
    index = int(0.37 * (N - 1))
    key = "reverse_diffusion_ode" if ode else "reverse_diffusion"
    if name == "vp":
        reference_step(name, key, ReverseDiffusion(VP_STEPS, ode), VP_STEPS, (index + 1) / N, index / N)
    else:
        process = VE(0.01, 50.0)
        reference_step(name, key, ReverseDiffusion(process, ode), process, index / (N - 1), (index - 1) / (N - 1))


@pytest.mark.parametrize("name", ["ve", "vp"])
def test_score_sde_ancestral(name):
    index = int(0.37 * (N - 1))
    if name == "vp":
        reference_step(name, "ancestral_sampling", Ancestral("forward", VP_STEPS), VP_STEPS, (index + 1) / N, index / N)
    else:
        process = VE(0.01, 50.0)
        reference_step(name, "ancestral_sampling", Ancestral(), process, index / (N - 1), (index - 1) / (N - 1))


@pytest.mark.parametrize("name", ["ve", "vp"])
def test_score_sde_langevin_corrector(name):
    """The release averages norms over the batch; given those norms the update is ours."""
    ref = np.load(REFERENCE / "score_sde_sdes.npz")
    x, z = (torch.tensor(ref[k], dtype=F64) for k in ("x", "z"))
    s = scaled_score(RELEASE[name], 0.37, x)
    damping = 1 - float(VP_STEPS.betas[int(0.37 * (N - 1))]) if name == "vp" else 1.0
    b = damping * corrector_step_size(0.16, z.flatten(1).norm(dim=1).mean(), s.flatten(1).norm(dim=1).mean())
    torch.testing.assert_close(
        langevin_step(x, s, 2 * b, z), torch.tensor(ref[f"{name}/langevin/x_next"], dtype=F64), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("name", ["ve", "vp"])
def test_score_sde_annealed_corrector(name):
    """The release's ALD: std of the continuous process at t = 0.37, beta of the discrete step; scaled coordinates."""
    ref = np.load(REFERENCE / "score_sde_sdes.npz")
    x, z = (torch.tensor(ref[k], dtype=F64) for k in ("x", "z"))
    s = scaled_score(RELEASE[name], 0.37, x)
    process, t = (VE(0.01, 50.0) if name == "ve" else VP()), torch.tensor(0.37, dtype=F64)
    alpha, sigma = float(process.alpha(t)), float(process.sigma(t))
    corrector = AnnealedCorrector(0.16, process=VP_STEPS if name == "vp" else None)
    found = corrector.correct(constant_field(alpha * s), x / alpha, sigma, lambda y: z)
    torch.testing.assert_close(alpha * found, torch.tensor(ref[f"{name}/ald/x_next"], dtype=F64), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("schedule", ["linear1000", "cosine1000"])
def test_guided_diffusion_posterior(schedule):
    """The affine coefficients of one ancestral step, read off by feeding unit inputs, are the release's."""
    ref = np.load(REFERENCE / "guided_diffusion_gaussian.npz")
    p = DiscreteVP(ref[f"{schedule}/betas"].tolist())
    levels = [0.0, *p.step_sigmas.tolist()]
    alphas = [1.0, *(1 / (1 + p.step_sigmas**2).sqrt()).tolist()]
    for i in (1, 2, 3, 10, 500, 999, 1000):

        def step(x: float, x0: float, z: float, i=i) -> float:
            """One step in scaled coordinates."""
            denoiser = lambda y, sigma: (x0 - y) / sigma**2  # noqa: E731
            start = torch.full((1, 1), x / alphas[i], dtype=F64)
            out, _ = Ancestral().step(
                Context(denoiser, start, levels[i], levels[i - 1], None, lambda y: torch.full_like(y, z))
            )
            return float(out) * alphas[i - 1]

        assert step(0, 1, 0) == pytest.approx(ref[f"{schedule}/posterior_mean_coef1"][i - 1], rel=1e-10)
        assert step(1, 0, 0) == pytest.approx(ref[f"{schedule}/posterior_mean_coef2"][i - 1], rel=1e-10, abs=1e-12)
        variance = step(0, 0, 1) ** 2
        assert variance == pytest.approx(ref[f"{schedule}/posterior_variance"][i - 1], rel=1e-10, abs=1e-20)
        if i > 1:
            assert math.log(variance) == pytest.approx(
                ref[f"{schedule}/posterior_log_variance_clipped"][i - 1], abs=1e-9
            )


class WithVariance:
    """A score from eps and v as one evaluation gives both."""

    def __init__(self, eps: torch.Tensor, v: torch.Tensor) -> None:
        self.eps, self.v = eps, v

    def __call__(self, x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        return -self.eps / sigma

    def score_and_variance(self, x: torch.Tensor, sigma: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self(x, sigma), self.v


@pytest.mark.parametrize("kind", ["FIXED_SMALL", "FIXED_LARGE", "LEARNED_RANGE"])
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_guided_diffusion_p_mean_variance(schedule, kind):
    from scorelab import clipped

    ref = np.load(REFERENCE / "guided_diffusion_gaussian.npz")
    p = DiscreteVP(ref[f"{schedule}1000/betas"].tolist())
    variance = {"FIXED_SMALL": "posterior", "FIXED_LARGE": "forward", "LEARNED_RANGE": "learned"}[kind]
    x = torch.tensor(ref["xt"], dtype=F64)
    eps, v = torch.tensor(ref["model_output"], dtype=F64).chunk(2, dim=1)
    for row, t in enumerate(ref["t"].tolist()):
        times = torch.tensor([t + 1, t], dtype=F64) / 1000
        alpha, sigma = p.alpha(times), p.sigma(times)
        score = WithVariance(eps[row : row + 1], (v[row : row + 1] + 1) / 2)
        start = x[row : row + 1] / alpha[0]
        denoised = start + sigma[0] ** 2 * clipped(score, -1, 1)(start, sigma[0])
        expected = torch.tensor(ref[f"{schedule}/{kind}/pred_xstart"][row : row + 1], dtype=F64)
        # 1/sqrt(abar) times float32 rounding of the reference
        torch.testing.assert_close(denoised, expected, rtol=1e-5, atol=1e-5 * max(1.0, 0.01 / float(alpha[0])))

        step = Ancestral(variance).step
        at = Context(clipped(score, -1, 1), start, float(sigma[0]), float(sigma[1]), None, torch.zeros_like)
        mean, _ = step(at)
        expected = torch.tensor(ref[f"{schedule}/{kind}/mean"][row : row + 1], dtype=F64)
        torch.testing.assert_close(alpha[1] * mean, expected, rtol=1e-5, atol=1e-5)
        if t > 0:  # the last step adds no noise
            kicked, _ = step(at._replace(noise=torch.ones_like))
            expected = torch.tensor(ref[f"{schedule}/{kind}/variance"][row : row + 1], dtype=F64)
            torch.testing.assert_close((alpha[1] * (kicked - mean)) ** 2, expected.expand_as(mean), rtol=1e-5, atol=0)


PREDICTORS = {
    "euler": Euler(),
    "heun": Heun(),
    "ddim": DDIM(0.7),
    "ancestral": Ancestral(),
    "reverse sde": ReverseSDE(),
    "euler-maruyama": ReverseSDE(VE(0.001, 100), explicit=True),
    "reverse diffusion": ReverseDiffusion(VE(0.001, 100)),
    "unipc": UniPC(2),
    "ode": ProbabilityFlow(1e-4, 1e-4),
}
CORRECTORS = {"none": None, "langevin": LangevinCorrector(0.1), "annealed": AnnealedCorrector(0.1, steps=2)}


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("corrector", CORRECTORS)
@pytest.mark.parametrize("predictor", PREDICTORS)
def test_every_predictor_with_every_corrector(predictor, corrector, first):
    """Samples of an exact Gaussian in 128 dimensions: variances and correlations."""
    d = Gaussian(torch.zeros(128), torch.linspace(0.5, 2.0, 128))
    sampler = PredictorCorrector(PREDICTORS[predictor], CORRECTORS[corrector], first)
    # the adaptive solver is exact between any two levels
    levels = sigmas.geometric(30 if predictor == "ode" else 240, sigma_min=0.02, sigma_max=50)
    x = sample(d.score, (1000, 128), levels, sampler, generator=generator(1)).double()
    ratio = x.var(0) / (d.variances + 0.02**2)
    assert abs(float(ratio.mean()) - 1) < 0.045
    assert float((ratio - 1).abs().max()) < 5 * math.sqrt(2 / 1000) + 0.045
    off = torch.corrcoef(x.T) - torch.eye(128, dtype=F64)
    assert float(off.abs().max()) < 6 / math.sqrt(1000)


def test_native_time_steps_of_a_discrete_process_use_their_own_segment():
    """On each segment log sigma is linear in t, so -f dt of step i is sigma^2/(1+sigma^2) log(sigma_i/sigma_{i-1})."""
    from scorelab.processes import cosine_betas

    p = DiscreteVP(cosine_betas(1000))
    for i in (999, 998, 500):
        high, low = float(p.step_sigmas[i]), float(p.step_sigmas[i - 1])
        alpha, alpha_next = (1 + high**2) ** -0.5, (1 + low**2) ** -0.5
        one = torch.ones(1, 1, dtype=F64)
        at = Context(lambda x, s: torch.zeros_like(x), one, high, low, None, torch.zeros_like)
        out, _ = ReverseSDE(p, 0.0, explicit=True).step(at)
        growth = float(out) * alpha_next / alpha - 1
        assert growth == pytest.approx(high**2 / (1 + high**2) * math.log(high / low), rel=1e-4)


def test_correctors_make_no_step_where_the_score_vanishes():
    x = randn(5, 3)
    still = LangevinCorrector(0.2).correct(lambda y, s: torch.zeros_like(y), x, 1.0, torch.ones_like)
    torch.testing.assert_close(still, x)


def test_langevin_reaches_its_stationary_variance():
    """x <- (1 - a/2v) x + sqrt(a) z on N(0, v) has variance a / (1 - (1 - a/2v)^2), not v: the bias is exact."""
    v, a = 1.0 + 0.25, 0.5
    d = Gaussian(torch.zeros(1, dtype=F64), 1.0)
    x = sample(d.score, (40_000, 1), [0.5], Langevin(60, a), generator=generator(), dtype=F64)
    expected = a / (1 - (1 - a / (2 * v)) ** 2)
    assert float(x.var()) == pytest.approx(expected, rel=4 * math.sqrt(2 / 40_000))


def test_annealed_langevin_scales_its_steps_and_denoises():
    seen: list[tuple[float, torch.Tensor]] = []

    def score(x, sigma):
        seen.append((float(sigma), x.clone()))
        return -torch.ones_like(x)

    noise = torch.Generator().manual_seed(0)
    x = sample(score, torch.zeros(1, 1, dtype=F64), [4.0, 2.0, 1.0], AnnealedLangevin(2, 0.1), generator=noise)
    assert [s for s, _ in seen] == [4, 4, 2, 2, 1, 1, 1]
    replay = torch.Generator().manual_seed(0)
    y = torch.zeros(1, 1, dtype=F64)
    for sigma in (4.0, 4.0, 2.0, 2.0, 1.0, 1.0):
        a = 0.1 * sigma**2
        y = y - a / 2 + math.sqrt(a) * torch.randn(1, 1, dtype=F64, generator=replay)
    torch.testing.assert_close(x, y - 1.0)
    kept = sample(
        score, torch.zeros(1, 1, dtype=F64), [1.0], AnnealedLangevin(2, 0.1, denoise=False), generator=generator()
    )
    assert kept.shape == (1, 1)
    assert [s for s, _ in seen[7:]] == [1, 1]


@pytest.mark.filterwarnings("ignore:explicit steps as long as the last")
@pytest.mark.parametrize("name", FIXED)
def test_nfe_is_counted_and_zero_never_evaluated(name):
    calls = []

    def score(x, sigma):
        calls.append(float(sigma))
        assert sigma.ndim == 0
        return mixture().score(x, sigma)

    levels = [10.0, 1.0, 0.1, 0.0]
    steps = list(trajectory(score, (4, 2), levels, FIXED[name], generator=generator(), dtype=F64))
    # Langevin leaves x at the level it ran at
    reached = {"langevin": [10.0, 10.0, 1.0, 0.1], "annealed": [10.0, 10.0, 1.0, 0.0]}
    assert [s.sigma for s in steps] == reached.get(name, levels)
    assert steps[-1].nfe == len(calls)
    assert min(calls) > 0
    assert steps[0].x0_hat is None
    assert all(s.x0_hat is not None for s in steps[1:])


@pytest.mark.parametrize("name", [n for n in FIXED if n not in ("langevin", "annealed")])
def test_a_step_to_zero_returns_the_denoised_sample(name):
    x = randn(6, 2)
    found = sample(mixture().score, x, [0.5, 0.0], FIXED[name], generator=generator())
    torch.testing.assert_close(found, mixture().denoise(x, 0.5))


@pytest.mark.parametrize("name", FIXED)
def test_batch_invariance(name):
    """With the noise given, no sample depends on its neighbours."""
    d, x = mixture(), 20 * randn(5, 2)
    noises = [randn(5, 2, seed=100 + i) for i in range(400)]

    def run(rows):
        at = iter(noises)
        state, y, sampler = None, x[rows], FIXED[name]
        levels = GRID[::4].tolist()
        state = sampler.init(y, levels)
        for a, b in zip(levels[:-1], levels[1:], strict=True):
            y, state = sampler.step(Context(d.score, y, a, b, state, lambda v: next(at)[rows]))
        return y

    torch.testing.assert_close(run([1, 3]), run([0, 1, 2, 3, 4])[[1, 3]], rtol=1e-12, atol=1e-12)


def test_lambdas_images_and_shapes():
    for shape in [(3, 2), (3, 1, 5), (3, 2, 4, 4), (2, 1, 3, 3, 3)]:
        x = sample(lambda x, s: -x / (1 + s**2), shape, GRID, generator=generator())
        assert x.shape == shape
        assert x.dtype == torch.get_default_dtype()


def test_generator_decides_and_global_state_is_left_alone():
    before = torch.random.get_rng_state()
    a = sample(ring().score, (4, 2), GRID, Ancestral(), generator=generator(5), dtype=F64)
    b = sample(ring().score, (4, 2), GRID, Ancestral(), generator=generator(5), dtype=F64)
    c = sample(ring().score, (4, 2), GRID, Ancestral(), dtype=F64)
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    assert torch.equal(before, torch.random.get_rng_state())


def test_differentiable_keeps_the_graph():
    x = randn(3, 2).requires_grad_()
    sample(mixture().score, x, [1.0, 0.5, 0.0], differentiable=True).sum().backward()
    assert x.grad is not None
    assert not sample(mixture().score, x, [1.0, 0.0]).requires_grad


def test_inputs_are_not_changed_and_may_be_views_or_half():
    x = randn(2, 6).T
    kept = x.clone()
    sample(mixture().score, x, GRID, AnnealedLangevin(2, 1e-4), generator=generator())
    assert torch.equal(x, kept)
    half = sample(lambda x, s: -x / (1 + s**2), torch.ones(2, 2, dtype=torch.bfloat16), [1.0, 0.0])
    assert half.dtype == torch.bfloat16


def test_no_samples_and_callbacks():
    assert sample(ring().score, (0, 2), GRID, dtype=F64).shape == (0, 2)
    steps = []
    sample(ring().score, (2, 2), [1.0, 0.5, 0.0], generator=generator(), dtype=F64, callback=steps.append)
    assert [s.sigma for s in steps] == [0.5, 0.0]


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda: sample(ring().score, (4, 2)), ValueError, "sigmas is None"),
        (lambda: sample(ring().score, (4, 2), [1.0]), ValueError, "at least 2"),
        (lambda: sample(ring().score, (4, 2), [1.0, 1.0]), ValueError, "descending"),
        (lambda: sample(ring().score, (4, 2), [1.0, -1.0]), ValueError, ">= 0"),
        (lambda: sample(ring().score, (4,), [1.0, 0.0]), ValueError, "expected a tensor"),
        (lambda: sample(ring().score, torch.zeros(4, 2, dtype=torch.long), [1.0, 0.0]), TypeError, "floating"),
        (lambda: sample(ring().score, torch.full((4, 2), math.nan), [1.0, 0.0]), ValueError, "sample 0"),
        (lambda: sample(ring().score, torch.zeros(4, 3), [1.0, 0.0]), ValueError, r"expected \(B, 2\)"),
        (lambda: sample(lambda x, s: x[:, 0], (4, 2), [1.0, 0.0]), ValueError, "scorelab.broadcast"),
        (lambda: sample(lambda x, s: None, (4, 2), [1.0, 0.0]), TypeError, "adapter"),
        (lambda: sample(lambda x, s: x.double(), (4, 2), [1.0, 0.0]), TypeError, "dtype of x"),
        (lambda: sample(lambda x, s: x.to("meta"), (4, 2), [1.0, 0.0]), ValueError, "on meta for x on cpu"),
        (lambda: sample(ring().score, (10**15, 2), [1.0, 0.0], batch_size=64), ValueError, "more than memory can hold"),
        (lambda: sample(None, (4, 2), [1.0, 0.0]), TypeError, "callable"),
        (lambda: sample(ring().score, (4, 2), [1.0, 0.0], Heun), TypeError, "sampler object"),
        (lambda: sample(ring().score, (4, 2), [1.0, 0.0], generator=5), TypeError, "torch.Generator"),
        (lambda: sample(ring().score, (4, 2), [1.0, 0.0], data_std=-1.0), ValueError, "data_std"),
        (lambda: sample(ring().score, (4, 2), [1.0, 0.5], Ancestral("learned")), TypeError, "score_and_variance"),
        (lambda: DDIM(2.0), ValueError, "eta"),
        (lambda: Ancestral("large"), ValueError, "variance"),
        (lambda: Langevin(0), ValueError, "steps"),
        (lambda: LangevinCorrector(-1.0), ValueError, "snr"),
    ],
)  # fmt: skip
def test_bad_input_is_refused(call, kind, message):
    with pytest.raises(kind, match=message):
        call()


def test_a_sample_that_is_not_finite_is_named():
    def score(x, sigma):
        bad = torch.zeros_like(x)
        bad[2] = math.nan
        return -x / (1 + sigma**2) + bad

    with pytest.raises(ValueError, match="sample 2"):
        sample(score, (4, 2), [1.0, 0.5, 0.0])
    with pytest.raises(ValueError, match=r"at sigma = 0.5 .*sample 2"):
        sample(score, (4, 2), [1.0, 0.5, 0.0], debug=True)


def test_levels_outside_a_scores_range_are_refused():
    class Ranged:
        sigma_range = (0.1, 10.0)

        def __call__(self, x, sigma):
            return -x

    with pytest.raises(ValueError, match="sigma_range"):
        sample(Ranged(), (4, 2), [20.0, 1.0])
    assert sample(Ranged(), (4, 2), [10.0, 0.1, 0.0]).shape == (4, 2)


def test_correlated_gaussian_by_native_time_of_every_process():
    """ReverseSDE maps between native and unscaled coordinates for every process: means and covariance hold."""
    d = correlated()
    for name in ("ve", "vp", "subvp", "cosine", "flow"):
        p = PROCESSES[name]
        low, high = p.sigma_range
        levels = sigmas.geometric(300, sigma_min=max(low, 0.02), sigma_max=min(high, 60.0))
        x = sample(d.score, (4000, 3), levels, ReverseSDE(p), generator=generator(), dtype=F64)
        cov = (d.basis * d.variances) @ d.basis.T
        scale = float(cov.diagonal().max())
        assert float((x.mean(0) - d.mean).abs().max()) < 5 * math.sqrt(scale / 4000) + 0.03
        assert float((torch.cov(x.T) - cov).abs().max()) < scale * (5 * math.sqrt(2 / 4000) + 0.03)


@pytest.mark.parametrize(
    "sampler",
    [Heun(), Midpoint(), RK4(), AdamsBashforth(3), UniPC(2), DPMSolverSinglestep(3), StochasticHeun(VE()), DDIM(0.5)],
    ids=repr,
)
def test_scores_that_overwrite_their_last_output_give_the_same(sampler):
    """As a network compiled with CUDA graphs does."""
    d, kept = mixture(), torch.empty(20, 2, dtype=F64)

    def overwriting(x, sigma):
        return kept.copy_(d.score(x, sigma))

    levels, x = [5.0, 2.0, 1.0, 0.4, 0.1, 0.0], 5 * randn(20, 2)
    steps = [list(trajectory(s, x, levels, sampler, generator=generator(1))) for s in (overwriting, d.score)]
    for a, b in zip(steps[0][1:], steps[1][1:], strict=True):
        torch.testing.assert_close(a.x, b.x)
        torch.testing.assert_close(a.x0_hat, b.x0_hat)


class Through(Wrapper):
    """A wrapper that adds nothing."""

    def __init__(self, within: Sampler) -> None:
        self.within = within

    @property
    def inner(self) -> Sampler:
        return self.within


@pytest.mark.parametrize(
    "within",
    [
        *(Heun(), UniPC(2), ProbabilityFlow(), AnnealedLangevin(3), PredictorCorrector(Ancestral()), DDIM(0.5)),
        Calibrated((20.0, 2.0, 0.4, 0.0), ((1.0,), (1.5, -0.5), (1.0,))),
    ],
    ids=lambda s: type(s).__name__,
)
def test_a_wrapper_has_its_inner_samplers_levels_state_and_order(within):
    d, x = mixture(), 20 * randn(4, 2)
    levels = None if isinstance(within, Calibrated) else sigmas.karras(5, sigma_min=0.1, sigma_max=20)
    for sampler in (Through(within), Through(Through(within))):
        assert sampler.order == within.order
        assert sampler.every_level == within.every_level
        steps = zip(
            trajectory(d.score, x, levels, sampler, generator=generator()),
            trajectory(d.score, x, levels, within, generator=generator()),
            strict=True,
        )
        for mine, plain in steps:
            assert torch.equal(mine.x, plain.x)
            assert (mine.sigma, mine.nfe) == (plain.sigma, plain.nfe)
