"""The bound as a loss: the release's terms, the bound of ``variational_bound``, and what a variance learns from it."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from ml_collections import ConfigDict
from problems import F64, REFERENCE, generator, randn

from scorelab import VP, DiscreteVP, PerSampleNoise, ScoreModel, clipped, experiments, variational_bound
from scorelab.cli.main import main
from scorelab.cli.sampling import sample_run
from scorelab.losses import Bins, Bound, Hybrid
from scorelab.processes import cosine_betas
from scorelab.samplers import Ancestral
from scorelab.training import build, load_data, train
from scorelab.typing import Batch

PIXELS = Bins(2 / 255, -1.0, 1.0)


def places(objective, steps: list[int]) -> torch.Tensor:
    """u of some steps, 0 to T - 1."""
    return torch.tensor([(objective.steps - 1 - s + 0.5) / objective.steps for s in steps], dtype=F64)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_terms_equal_the_releases(schedule):
    """KL of guided-diffusion's steps in bits a dimension; its x0_hat is clipped. Of its decoder: test_bound."""
    ref = np.load(REFERENCE / "guided_diffusion_gaussian.npz")
    objective = Bound(DiscreteVP(ref[f"{schedule}1000/betas"].tolist()), PIXELS, importance=False)
    x0, output = torch.tensor(ref["x"], dtype=F64), torch.tensor(ref["model_output"], dtype=F64)
    for row, t in enumerate(ref["t"].tolist()):
        if t == 0:
            continue
        this, time = slice(row, row + 1), torch.tensor((t + 1) / 1000, dtype=F64)
        sigma = objective.process.sigma(time)
        x = torch.tensor(ref["xt"][this], dtype=F64) / objective.process.alpha(time)
        eps, v = output[this].chunk(2, dim=1)
        given = ((x - sigma * eps).clamp(-1, 1) - x) / sigma**2, (v + 1) / 2

        def score(x, sigma, variance, given=given):
            return given

        found = objective.losses(score, Batch(x0[this]), places(objective, [t]), (x - x0[this]) / sigma) / 1000
        expected = float(ref[f"{schedule}/LEARNED_RANGE/vb_bpd"][row])
        assert float(found) == pytest.approx(expected, rel=1e-5, abs=2e-6 if t < 700 else 2e-7)


class Learned:
    """The score of N(0, 0.5^2) noised, and a variance between its bounds that depends on the level."""

    sigma_range = (0.0, math.inf)

    def __call__(self, x, sigma, variance=False):
        level = sigma.reshape(-1, *(1,) * (x.ndim - 1)) if sigma.ndim else sigma
        score, v = -x / (0.25 + level**2), torch.sigmoid(level).expand_as(x)
        return (score, v) if variance else score

    def score_and_variance(self, x, sigma):
        return self(x, sigma, variance=True)


@pytest.mark.parametrize("bins", [PIXELS, None])
def test_the_mean_over_steps_is_the_bound(bins):
    """All steps of a process of 8, many draws of noise, against the chain of ``variational_bound``; without L_T."""
    process = DiscreteVP(cosine_betas(8))
    objective, count = Bound(process, bins, importance=False), 4000
    x0 = torch.round(127.5 * (0.5 * randn(1, 6).clamp(-2, 2) + 1)) / 127.5 - 1
    u = places(objective, list(range(8))).repeat_interleave(count)
    noise = randn(8 * count, 6, seed=1)
    batch = Batch(x0.expand(8 * count, 6))
    found = objective.losses(Learned(), batch, u, noise).reshape(8, count).mean(0)
    levels = [*process.step_sigmas.flip(0).tolist(), 0.0]
    options = {} if bins is None else {"spacing": bins.spacing}
    chain = variational_bound(
        Learned(), x0.expand(count, 6), levels, Ancestral("learned"), data_std=1.0, generator=generator(), **options
    )
    expected = (chain.steps.sum(0) + chain.decoder) / (6 * math.log(2))
    error = math.hypot(float(found.std()), float(expected.std())) / count**0.5
    assert float(found.mean()) == pytest.approx(float(expected.mean()), abs=5 * error)


