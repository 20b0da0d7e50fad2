"""DiT: the release's values, its published sizes, patches of any dimension, training, and what is refused."""

from __future__ import annotations

import math
import re

import pytest
import torch
from problems import generator
from published import difference, released
from test_training import small

from scorelab import ScoreModel
from scorelab.interop.transformers import from_dit
from scorelab.nn import DiT
from scorelab.nn.dit import SIZES
from scorelab.processes import DiscreteVP, linear_betas
from scorelab.training import Trainer, build

SHAPES = [(1, 8, 8), (2, 4, 8), (2, 12), (1, 4, 2, 6)]


def net_for(shape: tuple[int, ...], random: bool = True, **settings) -> DiT:
    """A small one, whose weights are all random: a fresh one returns 0."""
    net = DiT(shape, **{"width": 24, "depth": 2, "heads": 4, "variance": False, **settings})
    if random:
        with torch.no_grad():
            for p in net.parameters():
                p.copy_(0.2 * torch.randn(p.shape, generator=generator(p.numel())))
    return net


def release_net(**changes) -> DiT:
    c = released("dit").config
    return DiT(
        **{
            "data_shape": (c["in_channels"], c["input_size"], c["input_size"]),
            "patch": c["patch_size"],
            "width": c["hidden_size"],
            "depth": c["depth"],
            "heads": c["num_heads"],
            "mlp": c["mlp_ratio"],
            "variance": c["learn_sigma"],
            "num_classes": c["num_classes"],
            "null_class": c["class_dropout_prob"] > 0,
            **changes,
        }
    ).eval()


def inputs(shape, count=3):
    return torch.randn(count, *shape, generator=generator()), torch.tensor([0.0, 3.5, 999.0])[:count]


def test_it_returns_what_the_release_does():
    """At steps 0, 400 and 999, of two classes and of none."""
    state, _, values = released("dit")
    net = release_net()
    net.load_state_dict(from_dit(net, state))
    assert values["class_labels"].tolist() == [1, 0, net.null_condition]
    with torch.no_grad():
        for label in (values["labels"], values["labels"].float()):
            found = net(values["x"], label, values["class_labels"])
            for one, expected in zip(found, values["output"], strict=True):
                assert difference(one, expected) < 2e-5
    assert torch.equal(net.positions, state["pos_embed"])


def test_a_model_of_it_has_the_score_and_the_variance_and_is_saved(tmp_path):
    """eps = -sigma score of the release's first channels at its own steps; v from its last; no condition is none."""
    state, _, values = released("dit")
    net = release_net()
    net.load_state_dict(from_dit(net, state))
    process = DiscreteVP(linear_betas(1000))
    made = ScoreModel(net, process, data_shape=(4, 8, 8), label="index", variance=True).eval()
    made.save(tmp_path)
    model = ScoreModel.load(tmp_path)
    assert type(model.net) is DiT
    assert model.net.config == net.config
    assert (model.num_classes, int(model.null_condition)) == (5, 5)
    # step 0 has the least noise
    sigma = process.step_sigmas[values["labels"]].float()
    x = values["x"] / process.alpha(process.time(sigma)).reshape(-1, 1, 1, 1)
    with torch.no_grad():
        eps, expected = model.eps(x, sigma, values["class_labels"]), values["output"]
        score, v = model.score_and_variance(x, sigma, values["class_labels"])
        # of the last sample the class is none
        none = model.eps(x, sigma)[2]
    assert difference(eps, expected[:, :4]) < 2e-5
    assert difference(-sigma.reshape(-1, 1, 1, 1) * score, expected[:, :4]) < 2e-5
    assert difference(v, (expected[:, 4:] + 1) / 2) < 2e-5
    assert difference(none, expected[2, :4]) < 2e-5


@pytest.mark.parametrize(("name", "patch", "millions"), [("S", 2, 33), ("B", 2, 130), ("L", 2, 458), ("XL", 2, 675)])
def test_published_sizes_have_the_published_number_of_parameters(name, patch, millions):
    with torch.device("meta"):
        net = DiT((4, 32, 32), patch=patch, num_classes=1000, null_class=True, **SIZES[name])
    assert round(sum(p.numel() for p in net.parameters()) / 1e6) == millions


