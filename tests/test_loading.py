"""Files of releases: read without running anything in them, and refused in a line where they are none."""

from __future__ import annotations

import io
import pickle
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from published import difference, released
from safetensors.torch import save_file
from torch import nn

from scorelab import ScoreModel
from scorelab.cli.main import main
from scorelab.interop.loading import load
from scorelab.interop.reading import Record, read_file, state_of

PARITY = 2e-5


class Persistent(nn.Module):
    """As NVIDIA's ``persistence`` decorates a class: its pickle holds its source, its arguments and its state."""

    def __init__(self, *args, **kwargs) -> None:
        self._init_args, self._init_kwargs = args, kwargs
        super().__init__()

    def __reduce__(self):
        source = "import os\nos.system('touch scorelab_was_here')\nraise SystemExit\n"
        meta = {"type": "class", "version": 6, "module_src": source, "class_name": type(self).__name__}
        return _reconstruct_persistent_obj, ({**meta, "state": dict(self.__dict__)},)


def _reconstruct_persistent_obj(meta):
    raise AssertionError("this runs a file's source code")


@pytest.fixture
def persistence(monkeypatch):
    """The module by whose name such files ask for the function above."""
    made = types.ModuleType("torch_utils.persistence")
    made._reconstruct_persistent_obj = _reconstruct_persistent_obj
    monkeypatch.setitem(sys.modules, "torch_utils", types.ModuleType("torch_utils"))
    monkeypatch.setitem(sys.modules, "torch_utils.persistence", made)
    monkeypatch.setattr(_reconstruct_persistent_obj, "__module__", "torch_utils.persistence")


class Inner(Persistent):
    def __init__(self, width=3) -> None:
        super().__init__(width=width)
        self.weight = nn.Parameter(torch.randn(width, 2))
        self.register_buffer("freqs", torch.randn(4).half())
        self.plain, self.kinds, self.missing = np.float64(0.5), {"a", "b"}, None
        self.register_parameter("bias", None)


class Outer(Persistent):
    def __init__(self) -> None:
        super().__init__(sigma_data=0.5)
        self.model, self.listed = Inner(5), nn.ModuleDict({"16x16_conv": nn.Conv2d(1, 2, 3)})
        self.use_fp16, self.dtype, self.array = False, torch.float32, np.arange(3.0)


def test_pickles_of_networks_are_records_of_what_they_hold(tmp_path, persistence, monkeypatch):
    """Weights and settings, and none of the source that they bring is run."""
    monkeypatch.chdir(tmp_path)
    net = Outer()
    with (tmp_path / "net.pkl").open("wb") as file:
        pickle.dump({"ema": net, "dataset_kwargs": {"resolution": 16}, "loss_fn": None}, file)
    found = read_file(tmp_path / "net.pkl")
    assert found["dataset_kwargs"] == {"resolution": 16}
    record = found["ema"]
    assert isinstance(record, Record)
    assert (record.kind, record.fields["_modules"]["model"].kind) == ("Outer", "Inner")
    assert record.fields["_modules"]["model"].fields["_init_kwargs"] == {"width": 5}
    assert (record.fields["dtype"], record.fields["array"].tolist()) == (torch.float32, [0.0, 1.0, 2.0])
    state, expected = state_of(record), net.state_dict()
    assert list(state) == list(expected)
    assert all(torch.equal(state[k], expected[k]) and state[k].dtype == expected[k].dtype for k in state)
    assert not (tmp_path / "scorelab_was_here").exists()


class Hostile:
    """What a pickle can ask for."""

    def __init__(self, function, *given) -> None:
        self.asked = function, given

    def __reduce__(self):
        return self.asked


def storage(name: str):
    """A tensor whose storage holds a pickle of its own."""
    inner = io.BytesIO()
    torch.save(Hostile(Path.touch, Path(name)), inner)
    return Hostile(torch.storage._load_from_bytes, inner.getvalue())


@pytest.mark.parametrize("suffix", [".pkl", ".pth", ".pt", ".bin", ".ckpt"])
@pytest.mark.parametrize("kind", ["eval", "system", "touch", "getattr", "storage", "import"])
def test_hostile_files_are_refused_and_do_nothing(tmp_path, suffix, kind):
    import os

    target = str(tmp_path / "touched")
    hostile = {
        "eval": lambda: Hostile(eval, f"open({target!r}, 'w')"),
        "system": lambda: Hostile(os.system, f"touch {target}"),
        "touch": lambda: Hostile(Path.touch, Path(target)),
        "getattr": lambda: Hostile(getattr, Hostile(__import__, "os"), "system"),
        "storage": lambda: storage(target),
        "import": lambda: Hostile(__import__, "antigravity"),
    }[kind]()
    path = tmp_path / f"hostile{suffix}"
    if suffix == ".pkl":
        path.write_bytes(pickle.dumps({"ema": hostile}))
    else:
        torch.save({"model": hostile}, path)
    with pytest.raises(ValueError, match="is damaged, or holds more than weights and settings|is damaged or no file"):
        read_file(path)
    assert not Path(target).exists()


