"""Autoencoders: their bound, their codes as a codec, and runs of either."""

from __future__ import annotations

import json
import math
import runpy
import shutil

import numpy as np
import pytest
import torch
from problems import F64, generator, randn
from safetensors.torch import load_file, save_file
from test_distributed import ROOT
from test_training import same_files

from scorelab import ScoreModel
from scorelab.cli.main import main
from scorelab.cli.sampling import sample_run
from scorelab.data import Arrays, Coded, digits
from scorelab.latent import Autoencoded, AutoencoderModel, autoencoded
from scorelab.losses import Bins, Elbo
from scorelab.nn import ConvAutoencoder, MLPAutoencoder
from scorelab.nn.autoencoder import Encoded
from scorelab.noise import PerSampleNoise
from scorelab.training import build, train
from scorelab.typing import Batch


def config(name: str, steps: int = 4, **changes):
    c = runpy.run_path(str(ROOT / "configs" / "digits" / f"{name}.py"))["get_config"]()
    c.model.net.width, c.data.validation, c.sampling.samples = 8, 40, 4
    c.training.steps, c.training.batch_size, c.training.checkpoint_every = steps, 16, 2
    c.training.log_every = c.training.validate_every = c.training.sample_every = 2
    c.training.precision, c.training.channels_last = "fp32", "no"
    c.optim.schedule.name, c.optim.warmup = "constant", 0
    for key, value in changes.items():
        *groups, last = key.split("__")
        place = c
        for group in groups:
            place = place[group]
        place[last] = value
    return c


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """An autoencoder's run, and that of a score of its codes."""
    folder = tmp_path_factory.mktemp("runs")
    train(config("autoencoder", 12, optim__lr=0.02), folder / "autoencoder", progress=False)
    train(latent(folder), folder / "latent", progress=False)
    return folder


def latent(folder, steps: int = 4, **changes):
    return config("latent", steps, model__codec__path=str(folder / "autoencoder"), **changes)


class Linear(torch.nn.Module):
    """x = W z + std eps, and the posterior of z, which is known."""

    encodes, latent_shape = True, (2,)

    def __init__(self, weight, std: float) -> None:
        super().__init__()
        precision = torch.eye(2, dtype=F64) + weight.T @ weight / std**2
        # W has orthogonal columns: the posterior is independent
        self.weight, self.std, self.variance = weight, std, torch.diagonal(torch.linalg.inv(precision))
        self.log_std = torch.full((5,), math.log(std), dtype=F64)

    def encode(self, x):
        mean = x @ self.weight * self.variance / self.std**2
        return mean, self.variance.log().expand_as(mean)

    def decode(self, z):
        return z @ self.weight.T

    def forward(self, x, noise):
        mean, log_variance = self.encode(x)
        return Encoded(self.decode(mean + torch.exp(0.5 * log_variance) * noise), self.log_std, mean, log_variance)


def test_the_bound_is_tight_where_the_posterior_is_known():
    """Probabilistic principal components: the ELBO with the right posterior is log p(x), x of N(0, W W' + std^2)."""
    weight = torch.linalg.qr(randn(5, 2, seed=1))[0] * torch.tensor([1.5, 0.7], dtype=F64)
    model = AutoencoderModel(Linear(weight, 0.6), data_shape=(5,))
    x, count = randn(3, 5, seed=2), 40_000
    law = torch.distributions.MultivariateNormal(torch.zeros(5, dtype=F64), weight @ weight.T + 0.36 * torch.eye(5))
    many = x.repeat_interleave(count, 0)
    noise = randn(len(many), 5, seed=3)
    given, rate = Elbo().terms(model, many, noise)
    bits = (given + rate).reshape(3, count)
    wanted = -law.log_prob(x) / (5 * math.log(2))
    assert bool(((bits.mean(1) - wanted).abs() < 5 * bits.std(1) / count**0.5).all())
    # of another posterior it is worse by its divergence from the right one
    mean, log_variance = model.net.encode(x)
    model.net.encode = lambda x: (mean.repeat_interleave(count, 0) + 0.5, log_variance.repeat_interleave(count, 0))
    worse = Elbo()(model, many, generator(4)).loss.reshape(3, count)
    gap = (0.5 * 0.25 / model.net.variance).sum() / (5 * math.log(2))
    assert bool(((worse.mean(1) - wanted - gap).abs() < 5 * worse.std(1) / count**0.5).all())


