"""Precision, layouts, memory savers, optimisers and rates."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from test_training import small
from torch.nn import functional

from scorelab import precision
from scorelab.cli.main import main
from scorelab.models import ScoreModel, UnitVariance
from scorelab.nn import UNet
from scorelab.processes import VE
from scorelab.training import Trainer, build, engine, train
from scorelab.training.optim import SCHEDULES, learning_rate
from scorelab.training.settings import part, resolve


def trained(steps: int = 3, **changes) -> Trainer:
    c = small(**{"model__net__dropout": 0.0, "training__batch_size": 32, "training__precision": "fp32", **changes})
    trainer = Trainer(build(c), c)
    for _ in range(steps):
        trainer.advance()
    return trainer


def difference(a: Trainer, b: Trainer) -> float:
    pairs = zip(a.model.parameters(), b.model.parameters(), strict=True)
    return max(float((p - q).detach().abs().max()) for p, q in pairs)


def test_layouts_change_nothing_but_rounding():
    first, last = trained(training__channels_last="no"), trained(training__channels_last="yes")
    assert last.model.net.first.weight.is_contiguous(memory_format=torch.channels_last)
    assert difference(first, last) < 1e-4
    with pytest.raises(ValueError, match="expected 'auto', 'yes' or 'no'"):
        trained(training__channels_last="maybe")


@pytest.fixture
def bf16_anywhere(monkeypatch):
    """PyTorch multiplies in bf16 on every CPU, slowly on some: what is tested here holds on all of them."""
    monkeypatch.setattr(precision, "multiplies_in_bf16", lambda device: True)


def test_bf16_trains_weights_that_stay_in_single_precision(bf16_anywhere):
    single, half = trained(1), trained(1, training__precision="bf16")
    assert all(p.dtype == torch.float32 for p in half.model.parameters())
    assert 0 < difference(single, half) < 1e-3
    assert torch.isfinite(torch.cat([p.flatten() for p in half.model.parameters()])).all()


SHAPES = [(1, 16), (1, 12), (2, 5), (1, 8, 8), (3, 9, 6), (1, 7, 7), (1, 4, 8, 8), (1, 2, 5, 5), (1, 6, 5, 4)]
"""Lines, planes and volumes, even and odd, whose U-Nets go down to 1 and 2, or do not."""


@pytest.mark.parametrize("multipliers", [(1,), (1, 1), (1, 1, 1)])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_gradient_of_bf16_is_that_of_fp32_or_bf16_is_refused(shape, multipliers, bf16_anywhere):
    """On any CPU: a product of bf16 numbers is right to 2^-8, and tens of them in a row lose a few times that."""
    torch.manual_seed(0)
    net = UNet(shape, width=8, multipliers=multipliers, blocks=1)
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.3 / max(1, p[0].numel()) ** 0.5 if p.ndim > 1 else 0.3)
    model = ScoreModel(net, VE(), data_shape=shape, input_scale=UnitVariance(0.5), label="log_sigma")
    smallest = min(shape[1:])
    for _ in multipliers[1:]:
        smallest = -(-smallest // 2)
    if smallest <= 2:
        assert precision.settled_precision("auto", model) == "fp32"
        with pytest.raises(ValueError, match=r"a size of 1 or 2\); use 'fp32'"):
            precision.settled_precision("bf16", model)
        return
    assert precision.settled_precision("auto", model) == precision.settled_precision("bf16", model) == "bf16"
    x, sigma = torch.randn(4, *shape), torch.tensor([0.1, 0.5, 1.0, 3.0])
    found = {}
    for kind in ("fp32", "bf16"):
        net.zero_grad()
        y = precision.prepare(model, kind, channels_last="no")(x, sigma)
        (y * sigma.reshape(-1, *(1,) * len(shape))).square().sum().backward()
        found[kind] = {name: p.grad for name, p in net.named_parameters()}
    for name, right in found["fp32"].items():
        assert (found["bf16"][name] - right).norm() <= 0.1 * right.norm(), name


def test_convolutions_that_are_called_as_functions_or_transposed_are_seen_too():
    class Net(torch.nn.Module):
        def __init__(self, kernel: int, stride: int) -> None:
            super().__init__()
            self.weight, self.stride = torch.nn.Parameter(torch.zeros(1, 1, kernel)), stride

        def forward(self, x, label):
            small = functional.conv1d(
                input=x, weight=self.weight, stride=self.stride, padding=self.weight.shape[2] // 2
            )
            return functional.interpolate(small, x.shape[2])

    def found(kernel, stride, length):
        model = ScoreModel(Net(kernel, stride), VE(), data_shape=(1, length)).train()
        sizes = precision.unsafe_convolution(model)
        assert model.training
        return sizes

    assert found(3, 2, 2) == "(2,) to (1,)"
    assert found(3, 2, 5) == ""
    assert found(3, 2, 4) == "(4,) to (2,)"
    assert found(1, 1, 1) == ""
    assert found(1, 2, 2) == "(2,) to (1,)"
    assert found(7, 1, 3) == "(3,) to (3,)"


def test_moments_lie_as_the_weights_do_whatever_layout_they_were_saved_in(tmp_path):
    """Fused Adam walks memory: 3 steps in the other layout are 3 steps more of the same run."""
    first, whole = trained(20, training__channels_last="no"), trained(23, training__channels_last="no")
    last = trained(0, training__channels_last="yes")
    last.restore(first.save(tmp_path))
    for _ in range(3):
        last.advance()
    assert difference(last, whole) < 0.01 * difference(first, whole)


@pytest.mark.parametrize("option", ["activation_checkpointing", "accumulate"])
def test_bf16_with_other_options(option, bf16_anywhere):
    plain = trained(training__precision="bf16")
    other = trained(training__precision="bf16", **{f"training__{option}": 2 if option == "accumulate" else True})
    assert difference(plain, other) < 1e-3


def test_precision_is_settled_by_the_device_and_the_network(monkeypatch):
    image = build(small()).model
    points = build(small(data__source="moons", model__net__name="mlp")).model
    for instructions, auto in (({}, "fp32"), ({"avx512_bf16": True}, "bf16"), ({"amx_bf16": True}, "bf16")):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda known=instructions: known)
        assert precision.settled_precision("auto", image) == auto
        assert precision.settled_precision("auto", points) == "fp32"
        assert precision.settled_precision("fp32", image) == "fp32"
        if instructions:
            assert precision.settled_precision("bf16", image) == "bf16"
        else:
            with pytest.raises(ValueError, match="'bf16', but this cpu has no bf16 instructions; use 'fp32'"):
                precision.settled_precision("bf16", image)
    with pytest.raises(ValueError, match="did you mean 'bf16'"):
        precision.settled_precision("bf61", image)


def test_activation_checkpointing_gives_the_same_weights_with_less_kept():
    """Also with dropout, whose random bits are drawn again alike."""
    options = {"model__net__dropout": 0.2}
    plain, saving = trained(**options), trained(training__activation_checkpointing=True, **options)
    assert difference(plain, saving) < 1e-6
    kept = []
    net = UNet((1, 16, 16), width=16, blocks=1)
    for net.activation_checkpointing in (False, True):
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=sizes: s.append(t.numel()) or t, lambda t: t):
            net(torch.randn(2, 1, 16, 16), torch.rand(2)).sum()
        kept.append(sum(sizes))
    assert kept[1] < kept[0] / 3
    with pytest.raises(ValueError, match="MLP does not: leave it False"):
        trained(data__source="moons", model__net__name="mlp", training__activation_checkpointing=True)


def test_workers_change_nothing():
    assert difference(trained(data__workers=2), trained()) == 0


def test_inverse_square_root_rate():
    schedule = SCHEDULES["inverse_sqrt"](decay_from=100)
    for step, rate in ((4, 1.0), (100, 2.0), (400, 1.0), (10_000, 0.2)):
        assert learning_rate(2.0, 10, schedule, step) == pytest.approx(rate)


def test_adamw_decays_weights_apart_from_the_gradient():
    """With no gradient, one step multiplies a weight by 1 - lr decay; Adam's decay would be a step of size lr."""
    for name, expected in (("adamw", 3 * (1 - 0.1 * 0.5)), ("adam", 3 - 0.1)):
        weight = torch.nn.Parameter(torch.full((2,), 3.0))
        weight.grad = torch.zeros(2)
        config = resolve(small(optim__name=name, optim__lr=0.1, optim__weight_decay=0.5))
        part(config, "optim", parameters=[weight]).step()
        torch.testing.assert_close(weight.detach(), torch.full((2,), expected), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optim__name": "adamm"}, "did you mean 'adam'"),
        ({"optim__schedule__name": "cosin"}, "did you mean 'cosine'"),
        ({"optim__schedule__name": "inverse_sqrt", "optim__schedule__decay_from": 0}, "optim.schedule.decay_from is 0"),
        ({"optim__beta1": 1.0}, "betas below 1"),
        ({"training__fsdp": True}, "start them with torchrun"),
        ({"data__workers": -1}, "data.workers is -1"),
        ({"optim__ema": ()}, "expected a decay in optim.ema"),
        ({"model__net__multipliers": (1.5, 2)}, r"multipliers is .1.5, 2.; expected a tuple"),
        ({"model__net__multipliers": (0, 2)}, "multipliers that give whole numbers of channels"),
        ({"model__net__head": -1, "model__net__attention": (1,)}, "and head >= 0"),
        ({"model__net__dropout": 1.5}, "expected 0 <= dropout < 1"),
        ({"data__path": "images"}, "reads no files; set data.source"),
    ],
)
def test_options_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        trained(**changes)


