"""RefineNets: the releases' stored outputs, InstanceNorm++ by its formula, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from published import difference, released
from test_training import small
from torch import nn

from scorelab import ScoreModel, sigmas
from scorelab.interop.refinenets import from_ncsn, from_ncsnv2
from scorelab.nn import RefineNet
from scorelab.nn.refinenet import InstanceNormPlus
from scorelab.predictions import EPS, SCORE
from scorelab.processes import VE
from scorelab.training import Trainer, build

LEVELS = sigmas.geometric(10, sigma_min=0.01, sigma_max=1.0)


def model_of(net: RefineNet, prediction=SCORE, levels=LEVELS, **settings) -> ScoreModel:
    told = {"label": "index", "index_order": "descending", "levels": levels, **settings}
    return ScoreModel(net, VE(0.01, 1.0), prediction, data_shape=net.config["data_shape"], **told)


def release_model(name: str) -> ScoreModel:
    levels, convert, prediction = {"ncsn": (10, from_ncsn, SCORE), "ncsnv2": (0, from_ncsnv2, EPS)}[name]
    net = RefineNet((3, 16, 16), width=16, levels=levels, zero_to_one=True)
    net.load_state_dict(convert(net, released(name).state))
    return model_of(net, prediction).eval()


@pytest.mark.parametrize("name", ["ncsn", "ncsnv2"])
def test_scores_are_those_of_the_release(name, tmp_path):
    values = released(name).values
    model = release_model(name)
    with torch.no_grad():
        score = model(values["x"], LEVELS[values["labels"]])
    assert difference(score, values["output"]) < 2e-5
    model.save(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(ScoreModel.load(tmp_path)(values["x"], LEVELS[values["labels"]]), score)


def test_weights_of_another_network_are_refused():
    conditional, plain = RefineNet((3, 16, 16), width=16, levels=10), RefineNet((3, 16, 16), width=16)
    with pytest.raises(ValueError, match="no weights 'normalizer.gamma'"):
        from_ncsnv2(plain, released("ncsn").state)
    with pytest.raises(ValueError, match="no weights 'normalizer.embed.weight'"):
        from_ncsn(conditional, released("ncsnv2").state)
    with pytest.raises(ValueError, match="another size"):
        from_ncsn(RefineNet((3, 16, 16), width=8, levels=10), released("ncsn").state)
    with pytest.raises(ValueError, match="1 are not known"):
        from_ncsnv2(plain, released("ncsnv2").state | {"more": torch.zeros(1)})


# names and channels (of width 1) of the levels of NCSNv2's deeper networks: in and out, on the way down and back
DEEPER = {
    5: (
        {"1": (1, 1), "2": (1, 2), "3": (2, 2), "4": (2, 4), "5": (4, 4)},
        {"1": (4, 4), "2": (4, 2), "3": (2, 2), "4": (2, 1), "5": (1, 1)},
    ),
    6: (
        {"1": (1, 1), "2": (1, 2), "3": (2, 2), "31": (2, 2), "4": (2, 4), "5": (4, 4)},
        {"1": (4, 4), "2": (4, 2), "31": (2, 2), "3": (2, 2), "4": (2, 1), "5": (1, 1)},
    ),
}


def deeper_state(depth: int, width: int) -> dict[str, torch.Tensor]:
    """Random weights by the names that NCSNv2's release has, for one channel."""
    down, back = DEEPER[depth]
    shapes: dict[str, tuple[int, ...]] = {"begin_conv.weight": (width, 1, 3, 3), "begin_conv.bias": (width,)}
    shapes |= {"end_conv.weight": (1, width, 3, 3), "end_conv.bias": (1,), "sigmas": (10,)}
    shapes |= {f"normalizer.{k}": (width,) for k in ("alpha", "gamma", "beta")}

    def conv(name: str, channels: int, out: int, kernel: int = 3, bias: bool = True) -> None:
        shapes[f"{name}.weight"] = (out, channels, kernel, kernel)
        if bias:
            shapes[f"{name}.bias"] = (out,)

    for i, (name, (a, b)) in enumerate((k, (width * a, width * b)) for k, (a, b) in down.items()):
        halves = 0 < i < depth - 2
        for k, into in enumerate((a, b)):
            for j in (1, 2):
                shapes |= {f"res{name}.{k}.normalize{j}.{p}": (into,) for p in ("alpha", "gamma", "beta")}
            conv(f"res{name}.{k}.conv1", into, into)
            conv(f"res{name}.{k}.conv2" + ".conv" * (halves and k == 0), into, b)
        if i:
            conv(f"res{name}.0.shortcut" + ".conv" * halves, a, b, 1 if halves else 3)
    for i, (name, (a, b)) in enumerate((k, (width * a, width * b)) for k, (a, b) in back.items()):
        for k in range(2 if i else 1):
            for unit in ("1_1", "1_2", "2_1", "2_2"):
                conv(f"refine{name}.adapt_convs.{k}.{unit}_conv", a, a, bias=False)
            if i:
                conv(f"refine{name}.msf.convs.{k}", a, b)
        for k in range(2):
            conv(f"refine{name}.crp.convs.{k}", b, b, bias=False)
        for unit in range(1, 4 if i == depth - 1 else 2):
            for k in (1, 2):
                conv(f"refine{name}.output_convs.{unit}_{k}_conv", b, b, bias=False)
    return {k: torch.randn(v) for k, v in shapes.items()}