def test_hybrid_is_the_mean_squared_error_and_teaches_the_variance_alone():
    objective = Hybrid(DiscreteVP(cosine_betas(20)), PIXELS)
    x0, noise, u = 0.5 * randn(40, 1, 2, 2), randn(40, 1, 2, 2, seed=1), (torch.arange(40, dtype=F64) + 0.5) / 40
    mean, v = torch.tensor(0.3, dtype=F64, requires_grad=True), torch.tensor(0.5, dtype=F64, requires_grad=True)

    def score(x, sigma, variance):
        return mean * -x / (1 + sigma.reshape(-1, 1, 1, 1) ** 2), v.expand_as(x)

    level = objective.levels(u).reshape(-1, 1, 1, 1)
    x = x0 + level * noise
    mse = (level * score(x, level, True)[0] + noise).square().mean()
    loss = objective.losses(score, Batch(x0), u, noise)
    ours, theirs = (torch.autograd.grad(f, mean, retain_graph=True)[0] for f in (loss.mean(), mse))
    torch.testing.assert_close(ours, theirs)
    (slope,) = torch.autograd.grad(loss.mean(), v)
    assert bool(slope.isfinite())
    assert float(slope) != 0
    # 1e-3 T terms of the bound beside it
    bound = Bound(objective.process, PIXELS, importance=False).losses(score, Batch(x0), u, noise)
    errors = (level * score(x, level, True)[0] + noise).flatten(1).square().mean(1)
    torch.testing.assert_close(loss, errors + 1e-3 * bound)


def test_the_variance_that_the_bound_teaches_is_the_best():
    """For a perfect score of N(0, s^2) the best variance of a step is the true one of q(x_r | x)."""
    process, s, count = DiscreteVP(cosine_betas(4)), 0.5, 20_000
    objective, noise, x0 = Hybrid(process), randn(count, 1), s * randn(count, 1, seed=1)
    tried = torch.linspace(0.05, 0.95, 19, dtype=F64)
    for i in range(1, 4):
        a, r = process.step_sigmas[i].item(), process.step_sigmas[i - 1].item()
        posterior, forward = Ancestral().variances(a, r)
        # q(x_r | x) = N(., (s^2 + r^2) (a^2 - r^2) / (s^2 + a^2))
        true = (s**2 + r**2) * (a**2 - r**2) / (s**2 + a**2)
        expected = math.log(true / posterior) / math.log(forward / posterior)
        u = places(objective, [i]).expand(count)
        found = [
            objective.losses(lambda x, _, variance, v=v, a=a: (-x / (s**2 + a**2), v.expand_as(x)), Batch(x0), u, noise)
            for v in tried
        ]
        best = tried[torch.stack(found).mean(1).argmin()]
        assert float(best) == pytest.approx(expected, abs=0.05)


def test_steps_are_chosen_by_their_losses_and_the_estimate_stays_unbiased():
    """Uniform until every step has its losses; then as often as the root of their mean square, and weighed by that."""
    objective = Bound(DiscreteVP(cosine_betas(10)), None, history=2)
    u = (torch.arange(20_000, dtype=F64) + 0.5) / 20_000
    assert torch.equal(objective.index(u).bincount(), torch.full((10,), 2000))
    value = torch.arange(1.0, 11.0, dtype=F64)
    for _ in range(2):
        every = places(objective, list(range(10)))
        # what losses returns is the term over p = 1/T
        objective.observe(every, 10 * value[objective.index(every)])
    counts = objective.index(u).bincount().double() / len(u)
    torch.testing.assert_close(counts, 0.999 * value / value.sum() + 1e-4, atol=1e-4, rtol=0)
    index = objective.index(u)
    weighed = value[index] / (10 * counts[index])
    assert float(weighed.mean()) == pytest.approx(float(value.mean()), rel=1e-3)
    # what is kept for a checkpoint goes on the same
    again = Bound(objective.process, None, history=2)
    again.restore(objective.state())
    assert torch.equal(again.index(u), index)
    with pytest.raises(
        ValueError, match="holds 2 losses of each of 10 steps, and the objective takes 3 of 10; expected"
    ):
        Bound(objective.process, None, history=3).restore(objective.state())
    # where nothing is lost, no step counts for more
    objective.observe(u, 0 * u)
    assert torch.equal(objective.index(u).bincount(), torch.full((10,), 2000))


def test_wrong_settings_are_refused():
    with pytest.raises(ValueError, match="the process is VP; expected process.name='ddpm' or 'ddpm_cosine'"):
        Hybrid(VP())
    with pytest.raises(ValueError, match="bound is -1"):
        Hybrid(DiscreteVP(cosine_betas(3)), bound=-1.0)
    with pytest.raises(ValueError, match="history is 0"):
        Bound(DiscreteVP(cosine_betas(3)), history=0)
    x = torch.zeros(2, 3)
    with pytest.raises(TypeError, match="this objective learns a variance"):
        Hybrid(DiscreteVP(cosine_betas(3))).losses(lambda x, s, variance: x, Batch(x), torch.tensor([0.1, 0.9]), x)


