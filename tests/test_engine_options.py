"""Precision, layouts, memory savers, optimisers and rates."""

from __future__ import annotations

import math
from contextlib import nullcontext

import pytest
import torch
from test_training import small
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from scorelab.nn import UNet
from scorelab.training import Trainer, build
from scorelab.training.optim import learning_rate, optimiser
from scorelab.training.precision import RoundedProducts, settled_precision


def trained(steps: int = 3, **changes) -> Trainer:
    c = small(**{"model__dropout": 0.0, "training__batch_size": 32, "training__precision": "fp32", **changes})
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


def test_bf16_trains_weights_that_stay_in_single_precision():
    single, half = trained(1), trained(1, training__precision="bf16")
    assert all(p.dtype == torch.float32 for p in half.model.parameters())
    assert 0 < difference(single, half) < 1e-3
    assert torch.isfinite(torch.cat([p.flatten() for p in half.model.parameters()])).all()


def test_bf16_products_by_fp32_instructions_are_those_of_bf16():
    """A sum of products of bf16 numbers is exact in fp32 here, so only the result is rounded: 1 + 2^-9 to 1."""
    x = torch.tensor([[1.0, 2**-9, 1 + 2**-10]])
    with RoundedProducts(), torch.autocast("cpu", torch.bfloat16):
        assert functional.linear(x, torch.tensor([[1.0, 0, 0], [1, 1, 0], [0, 0, 1], [0, 2**9, 0]])).tolist() == [
            [1.0, 1.0, 1.0, 1.0]
        ]
        assert functional.silu(x).dtype == torch.float32
        assert functional.linear(x.double(), x.double()).dtype == torch.float64
    with RoundedProducts():
        assert functional.linear(x, x).dtype == torch.float32


def test_bf16_products_of_every_kind_agree_with_pytorchs():
    """Values and gradients, within bf16's rounding of what PyTorch's own instructions give."""
    torch.manual_seed(0)
    net = UNet((1, 8, 8), width=16, blocks=1, attention=(1,), head=16)
    volume = UNet((1, 4, 4, 4), width=8, blocks=1)
    for some in (net, volume):
        for p in some.parameters():
            torch.nn.init.normal_(p, std=0.1)
        x, label = torch.randn(4, *some.config["data_shape"]), torch.rand(4)
        found = []
        for context in (nullcontext(), RoundedProducts()):
            some.zero_grad()
            with context:
                with torch.autocast("cpu", torch.bfloat16):
                    y = some(x, label)
                y.float().square().mean().backward()
            found.append([y.detach().float(), *(p.grad for p in some.parameters())])
        for theirs, ours in zip(*found, strict=True):
            assert (theirs - ours).norm() <= 0.02 * theirs.norm()


def test_bf16_products_that_are_run_again_in_the_backward_pass_have_the_same_gradient():
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Conv2d(8, 8, 3), torch.nn.SiLU(), torch.nn.Conv2d(8, 8, 3))
    x, found = torch.randn(4, 8, 8, 8), []
    for run in (net, lambda x: checkpoint(net, x, use_reentrant=False)):
        net.zero_grad()
        with RoundedProducts(), torch.autocast("cpu", torch.bfloat16):
            y = run(x)
        y.float().square().mean().backward()
        found.append(torch.cat([p.grad.flatten() for p in net.parameters()]))
    assert (found[0] - found[1]).norm() <= 0.02 * found[0].norm()


def test_bf16_leaves_what_it_does_not_know_to_pytorch():
    a, b = torch.randn(3, 4), torch.randn(4, 5)
    with RoundedProducts(), torch.autocast("cpu", torch.bfloat16):
        out = torch.zeros(3, 5)
        torch.mm(a, b, out=out)
        assert out.any()
        batched = torch.func.vmap(lambda row: row @ b)(a)
        assert batched.dtype == torch.bfloat16
        assert (a.to_sparse() @ b).shape == (3, 5)