@pytest.mark.parametrize("depth", [5, 6])
def test_weights_of_the_deeper_releases_find_their_places(depth):
    torch.manual_seed(0)
    net, theirs = RefineNet((1, 32, 32), width=4, depth=depth), deeper_state(depth, 4)
    ours = from_ncsnv2(net, theirs)
    net.load_state_dict(ours)
    down, back = DEEPER[depth]
    for i, name in enumerate(down):
        assert torch.equal(ours[f"down.{i}.blocks.1.conv1.weight"], theirs[f"res{name}.1.conv1.weight"])
    for i, name in enumerate(back):
        assert torch.equal(ours[f"back.{i}.units.convs.1.weight"], theirs[f"refine{name}.output_convs.1_2_conv.weight"])
    assert torch.equal(ours["last.bias"], -theirs["end_conv.bias"])


@pytest.mark.parametrize("sizes", [(7,), (4, 6), (2, 3, 4)])
@pytest.mark.parametrize("levels", [0, 3])
def test_instance_norm_plus_is_the_formula(sizes, levels):
    rng = np.random.default_rng(0)
    x, index = rng.normal(2, 3, (5, 4, *sizes)), np.array([2, 0, 1, 1, 2])
    norm = InstanceNormPlus(4, levels).double()
    table = rng.normal(size=norm.table.shape)
    with torch.no_grad():
        norm.table.copy_(torch.from_numpy(table))
        found = norm(torch.from_numpy(x), torch.from_numpy(index) if levels else None)
    rows = table[index] if levels else np.repeat(table, 5, 0)
    expected = np.empty_like(x)
    for b in range(5):
        means = np.array([x[b, c].mean() for c in range(4)])
        for c in range(4):
            gamma, alpha, beta = rows[b, c], rows[b, 4 + c], rows[b, 8 + c]
            h = (x[b, c] - means[c]) / np.sqrt(x[b, c].var() + 1e-5)
            shift = (means[c] - means.mean()) / np.sqrt(means.var(ddof=1) + 1e-5)
            expected[b, c] = gamma * (h + alpha * shift) + beta
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-10, atol=1e-10)


def test_instance_norm_plus_begins_at_gamma_and_alpha_around_one():
    table = InstanceNormPlus(64, 50).table.detach()
    assert float(table[:, :128].mean()) == pytest.approx(1, abs=0.02 * 4 / (50 * 128) ** 0.5)
    assert float(table[:, :128].std()) == pytest.approx(0.02, rel=0.05)
    assert (table[:, 128:] == 0).all()


