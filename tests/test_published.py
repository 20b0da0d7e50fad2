"""Networks of the public releases: equal to what they return, and options of theirs that no stored value shows."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from ml_collections import ConfigDict
from problems import F64, randn
from published import difference, released
from test_training import small
from torch import nn
from torch.nn import functional

from scorelab import VE, VP, DiscreteVP, PerSampleNoise, ScoreModel, precision, sample
from scorelab.interop.unets import from_adm, from_edm, from_score_sde
from scorelab.models import Constant, LogSigma, UnitVariance
from scorelab.nn import UNet, adm, ncsnpp
from scorelab.nn.layers import Resampled, Style, resampled
from scorelab.predictions import EPS, edm
from scorelab.samplers import Heun
from scorelab.training import Trainer, build, resolve

PARITY = 2e-5
BETAS = np.linspace(1e-4, 0.02, 1000).tolist()


def levels_at(sizes: list[int], size: int, count: int) -> tuple[int, ...]:
    return tuple(i for i in range(count) if size >> i in sizes)


def song(config: dict) -> UNet:
    """The network of a score_sde configuration."""
    m, size = config["model"], config["data"]["image_size"]
    shape, kinds = (config["data"]["channels"], size, size), {"input_skip": "skip", "output_skip": "skip"}
    return ncsnpp(
        shape,
        width=m["nf"],
        multipliers=tuple(m["ch_mult"]),
        blocks=m["num_res_blocks"],
        attention=levels_at(m["attn_resolutions"], size, len(m["ch_mult"])),
        embedding={"fourier": "gaussian"}.get(m["embedding_type"], m["embedding_type"]),
        fir=tuple(map(float, m["fir_kernel"])) if m["fir"] else (),
        inputs=kinds.get(m["progressive_input"], m["progressive_input"]),
        outputs=kinds.get(m["progressive"], m["progressive"]),
        combine=m["progressive_combine"],
    )


def test_ddpm_of_score_sde():
    """Steps are labels 0 to 999, its output is eps."""
    r = released("score_sde_ddpm_vp")
    r.state.pop("sigmas")
    m = r.config["model"]
    options = {"middle_attention": True, "attention_up": "last", "resampling": "same", "group": 1, "eps": 1e-6}
    attention = levels_at(m["attn_resolutions"], 16, 2)
    net = UNet(
        (3, 16, 16),
        width=m["nf"],
        multipliers=tuple(m["ch_mult"]),
        blocks=1,
        attention=attention,
        head=0,
        embedding="positional",
        **options,
    )
    net.load_state_dict(from_score_sde(net, r.state))
    model = ScoreModel(net, DiscreteVP(BETAS), data_shape=(3, 16, 16), label="index", data_range=(-1, 1)).eval()
    sigma = model.process.step_sigmas[r.values["labels"].long()]
    x = r.values["x"] * (1 + sigma**2).sqrt().float().reshape(-1, 1, 1, 1)
    with torch.no_grad():
        assert difference(net(r.values["x"], r.values["labels"]), r.values["output"]) < PARITY
        # the same through the model, whose x is unscaled
        assert difference(model.eps(x, sigma.float()), r.values["output"]) < 1e-4


@pytest.mark.parametrize("name", ["score_sde_ddpmpp_vp_continuous", "score_sde_ncsnpp_ve_continuous"])
def test_networks_of_score_sde(name):
    r = released(name)
    r.state.pop("sigmas")
    net = song(r.config).eval()
    net.load_state_dict(from_score_sde(net, r.state))
    x, label = r.values["x"], r.values["labels"]
    with torch.no_grad():
        # of VE the data is in [0, 1]; the release takes the logarithm itself, and divides by sigma
        found = net(2 * x - 1, label.log()) / label.reshape(-1, 1, 1, 1) if "ve" in name else net(x, label)
    assert difference(found, r.values["output"]) < PARITY


@pytest.mark.parametrize("name", ["edm_ddpmpp", "edm_ncsnpp", "edm_ve", "edm_vp", "edm_adm"])
def test_networks_of_edm(name):
    """Unscaled x and sigma go in and the denoised sample comes out, by each of its preconditionings."""
    r = released(name)
    c, state = r.config, {k.removeprefix("model."): v for k, v in r.state.items() if "resample_filter" not in k}
    known = {"width": c["model_channels"], "multipliers": tuple(c["channel_mult"]), "blocks": c["num_blocks"]}
    known["attention"] = levels_at(c["attn_resolutions"], 16, len(c["channel_mult"]))
    if c["label_dim"]:
        known |= {"num_classes": c["label_dim"], "null_class": True}
    if c["model_type"] == "DhariwalUNet":
        net = adm((3, 16, 16), variance=False, group=4, **known)
    else:
        known["embedding"] = {"fourier": "gaussian"}.get(c.get("embedding_type"), "positional")
        known["inputs"] = {"residual": "residual"}.get(c.get("encoder_type"), "none")
        net = ncsnpp((3, 16, 16), fir=(1.0, 3.0, 3.0, 1.0) if "resample_filter" in c else (), **known)
    net.load_state_dict(from_edm(net, state))
    if c["cls"] == "EDMPrecond":
        model = ScoreModel(net, VE(0.002, 80.0), edm(0.5), data_shape=(3, 16, 16), label="log_sigma", label_scale=0.25)
        model.input_scale = UnitVariance(0.5)
    elif c["cls"] == "VPPrecond":
        model = ScoreModel(net, VP(0.1, 20.0), EPS, data_shape=(3, 16, 16), label_scale=999.0)
    else:
        # its F has the sign of the score: eps is -F
        for parameter in net.last.parameters():
            parameter.data.neg_()
        model = ScoreModel(net, VE(0.02, 100.0), EPS, data_shape=(3, 16, 16), label=LogSigma(2.0))
        model.input_scale = Constant(1.0)
    with torch.no_grad():
        found = model.eval().denoise(r.values["x"], r.values["sigma"], r.values.get("class_labels"))
    assert difference(found, r.values["output"]) < PARITY


def test_adm_of_guided_diffusion():
    """Six channels: eps and the variance. Queries, keys and values in the wrong order have the same shapes."""
    r = released("guided_diffusion_unet")
    c = r.config
    net = adm(
        (3, 16, 16),
        width=c["model_channels"],
        multipliers=tuple(c["channel_mult"]),
        blocks=c["num_res_blocks"],
        attention=tuple(int(math.log2(a)) for a in c["attention_resolutions"]),
        head=c["num_head_channels"],
        variance=True,
        num_classes=c["num_classes"],
    ).eval()
    given = [r.values[key] for key in ("x", "labels", "class_labels")]
    for legacy, least, most in ((True, 0, PARITY), (False, 1e-2, 10)):
        net.load_state_dict(from_adm(net, r.state, legacy=legacy))
        with torch.no_grad():
            assert least <= difference(net(*given), r.values["output"]) < most


def test_weights_of_another_network_are_refused():
    r = released("guided_diffusion_unet")
    known = {"multipliers": (1, 2), "blocks": 1, "attention": (1,), "head": 16, "num_classes": 10, "variance": True}
    net = adm((3, 16, 16), width=32, **known)
    with pytest.raises(ValueError, match=r"there are no weights 'time_embed.0.weight'; expected those of this release"):
        from_adm(net, {})
    with pytest.raises(ValueError, match="1 are not known [(]more[)], and 0 are missing"):
        from_adm(net, {**r.state, "more": torch.zeros(1)})
    wide = adm((3, 16, 16), width=64, **known)
    with pytest.raises(ValueError, match=r"the weights for embed.1.weight are \(128, 32\); expected \(256, 64\)"):
        from_adm(wide, r.state)


def filtered(x: np.ndarray, taps: np.ndarray, up: int, before: int, behind: int) -> np.ndarray:
    """Along the last axis, value by value: zeros after each, padding, and a filter."""
    wide = np.zeros((*x.shape[:-1], x.shape[-1] * up))
    wide[..., ::up] = x
    wide = np.pad(wide, [(0, 0)] * (x.ndim - 1) + [(before, behind)])
    return np.apply_along_axis(lambda line: np.convolve(line, taps, "valid"), -1, wide)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_fir_resampling_is_that_of_the_definition(rank):
    """Twice the size: zeros between, then the kernel of sum 2 in each direction; half: every second value after it."""
    taps, x = np.array([1.0, 3.0, 3.0, 1.0]) / 8, randn(2, 3, *(8, 6, 4)[:rank])
    up, down = x.numpy(), x.numpy()
    for axis in range(2, 2 + rank):
        up = np.moveaxis(filtered(np.moveaxis(up, axis, -1), 2 * taps, 2, 2, 1), -1, axis)
        down = np.moveaxis(filtered(np.moveaxis(down, axis, -1), taps, 1, 1, 1)[..., ::2], -1, axis)
    fir = (1.0, 3.0, 3.0, 1.0)
    np.testing.assert_allclose(resampled(x, True, fir).numpy(), up, rtol=0, atol=1e-12)
    np.testing.assert_allclose(resampled(x, False, fir).numpy(), down, rtol=0, atol=1e-12)


@pytest.mark.parametrize("fir", [(), (1.0, 3.0, 3.0, 1.0)])
@pytest.mark.parametrize("rank", [1, 2])
def test_convolutions_at_half_and_twice_the_size_are_both_in_turn(rank, fir):
    """Of padding "same" without a filter; with one, the filter of the whole plane and every second value, or the
    convolution of the plane that is filtered: the zeros around are the only difference, so it is looked at inside."""
    style, x = Style(rank, 4, fir=fir), randn(2, 3, *(16, 12)[:rank])
    conv = (nn.Conv1d, nn.Conv2d)[rank - 1](3, 5, 3, padding=1).to(F64)
    for up in (False, True):
        module = Resampled(style, 3, 5, up).to(F64)
        module.conv.load_state_dict(conv.state_dict())
        with torch.no_grad():
            found = module(x)
            if up:
                expected = conv(resampled(x, True, fir))
            elif fir:
                taps = torch.tensor(fir, dtype=F64) / sum(fir)
                kernel = taps if rank == 1 else taps[:, None] * taps
                whole = (functional.conv1d, functional.conv2d)[rank - 1](
                    x, kernel.expand(3, 1, *kernel.shape), padding=2, groups=3
                )
                plain = (functional.conv1d, functional.conv2d)[rank - 1]
                expected = plain(whole, conv.weight, conv.bias)[(..., *(slice(None, None, 2),) * rank)]
            else:
                # every second value from the second on, as one zero stands behind and none before
                expected = conv(x)[(..., *(slice(1, None, 2),) * rank)]
        assert found.shape == (2, 5, *(n * 2 if up else n // 2 for n in x.shape[2:]))
        inside = (..., *(slice(3, -3),) * rank) if up and fir else ...
        torch.testing.assert_close(found[inside], expected[inside], rtol=0, atol=1e-12)


OPTIONS = {
    "input skip, sum": {"inputs": "skip"},
    "input skip, cat": {"inputs": "skip", "combine": "cat"},
    "input residual, no filter": {"inputs": "residual", "fir": ()},
    "output skip": {"outputs": "skip"},
    "output residual": {"outputs": "residual"},
    "output residual, pooling without filter": {"outputs": "residual", "fir": (), "inputs": "skip"},
    "convolutions that resample": {"resampling": "strided", "inputs": "none"},
    "not rescaled": {"rescaled": False},
}


@pytest.mark.parametrize("shape", [(3, 16, 8), (1, 16), (2, 8, 8, 4)])
@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_of_ncsnpp_trains(name, shape):
    """Also those that crash in the public release; each part of a network has a share in what comes out."""
    torch.manual_seed(0)
    net = ncsnpp(shape, width=8, multipliers=(1, 2, 2), blocks=1, attention=(1,), dropout=0.0, **OPTIONS[name])
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.3)
    x = torch.randn(2, *shape)
    out = net(x, torch.tensor([0.3, -1.0]))
    assert out.shape == x.shape
    out.square().sum().backward()
    assert all(float(p.grad.abs().max()) > 0 for p in net.parameters() if p.grad is not None)
    assert not [k for k, p in net.named_parameters() if p.grad is None]


def test_sizes_that_the_resolutions_do_not_divide_are_refused_when_it_is_built():
    with pytest.raises(ValueError, match=r"data_shape is \(3, 20, 18\); expected sizes that are multiples of 4, for 3"):
        ncsnpp((3, 20, 18), width=8, multipliers=(1, 2, 2))
    with pytest.raises(ValueError, match="multipliers = .* whole numbers of channels"):
        UNet((1, 8, 8), width=6, multipliers=(1, 0.25))
    with pytest.raises(ValueError, match="inputs is 'both'; expected one of 'none', 'skip', 'residual'"):
        ncsnpp((3, 16, 16), width=8, inputs="both")
    assert adm((3, 32, 32), width=16, multipliers=(0.5, 1), blocks=1, attention=()).first.out_channels == 8


SIZES = {
    # Ho et al., 2020, appendix B; Dhariwal and Nichol, 2021, table 1 and appendix I; EDM's networks as released
    "ddpm cifar10": (35.7, UNet, (3, 32, 32), {"multipliers": (1, 2, 2, 2), "attention": (1,)}),
    "ddpm 256": (114, UNet, (3, 256, 256), {"multipliers": (1, 1, 2, 2, 4, 4), "attention": (4,)}),
    "adm 64": (296, adm, (3, 64, 64), {}),
    "adm 128": (422, adm, (3, 128, 128), {"multipliers": (1, 1, 2, 3, 4), "attention": (2, 3, 4)}),
    "adm 256": (554, adm, (3, 256, 256), {"multipliers": (1, 1, 2, 2, 4, 4), "attention": (3, 4, 5)}),
    "adm 512": (559, adm, (3, 512, 512), {"multipliers": (0.5, 1, 1, 2, 2, 4, 4), "attention": (4, 5, 6)}),
    "edm ddpm++": (55.7, ncsnpp, (3, 32, 32), {"multipliers": (2, 2, 2), "fir": (), "inputs": "none"}),
}


@pytest.mark.parametrize("name", SIZES)
def test_networks_have_as_many_millions_of_parameters_as_published(name):
    millions, maker, shape, settings = SIZES[name]
    if maker is adm:
        settings = {"num_classes": 1000, **({} if "64" in name else {"width": 256, "blocks": 2}), **settings}
        settings["variance"] = True
    elif maker is UNet:
        settings = {"width": 128, "embedding": "positional", "middle_attention": True, "head": 0, **settings}
    elif "ddpm" in name:
        settings = {"embedding": "positional", **settings}
    with torch.device("meta"):
        count = sum(p.numel() for p in maker(shape, **settings).parameters()) / 1e6
    assert count == pytest.approx(millions, abs=0.5 if millions > 100 else 0.05)


FAMILIES = {
    "unet": {"width": 8, "blocks": 1, "attention": (1,), "middle_attention": True},
    "ncsnpp": {"width": 8, "multipliers": (1, 2), "blocks": 1},
    "adm": {"width": 8, "multipliers": (1, 2), "blocks": 1, "attention": (1,), "head": 8},
    "edm2": {"width": 8, "multipliers": (1, 2), "blocks": 1, "attention": (1,), "head": 8},
    "dit": {"width": 16, "depth": 1, "heads": 2},
    "refinenet": {"width": 8},
}


def family(name: str, **changes) -> Trainer:
    """Two steps of a small network of a family on the digits."""
    c = small(2, training__batch_size=8, training__precision="fp32")
    c.model.net = ConfigDict({"name": name, **FAMILIES[name]})
    c.model.net.unlock()
    if name != "refinenet":
        c.model.conditional, c.training.label_dropout = True, 0.5
    if "dropout" in resolve(c).model.net:
        c.model.net.dropout = 0.1
    for key, value in changes.items():
        c.training[key] = value
    trainer = Trainer(build(c), c)
    for _ in range(2):
        trainer.advance()
    return trainer


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_trains_in_every_way_and_is_sampled(name, tmp_path, monkeypatch):
    """In bf16, with activations computed again, in parts, and compiled: traced and differentiated, then run eagerly."""
    monkeypatch.setattr(precision, "multiplies_in_bf16", lambda device: True)
    plain = family(name)
    weights = dict(plain.model.named_weights())
    assert all(torch.isfinite(p).all() for p in weights.values())

    def gap(other: Trainer) -> float:
        return max(float((weights[k] - p).detach().abs().max()) for k, p in other.model.named_weights())

    half = family(name, precision="bf16")
    assert all(p.dtype == torch.float32 for p in half.model.parameters())
    assert 0 < gap(half) < 5e-3
    assert gap(family(name, activation_checkpointing=True)) < 1e-6
    assert gap(family(name, accumulate=2)) < 1e-4
    monkeypatch.setattr(nn.Module, "compile", lambda self, **k: compiled_eagerly(self))
    assert gap(family(name, compile=True)) < 1e-4
    monkeypatch.undo()
    plain.save(tmp_path)
    model = ScoreModel.load(tmp_path / "step_00000002")
    assert sample(model, (3, 1, 8, 8), sampler=Heun(), generator=PerSampleNoise(0)).shape == (3, 1, 8, 8)


def compiled_eagerly(module: nn.Module) -> None:
    """torch.compile's tracing and its derivative, without the minutes that code generation takes."""
    module._compiled_call_impl = torch.compile(module._call_impl, backend="aot_eager")