def test_more_codes_come_nearer_to_the_likelihood():
    """Of the wrong posterior: weighed by p(x, z)/q(z), whose mean is p(x)."""
    weight = torch.linalg.qr(randn(5, 2, seed=1))[0] * torch.tensor([1.5, 0.7], dtype=F64)
    model, x = AutoencoderModel(Linear(weight, 0.6), data_shape=(5,)), randn(5, seed=2)
    law = torch.distributions.MultivariateNormal(torch.zeros(5, dtype=F64), weight @ weight.T + 0.36 * torch.eye(5))
    model.net.variance = 1.3 * model.net.variance
    weights = Elbo().weighed(model, x, randn(200_000, 2, seed=3))[2]
    assert float(torch.logsumexp(weights, 0)) - math.log(200_000) == pytest.approx(float(law.log_prob(x)), abs=0.01)
    assert float(weights.mean()) < float(law.log_prob(x)) - 0.02


def test_likelihoods_are_masses_or_densities_of_what_was_said():
    x0 = torch.tensor([[-1.0, 0.0, 1.0]], dtype=F64)
    zeros = torch.zeros(1, 1, dtype=F64)
    found = Encoded(torch.full_like(x0, 0.1), torch.full((3,), math.log(0.4), dtype=F64), zeros, zeros)
    normal, scale = torch.distributions.Normal(0.1, 0.4), 0.4 / 2**0.5
    assert torch.allclose(Elbo().log_likelihood(x0, found), normal.log_prob(x0).double(), atol=1e-6)
    laplace = torch.distributions.Laplace(torch.tensor(0.1, dtype=F64), scale)
    assert torch.allclose(Elbo(likelihood="laplace").log_likelihood(x0, found), laplace.log_prob(x0))
    # the masses of all values are one
    values = torch.linspace(-1, 1, 5, dtype=F64).unsqueeze(0)
    many = Encoded(torch.full_like(values, 0.1), torch.full((5,), math.log(0.4), dtype=F64), zeros, zeros)
    masses = Elbo(Bins(0.5, -1.0, 1.0)).log_likelihood(values, many)
    assert float(masses.exp().sum()) == pytest.approx(1, abs=1e-6)
    # and a Laplace distribution's what its density integrates to, about the peak and far from it
    for mean, std in ((0.1, 0.4), (0.25, 0.05), (-3.0, 0.2)):
        off = Encoded(torch.full_like(values, mean), torch.full((5,), math.log(std), dtype=F64), zeros, zeros)
        masses = Elbo(Bins(0.5, -1.0, 1.0), likelihood="laplace").log_likelihood(values, off)
        assert float(torch.logsumexp(masses, 1)) == pytest.approx(0, abs=1e-9)
        law = torch.distributions.Laplace(torch.tensor(mean, dtype=F64), std / 2**0.5)
        ends = law.cdf(torch.tensor([-0.75, -0.25, 0.25, 0.75], dtype=F64))
        assert torch.allclose(masses[0, 1:4].exp(), ends.diff(), rtol=1e-6, atol=1e-12)
    with pytest.raises(ValueError, match=r"likelihood is 'gaussian'; expected one of \('normal', 'laplace'\)"):
        Elbo(likelihood="gaussian")
    with pytest.raises(ValueError, match="kl_weight is -1"):
        Elbo(kl_weight=-1)