@pytest.mark.parametrize(
    ("depth", "widths", "sizes"),
    [
        (4, (1, 2, 2, 2), (1, 2, 2, 2)),
        (5, (1, 2, 2, 4, 4), (1, 2, 4, 4, 4)),
        (6, (1, 2, 2, 2, 4, 4), (1, 2, 4, 8, 8, 8)),
    ],
)
@pytest.mark.parametrize("levels", [0, 10])
def test_levels_have_the_published_widths_and_a_step_trains_all_weights(depth, widths, sizes, levels):
    torch.manual_seed(0)
    net, seen = RefineNet((2, 32, 16), width=4, depth=depth, levels=levels), []
    for level in net.down:
        level.register_forward_hook(lambda module, inputs, out: seen.append(tuple(out.shape[1:])))
    x, labels = torch.randn(3, 2, 32, 16), torch.arange(10)[:3]
    before = (net(x, labels) - x).square().mean()
    assert seen == [(4 * w, 32 // s, 16 // s) for w, s in zip(widths, sizes, strict=True)]
    optimiser = torch.optim.SGD(net.parameters(), lr=1e-3)
    before.backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in net.parameters())
    optimiser.step()
    assert (net(x, labels) - x).square().mean() < before


def test_dilation_reaches_as_far_as_published():
    # convolutions of the last two levels of NCSN: 2 and 4 apart, all of them; what halves is not dilated
    net = RefineNet((3, 8, 8), width=4)
    apart = [{m.dilation[0] for m in level.modules() if isinstance(m, nn.Conv2d)} for level in net.down]
    assert apart == [{1}, {1}, {2}, {4}]
    assert [{m.stride[0] for m in level.modules() if isinstance(m, nn.Conv2d)} for level in net.down] == [{1}] * 4


@pytest.mark.parametrize("shape", [(2, 12), (1, 6, 10), (1, 4, 6, 2)])
@pytest.mark.parametrize("levels", [0, 10])
def test_signals_images_and_volumes(shape, levels):
    torch.manual_seed(0)
    model = model_of(RefineNet(shape, width=4, levels=levels))
    x = torch.randn(3, *shape)
    score = model(x, LEVELS[[0, 4, 9]])
    assert score.shape == x.shape
    # a sample's score is its own
    torch.testing.assert_close(model(x[1:2], LEVELS[4]), score[1:2], rtol=1e-4, atol=1e-5)


def test_a_volume_without_depth_is_an_image():
    # two equal slices: convolutions with weight in the middle slice alone, so nothing differs along the depth
    torch.manual_seed(0)
    plane, volume = RefineNet((2, 8, 6), width=4), RefineNet((2, 2, 8, 6), width=4)
    state = volume.state_dict()
    for name, value in plane.state_dict().items():
        if value.ndim == 4:
            state[name].zero_()
            state[name][:, :, state[name].shape[2] // 2] = value
        else:
            state[name] = value
    volume.load_state_dict(state)
    x, label = torch.randn(3, 2, 8, 6), torch.zeros(3)
    with torch.no_grad():
        found = volume(x.unsqueeze(2).expand(-1, -1, 2, -1, -1), label)
        torch.testing.assert_close(found, plane(x, label).unsqueeze(2).expand_as(found), rtol=1e-4, atol=1e-5)


def test_only_levels_look_at_the_label():
    torch.manual_seed(0)
    x = torch.randn(1, 1, 8, 8)
    told, plain = RefineNet((1, 8, 8), width=4, levels=3), RefineNet((1, 8, 8), width=4)
    first, second = torch.tensor([0]), torch.tensor([1])
    assert not torch.allclose(told(x, first), told(x, second))
    assert torch.equal(plain(x, first), plain(x, second))
    entered = RefineNet((1, 8, 8), width=4, zero_to_one=True)
    entered.load_state_dict(plain.state_dict())
    torch.testing.assert_close(entered((x + 1) / 2, first), plain(x, first), rtol=1e-4, atol=1e-5)


def test_activation_checkpointing_gives_the_same_gradients():
    torch.manual_seed(0)
    net, x, label = RefineNet((1, 8, 8), width=4, levels=3), torch.randn(2, 1, 8, 8), torch.tensor([0, 2])
    found = []
    for net.activation_checkpointing in (False, True):
        net.zero_grad()
        net(x, label).square().mean().backward()
        found.append([p.grad.clone() for p in net.parameters()])
    torch.testing.assert_close(found[0], found[1])


@pytest.mark.parametrize("levels", [0, 3])
def test_half_precision_is_close(levels):
    torch.manual_seed(0)
    net, x, label = RefineNet((1, 8, 8), width=8, levels=levels), torch.rand(2, 1, 8, 8), torch.tensor([0, 2])
    with torch.no_grad():
        exact = net(x, label)
        with torch.autocast("cpu", torch.bfloat16):
            assert difference(net(x, label).float(), exact) < 0.1
        assert difference(net.bfloat16()(x.bfloat16(), label).float(), exact) < 0.1


def test_trains_by_a_config_with_the_indices_it_wants():
    settings = {"model__net__name": "refinenet", "model__net__width": 4, "process__sigma_max": 10.0}
    settings |= {"model__prediction": "score", "training__sigmas__name": "sequence", "training__sigmas__levels": 5}
    config = small(1, model__net__levels=5, training__batch_size=8, **settings)
    experiment = build(config)
    assert experiment.model.label == "index"
    trainer = Trainer(experiment, config)
    trainer.advance()
    assert trainer.step == 1
    with pytest.raises(ValueError, match="knows 4 noise levels, and the model counts 5"):
        build(small(1, model__net__levels=4, **settings))
    with pytest.raises(ValueError, match="which model.net.name='refinenet' does not take"):
        build(small(1, model__net__levels=5, model__label="time", **settings))


@pytest.mark.parametrize(
    ("shape", "settings", "said"),
    [
        ((3,), {}, "points need MLP"),
        ((3, 0), {}, "expected .C, L."),
        ((3, 7, 8), {}, "multiples of 2 at depth 4"),
        ((3, 32, 30), {"depth": 5}, "multiples of 4 at depth 5"),
        ((3, 28, 28), {"depth": 6}, "multiples of 8 at depth 6"),
        ((3, 8, 8), {"depth": 6}, "one value a channel.*16 or more"),
        ((3, 8, 8), {"depth": 3}, "expected 4 .NCSN"),
        ((3, 8, 8), {"width": 1}, "width >= 2"),
        ((3, 8, 8), {"levels": -1}, "levels >= 0"),
    ],
)
def test_settings_that_do_not_fit_are_refused(shape, settings, said):
    with pytest.raises(ValueError, match=said):
        RefineNet(shape, **settings)


def test_inputs_that_do_not_fit_are_refused():
    net, x = RefineNet((1, 8, 8), width=4, levels=10), torch.zeros(2, 1, 8, 8)
    with pytest.raises(ValueError, match="takes none"):
        net(x, torch.tensor([0, 1]), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="label='index'"):
        net(x, torch.rand(2))
    with pytest.raises(ValueError, match="none of this model's 10 levels"):
        model_of(net)(x, torch.tensor(0.5))
    with pytest.raises(ValueError, match="knows 10 noise levels, and the model counts 9"):
        model_of(net, levels=LEVELS[1:])
