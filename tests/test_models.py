from __future__ import annotations

import math

import pytest
import torch
from problems import F64, PROCESSES, generator, mixture, randn
from torch import nn

from scorelab import VE, VP, DiscreteVP, ScoreModel, classifier_free, clipped, sample, sigmas
from scorelab.models import Constant, LogSigma, UnitVariance
from scorelab.nn import MLP, UNet
from scorelab.nn.dropout import Dropout
from scorelab.nn.layers import grown
from scorelab.predictions import EPS, FLOW, SCORE, X0, V, edm
from scorelab.processes import linear_betas
from scorelab.samplers import Ancestral, Context

PREDICTIONS = {"x0": X0, "eps": EPS, "score": SCORE, "v": V, "flow": FLOW, "edm": edm(0.7)}


class Oracle(nn.Module):
    """A 'network' that returns the exact prediction for the mixture, from the scaled input and the time it is told."""

    def __init__(self, process, prediction):
        super().__init__()
        self.process, self.prediction = process, prediction

    def forward(self, x_t, t):
        p, d = self.process, mixture()
        x, sigma = x_t / p.alpha(t)[:, None], p.sigma(t)[:, None]
        return (d.denoise(x, sigma[:, 0]) - self.prediction.skip(sigma) * x) / self.prediction.out(sigma)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("process", PROCESSES)