@pytest.mark.parametrize(
    ("shape", "codes"),
    [((3, 9, 14), (2, 3, 4)), ((1, 7), (2, 2)), ((2, 5, 4, 6), (2, 2, 1, 2)), ((1, 1, 1), (2, 1, 1))],
)
def test_sizes_of_any_kind_are_halved_and_come_back(shape, codes):
    net = ConvAutoencoder(shape, width=4, multipliers=(1, 2, 2), latent=2, middle_attention=True)
    model = AutoencoderModel(net, data_shape=shape).eval()
    x = torch.randn(3, *shape, generator=generator())
    mean, std = model.posterior(x)
    assert mean.shape == std.shape == (3, *codes) == (3, *model.latent_shape)
    found = model(x, torch.zeros(3, *codes))
    assert torch.allclose(found.decoded, model.reconstruct(x), atol=1e-6)
    # one does not depend on another
    assert torch.allclose(model.reconstruct(x[1:2]), found.decoded[1:2], atol=1e-5)
    found.decoded.square().sum().backward()
    assert all(p.grad is not None for n, p in net.named_parameters() if "log_std" not in n)


@pytest.mark.parametrize("net", [MLPAutoencoder((1, 8, 8), latent=70), ConvAutoencoder((1, 8, 8), latent=20)])
def test_codes_larger_than_what_they_are_of_are_refused(net):
    with pytest.raises(ValueError, match=r"codes have \d+ numbers, .*, and samples 64; expected no more"):
        Elbo().terms(AutoencoderModel(net, data_shape=(1, 8, 8)), torch.zeros(2, 1, 8, 8), torch.zeros(2, 1, 8, 8))