def test_files_that_are_none_are_said_in_a_line(tmp_path):
    with pytest.raises(ValueError, match="there is no file .*nowhere.pth; expected one of weights"):
        read_file(tmp_path / "nowhere.pth")
    torch.save({"a": torch.zeros(1000)}, tmp_path / "whole.pth")
    save_file({"a": torch.zeros(1000)}, tmp_path / "whole.safetensors")
    (tmp_path / "whole.pkl").write_bytes(pickle.dumps({"a": np.zeros(1000)}))
    for name in ("whole.pth", "whole.safetensors", "whole.pkl"):
        assert len(read_file(tmp_path / name)["a"]) == 1000
        cut = tmp_path / f"cut{Path(name).suffix}"
        for size in (0, 10, 500):
            cut.write_bytes((tmp_path / name).read_bytes()[:size])
            with pytest.raises(ValueError, match=f"cut{cut.suffix} is damaged") as caught:
                read_file(cut)
            assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="got list; expected a module, or tensors by their names"):
        state_of([1])


def record(kind: str, state: dict, fields: dict, inner: dict) -> Persistent:
    """A module of NVIDIA's as their files have it: tensors in a tree of modules, settings as attributes."""
    made = type(kind, (Persistent,), {})()
    for name, value in state.items():
        *path, last = name.split(".")
        place = made
        for depth, part in enumerate(path):
            if part not in place._modules:
                kinds = inner.get(".".join(path[: depth + 1]), "Module")
                place._modules[part] = type(kinds, (Persistent,), {})()
            place = place._modules[part]
        place._parameters[last] = nn.Parameter(value)
    made.__dict__ |= fields
    return made


EDM = ("edm_ddpmpp", "edm_ncsnpp", "edm_box", "edm_ve", "edm_vp", "edm_adm", "edm_iddpm", "edm2")


@pytest.mark.parametrize("name", EDM)
def test_pickles_of_edm_say_all(tmp_path, persistence, name, capsys):
    r = released(name)
    c = dict(r.config)
    kind, part = c.pop("cls"), "unet" if name == "edm2" else "model"
    fields = {k: c[k] for k in ("img_resolution", "img_channels", "label_dim")} | {"sigma_data": 0.5}
    network = record(kind, r.state, fields, {part: c.pop("model_type", "UNet")})
    network._modules[part]._init_kwargs = c
    if name != "edm2":
        # weights of augmentation in training, which others don't have
        extra = torch.randn(r.state["model.map_layer0.weight"].shape[1], 9)
        network._modules["model"]._modules["map_augment"] = record("Linear", {"weight": extra}, {}, {})
    path = tmp_path / f"{name}.pkl"
    with path.open("wb") as file:
        pickle.dump({"ema": network.half() if name == "edm2" else network, "loss_fn": None}, file)
    model = load(path, "edm2" if name == "edm2" else "edm")
    x, sigma, classes = r.values["x"], r.values["sigma"], r.values.get("class_labels")
    with torch.no_grad():
        found = model.denoise(x, sigma, classes)
    # averages of EDM2 are stored in half precision
    assert difference(found, r.values["output"]) < (2e-3 if name == "edm2" else PARITY)
    assert capsys.readouterr().err == ""
    with pytest.raises(ValueError, match="can't be loaded as release='dit' .*: check the release and options"):
        load(path, "dit")


def test_settings_that_no_published_network_has_are_refused(tmp_path, persistence):
    """They change what a network computes and not the shapes of its weights."""
    r = released("edm2")
    c = {k: v for k, v in r.config.items() if k != "cls"} | {"concat_balance": 0.3}
    network = record("Precond", r.state, {"img_resolution": 16, "img_channels": 3}, {"unet": "UNet"})
    network._modules["unet"]._init_kwargs = c
    (tmp_path / "edm2.pkl").write_bytes(pickle.dumps({"ema": network}))
    with pytest.raises(ValueError, match="its concat_balance is 0.3; expected 0.5, as in all published networks"):
        load(tmp_path / "edm2.pkl", "edm2")


