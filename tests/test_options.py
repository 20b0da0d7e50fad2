"""Options of the releases' networks that their published files don't have together: files in their layout, loaded."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from published import difference, released

from scorelab.interop import load, load_classifier
from scorelab.nn import UNet

PARITY = 2e-5


def checkpoint(name: str, path) -> tuple:
    """score_sde's, of what is stored: its weights twice, and the levels."""
    r = released(name)
    trained = [v for k, v in r.state.items() if k != "sigmas" and not k.endswith("modules.0.W")]
    whole = {"optimizer": {}, "ema": {"shadow_params": trained}, "step": 1}
    whole["model"] = {f"module.{k}": v for k, v in r.state.items()}
    torch.save(whole, path)
    return r, path


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("skip", {"inputs": "skip", "outputs": "skip", "combine": "sum", "resampling": "block", "rescaled": True}),
        ("residual", {"inputs": "skip", "outputs": "residual", "combine": "cat", "resampling": "same"}),
    ],
)
def test_pyramids_of_ncsnpp_are_read_off_the_shapes(tmp_path, name, found):
    r, path = checkpoint(f"score_sde_ncsnpp_{name}", tmp_path / "checkpoint.pth")
    options = {} if found.get("rescaled") else {"net": {"rescaled": False}}
    model = load(path, "score_sde", image_size=8, **options)
    assert {k: model.net.config[k] for k in found} == found
    with torch.no_grad():
        made = 2 * model(2 * r.values["x"] - 1, 2 * r.values["labels"])
    # of each sample: their scores differ by the ratio of their levels
    for one, expected in zip(made, r.values["output"], strict=True):
        assert difference(one, expected) < PARITY


def test_ncsnpp_that_resamples_without_weights_and_returns_the_score_itself(tmp_path):
    r, path = checkpoint("score_sde_ncsnpp_plain", tmp_path / "checkpoint.pth")
    model = load(path, "score_sde", sde="ve", image_size=8, centered=True, scale_by_sigma=False)
    assert (model.net.config["resampling"], model.net.config["fir"]) == ("plain", ())
    sigma = r.state["sigmas"][r.values["labels"]].float()
    with torch.no_grad():
        assert difference(model(r.values["x"], sigma), r.values["output"]) < PARITY
        # data in [0, 1]: noise is twice as large in [-1, 1], and the score half as large
        half = load(path, "score_sde", sde="ve", image_size=8, scale_by_sigma=False)
        assert difference(2 * half(r.values["x"], 2 * sigma), r.values["output"]) < PARITY
    with pytest.raises(ValueError, match="name is 'ddpmpp'; expected 'ddpm' or 'ncsnpp'"):
        load(path, "score_sde", sde="ve", image_size=8, net={"name": "ddpmpp"})


def test_a_network_that_is_not_told_of_the_noise_is_refused(tmp_path):
    r, path = checkpoint("score_sde_ncsnpp_plain", tmp_path / "checkpoint.pth")
    first = {k: v for k, v in r.state.items() if not k.startswith(("all_modules.0.", "all_modules.1."))}
    moved = {f"all_modules.{int(k.split('.')[1]) - 2}.{k.split('.', 2)[2]}": v for k, v in first.items() if "." in k}
    torch.save({"model": moved | {"sigmas": r.state["sigmas"]}}, path)
    with pytest.raises(ValueError, match="of a network that is not told of the noise level; expected one that is"):
        load(path, "score_sde", sde="ve", image_size=8, averaged=False)


@pytest.mark.parametrize("name", ["ncsnv2_128", "ncsnv2_256"])
def test_deeper_networks_of_ncsnv2(tmp_path, name):
    """In its own release's files and in those of score_sde."""
    r, path = checkpoint(name, tmp_path / "score_sde.pth")
    own = {k: v for k, v in r.state.items() if k != "sigmas"}
    torch.save([{f"module.{k}": v for k, v in r.state.items()}, {}, 1, 2, own], tmp_path / "ncsnv2.pth")
    sigma = 2 * r.state["sigmas"][r.values["labels"]].float()
    for file, release in ((path, "score_sde"), (tmp_path / "ncsnv2.pth", "ncsnv2")):
        model = load(file, release, image_size=16)
        with torch.no_grad():
            found = 2 * model(2 * r.values["x"] - 1, sigma)
        for one, expected in zip(found, r.values["output"], strict=True):
            assert difference(one, expected) < PARITY
    with pytest.raises(ValueError, match="a network of NCSN, whose noise levels are those of VE; expected sde='ve'"):
        load(path, "score_sde", sde="vp", image_size=16)


def test_guided_diffusion_by_its_number_of_heads_and_without_weights_that_resample(tmp_path):
    r = released("guided_diffusion_plain")
    torch.save(r.state, tmp_path / "plain.pt")
    options = {"image_size": 8, "heads": 4, "heads_up": 2, "schedule": "linear"}
    model = load(tmp_path / "plain.pt", "guided_diffusion", **options)
    assert (model.net.config["resampling"], model.net.config["time"], model.variance) == ("plain", "added", False)
    with torch.no_grad():
        assert difference(model.net(r.values["x"], r.values["labels"]), r.values["output"]) < PARITY
    told = []
    again = load(tmp_path / "plain.pt", "guided_diffusion", **options, steps=500, rescaled=True)
    again.net.register_forward_pre_hook(lambda module, inputs: told.append(inputs[1]))
    again(r.values["x"], again.process.step_sigmas[torch.tensor([3, 400])].float())
    np.testing.assert_allclose(told[0].numpy(), [6, 800], rtol=1e-3)
    with pytest.raises(ValueError, match="heads_up = 3 does not divide the attention widths"):
        UNet((1, 8, 8), width=32, attention=(1,), heads_up=3)


def test_the_classifier_of_guided_diffusion(tmp_path):
    r = released("guided_diffusion_classifier")
    torch.save(r.state, tmp_path / "classifier.pt")
    model = load_classifier(tmp_path / "classifier.pt", 8, levels=2, head=16)
    with torch.no_grad():
        assert difference(model.net(r.values["x"], r.values["labels"]), r.values["output"]) < PARITY


@pytest.mark.parametrize("null_class", [True, False])
def test_the_last_row_of_the_classes_of_dit_is_none_or_one_of_them(tmp_path, null_class):
    r = released("dit")
    torch.save(r.state, tmp_path / "dit.pt")
    net = load(tmp_path / "dit.pt", "dit", heads=4, null_class=null_class).net
    rows = len(r.state["y_embedder.embedding_table.weight"])
    assert (net.num_classes, net.null_condition) == ((rows - 1, rows - 1) if null_class else (rows, None))