class Halves(torch.nn.Module):
    """Features for a perceptual term."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(1, 6, 3, stride=2, bias=False)
        torch.nn.init.normal_(self.conv.weight, generator=generator())

    def forward(self, x):
        return self.conv(x).tanh()


ADDED = {
    "training__objective__perceptual": 0.5,
    "training__objective__features": f"{__name__}:Halves",
    "training__objective__adversarial": 0.1,
    "training__objective__adversarial_from": 3,
    "model__net__critic": 4,
}


@pytest.mark.parametrize("name", ["vae", "autoencoder", "with all terms", "latent"])
def test_a_run_goes_on_bit_for_bit(name, runs, tmp_path):
    def made(steps: int):
        if name == "latent":
            return latent(runs, steps)
        return config("autoencoder", steps, **ADDED) if name == "with all terms" else config(name, steps)

    train(made(4), tmp_path / "whole", progress=False)
    train(made(2), tmp_path / "parts", progress=False)
    train(made(4), tmp_path / "parts", progress=False)
    same_files(*(tmp_path / name / "checkpoints" / "step_00000004" for name in ("whole", "parts")))


def test_a_run_of_an_autoencoder_is_watched_sampled_judged_and_reported(tmp_path, capsys):
    run = tmp_path / "vae"
    c = config("vae", 60, training__batch_size=64, optim__lr=3e-3, sampling__samples=6)
    train(c, run, progress=False)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [r["loss"] for r in rows if "loss" in r]
    assert losses[-1] < 0.7 * losses[0]
    shown = next(r for r in reversed(rows) if "reconstruction_rmse" in r)
    held = digits().hold_out(40).x0
    model = AutoencoderModel.load(run)
    with torch.no_grad():
        rmse = float((model.reconstruct(held) - held).square().mean().sqrt())
    assert shown["reconstruction_rmse"] == pytest.approx(rmse, rel=1e-4)
    assert shown["bits_given_code"] + shown["bits_of_code"] == pytest.approx(rows_of(rows, "validation_loss"), rel=0.05)
    assert all(level is None for r in rows if "loss" in r for level in r["sigma_bins"])
    assert main(["report", f"--workdir={run}"]) == 0
    page = (run / "report.html").read_text()
    assert "Reconstructions over time" in page
    assert ">nan<" not in page.lower()
    assert main(["sample", f"--workdir={run}", "--n=5", f"--out={tmp_path / 'x.npz'}"]) == 0
    with np.load(tmp_path / "x.npz") as archive:
        x = archive["samples"]
    assert x.shape == (5, 1, 8, 8) or x.shape == (5, 8, 8)
    assert 0 <= x.min() <= x.max() <= 16
    again = sample_run(run, n=3).x
    assert torch.equal(again, sample_run(run, n=5).x[:3])
    assert main(["evaluate", f"--workdir={run}", "--n=60", "--few"]) == 0
    capsys.readouterr()
    assert main(["likelihood", f"--workdir={run}", "--n=40", "--codes=20"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["samples"], told["of"], told["unit"]) == (40, "held-out data", "bits per dimension")
    assert told["bound"]["mean"] == pytest.approx(rows_of(rows, "validation_loss"), rel=0.02)
    assert told["bound_by_20_codes"]["mean"] < told["bound"]["mean"]
    for asked, said in [
        (["likelihood", "--method=bound"], "is an autoencoder's run, --codes is 100, and got --method; expected"),
        (["sample", "--condition=3"], "got --condition=3, and an autoencoder has no conditions"),
        (["sample", "--sampler=heun"], "got --config.sampling.sampler.name=heun, but samples of an autoencoder are"),
        (["sample", "--nfe=4"], "samples of an autoencoder are decoded at once; expected no --nfe"),
        (["calibrate"], "it holds an autoencoder model and no score model"),
        (["health"], "expected AutoencoderModel.load"),
    ]:
        assert main([*asked, f"--workdir={run}"]) == 2
        assert said in capsys.readouterr().err


def rows_of(rows, key):
    return [r[key] for r in rows if key in r][-1]


def test_drawn_codes_have_unit_variance_and_decode_to_the_data(runs):
    codec = autoencoded(str(runs / "autoencoder"), (1, 8, 8))
    data = digits()
    x0 = data.reference()
    codec.fit(x0)
    source = Coded(data, codec)
    z = torch.cat([source.batch(0, step, 1797).x0 for step in range(3)])
    assert torch.allclose(z.mean((0, 2, 3)), torch.zeros(2), atol=0.03)
    assert torch.allclose(z.std((0, 2, 3)), torch.ones(2), atol=0.03)
    model = AutoencoderModel.load(runs / "autoencoder")
    assert torch.allclose(codec.decode(codec.encode(x0[:50])), model.reconstruct(x0[:50]), atol=1e-5)


def test_a_code_is_the_same_in_whatever_batch_it_is_asked_for(runs):
    """Encoded once, by blocks of the data, so that a run that goes on sees the same numbers; drawn by its place."""
    codec = autoencoded(str(runs / "autoencoder"), (1, 8, 8))
    one, other = Coded(digits(), codec), Coded(digits(), codec)
    for step in range(4):
        one.batch(3, step, 40)
    whole = one.batch(3, 5, 40)
    found = other.batch(3, 5, 40, range(10, 25))
    assert torch.equal(whole.x0[10:25], found.x0)
    assert torch.equal(whole.condition[10:25], found.condition)
    assert not torch.equal(one.batch(3, 6, 40).x0, whole.x0)
    # data that is never the same is encoded when it comes, to nearly the same
    source = digits()
    source.fixed = False
    assert torch.allclose(Coded(source, codec).batch(3, 5, 40).x0, whole.x0, atol=1e-5)


def test_a_latent_model_is_sampled_decoded_judged_and_moved(runs, tmp_path, capsys):
    run = runs / "latent"
    x = sample_run(run, n=10).x
    model = ScoreModel.load(run)
    assert (model.data_shape, model.outside_shape, x.shape) == ((2, 4, 4), (1, 8, 8), (10, 1, 8, 8))
    assert float(x.abs().max()) <= 1
    assert main(["evaluate", f"--workdir={run}", "--n=40", "--few", "--nfe=3"]) == 0
    assert main(["likelihood", f"--workdir={run}", "--n=4", "--tolerance=0.1"]) == 0
    assert main(["health", f"--workdir={run}", "--n=40", "--nfe=3"]) == 0
    assert main(["report", f"--workdir={run}"]) == 0
    capsys.readouterr()
    # the autoencoder goes with it, also where the network is halved
    for dtype in (None, torch.float16):
        model.save(tmp_path / "moved", dtype=dtype)
        shutil.move(runs / "autoencoder", runs / "away")
        again = ScoreModel.load(tmp_path / "moved")
        shutil.move(runs / "away", runs / "autoencoder")
        z = torch.randn(3, 2, 4, 4, generator=generator())
        assert torch.equal(again.decode(z), model.decode(z))


def test_another_autoencoder_is_noticed(runs, tmp_path):
    run, own = tmp_path / "latent", tmp_path / "autoencoder"
    shutil.copytree(runs / "latent", run)
    weights = load_file(run / "checkpoints" / "step_00000004" / "ema.safetensors")
    name = next(k for k in weights if k.startswith("codec:model.net.") and weights[k].ndim > 1)
    weights[name].flatten()[0] += 1e-3
    ScoreModel.load(runs / "latent").save(tmp_path / "moved")
    save_file(weights, tmp_path / "moved" / "model.safetensors")
    with pytest.raises(
        ValueError, match="the autoencoder that made the codes has weights of SHA-256 .*, and the model"
    ):
        ScoreModel.load(tmp_path / "moved")
    # a run whose autoencoder was trained on
    shutil.copytree(runs / "autoencoder", own)
    train(config("autoencoder", 14, optim__lr=0.02), own, progress=False)
    c = latent(runs, 6)
    c.model.codec.path = str(own)
    with pytest.raises(ValueError, match="belongs to another experiment"):
        train(c, run, progress=False)
    shutil.rmtree(own)
    with pytest.raises(ValueError, match=r"model.codec.path: there is no directory .*; expected the directory of a"):
        train(c, run, progress=False)


def test_a_damaged_autoencoder_makes_no_codes(runs, tmp_path):
    shutil.copytree(runs / "autoencoder", tmp_path / "autoencoder")
    place = sorted((tmp_path / "autoencoder" / "checkpoints").iterdir())[-1] / "ema.safetensors"
    content = bytearray(place.read_bytes())
    content[-5] ^= 1
    place.write_bytes(content)
    with pytest.raises(ValueError, match="ema.safetensors is damaged"):
        autoencoded(str(tmp_path / "autoencoder"), (1, 8, 8))


def test_codes_of_numbers_that_were_scaled_first_decode_to_the_numbers(tmp_path):
    """The autoencoder's own codec comes before it, and after it."""
    x = torch.randn(300, 3, generator=generator()) * torch.tensor([3.0, 5.0, 12.0]) + 100
    np.save(tmp_path / "x.npy", x.numpy())
    c = config("vae", 200, training__batch_size=100, optim__lr=0.01, data__validation=0, training__sample_every=0)
    c.data.source, c.data.path, c.model.net.latent, c.model.net.width = "arrays", str(tmp_path / "x.npy"), 3, 32
    c.training.checkpoint_every, c.training.validate_every, c.training.objective.kl_weight = 200, 0, 0.01
    train(c, tmp_path / "autoencoder", progress=False)
    model = AutoencoderModel.load(tmp_path / "autoencoder")
    codec = autoencoded(str(tmp_path / "autoencoder"), (3,))
    codec.fit(x)
    assert torch.allclose(codec.decode(codec.encode(x)), model.decode(model.reconstruct(model.encode(x))), atol=1e-2)
    assert float((codec.decode(codec.encode(x)) - x).square().mean().sqrt()) < 4