def test_state_dicts_of_guided_diffusion_are_read_off_their_shapes(tmp_path, capsys):
    r = released("guided_diffusion_unet")
    torch.save(r.state, tmp_path / "adm.pt")
    model = load(tmp_path / "adm.pt", "guided_diffusion", image_size=16, head=16, legacy=True, schedule="linear")
    assert "adm.pt: assumed heads=0, heads_up=0, steps=1000" in capsys.readouterr().err
    steps, classes = r.values["labels"].long(), r.values["class_labels"]
    sigma = model.process.step_sigmas[steps].float()
    x = r.values["x"] * (1 + sigma**2).sqrt().reshape(-1, 1, 1, 1)
    with torch.no_grad():
        score, v = model.score_and_variance(x, sigma, classes)
    eps = -sigma.reshape(-1, 1, 1, 1) * score
    expected, beside = r.values["output"].chunk(2, 1)
    assert difference(eps, expected) < 1e-4
    assert difference(2 * v - 1, beside) < 1e-4
    again = load(tmp_path / "adm.pt", "improved_diffusion", image_size=16, heads=2, steps=100)
    assert again.label_scale == 10.0
    for options, said in (
        ({"heads": 5}, "heads = 5 does not divide"),
        ({"imagesize": 3}, "has no option 'imagesize'; did you mean 'image_size'"),
    ):
        with pytest.raises(ValueError, match=said):
            load(tmp_path / "adm.pt", "guided_diffusion", **options)
    with pytest.raises(ValueError, match="release is 'guided'; did you mean 'guided_diffusion'"):
        load(tmp_path / "adm.pt", "guided")


def test_state_dicts_of_dit(tmp_path):
    r = released("dit")
    args = types.SimpleNamespace(model="DiT")
    for name, whole in (("raw", r.state), ("whole", {"model": {}, "ema": r.state, "opt": {}})):
        torch.save(whole, tmp_path / f"{name}.pt")
        model = load(tmp_path / f"{name}.pt", "dit", heads=4)
        steps, classes = r.values["labels"].long(), r.values["class_labels"]
        sigma = model.process.step_sigmas[steps].float()
        x = r.values["x"] * (1 + sigma**2).sqrt().reshape(-1, 1, 1, 1)
        known = classes < 5
        with torch.no_grad():
            found = model.eps(x[known], sigma[known], classes[known])
        assert difference(found, r.values["output"].chunk(2, 1)[0][known]) < 1e-4
    with pytest.raises(ValueError, match="a width of 64 is none of the published; expected heads="):
        load(tmp_path / "raw.pt", "dit")
    torch.save({"ema": r.state, "args": args}, tmp_path / "hostile.pt")
    with pytest.raises(ValueError, match="more than weights and settings"):
        load(tmp_path / "hostile.pt", "dit", heads=4)


@pytest.mark.parametrize("name", ["ncsn", "ncsnv2"])
def test_lists_of_ncsn(tmp_path, name):
    """Data in [0, 1] there, in [-1, 1] here: noise is twice as large, and a score half as large."""
    r = released(name)
    noise = torch.ones(1)
    prefixed = {f"module.{k}": v for k, v in r.state.items()}
    wrong = {k: v + 1 if v.is_floating_point() and "sigmas" not in k else v for k, v in prefixed.items()}
    whole = [prefixed, {"lr": 1}] if name == "ncsn" else [wrong, {"lr": 1}, 3, 7, {k: r.state[k] for k in r.state}]
    torch.save(whole, tmp_path / "checkpoint.pth")
    model = load(tmp_path / "checkpoint.pth", name, image_size=16)
    sigmas = r.state["sigmas"] if name == "ncsnv2" else torch.from_numpy(np.geomspace(1, 0.01, 10)).float()
    sigma = 2 * sigmas[r.values["labels"].long()] * noise
    with torch.no_grad():
        found = 2 * model(2 * r.values["x"] - 1, sigma)
    assert difference(found, r.values["output"]) < 1e-4
    assert model.sigma_range == pytest.approx((0.02, 2.0), rel=1e-6)


