"""ADM's classifier of noisy images: its parts by their definitions, and files in the release's layout."""

from __future__ import annotations

import math

import pytest
import torch
from published import released

from scorelab.interop import load, load_classifier
from scorelab.interop.unets import from_adm
from scorelab.nn import Classifier, adm
from scorelab.nn.classifier import AttentionPool
from scorelab.processes import DiscreteVP, linear_betas


def test_the_pool_attends_from_the_mean():
    """Softmax over all positions and their mean of q.k / sqrt(channels of a head), at the mean; in float64."""
    torch.manual_seed(0)
    pool = AttentionPool(12, (2, 3), head=4, out=5).double()
    h = torch.randn(2, 12, 2, 3, dtype=torch.float64)
    found = pool(h)
    for b in range(2):
        flat = h[b].reshape(12, 6).T
        tokens = torch.cat([flat.mean(0, keepdim=True), flat]) + pool.positions
        rows = tokens @ pool.qkv.weight.T + pool.qkv.bias
        mixed = []
        for head in range(3):
            q, k, v = (rows[:, 12 * part + 4 * head : 12 * part + 4 * head + 4] for part in range(3))
            weights = torch.exp(k @ q[0] / math.sqrt(4))
            mixed.append((weights / weights.sum()) @ v)
        expected = pool.out.weight @ torch.cat(mixed) + pool.out.bias
        torch.testing.assert_close(found[b], expected, rtol=1e-10, atol=1e-10)


def written(classes: int = 7) -> tuple[dict[str, torch.Tensor], dict]:
    """The release's U-Net's way down, which equals its stored values, with a pool of 16 px / 2 behind it."""
    r = released("guided_diffusion_unet")
    state = {k: v for k, v in r.state.items() if not k.startswith(("output_blocks", "out.", "label_emb"))}
    channels = len(state["middle_block.0.in_layers.0.weight"])
    shapes = {"out.0.weight": (channels,), "out.0.bias": (channels,), "out.2.positional_embedding": (channels, 65)}
    shapes |= {"out.2.qkv_proj.weight": (3 * channels, channels, 1), "out.2.qkv_proj.bias": (3 * channels,)}
    shapes |= {"out.2.c_proj.weight": (classes, channels, 1), "out.2.c_proj.bias": (classes,)}
    generator = torch.Generator().manual_seed(0)
    state |= {k: torch.randn(shape, generator=generator) * 0.1 for k, shape in shapes.items()}
    known = {"width": r.config["model_channels"], "multipliers": tuple(r.config["channel_mult"])}
    known |= {"blocks": r.config["num_res_blocks"], "head": r.config["num_head_channels"]}
    known["attention"] = tuple(int(math.log2(a)) for a in r.config["attention_resolutions"])
    return state, known


def test_its_way_down_is_that_of_adm():
    """With the same weights."""
    state, known = written()
    net = Classifier((3, 16, 16), 7, **known).eval()
    net.load_state_dict(from_adm(net, state))
    r = released("guided_diffusion_unet")
    whole = adm((3, 16, 16), variance=True, num_classes=r.config["num_classes"], **known).eval()
    whole.load_state_dict(from_adm(whole, r.state))
    x, label = r.values["x"], r.values["labels"]
    with torch.no_grad():
        found, _ = net._descended(x, net._embedded(x, label, None))
        expected, _ = whole._descended(x, net._embedded(x, label, None))
        assert torch.equal(found, expected)
        assert net(x, label).shape == (len(x), 7)
    assert not [k for k in net.state_dict() if k.startswith(("up", "grow", "last"))]


def test_a_file_gives_logits_by_noise_level(tmp_path):
    """x is unscaled; step i has label i, and half a step in log sigma half a label."""
    state, known = written()
    torch.save({f"module.{k}": v for k, v in state.items()}, tmp_path / "classifier.pt")
    with pytest.raises(ValueError, match=r"image_size is 16, of which none is published; expected levels="):
        load_classifier(tmp_path / "classifier.pt", 16)
    head = {k: v for k, v in known.items() if k == "head"}
    model = load_classifier(tmp_path / "classifier.pt", 16, levels=len(known["multipliers"]), **head)
    assert isinstance(model.process, DiscreteVP)
    assert torch.equal(model.process.betas, torch.as_tensor(linear_betas(1000), dtype=torch.float64))
    sigmas = model.process.step_sigmas[torch.tensor([0, 300, 999])]
    x = torch.randn(3, 3, 16, 16)
    sigma = sigmas.float()
    scaled = x / (1 + sigma**2).sqrt().reshape(-1, 1, 1, 1)
    torch.testing.assert_close(
        model(x, sigma), model.net(scaled, torch.tensor([0.0, 300.0, 999.0])), rtol=1e-3, atol=1e-4
    )
    seen = []
    model.net.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[1]))
    model(x, (model.process.step_sigmas[10] * model.process.step_sigmas[11]).sqrt().float())
    torch.testing.assert_close(seen[0], torch.full((3,), 10.5), rtol=0, atol=1e-3)


def test_what_is_no_classifier_is_refused(tmp_path):
    state, _ = written()
    torch.save(state, tmp_path / "classifier.pt")
    with pytest.raises(ValueError, match="these are a classifier's weights; expected scorelab.interop.load_classifier"):
        load(tmp_path / "classifier.pt", "guided_diffusion", image_size=16)
    torch.save(released("guided_diffusion_unet").state, tmp_path / "unet.pt")
    with pytest.raises(ValueError, match="holds no weights of a classifier"):
        load_classifier(tmp_path / "unet.pt")
    with pytest.raises(ValueError, match="can't be loaded as a classifier at 32 px .*: check the size"):
        load_classifier(tmp_path / "classifier.pt", 32, levels=2, head=16)
    with pytest.raises(ValueError, match="schedule is 'cos'; did you mean 'cosine'"):
        load_classifier(tmp_path / "classifier.pt", 16, levels=2, head=16, schedule="cos")
    for settings in ({"num_classes": 0}, {"num_classes": 3, "head": 0}, {"num_classes": 3, "head": 7}):
        with pytest.raises(ValueError, match="expected at least 1 of each, and a divisor of 64"):
            Classifier((3, 16, 16), **settings, width=32, multipliers=(1, 2), attention=())
    with pytest.raises(ValueError, match="some multipliers"):
        Classifier((3, 16, 16), 3, multipliers=())
    net = Classifier((2, 8, 8), 3, width=8, multipliers=(1, 2), blocks=1, attention=(), head=4)
    with pytest.raises(ValueError, match=r"x is \(1, 2, 4, 16\); expected \(B, 2, 8, 8\)"):
        net(torch.randn(1, 2, 4, 16), torch.zeros(1))


def test_every_weight_of_it_is_trained():
    net = Classifier((1, 8, 8), 3, width=8, multipliers=(1, 2), blocks=1, attention=(1,), head=4)
    logits = net(torch.randn(4, 1, 8, 8), torch.arange(4.0))
    torch.nn.functional.cross_entropy(logits, torch.tensor([0, 1, 2, 0])).backward()
    unused = [k for k, p in net.named_parameters() if p.grad is None]
    assert not unused