def test_an_autoencoder_trained_on_is_noticed_by_the_run_that_goes_on(runs, tmp_path):
    shutil.copytree(runs / "autoencoder", tmp_path / "autoencoder")
    train(latent(tmp_path), tmp_path / "run", progress=False)
    train(config("autoencoder", 14, optim__lr=0.02), tmp_path / "autoencoder", progress=False)
    with pytest.raises(ValueError, match=r"was trained on other data \(.*codec"):
        train(latent(tmp_path, 6, training__sample_every=0), tmp_path / "run", progress=False)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"training__objective__name": "denoising"}, "training.objective.name='elbo', or model.net.name=another"),
        ({"model__net__critic": 4}, "adversarial is 0, and the network has a critic; expected both"),
        ({"training__objective__perceptual": 1.0}, "perceptual is 1 and features is ''; expected both or neither"),
        ({"training__objective__adversarial": -1.0}, "adversarial is -1; expected a weight of 0 or more"),
        ({"model__conditional": True}, "expected one that takes conditions"),
        ({"model__net__latent": 0}, "expected 1 or more"),
        ({"model__codec__name": "autoencoder", "model__codec__path": "nowhere"}, "model.codec.path: there is no"),
    ],
)
def test_what_does_not_go_together_is_said(changes, said):
    with pytest.raises(ValueError, match=said):
        build(config("autoencoder", **changes))