@pytest.mark.parametrize("name", ["hybrid", "bound"])
def test_a_run_of_it_resumes_bit_for_bit_samples_in_fewer_steps_and_has_a_bound(name, tmp_path, capsys):
    """Steps chosen by their losses go on from those of the checkpoint; the variance is sampled with."""

    def config(steps: int) -> ConfigDict:
        c = experiments.improved_ddpm(steps=4)
        c.data.source, c.training.batch_size, c.optim.warmup = "digits", 16, 0
        c.model.net.update(width=8, multipliers=(1, 2), blocks=1, attention=(), heads=2)
        c.training.objective.name = name
        c.training.steps, c.training.checkpoint_every, c.training.sample_every = steps, 3, 0
        if name == "bound":
            c.training.objective.history = 2
        return c

    whole = train(config(6), tmp_path / "a", progress=False)
    train(config(3), tmp_path / "b", progress=False)
    resumed = train(config(6), tmp_path / "b", progress=False)
    pairs = zip(whole.state_dict().values(), resumed.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert sample_run(tmp_path / "b", n=2, nfe=2).x.isfinite().all()
    command = ["likelihood", f"--workdir={tmp_path / 'b'}", "--method=bound", "--n=70", f"--out={tmp_path / 'x.png'}"]
    assert main([*command, "--bits"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["method"] == "variational bound over 4 levels, variance learned"
    parts = sum(found[part]["mean"] for part in ("prior", "steps", "decoder"))
    assert found["bound"]["mean"] == pytest.approx(parts, rel=1e-9)
    assert (tmp_path / "x.png").stat().st_size > 1000
    # of the first samples, whatever their number
    assert main([*command, "--bits", "--n=3"]) == 0
    few = json.loads(capsys.readouterr().out)
    model, data = ScoreModel.load(tmp_path / "b"), load_data(config(6))
    expected = variational_bound(
        clipped(model, -1, 1),
        data.first(3).x0,
        model.process.step_sigmas.flip(0),
        Ancestral("learned", model.process),
        data_std=1.0,
        spacing=1 / 8,
        generator=PerSampleNoise(0),
    )
    assert few["bound"]["mean"] == pytest.approx(-float(expected.log_prob.mean()) / (64 * math.log(2)), rel=1e-5)
    for wrong, said in (
        ("--method=elbo", "--method is 'elbo'; known: bound, ode"),
        ("--variance=postrior", "--variance is 'postrior'; did you mean 'posterior'?"),
        ("--out=x.pdf", "--out is x.pdf; expected a name that ends in .png"),
        ("--probes=9", "are for --method=ode; expected none with --method=bound"),
    ):
        assert main([*command, wrong]) == 2
        assert said in capsys.readouterr().err


@pytest.mark.parametrize("command", [["likelihood", "--method=bound"], ["calibrate"], ["density"], ["likelihood"]])
def test_what_is_asked_of_no_run_leaves_nothing(tmp_path, capsys, command):
    assert main([*command, f"--workdir={tmp_path / 'none'}"]) == 2
    assert "holds no config.json" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_clamped_samples_bound_better_from_great_noise():
    """An error of eps of 0.03 in the cosine schedule's noisiest step, from sigma = 2e4 to 640, costs a bit a dimension;
    clamped, nothing."""
    levels = DiscreteVP(cosine_betas()).step_sigmas.flip(0)[:3]
    assert float(levels[0] / levels[1]) > 30
    x0 = (0.5 * randn(200, 8)).clamp(-1, 1)

    def score(x, sigma):
        return -(x / (0.2 + sigma**2)) + 0.03 / sigma

    bits = [
        float(-variational_bound(f, x0, levels, data_std=1.0, generator=generator()).steps[0].mean())
        / (8 * math.log(2))
        for f in (score, clipped(score, -1, 1))
    ]
    assert -bits[0] == pytest.approx(0.5 * (0.03 * float(levels[0] / levels[1])) ** 2 / math.log(2), rel=0.1)
    assert bits[1] < 1e-5


def test_a_variance_and_an_objective_that_do_not_fit_are_refused():
    c = experiments.improved_ddpm(steps=4)
    c.data.source = "digits"
    c.model.net.update(width=8, multipliers=(1, 2), blocks=1, attention=(), heads=2)
    c.training.objective.name = "denoising"
    with pytest.raises(ValueError, match="the network returns a variance, and Denoising learns none; expected train"):
        build(c)
    c.training.objective.name, c.model.net.variance = "hybrid", False
    with pytest.raises(ValueError, match="Hybrid learns a variance, and the network returns none; expected model.net"):
        build(c)