def test_none_is_none_where_that_means_something():
    c = small(2, training__batch_size=16)
    with c.ignore_type():
        c.optim.clip = None
    trainer = Trainer(build(c), c)
    assert math.isfinite(trainer.advance().gradient_norm)
    with c.ignore_type():
        c.optim.lr = None
    with pytest.raises(ValueError, match=r"config.optim.lr is None; expected a finite number"):
        build(c)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_a_compiled_network_trains_alike():
    assert difference(trained(), trained(training__compile=True)) < 1e-4


def image_model(**options) -> ScoreModel:
    torch.manual_seed(0)
    net = UNet((1, 8, 8), width=8, multipliers=(1,), blocks=1, **options)
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return ScoreModel(net, VE(), data_shape=(1, 8, 8), input_scale=UnitVariance(0.5), label="log_sigma").eval()


def test_only_the_network_runs_in_what_was_chosen(bf16_anywhere):
    """What goes in, what comes out and the coefficients are single; large levels lose no digits to bf16."""
    model, seen = image_model(), []
    model.net.register_forward_hook(lambda net, given, out: seen.append((*(t.dtype for t in given), out.dtype)))
    x = 50 * torch.randn(3, 1, 8, 8)
    plain = model(x, torch.tensor(40.0))
    assert precision.prepare(model, "bf16") is model
    assert model.precision == "bf16"
    del seen[1:]  # it is run once to be looked at
    half = model(x, torch.tensor(40.0))
    assert seen == [(torch.float32, torch.float32, torch.float32), (torch.float32, torch.float32, torch.bfloat16)]
    assert half.dtype == torch.float32
    assert not torch.equal(half, plain)
    # x/sigma^2 dominates there: an error of bf16 in it would be 0.4 %
    torch.testing.assert_close(half, plain, rtol=5e-2, atol=2e-3)
    assert precision.prepare(model, "fp32").precision == "fp32"
    torch.testing.assert_close(model(x, torch.tensor(40.0)), plain)


