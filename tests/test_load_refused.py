"""What a checkpoint can't be is refused in a line, and not read as something else."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from published import released
from test_score_sde import SIZES, checkpoint, saved

import scorelab
from scorelab import VE, ScoreModel
from scorelab.cli.main import main
from scorelab.interop import load
from scorelab.nn import UNet, ncsnpp

ADM = {"image_size": 16, "head": 16, "schedule": "linear"}


def adm_state() -> dict[str, torch.Tensor]:
    return dict(released("guided_diffusion_unet").state)


@pytest.mark.parametrize(("flag", "legacy"), [("--legacy", True), ("--legacy=true", True), ("--legacy=False", False)])
def test_flags_of_convert_mean_what_they_say(tmp_path, flag, legacy):
    torch.save(adm_state(), tmp_path / "adm.pt")
    # before the file it takes the file for no value
    command = ["convert", flag, str(tmp_path / "adm.pt"), "--release", "guided_diffusion", f"--out={tmp_path / 'out'}"]
    assert main([*command, *(f"--{k}={v}" for k, v in ADM.items())]) == 0
    expected = load(tmp_path / "adm.pt", "guided_diffusion", legacy=legacy, **ADM).net.state_dict()
    found = ScoreModel.load(tmp_path / "out").net.state_dict()
    assert all(torch.equal(found[k], v) for k, v in expected.items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"legacy": "no"}, "guided_diffusion's option legacy is 'no'; expected bool, as False"),
        ({"image_size": 16.0}, "option image_size is 16.0; expected int, as 64"),
        ({"schedule": 3}, "option schedule is 3; expected str, as 'cosine'"),
    ],
)
def test_options_of_another_type(tmp_path, options, message):
    torch.save(adm_state(), tmp_path / "adm.pt")
    with pytest.raises(ValueError, match=message):
        load(tmp_path / "adm.pt", "guided_diffusion", **{**ADM, **options})


def broken(change: str) -> dict[str, torch.Tensor]:
    state = adm_state()
    name = (
        "time_embed.0.weight" if change != "turned" else next(k for k in state if k.endswith("skip_connection.weight"))
    )
    value = state[name].clone()
    if change == "nan":
        value.view(-1)[3] = float("nan")
    state[name] = {"whole": value.long(), "turned": value.transpose(0, 1).contiguous()}.get(change, value)
    return state


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("nan", r"weights for embed.1.weight are torch.float32, or not all finite"),
        ("whole", r"weights for embed.1.weight are torch.int64, or not all finite"),
        ("turned", r"the weights for .*skip.weight are .*; expected .*: another size"),
    ],
)
def test_weights_that_a_network_can_not_have(tmp_path, change, message):
    torch.save(broken(change), tmp_path / "adm.pt")
    with pytest.raises(ValueError, match=message):
        load(tmp_path / "adm.pt", "guided_diffusion", **ADM)


def test_a_file_that_was_damaged_in_its_middle(tmp_path):
    torch.save(adm_state(), tmp_path / "adm.pt")
    whole = bytearray((tmp_path / "adm.pt").read_bytes())
    whole[len(whole) // 2 : len(whole) // 2 + 2000] = bytes(2000)
    (tmp_path / "adm.pt").write_bytes(whole)
    with pytest.raises(ValueError, match="is damaged or no file of weights: its part .* is not as it was written"):
        load(tmp_path / "adm.pt", "guided_diffusion", **ADM)


def test_a_network_of_ve_is_none_of_vp(tmp_path):
    saved(tmp_path / "ve.pth", checkpoint(**SIZES[0], inputs="residual"), torch.logspace(1, -2, 5))
    with pytest.raises(ValueError, match="sde is 'vp', but the network takes log sigma, as those of VE alone"):
        load(tmp_path / "ve.pth", "score_sde", sde="vp", image_size=16)
    state = checkpoint(**SIZES[0]) | {"all_modules.300000000.weight": torch.zeros(1)}
    saved(tmp_path / "far.pth", state, torch.logspace(1, -2, 5))
    with pytest.raises(ValueError, match="its modules are numbered up to 300000000"):
        load(tmp_path / "far.pth", "score_sde", image_size=16)


def test_a_process_that_the_file_does_not_tell_is_asked_for(tmp_path):
    """Networks that take steps or times are of either process; those of log sigma are VE's."""
    saved(tmp_path / "steps.pth", checkpoint(**SIZES[1], gaussian=False), torch.logspace(1, -2, 5))
    for options in ({}, {"sde": "vp"}):
        with pytest.raises(ValueError, match=r"does not say by which process it was trained; expected sde='ve', 'vp'"):
            load(tmp_path / "steps.pth", "score_sde", image_size=16, **options)
    with pytest.raises(ValueError, match="centered and scale_by_sigma are options of 've'"):
        load(tmp_path / "steps.pth", "score_sde", image_size=16, sde="vp", continuous=False, centered=True)


