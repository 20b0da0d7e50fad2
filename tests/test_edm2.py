"""EDM2's network: equal to the release's stored values, and what its mathematics promises."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from problems import randn
from published import Released, difference, released
from test_training import small
from torch import nn

from scorelab import VE, ScoreModel
from scorelab.interop.magnitude import from_edm2
from scorelab.models import UnitVariance
from scorelab.nn import EDM2, MLP
from scorelab.nn.edm2 import _Block, _cat, _Conv, _Fourier, _silu, _sum
from scorelab.predictions import edm
from scorelab.training import Trainer, build
from scorelab.typing import Batch


def net_of(found: Released, **changes) -> EDM2:
    c = found.config
    settings = {
        "width": c["model_channels"],
        "multipliers": tuple(c["channel_mult"]),
        "blocks": c["num_blocks"],
        "attention": tuple(int(math.log2(c["img_resolution"] // r)) for r in c["attn_resolutions"]),
        "head": c["channels_per_head"],
        "uncertainty": c["logvar_channels"],
        "num_classes": c["label_dim"],
    }
    return EDM2((c["img_channels"], c["img_resolution"], c["img_resolution"]), **(settings | changes)).eval()


def model_of(net: EDM2, sd: float = 0.5) -> ScoreModel:
    return ScoreModel(
        net,
        VE(0.002, 80.0),
        edm(sd),
        data_shape=net.config["data_shape"],
        input_scale=UnitVariance(sd),
        label="log_sigma",
        label_scale=0.25,
    )


def tiny(shape=(2, 8, 8), **changes) -> EDM2:
    torch.manual_seed(0)
    settings = {"width": 8, "multipliers": (1, 2), "blocks": 1, "attention": (1,), "head": 8, "uncertainty": 8}
    net = EDM2(shape, **(settings | changes))
    # at 0, as at the start of training, nothing would depend on them
    with torch.no_grad():
        for name, value in net.named_parameters():
            if name.endswith("gain"):
                value.fill_(0.5)
    return net


def convolutions(net: nn.Module) -> list[_Conv]:
    return [m for m in net.modules() if isinstance(m, _Conv)]


def test_the_release_is_this_network():
    found = released("edm2")
    net, v = net_of(found), found.values
    net.load_state_dict(from_edm2(net, found.state))
    model, sigma = model_of(net), v["sigma"]
    with torch.no_grad():
        denoised = model.denoise(v["x"], sigma, v["class_labels"])
        assert difference(net.uncertainty(sigma.log() / 4), v["logvar"].flatten()) < 2e-5
    assert difference(denoised, v["output"]) < 2e-5
    # what the network adds to c_skip x, where that is not lost in x
    level = sigma.reshape(-1, 1, 1, 1)
    skipped = 0.25 / (level**2 + 0.25) * v["x"]
    for i in (1, 2):
        assert difference((denoised - skipped)[i], (v["output"] - skipped)[i]) < 2e-5


def test_weights_of_another_network_are_refused():
    found = released("edm2")
    # a network without the head leaves its weights out
    without = net_of(found, uncertainty=0)
    assert without.load_state_dict(from_edm2(without, found.state)).missing_keys == []
    with pytest.raises(ValueError, match="another size"):
        from_edm2(net_of(found, width=32), found.state)
    with pytest.raises(ValueError, match="there are no weights 'unet.enc.16x16_block1"):
        from_edm2(net_of(found, blocks=2), found.state)
    with pytest.raises(ValueError, match="1 are not known .unet.emb_label.weight"):
        from_edm2(net_of(found, num_classes=None), found.state)


@pytest.mark.parametrize(
    ("width", "millions"), [(128, 125), (192, 280), (256, 498), (320, 777), (384, 1119), (448, 1523)]
)
def test_sizes_are_the_published(width, millions):
    """Table 2 of the paper (XS to XXL), for latents (4, 64, 64) of ImageNet."""
    with torch.device("meta"):
        net = EDM2((4, 64, 64), width=width, num_classes=1000)
    assert round(sum(p.numel() for p in net.parameters()) / 1e6) == millions


def test_training_puts_weights_back_to_unit_magnitude():
    net = tiny(num_classes=3)
    with torch.no_grad():
        for conv in convolutions(net):
            conv.weight.mul_(1 + 2 * torch.rand(len(conv.weight), *(1,) * (conv.weight.ndim - 1)))
    x, label, c = torch.randn(4, 2, 8, 8), torch.linspace(-1, 1, 4), torch.tensor([0, 1, 2, 0])
    with torch.no_grad():
        before = net.eval()(x, label, c)
        weights = {k: p.clone() for k, p in net.named_parameters()}
        # without gradients nothing is trained, and nothing is changed
        net.train()(x, label, c)
    assert all(torch.equal(weights[k], p) for k, p in net.named_parameters())
    trained = net(x, label, c)
    rms = [conv.weight.square().flatten(1).mean(1).sqrt() for conv in convolutions(net)]
    # r / (1e-4 + r) of a row of root mean square r
    torch.testing.assert_close(torch.cat(rms), torch.ones(sum(map(len, rms))), rtol=0, atol=1e-3)
    assert all(torch.equal(weights[k], p) for k, p in net.named_parameters() if k.endswith("gain"))
    torch.testing.assert_close(trained, net.eval()(x, label, c), rtol=1e-4, atol=1e-4)
    # its function depends on the rows' directions only
    torch.testing.assert_close(trained, before, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("scale", [0.1, 10.0])
def test_the_scale_of_weights_means_nothing(scale):
    net = tiny(num_classes=3).eval()
    x, label, c = torch.randn(2, 2, 8, 8), torch.tensor([-0.5, 0.5]), torch.tensor([0, 2])
    with torch.no_grad():
        expected, log_u = net(x, label, c), net.uncertainty(label)
        for conv in convolutions(net):
            conv.weight.mul_(scale)
        torch.testing.assert_close(net(x, label, c), expected, rtol=0, atol=0.02)
        torch.testing.assert_close(net.uncertainty(label), log_u, rtol=2e-3, atol=2e-3)


def mean_square(x: torch.Tensor) -> float:
    return float(x.double().square().mean())


def test_operations_preserve_magnitude():
    z = torch.linspace(-12, 12, 100_001, dtype=torch.float64)
    density = torch.exp(-0.5 * z**2) / math.sqrt(2 * math.pi)
    assert float(torch.trapezoid(density * _silu(z) ** 2, z)) == pytest.approx(1, abs=2e-3)
    torch.manual_seed(0)
    a, b = torch.randn(2, 64, 20_000)
    for t in (0.2, 0.5, 0.7):
        assert mean_square(_sum(a, b, t)) == pytest.approx(1, abs=0.01)
    assert torch.equal(_sum(a, b, 0.0), a)
    joined = _cat(a, b[:, :5_000])
    assert mean_square(joined) == pytest.approx(1, abs=0.01)
    # both parts add as much to the sum of squares
    assert mean_square(joined[:, :20_000]) * 20_000 == pytest.approx(mean_square(joined[:, 20_000:]) * 5_000, rel=0.02)
    with torch.no_grad():
        assert mean_square(_Conv(0, 300, 400)(torch.randn(500, 300))) == pytest.approx(1, abs=0.02)
        inside = _Conv(2, 32, 64, 3)(torch.randn(8, 32, 16, 16))[:, :, 1:-1, 1:-1]
        assert mean_square(inside) == pytest.approx(1, abs=0.05)
        assert mean_square(_Fourier(64)(torch.linspace(-20, 20, 2_000))) == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("normed", [True, False])
@pytest.mark.parametrize("up", [None, True, False])
@pytest.mark.parametrize("head", [0, 16])
def test_blocks_preserve_magnitude(normed, up, head):
    """Averages of four independent pixels have a quarter of the mean square, which only the way down restores."""
    torch.manual_seed(0)
    block = _Block(2, 32, 48, 32, 0.0, head, normed=normed, up=up)
    with torch.no_grad():
        found = mean_square(block(torch.randn(4, 32, 16, 16), torch.randn(4, 32)))
    if up is False and not normed:
        assert 0.15 < found < 0.45
    else:
        assert 0.75 < found < 1.25
    if normed:
        # whatever comes in
        with torch.no_grad():
            assert mean_square(block(100 * torch.randn(4, 32, 16, 16), torch.randn(4, 32))) == pytest.approx(1, abs=0.3)


def test_activations_are_clipped():
    block = _Block(2, 8, 8, 8, 0.0)
    with torch.no_grad():
        found = block(torch.full((1, 8, 4, 4), 1e4), torch.randn(1, 8))
    assert float(found.abs().max()) == 256


def test_no_class_is_a_label_of_zeros():
    torch.manual_seed(0)
    net = tiny(num_classes=3, null_class=True).eval()
    assert (net.num_classes, net.null_condition) == (3, 3)
    x, label = torch.randn(2, 2, 8, 8), torch.tensor([-0.5, 0.5])
    with torch.no_grad():
        null, known = net(x, label, torch.tensor([3, 3])), net(x, label, torch.tensor([0, 2]))
        assert torch.equal(null, net(x, label))
        assert not torch.allclose(null, known)
        # a column of the normalised matrix: sqrt(3) one-hot times w_hat / sqrt(3)
        w = net.classes.weight.double()
        expected = (w / w.square().mean(1, keepdim=True).sqrt())[:, [0, 2]].T
        torch.testing.assert_close(net.embedded(torch.tensor([0, 2])).double(), expected, rtol=3e-4, atol=0)
        assert torch.equal(net.embedded(torch.tensor([3])), torch.zeros(1, 16))
        model = model_of(net)
        sigma = torch.tensor([0.3, 3.0])
        assert torch.equal(model(x, sigma), model(x, sigma, torch.tensor([3, 3])))
    # without a null class the model asks for a condition
    with pytest.raises(ValueError, match="expected a condition"):
        model_of(tiny(num_classes=3))(x, sigma)
    with pytest.raises(RuntimeError, match="smaller than num_classes"):
        tiny(num_classes=3)(x, label, torch.tensor([0, 3]))


@pytest.mark.parametrize("shape", [(3, 16), (2, 8, 12), (1, 4, 6, 8)])
def test_signals_images_and_volumes_of_any_size(shape):
    net = tiny(shape)
    out = net(torch.randn(2, *shape), torch.tensor([0.1, -0.2]))
    assert out.shape == (2, *shape)
    out.square().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in net.parameters())
    # a process of several waits for a gradient of every weight
    assert torch.equal(net.last_uncertainty.weight.grad, torch.zeros(1, 8))


def test_recomputed_activations_give_the_same_gradients():
    net = tiny(num_classes=3, dropout=0.2)
    x, label, c = torch.randn(2, 2, 8, 8), torch.tensor([-0.5, 0.5]), torch.tensor([0, 2])
    found = []
    for net.activation_checkpointing in (False, True):
        net.zero_grad()
        torch.manual_seed(1)
        net(x, label, c).square().sum().backward()
        found.append({k: p.grad.clone() for k, p in net.named_parameters()})
    for key, value in found[0].items():
        torch.testing.assert_close(found[1][key], value, rtol=1e-3, atol=1e-3)


def test_uncertainty_is_fitted_by_its_own_loss():
    """loss / u + log u is least where u is the loss: of losses that are 4 at every level, log u = log 4."""
    net = tiny(uncertainty=64)
    head = net.last_uncertainty
    label = torch.linspace(-1, 1, 32)
    assert net.uncertainty(label).shape == (32,)
    with torch.no_grad():
        features = net.fourier_uncertainty(label)
        log_u = features @ (head.weight[0] / head.weight.square().mean().sqrt()) / 8
        torch.testing.assert_close(net.uncertainty(label), log_u, rtol=1e-3, atol=1e-3)
    log_u = net.uncertainty(label)
    (4 * torch.exp(-log_u) + log_u).sum().backward()
    expected = (1 - 4 * torch.exp(-log_u)).detach() @ features / 8
    # its direction's part alone: the magnitude of a row has no gradient
    row = head.weight[0].detach() / head.weight.norm()
    scale = head.weight.detach().square().mean().sqrt()
    torch.testing.assert_close(head.weight.grad[0] * scale, expected - (expected @ row) * row, rtol=1e-2, atol=1e-2)
    with pytest.raises(ValueError, match="has no uncertainty; expected one that was built with uncertainty"):
        tiny(uncertainty=0).uncertainty(label)


def test_the_objective_weighs_by_the_uncertainty():
    """Its losses are the plain ones, their gradients those of loss / u + log u."""
    c = small(2, training__batch_size=8, model__net__name="edm2")
    c.model.net.update(multipliers=(1, 2), blocks=1, attention=(1,), head=8, uncertainty=8)
    e = build(c)
    e.model.eval()
    with torch.no_grad():
        e.model.net.gain.fill_(0.3)
    batch, u, noise = Batch(randn(4, 1, 8, 8).float()), torch.linspace(0.1, 0.9, 4), randn(4, 1, 8, 8).float()
    plain = dataclasses.replace(e.objective, uncertainty=None).losses(e.model, batch, u, noise)
    found = e.objective.losses(e.model, batch, u, noise)
    assert torch.equal(found, plain)
    log_u = e.model.net.uncertainty(e.objective.levels(u).log() / 4)
    parameters = [e.model.net.gain, e.model.net.last_uncertainty.weight]
    expected = torch.autograd.grad((plain / log_u.exp() + log_u).sum(), parameters)
    for a, b in zip(torch.autograd.grad(found.sum(), parameters), expected, strict=True):
        torch.testing.assert_close(a, b)
        assert float(b.abs().max()) > 0
    with pytest.raises(ValueError, match="UNet estimates no uncertainty; expected an EDM2"):
        build(small(2)).model.uncertainty(torch.ones(1))


def test_a_config_trains_it():
    c = small(2, training__batch_size=8, training__label_dropout=0.5, model__conditional=True, model__net__name="edm2")
    c.model.net.update(multipliers=(1, 2), blocks=1, attention=(1,), head=8, uncertainty=8)
    trainer = Trainer(build(c), c)
    model = trainer.model
    assert (model.label, model.label_scale) == ("log_sigma", 0.25)
    assert isinstance(model.input_scale, UnitVariance)
    # the first step moves the last gain, which is 0, and so the second all that comes before it
    before = {k: p.detach().clone() for k, p in model.net.named_parameters()}
    assert all(math.isfinite(trainer.advance().loss) for _ in range(2))
    still = {k for k, p in model.net.named_parameters() if torch.equal(p, before[k])}
    assert not still
    c.model.label = "time"
    with pytest.raises(ValueError, match="model.label is 'time', which model.net.name='edm2' does not take"):
        build(c)


def test_a_saved_model_is_the_same(tmp_path):
    net = tiny((2, 8, 4), num_classes=3, null_class=True).eval()
    assert net.config.keys() == EDM2((2, 8, 8), width=8).config.keys()
    model = model_of(net)
    model.save(tmp_path / "model")
    again = ScoreModel.load(tmp_path / "model").eval()
    assert isinstance(again.net, EDM2)
    assert again.net.config == net.config
    x, sigma, c = torch.randn(2, 2, 8, 4), torch.tensor([0.1, 5.0]), torch.tensor([1, 3])
    with torch.no_grad():
        assert torch.equal(again(x, sigma, c), model(x, sigma, c))
        assert torch.equal(again.net.uncertainty(sigma.log() / 4), net.uncertainty(sigma.log() / 4))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_precisions(dtype):
    net = tiny(num_classes=3).eval()
    x, label, c = torch.randn(2, 2, 8, 8), torch.tensor([-0.5, 0.5]), torch.tensor([0, 2])
    with torch.no_grad():
        expected = net(x, label, c)
        close = 1e-5 if dtype == torch.float64 else 0.1
        found = net.to(dtype)(x.to(dtype), label.to(dtype), c)
        assert found.dtype == dtype
        assert difference(found.float(), expected) < close
        with torch.autocast("cpu", torch.bfloat16):
            assert difference(net.float()(x, label, c).float(), expected) < 0.1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data_shape": (3,)}, r"data_shape is \(3,\); expected .*: points need MLP"),
        ({"data_shape": (3, 8, 0)}, "data_shape is"),
        (
            {"data_shape": (3, 8, 12)},
            "data_shape is .*; expected sizes that are multiples of 8, for 4 res.*: crop",
        ),
        ({"width": 0}, "width = 0, .*; expected width"),
        ({"blocks": 0}, "blocks = 0, .*; expected width"),
        ({"head": 0}, "head = 0, .*; expected width"),
        ({"uncertainty": -1}, "uncertainty = -1, .*; expected width"),
        ({"multipliers": ()}, r"multipliers = \(\); expected width"),
        ({"dropout": 1.0}, "dropout is 1; expected 0 <= dropout < 1"),
        ({"attention": (4,)}, r"attention is \(4,\); expected resolutions from 0 to 3"),
        ({"head": 5}, r"head = 5 does not divide the widths with attention, .*; expected a divisor"),
        ({"num_classes": 0}, "num_classes is 0; expected at least 1"),
    ],
)
def test_settings_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        EDM2(**({"data_shape": (3, 8, 8), "width": 8, "head": 8} | changes))


def test_a_condition_needs_classes():
    with pytest.raises(ValueError, match="a condition was given to a EDM2 without classes"):
        tiny()(torch.randn(1, 2, 8, 8), torch.zeros(1), torch.tensor([0]))
    # networks say what their label is multiplied by; one that says nothing gets it as it is
    assert not hasattr(MLP, "label_scale")