def test_the_width_of_positions_is_shared_by_the_dimensions_the_last_first():
    net = net_for((1, 4, 6, 10))
    index = 0
    for d in range(2):
        for h in range(3):
            for w in range(5):
                expected = []
                for place in (w, h, d):
                    angles = [place * 10000 ** (-i / 4) for i in range(4)]
                    expected += [*map(math.sin, angles), *map(math.cos, angles)]
                torch.testing.assert_close(net.positions[0, index], torch.tensor(expected), rtol=0, atol=1e-6)
                index += 1
    assert net.positions.shape == (1, index, 24)
    assert "positions" not in net.state_dict()


def test_norms_add_a_millionth_to_the_variance():
    """As the release's, which its values at a variance of 1 hardly show: +-1e-3 becomes +-1/sqrt(2)."""
    net = net_for((1, 8, 8))
    x = torch.tensor([1e-3, -1e-3]).repeat(12)
    for norm in (net.norm, net.blocks[0].norm1, net.blocks[0].norm2):
        torch.testing.assert_close(norm(x), x.sign() * 0.5**0.5)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_fresh_one_returns_0_and_its_blocks_are_identities(shape):
    """adaLN-zero: with its last layer alone made random, what comes out of a patch depends on that patch alone."""
    x, label = inputs(shape)
    net = net_for(shape, random=False)
    assert net(x, label).abs().max() == 0
    with torch.no_grad():
        net.last.weight.normal_(generator=generator(1))
    changed = torch.zeros(shape)
    changed[(slice(None), *(slice(n - 2, n) for n in shape[1:]))] = 1
    moved = (net(x + changed, label) - net(x, label)) != 0
    assert moved.any()
    assert moved.shape == x.shape
    assert not moved[:, changed == 0].any()
    # and with all of them random on all patches
    assert (net_for(shape)(x + changed, label) != net_for(shape)(x, label)).all()


@pytest.mark.parametrize("settings", [{}, {"variance": True}, {"patch": 1, "heads": 1, "mlp": 0.5, "depth": 1}])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_gradient_is_right_and_no_sample_sees_another(shape, settings):
    net = net_for(shape, num_classes=3, null_class=True, **settings).double()
    x, label = (t.double() for t in inputs(shape))
    classes = torch.tensor([2, 0, 3])
    out = net(x, label, classes)
    assert out.shape == (3, shape[0] * (1 + settings.get("variance", False)), *shape[1:])
    torch.testing.assert_close(net(x[1:2], label[1:2], classes[1:2]), out[1:2], rtol=1e-10, atol=1e-12)
    weight = torch.randn(out.shape, generator=generator(2), dtype=torch.float64)
    (weight * out).sum().backward()
    step, at = 1e-5, generator(3)
    for name, p in net.named_parameters():
        direction = torch.randn(p.shape, generator=at, dtype=torch.float64)
        if name == "classes.weight":
            assert p.grad[1].abs().max() == 0
        found = []
        with torch.no_grad():
            for sign in (1, -2):
                p.add_(direction, alpha=sign * step)
                found.append((weight * net(x, label, classes)).sum())
            p.add_(direction, alpha=step)
        slope, exact = (found[0] - found[1]) / (2 * step), (p.grad * direction).sum()
        assert float(slope) == pytest.approx(float(exact), rel=1e-5, abs=1e-5), name
        assert p.grad.abs().max() > 0, name


def test_activations_computed_again_give_the_same_gradients():
    net, (x, label) = net_for((2, 4, 8)), inputs((2, 4, 8))
    found, kept = [], []
    for net.activation_checkpointing in (False, True):
        sizes: list[int] = []
        net.zero_grad()
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=sizes: s.append(t.numel()) or t, lambda t: t):
            loss = net(x, label).square().sum()
        loss.backward()
        found.append([p.grad.clone() for p in net.parameters()])
        kept.append(sum(sizes))
    for plain, again in zip(*found, strict=True):
        torch.testing.assert_close(again, plain)
    assert kept[1] < kept[0] / 2