def test_a_model_is_the_score_in_any_process_and_prediction(process, prediction):
    p, d = PROCESSES[process], mixture()
    model = ScoreModel(Oracle(p, PREDICTIONS[prediction]), p, PREDICTIONS[prediction], data_shape=(2,))
    x = 2 * randn(5, 2)
    for sigma in (torch.tensor(0.6, dtype=F64), torch.tensor([0.1, 0.5, 1.0, 2.0, 9.0], dtype=F64)):
        level = sigma.reshape(-1, 1)
        torch.testing.assert_close(model(x, sigma), d.score(x, sigma), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(model.denoise(x, sigma), d.denoise(x, sigma), rtol=1e-6, atol=1e-6)
        eps = -level * d.score(x, sigma)
        torch.testing.assert_close(model.eps(x, sigma), eps, rtol=1e-6, atol=1e-6)
        v = (eps - level * d.denoise(x, sigma)) / (1 + level**2).sqrt()
        torch.testing.assert_close(model.v(x, sigma), v, rtol=1e-6, atol=1e-6)


def test_score_keeps_its_digits_at_small_sigma():
    """eps = 0.3 exactly: at sigma = 1e-3 in float32 the score must be -300, where x0_hat - x keeps few digits."""

    class Fixed(nn.Module):
        def forward(self, x, t):
            return torch.full_like(x, 0.3)

    model = ScoreModel(Fixed(), VE(1e-3, 10.0), EPS, data_shape=(2,))
    found = model(torch.full((1, 2), 50.0), torch.tensor(1e-3))
    torch.testing.assert_close(found, torch.full((1, 2), -300.0), rtol=1e-6, atol=0)


class Spy(nn.Module):
    def __init__(self, integer=False):
        super().__init__()
        self.integer_labels = integer
        self.seen = None

    def forward(self, x, label):
        self.seen = label
        return torch.zeros_like(x)


def told(sigma: float, **settings) -> torch.Tensor:
    net = Spy(settings.pop("integer", False))
    ScoreModel(net, settings.pop("process"), EPS, data_shape=(2,), **settings)(torch.zeros(3, 2), torch.tensor(sigma))
    return net.seen


def test_labels():
    ddpm = DiscreteVP(linear_betas())
    assert told(2.0, process=VE(), label="log_sigma").tolist() == pytest.approx([math.log(2)] * 3)
    assert told(2.0, process=VP(), label_scale=999.0)[0] == pytest.approx(
        999 * float(VP().time(torch.tensor(2.0))), rel=1e-5
    )
    for i in (0, 1, 500, 999):
        assert told(float(ddpm.step_sigmas[i]), process=ddpm, label="index")[0] == pytest.approx(i, abs=2e-3)
    halfway = float((ddpm.step_sigmas[10] * ddpm.step_sigmas[11]).sqrt())
    assert told(halfway, process=ddpm, label="index")[0] == pytest.approx(10.5, abs=1e-2)
    grid = sigmas.geometric(10, sigma_min=0.01, sigma_max=1.0)
    ncsn = {"process": VE(0.01, 1.0), "label": "index", "levels": grid, "index_order": "descending"}
    assert told(1.0, **ncsn)[0] == 0
    assert told(0.01, **ncsn)[0] == 9
    assert told(float(grid[3]), integer=True, **ncsn).tolist() == [3, 3, 3]
    with pytest.raises(ValueError, match="none of this model's 10 levels"):
        told(float(grid[3]) * 1.01, integer=True, **ncsn)


def test_integer_labels_reach_an_embedding_and_double_levels_are_taken():
    class Embedded(nn.Module):
        integer_labels = True

        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(10, 2)

        def forward(self, x, label):
            return x + self.table(label)

    grid = sigmas.geometric(10, sigma_min=0.01, sigma_max=1.0)
    model = ScoreModel(Embedded(), VE(0.01, 1.0), EPS, data_shape=(2,), label="index", levels=grid)
    assert model(torch.zeros(3, 2), grid[:3]).dtype == torch.float32


def test_input_scale():
    class Seen(nn.Module):
        def forward(self, x, label):
            return x

    x, sigma = torch.ones(1, 2), torch.tensor(2.0)
    # eps_hat = the scaled input, so score = -scale x / sigma
    for scale, expected in ((Constant(0.25), 0.25), (UnitVariance(0.5), 4.25**-0.5), ("process", 5**-0.5)):
        model = ScoreModel(Seen(), VP(), EPS, data_shape=(2,), input_scale=scale)
        assert float(model(x, sigma)[0, 0]) == pytest.approx(-expected / 2, rel=1e-5)


def random_weights(net: nn.Module) -> nn.Module:
    noise = generator(3)
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(0.2 * torch.randn(p.shape, generator=noise))
    return net


def test_save_and_load(tmp_path):
    model = ScoreModel(
        random_weights(UNet((2, 5, 3), width=8, multipliers=(1, 2), blocks=1, attention=(1,), head=8)),
        DiscreteVP(linear_betas(50)),
        V,
        data_shape=(2, 5, 3),
        data_range=(0, 255),
        label="index",
    ).eval()
    model.save(tmp_path / "m")
    assert sorted(p.name for p in (tmp_path / "m").iterdir()) == ["model.json", "model.safetensors"]
    before = torch.random.get_rng_state()
    again = ScoreModel.load(tmp_path / "m")
    assert torch.equal(before, torch.random.get_rng_state())
    x, sigma = torch.randn(2, 2, 5, 3, generator=generator()), torch.tensor(0.7)
    assert torch.equal(model(x, sigma), again(x, sigma))
    assert again.data_range == (0.0, 255.0)
    assert again.process == model.process


def test_own_networks_are_passed_to_load(tmp_path):
    own = ScoreModel(
        nn.Sequential(Spy()), VP(), edm(0.3), data_shape=(2,), input_scale=UnitVariance(0.3), label=LogSigma()
    )
    with pytest.warns(RuntimeWarning, match=r"can't say how Sequential is made, .*: ScoreModel.load.path, net=\.\.\."):
        own.save(tmp_path)
    with pytest.raises(ValueError, match=r"net=\.\.\."):
        ScoreModel.load(tmp_path)
    again = ScoreModel.load(tmp_path, net=nn.Sequential(Spy()))
    assert again.prediction == edm(0.3) or again.prediction.name == "edm(0.3)"
    with pytest.raises(ValueError, match=r"2 keys missing"):
        ScoreModel.load(tmp_path, net=nn.Linear(2, 2))
    odd = ScoreModel(Spy(), VP(), EPS, data_shape=(2,), label=lambda s: s)
    with pytest.raises(ValueError, match="label is a function"):
        odd.save(tmp_path / "odd")
    assert not (tmp_path / "odd").exists()


@pytest.mark.parametrize("shape", [(1, 7, 5), (4, 7, 5), (3, 8, 8), (2, 9), (1, 3, 5, 4), (1, 1, 1)])
def test_unet_takes_any_shape_and_is_batch_invariant(shape):
    net = random_weights(UNet(shape, width=8, multipliers=(1, 2, 2), blocks=1, attention=(2,), head=8)).eval()
    x, label = torch.randn(3, *shape, generator=generator()), torch.tensor([0.1, 0.5, 2.0])
    out = net(x, label)
    assert out.shape == x.shape
    torch.testing.assert_close(net(x[1:2], label[1:2]), out[1:2], rtol=1e-4, atol=1e-4)


def test_class_conditions_and_their_rows():
    net = random_weights(UNet((1, 4, 4), width=8, multipliers=(1,), blocks=1, num_classes=3))
    model = ScoreModel(net, VP(), data_shape=(1, 4, 4), label="log_sigma").eval()
    x, labels, sigma = torch.randn(4, 1, 4, 4, generator=generator()), torch.tensor([0, 1, 2, 0]), torch.tensor(1.0)
    score = model.conditioned(labels)
    index = torch.tensor([2, 0])
    torch.testing.assert_close(score.rows(index)(x[index], sigma), score(x, sigma)[index], rtol=1e-4, atol=1e-5)
    one = model.conditioned(torch.tensor([1]))
    torch.testing.assert_close(one(x, sigma)[1], score(x, sigma)[1])
    assert sample(score, x, [1.0, 0.0]).shape == x.shape
    with pytest.raises(ValueError, match="4 rows for a batch of 2"):
        score(x[:2], sigma)
    with pytest.raises(ValueError, match="num_classes"):
        ScoreModel(UNet((1, 4, 4), width=8), VP(), data_shape=(1, 4, 4)).conditioned(labels)(x, sigma)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: UNet((2,)), "MLP"),
        (lambda: UNet((1, 4, 4), width=7), "even width"),
        (lambda: UNet((1, 4, 4), attention=(5,)), "resolutions"),
        (lambda: UNet((1, 4, 4), embedding="sine"), "fourier"),
        (lambda: MLP((2, 2)), "UNet"),
        (lambda: ScoreModel(Spy(), VP(), data_shape=(2,), label="sigma"), "label"),
        (lambda: ScoreModel(Spy(), VE(), data_shape=(2,), label="index"), "levels="),
        (lambda: ScoreModel(Spy(), VP(), data_shape=(2,), input_scale="none"), "input_scale"),
        (lambda: ScoreModel(Spy(), VP(), data_shape=(2,))(torch.zeros(3, 4), torch.tensor(1.0)), r"expected \(B, 2\)"),
        (lambda: ScoreModel(Spy(), VP(), data_shape=(2,))(torch.zeros(3, 2), torch.ones(2)), "sigma has shape"),
        (lambda: sample(ScoreModel(Spy(), VP(), data_shape=(2,)), (3, 2), [500.0, 1.0]), "sigma_range"),
        (lambda: ScoreModel.load("nowhere"), "there is no directory nowhere"),
    ],
)
def test_bad_input_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("sizes", [(6,), (4, 6), (3, 4, 2)])
def test_growing_is_enlarging_and_convolving(sizes):
    """In value and gradients, and also where the size is not just doubled."""
    rank = len(sizes)
    conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[rank - 1](5, 7, 3, padding=1).double()
    x = torch.randn(2, 5, *sizes, dtype=torch.float64, generator=generator()).requires_grad_()
    for size in (tuple(2 * n for n in sizes), tuple(2 * n - 1 for n in sizes)):
        a, b = grown(x, size, conv), conv(nn.functional.interpolate(x, size=size))
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
        g = torch.randn(a.shape, dtype=a.dtype, generator=generator(1))
        wanted = (x, conv.weight, conv.bias)
        for mine, plain in zip(torch.autograd.grad(a, wanted, g), torch.autograd.grad(b, wanted, g), strict=True):
            torch.testing.assert_close(mine, plain, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_dropout_by_random_bits(layout):
    """Each element is kept with probability 1 - p, alone, and scaled so that the mean is exact; gradients likewise."""
    p, x = 0.3, torch.ones(40, 25, 20, 20).to(memory_format=layout).requires_grad_()
    layer = Dropout(p)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        y = layer(x)
        torch.manual_seed(0)
        again = layer(x)
    assert torch.equal(y, again)
    assert y.is_contiguous(memory_format=layout)
    kept = (y > 0).double()
    count = x.numel()
    exact = 1 - round(p * 2**16) / 2**16
    assert abs(float(kept.mean()) - (1 - p)) < 5 * math.sqrt(p * (1 - p) / count)
    torch.testing.assert_close(y[y > 0], torch.full_like(y[y > 0], 1 / exact))
    # neighbours, in whatever order they were drawn, are independent
    for axis in range(4):
        a, b = kept.narrow(axis, 0, kept.shape[axis] - 1), kept.narrow(axis, 1, kept.shape[axis] - 1)
        assert abs(float(((a - exact) * (b - exact)).mean())) < 5 * p * (1 - p) / math.sqrt(a.numel())
    y.sum().backward()
    assert torch.equal(x.grad, y.detach())
    assert torch.equal(layer.eval()(x), x)
    assert torch.equal(Dropout(1.0)(x), torch.zeros_like(x))


class Doubled(nn.Module):
    """F and the place of the log-variance, from -1 to 1, of two classes."""

    num_classes, null_condition = 2, 2

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(3, 2)

    def forward(self, x, label, condition):
        shift = self.table(condition).reshape(len(x), 2, 1, 1)
        return torch.cat([0.3 * x + shift, torch.tanh(x - shift)], 1)


def test_a_learned_variance_has_a_place_and_passes_through_conditions_clipping_and_guidance():
    """The same ancestral step as from the network's outputs written out, in one evaluation each."""
    torch.manual_seed(0)
    process, net, calls = VE(0.01, 50.0), Doubled().double(), []
    options = {"data_shape": (2, 3, 3), "input_scale": Constant(0.5)}
    model = ScoreModel(net, process, EPS, variance=True, **options).eval().requires_grad_(False)
    x, y, sigma, low = torch.randn(4, 2, 3, 3, dtype=F64), torch.tensor([0, 1, 1, 0]), 2.0, 1.2
    net.register_forward_hook(lambda *_: calls.append(1))

    def written_out(scale: float) -> torch.Tensor:
        """Mean and standard deviation of the step from sigma to low, v that of the conditional score."""
        given, none = net(0.5 * x, None, y).chunk(2, 1), net(0.5 * x, None, torch.full((4,), 2)).chunk(2, 1)
        eps = none[0] + scale * (given[0] - none[0])
        x0_hat = (x - sigma * eps).clamp(-1, 1)
        gap, v = sigma**2 - low**2, (given[1] + 1) / 2
        posterior, forward = low**2 * gap / sigma**2, gap * (1 + low**2) / (1 + sigma**2)
        std = torch.exp(0.5 * (v * math.log(forward) + (1 - v) * math.log(posterior)))
        return x + gap * (x0_hat - x) / sigma**2 + std

    for scale, evaluations in ((1.0, 1), (3.0, 2)):
        expected = written_out(scale)
        guided = classifier_free(model.conditioned(y), model.conditioned(None), scale)
        calls.clear()
        found, _ = Ancestral("learned").step(Context(clipped(guided, -1, 1), x, sigma, low, None, torch.ones_like))
        torch.testing.assert_close(found, expected)
        assert len(calls) == evaluations
    index = torch.tensor([2, 0])
    part = model.conditioned(y).rows(index)
    torch.testing.assert_close(
        part.score_and_variance(x[index], torch.tensor(sigma, dtype=F64))[1],
        model.conditioned(y).score_and_variance(x, torch.tensor(sigma, dtype=F64))[1][index],
    )
    plain = ScoreModel(net, process, EPS, **options)
    assert not hasattr(plain, "score_and_variance")
    assert not hasattr(plain.conditioned(y), "score_and_variance")
    with pytest.raises(ValueError, match=r"returned shape \(4, 4, 3, 3\) for input \(4, 2, 3, 3\); expected the same"):
        plain.conditioned(y)(x, torch.tensor(sigma, dtype=F64))
    with pytest.raises(TypeError, match="variance is 'learned', but this score learned none"):
        Ancestral("learned").step(Context(plain.conditioned(y), x, sigma, low, None, torch.ones_like))


@pytest.mark.filterwarnings("ignore:the file can't say how")
def test_a_model_with_a_variance_is_saved_and_found_again(tmp_path):
    model = ScoreModel(Doubled(), VE(), EPS, variance=True, data_shape=(2, 3, 3))
    model.save(tmp_path)
    again = ScoreModel.load(tmp_path, net=Doubled())
    x, y, sigma = torch.randn(2, 2, 3, 3), torch.tensor([1, 0]), torch.tensor(1.0)
    for a, b in zip(*(m.conditioned(y).score_and_variance(x, sigma) for m in (model, again)), strict=True):
        assert torch.equal(a, b)