def test_moments_lie_as_the_weights_do_whatever_layout_they_were_saved_in(tmp_path):
    """Fused Adam walks memory: 3 steps in the other layout are 3 steps more of the same run."""
    first, whole = trained(20, training__channels_last="no"), trained(23, training__channels_last="no")
    last = trained(0, training__channels_last="yes")
    last.restore(first.save(tmp_path))
    for _ in range(3):
        last.advance()
    assert difference(last, whole) < 0.01 * difference(first, whole)


@pytest.mark.parametrize("option", ["activation_checkpointing", "accumulate"])
def test_bf16_with_other_options(option):
    plain = trained(training__precision="bf16")
    other = trained(training__precision="bf16", **{f"training__{option}": 2 if option == "accumulate" else True})
    assert difference(plain, other) < 1e-3


def test_precision_is_settled_by_the_device_and_the_network(monkeypatch):
    image = build(small()).model
    points = build(small(data__source="moons", model__net="mlp", model__dropout=0.0)).model
    for has in (False, True):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda has=has: has)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
        assert settled_precision("auto", image) == ("bf16" if has else "fp32")
        assert settled_precision("auto", points) == "fp32"
    assert settled_precision("bf16", points) == "bf16"
    with pytest.raises(ValueError, match="did you mean 'bf16'"):
        settled_precision("bf61", image)


def test_activation_checkpointing_gives_the_same_weights_with_less_kept():
    """Also with dropout, whose random bits are drawn again alike."""
    options = {"model__dropout": 0.2}
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
        trained(data__source="moons", model__net="mlp", training__activation_checkpointing=True)


def test_workers_change_nothing():
    assert difference(trained(data__workers=2), trained()) == 0


def test_inverse_square_root_rate():
    o = small(optim__schedule="inverse_sqrt", optim__decay_from=100, optim__lr=2.0, optim__warmup=10).optim
    assert learning_rate(o, 4, 1000) == pytest.approx(1.0)
    assert learning_rate(o, 100, 1000) == pytest.approx(2.0)
    assert learning_rate(o, 400, 1000) == pytest.approx(1.0)
    assert learning_rate(o, 10_000, 1000) == pytest.approx(0.2)


def test_adamw_decays_weights_apart_from_the_gradient():
    """With no gradient, one step multiplies a weight by 1 - lr decay; Adam's decay would be a step of size lr."""
    for name, expected in (("adamw", 3 * (1 - 0.1 * 0.5)), ("adam", 3 - 0.1)):
        weight = torch.nn.Parameter(torch.full((2,), 3.0))
        weight.grad = torch.zeros(2)
        o = small(optim__name=name, optim__lr=0.1, optim__weight_decay=0.5).optim
        optimiser([weight], o).step()
        torch.testing.assert_close(weight.detach(), torch.full((2,), expected), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optim__name": "adamm"}, "did you mean 'adam'"),
        ({"optim__schedule": "cosin"}, "did you mean 'cosine'"),
        ({"optim__schedule": "inverse_sqrt", "optim__decay_from": 0}, "optim.decay_from is 0"),
        ({"optim__beta1": 1.0}, "betas below 1"),
        ({"training__fsdp": True}, "start them with torchrun"),
        ({"data__workers": -1}, "data.workers is -1"),
        ({"optim__ema": ()}, "expected a decay in optim.ema"),
        ({"model__multipliers": (1.5, 2)}, "tuple of whole numbers"),
        ({"model__multipliers": (0, 2)}, "all of them 1 or more"),
        ({"model__head": 0, "model__attention": (1,)}, "all of them 1 or more"),
        ({"model__dropout": 1.5}, "expected 0 <= dropout < 1"),
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
    with pytest.raises(ValueError, match=r"config.optim.lr is None; expected float, such as 0.0002"):
        build(c)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_a_compiled_network_trains_alike():
    assert difference(trained(), trained(training__compile=True)) < 1e-4