@pytest.mark.parametrize("label", ["", "index"])
def test_the_trainer_trains_it(label):
    """On digits; at first only the last layer has a gradient, then what it lets through."""
    c = small(
        3,
        training__batch_size=16,
        model__net__name="dit",
        optim__warmup=0,
        training__activation_checkpointing=True,
        model__conditional=True,
        training__label_dropout=0.5,
    )
    c.model.label = label
    if label == "index":
        c.training.sigmas.name = "sequence"
    c.model.net.width, c.model.net.depth, c.model.net.heads, c.model.net.variance = 16, 1, 2, False
    trainer = Trainer(build(c), c)
    net = trainer.model.net
    assert net.null_condition == 10
    before = {k: v.detach().clone() for k, v in net.named_parameters()}
    changed = []
    for _ in range(3):
        trainer.advance()
        changed.append({k for k, v in net.named_parameters() if not torch.equal(v, before[k])})
    assert changed[0] == {"last.weight", "last.bias"}
    assert changed[2] == set(before)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: net_for((2,)), r"data_shape is \(2,\); expected \(C, L\), .* need MLP"),
        (lambda: net_for((1, 2, 2, 2, 2)), r"expected \(C, L\), \(C, H, W\) or \(C, D, H, W\)"),
        (lambda: net_for((1, 8, 9)), r"\(1, 8, 9\); expected sizes that are multiples of patch = 2: choose"),
        (lambda: net_for((1, 8, 8), heads=5), "heads = 5 does not divide width = 24; expected a divisor"),
        (
            lambda: net_for((1, 8, 8), width=22, heads=2),
            "width = 22 has no equal parts .* 2 dim.* multiple of 4",
        ),
        (lambda: net_for((1, 8, 8, 8), width=16), "width = 16 has no equal parts .* 3 dim.* multiple of 6"),
        (lambda: net_for((1, 8, 8), depth=0), "depth = 0, .*; expected 1 or more"),
        (lambda: net_for((1, 8, 8), patch=0), "patch = 0, .*; expected 1 or more"),
        (lambda: net_for((1, 8, 8), mlp=0.0), "mlp = 0; expected 1 or more"),
        (lambda: net_for((1, 8, 8), num_classes=0), "num_classes is 0; expected at least 1"),
        (
            lambda: net_for((1, 8, 8))(*inputs((1, 8, 4))),
            re.escape("x is (3, 1, 8, 4); expected (B, 1, 8, 8), for which this DiT has positions"),
        ),
        (
            lambda: net_for((1, 8, 8))(*inputs((1, 8, 8)), torch.tensor([0, 1, 2])),
            "a condition was given to a DiT without classes",
        ),
    ],
)
def test_what_does_not_fit_is_refused(make, said):
    with pytest.raises(ValueError, match=said):
        make()


@pytest.mark.parametrize(
    ("settings", "change", "said"),
    [
        ({"depth": 3}, {}, r"10 are missing \(blocks.2.attn.qkv.weight, .*, 0 are not known \(\), 0 have"),
        ({"depth": 1}, {}, r"0 are missing \(\), 10 are not known \(blocks.1.attn.qkv.weight, .* expected .*depth=1"),
        ({"num_classes": None}, {}, r"1 are not known \(y_embedder.embedding_table.weight\)"),
        ({"null_class": False}, {}, r"1 have another shape \(.*table.weight \(6, 64\), not \(5, 64\)\)"),
        ({"variance": False}, {}, r"2 have another shape \(final_layer.linear.weight \(32, 64\), not \(16, 64\)"),
        ({"data_shape": (4, 16, 16)}, {}, r"pos_embed \(1, 16, 64\) is not the embedding of .* \(1, 64, 64\)"),
        ({"data_shape": (4, 4, 16)}, {}, r"pos_embed \(1, 16, 64\) is not the embedding of .*data_shape=\(4, 4, 16\)"),
        ({}, {"extra": torch.zeros(1)}, r"1 are not known \(extra\)"),
    ],
)
def test_weights_of_another_network_are_refused(settings, change, said):
    state = {**released("dit").state, **change}
    with pytest.raises(ValueError, match=said):
        from_dit(release_net(**settings), state)