@pytest.mark.parametrize(
    "name", ["score_sde_ncsnpp_ve_continuous", "score_sde_ddpmpp_vp_continuous", "score_sde_ddpm_vp"]
)
def test_checkpoints_of_score_sde(tmp_path, name):
    """Their averages are a list in the order of what was trained, without the random frequencies."""
    r = released(name)
    trained = {k: v for k, v in r.state.items() if k != "sigmas" and not (k.endswith(".W") and "NIN" not in k)}
    raw = {f"module.{k}": torch.zeros_like(v) if k in trained else v for k, v in r.state.items()}
    whole = {"optimizer": {}, "model": raw, "ema": {"decay": 0.999, "shadow_params": list(trained.values())}, "step": 7}
    torch.save(whole, tmp_path / "checkpoint_7.pth")
    ve = "ve" in name
    raw["module.sigmas"] = r.state["sigmas"]
    options = {"sde": "ve" if ve else "vp", "image_size": 16, "continuous": "continuous" in name}
    model = load(tmp_path / "checkpoint_7.pth", "score_sde", **options)
    x, label = r.values["x"], r.values["labels"]
    with torch.no_grad():
        if ve:
            found = 2 * model(2 * x - 1, 2 * label)
        else:
            process, continuous = model.process, options["continuous"]
            sigma = process.sigma(label / 999) if continuous else process.step_sigmas[label.long()].float()
            found = model.eps(x * (1 + sigma**2).sqrt().reshape(-1, 1, 1, 1), sigma)
    # the label 999 t of VP is found from sigma
    assert difference(found, r.values["output"]) < (PARITY if ve else 1e-3)
    whole["ema"]["shadow_params"].pop()
    torch.save(whole, tmp_path / "checkpoint_8.pth")
    with pytest.raises(ValueError, match=r"it has averages of \d+ weights, and \d+ weights; expected as many"):
        load(tmp_path / "checkpoint_8.pth", "score_sde", **options)
    with pytest.raises(ValueError, match="another size|there are no weights|are not known"):
        load(tmp_path / "checkpoint_7.pth", "score_sde", **{**options, "net": {"width": 64}})
    with pytest.raises(ValueError, match="sde is 'vpsde'; did you mean 'vp'"):
        load(tmp_path / "checkpoint_7.pth", "score_sde", **{**options, "sde": "vpsde"})


def test_what_was_loaded_is_saved_as_our_own(tmp_path):
    r = released("dit")
    torch.save(r.state, tmp_path / "dit.pt")
    model = load(tmp_path / "dit.pt", "dit", heads=4)
    model.save(tmp_path / "saved")
    again, x = ScoreModel.load(tmp_path / "saved"), torch.randn(2, 4, 8, 8)
    assert torch.equal(again(x, torch.tensor(1.0)), model(x, torch.tensor(1.0)))


def test_the_command_line_converts_and_samples(tmp_path, persistence, capsys):
    r = released("edm_ddpmpp")
    c = dict(r.config)
    fields, kinds = {"img_resolution": 16, "img_channels": 3}, {"model": c.pop("model_type")}
    network = record(c.pop("cls"), r.state, fields, kinds)
    network._modules["model"]._init_kwargs = c
    path, out = tmp_path / "edm.pkl", tmp_path / "models" / "edm"
    with path.open("wb") as file:
        pickle.dump({"ema": network}, file)
    assert main(["convert", str(path), "--release", "edm", f"--out={out}"]) == 0
    assert "UNet, " in capsys.readouterr().out
    few = ["--n=2", "--nfe=3", "--condition=1", "--guidance=2"]
    assert main(["sample", f"--workdir={out}", *few, f"--out={tmp_path / 'x.npz'}"]) == 0
    assert np.load(tmp_path / "x.npz")["samples"].shape == (2, 16, 16, 3)
    capsys.readouterr()
    for command, said in (
        (["convert", str(path), "--release=edm", f"--out={out}"], "not empty; expected a new directory"),
        (["convert", str(path), "--release=edmm", f"--out={tmp_path / 'y'}"], "did you mean 'edm'"),
        (
            ["convert", str(path), "--release=edm", f"--out={tmp_path / 'y'}", "--size=3"],
            "has no option 'size'; it has",
        ),
        (["convert", str(path), "--out=y"], "expected scorelab convert FILE --release=NAME"),
        (["likelihood", f"--workdir={out}"], "which has no data; expected a run's directory"),
        (["sample", f"--workdir={out}", "--step=3"], "holds one model and no checkpoints"),
    ):
        assert main(command) == 2
        found = capsys.readouterr().err
        assert said in found
        assert found.count("\n") == 1
    torch.save(released("guided_diffusion_unet").state, tmp_path / "adm.pt")
    known = ["--image_size=16", "--head=16", "--legacy=True", "--schedule", "linear"]
    assert (
        main(["convert", str(tmp_path / "adm.pt"), "--release=guided_diffusion", f"--out={tmp_path / 'adm'}", *known])
        == 0
    )
    assert main(["sample", f"--workdir={tmp_path / 'adm'}", "--n=2", "--nfe=3", "--condition=1"]) == 0