@pytest.mark.parametrize(
    ("name", "release", "layout"),
    [
        ("ncsnv2", "edm", "ncsnv2"),
        ("guided_diffusion_unet", "dit", "guided_diffusion or improved_diffusion"),
        ("dit", "guided_diffusion", "dit"),
    ],
)
def test_a_file_of_another_release_is_told_by_its_layout(tmp_path, name, release, layout):
    state = dict(released(name).state)
    torch.save([state, {}, 1, 1] if name == "ncsnv2" else state, tmp_path / "x.pth")
    with pytest.raises(ValueError, match=rf"release='{release}' \(its layout is that of {layout}\)"):
        load(tmp_path / "x.pth", release)
    with pytest.raises(ValueError, match="is a folder; expected a file of weights: release='diffusers' reads folders"):
        load(tmp_path, release)
    # a refused conversion leaves nothing
    assert main(["convert", str(tmp_path / "x.pth"), f"--release={release}", f"--out={tmp_path / 'made'}"]) == 2
    assert not (tmp_path / "made").exists()


def test_an_average_of_some_weights_is_none(tmp_path):
    state = dict(released("ncsnv2").state)
    name = next(iter(state))
    torch.save([state, {}, 1, 1, {name: state[name]}], tmp_path / "ncsnv2.pth")
    with pytest.raises(ValueError, match=r"its average lacks \d+ weights .*; expected averaged=False"):
        load(tmp_path / "ncsnv2.pth", "ncsnv2", image_size=16)


@pytest.mark.parametrize("fir", [(1.0, 2.0, 1.0), (1.0, -1.0)])
def test_filters_that_are_none(fir):
    with pytest.raises(ValueError, match="expected an even number of taps, of a sum other than 0"):
        ncsnpp((1, 8, 8), width=8, multipliers=(1, 2), fir=fir)


def config(folder, **settings) -> str:
    lines = "".join(f"    c.{key} = {value!r}\n" for key, value in settings.items())
    (folder / "mine.py").write_text(
        "from scorelab.training import default_config\n\n\ndef get_config():\n    c = default_config()\n"
        f"{lines}    c.training.steps, c.training.sample_every = 2, 0\n    return c\n"
    )
    return str(folder / "mine.py")


def test_what_training_goes_on_from_stays_what_it_was(tmp_path, capsys):
    """A run refuses a folder that has changed; classes have to be those of the data."""
    scorelab.load("digits").save(tmp_path / "digits")
    place = str(tmp_path / "digits")
    mine = config(tmp_path, **{"model.saved": place, "model.conditional": True, "training.label_dropout": 0.1})
    command = ["train", "--config", mine, "--workdir", str(tmp_path / "run")]
    assert main(command) == 0
    settings = json.loads((tmp_path / "digits" / "model.json").read_text())
    (tmp_path / "digits" / "model.json").write_text(json.dumps({**settings, "label_scale": 3.0}))
    capsys.readouterr()
    assert main([*command, "--config.training.steps=3"]) == 2
    assert "model.saved is another model than" in (said := capsys.readouterr().err)
    assert "label_scale differ" in said
    (tmp_path / "digits" / "model.json").write_text(json.dumps(settings))
    changes = ["--config.model.conditional=False", "--config.training.label_dropout=0"]
    assert main([*command[:-1], str(tmp_path / "other"), *changes]) == 2
    assert "expected model.conditional=True" in capsys.readouterr().err


def test_the_range_of_a_model_that_is_trained_on_is_that_of_its_new_data(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (40, 8, 8), dtype=np.uint8)
    np.savez(tmp_path / "mine.npz", samples=images, labels=np.arange(40) % 10)
    settings = {"model.saved": "digits", "model.conditional": True, "training.label_dropout": 0.1}
    mine = config(tmp_path, **settings, **{"data.source": "arrays", "data.path": str(tmp_path / "mine.npz")})
    assert main(["train", "--config", mine, "--workdir", str(tmp_path / "run")]) == 0
    assert ScoreModel.load(tmp_path / "run").data_range == (0.0, 255.0)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: {"state_dict": {f"model.{k}": v for k, v in state.items()}, "epoch": 3},
        lambda state: {"model": {f"module._orig_mod.{k}": v for k, v in state.items()}, "step": 7},
        lambda state: {f"_orig_mod.{k}": v for k, v in state.items()},
    ],
    ids=["Lightning", "a trainer's dict of a compiled network", "compiled"],
)
def test_what_trainers_put_around_weights_is_taken_off(tmp_path, wrap):
    torch.save(adm_state(), tmp_path / "plain.pt")
    torch.save(wrap(adm_state()), tmp_path / "wrapped.pt")
    plain, found = (load(tmp_path / f"{name}.pt", "guided_diffusion", **ADM) for name in ("plain", "wrapped"))
    expected = plain.net.state_dict()
    assert all(torch.equal(v, expected[k]) for k, v in found.net.state_dict().items())
    torch.save({"model": adm_state(), "state_dict": adm_state()}, tmp_path / "both.pt")
    with pytest.raises(ValueError, match="check the release and options"):
        load(tmp_path / "both.pt", "guided_diffusion", **ADM)


def test_a_network_larger_than_its_file_takes_no_memory(tmp_path):
    """Settings of terabytes beside the weights of a small network."""
    ScoreModel(UNet((1, 8, 8), width=8), VE(), data_shape=(1, 8, 8)).save(tmp_path)
    path = tmp_path / "model.json"
    path.write_text(path.read_text().replace('"width": 8', '"width": 4000000'))
    with pytest.raises(ValueError, match=r"its network has 13,\S* numbers, and the file of weights 57,473"):
        ScoreModel.load(tmp_path)