def test_added_terms_are_what_they_say():
    c = config("autoencoder", **ADDED)
    experiment, x = build(c), digits().take(torch.arange(16))
    model, objective, noise = experiment.model.train(), experiment.objective, randn(16, 1, 8, 8).float()
    found = model(x, noise[:, 0].reshape(16, 64)[:, :32].reshape(16, 2, 4, 4))
    given, rate = objective.terms(model, x, noise)
    seen = Halves()
    a, b = (seen(v).mean((2, 3)) for v in (x, found.decoded))
    unlike = (a - b).square().mean(1) / (a.square().mean(1) + 1e-6)
    hinge = (1 - found.real).clamp_min(0) + (1 + found.false).clamp_min(0)
    expected = given + rate + 0.5 * unlike + hinge.mean((1, 2, 3))
    batch, u = Batch(x), torch.rand(16)
    assert torch.allclose(objective.losses(model, batch, u, noise), expected, rtol=1e-4)
    for _ in range(3):
        objective.observe(u, expected)
    loss = objective.losses(model, batch, u, noise)
    assert torch.allclose(loss, expected - 0.1 * found.judged.mean((1, 2, 3)), rtol=1e-4)
    # the critic learns to tell them apart, and what is decoded to be taken for data
    ours = [p for n, p in model.net.named_parameters() if not n.startswith("critic.")]
    for term, weights, others in (
        (hinge, model.net.critic.parameters(), ours),
        (found.judged, [model.net.last[-1].weight], model.net.critic.parameters()),
    ):
        every = [*weights, *others]
        grads = torch.autograd.grad(term.sum(), every, allow_unused=True, retain_graph=True)
        learns = len(every) - len([*others]) if others is ours else 1
        assert all(g is not None for g in grads[:learns])
        assert all(g is None for g in grads[learns:])
    # a codec does without it
    codec = Autoencoded.of(model.eval())
    assert not any("critic" in name for name in codec.state_dict())
    z = torch.zeros(2, 2, 4, 4)
    assert torch.equal(codec.model.generate(z), model.generate(z))


def test_codes_of_other_data_are_refused(runs):
    c = latent(runs)
    with pytest.raises(ValueError, match=r"model.codec.path is of data \(1, 8, 8\), and the data has \(1, 4, 4\)"):
        build(c, data=Arrays(torch.rand(200, 1, 4, 4), torch.arange(200) % 10))
    with pytest.raises(
        ValueError, match=r"learnt from data with \(0.0, 16.0\) scaled to \[-1, 1\], and the data has None"
    ):
        build(c, data=Arrays(torch.rand(200, 1, 8, 8), torch.arange(200) % 10))


def test_samples_of_the_prior_depend_on_their_place_alone():
    model = AutoencoderModel(MLPAutoencoder((3,), width=8, latent=2), data_shape=(3,))
    found, again = model.sample(5, PerSampleNoise(1))[3:], model.sample(2, PerSampleNoise(1, 3))
    assert torch.allclose(found, again, atol=1e-6)
    assert isinstance(Autoencoded.of(model), torch.nn.Module)
    losses = Elbo().losses(model, Batch(torch.zeros(4, 3)), torch.rand(4), torch.zeros(4, 3))
    assert losses.shape == (4,)