def test_conditional_networks_without_a_null_condition_are_settled_too(bf16_anywhere):
    assert precision.settled_precision("auto", image_model(num_classes=3)) == "bf16"
    assert precision.settled_precision("auto", image_model(num_classes=3, null_class=True)) == "bf16"


def test_layouts_are_chosen_in_one_place(monkeypatch):
    """On a GPU channels last where the network is compiled; on a CPU in fp32 with AVX-512."""
    made: list[object] = []
    monkeypatch.setattr(ScoreModel, "to", lambda self, **k: made.append(k.get("memory_format")) or self)
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, mode=None: made.append(f"compiled {mode}"))
    monkeypatch.setattr(precision, "check_compiler", lambda device: None)
    for device, capability, compiled, expected in [
        ("cuda", "", False, []),
        ("cuda", "", True, [torch.channels_last, "compiled reduce-overhead"]),
        ("cpu", "AVX512", False, [torch.channels_last]),
        ("cpu", "AVX2", False, []),
        ("cpu", "AVX2", True, ["compiled None"]),
    ]:
        made.clear()
        model = image_model().requires_grad_(False)
        monkeypatch.setattr(ScoreModel, "device", torch.device(device))
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda c=capability: c)
        precision.prepare(model, "fp32", compile=compiled)
        assert made == expected
    made.clear()
    monkeypatch.setattr(ScoreModel, "device", torch.device("cuda"))
    precision.prepare(image_model(), "fp32", compile=True, channels_last="no", graphs=False)
    assert made == ["compiled None"]
    with pytest.raises(ValueError, match="channels_last is 'maybe'"):
        precision.prepare(image_model(), "fp32", channels_last="maybe")


@pytest.mark.parametrize(
    ("options", "expected"),
    [({}, True), ({"training__accumulate": 2}, False), ({"training__activation_checkpointing": True}, False)],
)
def test_gradients_summed_over_calls_are_not_replayed(monkeypatch, options, expected):
    """A graph's memory is overwritten by its next call, and gradients lie in it."""
    asked = []
    monkeypatch.setattr(engine, "prepare", lambda model, *a, graphs, **k: asked.append(graphs) or model)
    c = small(1, **options)
    Trainer(build(c), c)
    assert asked == [expected]


def test_evaluations_take_one_copy_that_is_filled_again(bf16_anywhere):
    c = small(3, training__precision="bf16", training__batch_size=16, optim__ema=(0.5,))
    trainer = Trainer(build(c), c)
    trainer.advance()
    first = trainer.evaluated()
    assert (first.precision, first.training) == ("bf16", False)
    before = {k: v.clone() for k, v in first.weights().items()}
    trainer.advance()
    assert trainer.evaluated() is first
    assert any(not torch.equal(v, before[k]) for k, v in first.weights().items())
    for k, v in trainer.averaged().weights().items():
        assert torch.equal(v, first.weights()[k])
    assert trainer.averaged().precision == "fp32"


def test_samples_in_another_precision(tmp_path, monkeypatch, capsys, bf16_anywhere):
    train(small(2, sampling__grid__n=4, training__batch_size=16), tmp_path, progress=False)
    for kind in ("fp32", "bf16", "auto"):
        out = tmp_path / f"{kind}.npz"
        assert main(["sample", f"--workdir={tmp_path}", "--n=3", f"--precision={kind}", f"--out={out}"]) == 0
    single, half, auto = (np.load(tmp_path / f"{k}.npz")["samples"] for k in ("fp32", "bf16", "auto"))
    np.testing.assert_array_equal(half, auto)
    assert 0 < np.abs(single - half).max() < 0.5
    monkeypatch.setattr(precision, "multiplies_in_bf16", lambda device: False)
    assert main(["sample", f"--workdir={tmp_path}", "--n=3", "--precision=bf16"]) == 2
    assert "precision is 'bf16', but this cpu has no bf16 instructions; use 'fp32'" in capsys.readouterr().err
