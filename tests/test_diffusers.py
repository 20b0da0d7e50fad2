"""diffusers both ways: networks, folders, schedulers and samplers, beside the package itself."""

from __future__ import annotations

import builtins
import inspect
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from published import difference
from safetensors.torch import load_file, save_file

from scorelab import DiscreteVP, PerSampleNoise, ScoreModel, sample, trajectory
from scorelab.cli.main import main
from scorelab.distributions import GaussianMixture
from scorelab.interop import as_sampler, as_scheduler, from_diffusers, from_scheduler, load, to_diffusers
from scorelab.interop.schedulers import DEFAULTS, prediction_of, process_of
from scorelab.interop.unet2d import DEFAULTS as UNET_DEFAULTS
from scorelab.nn import UNet, adm, ddpm
from scorelab.predictions import SCORE, X0, V
from scorelab.processes import VP, linear_betas
from scorelab.samplers import DDIM, Ancestral, Euler, Heun, ProbabilityFlow, UniPC
from scorelab.sigmas import from_betas, karras

diffusers = pytest.importorskip("diffusers")
# diffusers makes arrays of tensors in a way that NumPy 2 warns of
pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")
PARITY = 2e-5
FILE = "diffusion_pytorch_model"


def blocks(kind: str, attention: str) -> dict:
    """Block types by a letter for each resolution: "a" with attention."""
    down = {"a": f"Attn{kind}DownBlock2D", "-": f"{kind}DownBlock2D"}
    up = {"a": f"Attn{kind}UpBlock2D", "-": f"{kind}UpBlock2D"}
    return {
        "down_block_types": tuple(down[k] for k in attention),
        "up_block_types": tuple(up[k] for k in reversed(attention)),
    }


SMALL = {
    "sample_size": 8,
    "block_out_channels": (16, 32),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    **blocks("", "-a"),
}
NETWORKS = {
    # as ddpm-cifar10-32 is
    "ddpm": {
        **SMALL,
        "block_out_channels": (32, 64, 64),
        **blocks("", "-a-"),
        "layers_per_block": 2,
        "downsample_padding": 0,
        "flip_sin_to_cos": False,
        "freq_shift": 1,
        "attention_head_dim": None,
        "norm_num_groups": 32,
        "norm_eps": 1e-6,
    },
    "gray, not square, classes": {
        **SMALL,
        "sample_size": (8, 12),
        "in_channels": 1,
        "out_channels": 1,
        "num_class_embeds": 5,
    },
    # as openai's consistency models are
    "adm": {
        **SMALL,
        "out_channels": 6,
        "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "ResnetUpsampleBlock2D"),
        "downsample_type": "resnet",
        "upsample_type": "resnet",
        "resnet_time_scale_shift": "scale_shift",
        "attn_norm_num_groups": 4,
        "attention_head_dim": 16,
        "num_class_embeds": 5,
    },
    "without attention": {**SMALL, **blocks("", "--"), "in_channels": 2, "out_channels": 2, "add_attention": False},
    "a width that no fraction gives": {
        **SMALL,
        "block_out_channels": (14, 58),
        "norm_num_groups": 2,
        **blocks("", "--"),
    }
    | {"add_attention": False},
    # as diffusers' own tests have it, and ncsnpp-celebahq-256
    "ncsnpp": {
        "sample_size": (16, 8),
        "block_out_channels": (32, 64, 64),
        "layers_per_block": 1,
        "time_embedding_type": "fourier",
        "norm_eps": 1e-6,
        "mid_block_scale_factor": 2**0.5,
        "norm_num_groups": None,
        **blocks("Skip", "-a-"),
    },
}


def network(**config) -> torch.nn.Module:
    """A UNet2DModel with random weights."""
    net = diffusers.UNet2DModel(**config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, value in net.named_parameters():
            if "time_proj" in name:
                continue
            scale = (1.5 / value[0].numel()) ** 0.5 if value.ndim > 1 else 0.1
            value.copy_(scale * torch.randn(value.shape, generator=generator) + ("norm" in name and "weight" in name))
    return net


def inputs(net, batch: int = 2):
    """x, time steps and classes for a network."""
    size = net.config.sample_size
    x = torch.randn(batch, net.config.in_channels, *((size, size) if isinstance(size, int) else size))
    fourier = net.config.time_embedding_type == "fourier"
    t = torch.tensor([0.3, 70.0] if fourier else [3, 700])[:batch]
    return x, t, None if net.config.num_class_embeds is None else torch.tensor([1, 4])[:batch]


def outputs(model: ScoreModel, x, t, classes):
    """What diffusers' network returns, of our model."""
    if not t.is_floating_point():
        return model.net(x, t.float(), *(() if classes is None else (classes,)))
    return model(x, t)


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_from_folders_are_the_same(tmp_path, name, capsys):
    net = network(**NETWORKS[name])
    net.save_pretrained(tmp_path)
    model = load(tmp_path, "diffusers")
    assert "no scheduler is there: assumed " in capsys.readouterr().err
    args = inputs(net)
    with torch.no_grad():
        expected = net(*args).sample
        assert difference(outputs(model, *args), expected) < PARITY
        model.save(tmp_path / "own")
        assert difference(outputs(ScoreModel.load(tmp_path / "own"), *args), expected) < PARITY
    assert (model.num_classes, model.variance) == (net.config.num_class_embeds, name == "adm")


def test_a_ve_network_that_centres_its_data_sees_twice_the_noise(tmp_path):
    net = network(**NETWORKS["ncsnpp"], center_input_sample=True)
    net.save_pretrained(tmp_path / "unet")
    scheduler = diffusers.ScoreSdeVeScheduler(sigma_max=50.0)
    scheduler.save_pretrained(tmp_path / "scheduler")
    model = load(tmp_path, "diffusers")
    x, sigma, _ = inputs(net)
    with torch.no_grad():
        # data in [0, 1] there, in [-1, 1] here
        assert difference(2 * model(2 * x - 1, 2 * sigma), net(x, sigma).sample) < PARITY
    assert model.sigma_range == pytest.approx((0.02, 100.0), rel=1e-6)
    assert float(from_scheduler(tmp_path, 10)[0][0]) == pytest.approx(100.0, rel=1e-6)


def test_folders_of_all_layouts(tmp_path):
    """A pipeline's, flat ones, parts with an index, PyTorch's files, and names of old."""
    net, scheduler = network(**SMALL), diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2")
    pipeline = tmp_path / "pipeline"
    diffusers.DDPMPipeline(net, scheduler).save_pretrained(pipeline)
    diffusers.DDPMPipeline(net, scheduler).save_pretrained(tmp_path / "parts", max_shard_size="50KB")
    assert len([*(tmp_path / "parts" / "unet").glob("*-of-*")]) > 2
    flat, state = tmp_path / "flat", load_file(pipeline / "unet" / f"{FILE}.safetensors")
    flat.mkdir()
    for name in ("model_index.json", "unet/config.json", "scheduler/scheduler_config.json"):
        (flat / Path(name).name).write_text((pipeline / name).read_text())
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    for new, name in old.items():
        state = {k.replace(f".{new}.", f".{name}."): v for k, v in state.items()}
    assert any("proj_attn" in k for k in state)
    torch.save(state, flat / f"{FILE}.bin")
    args = inputs(net)
    with torch.no_grad():
        expected = net(*args).sample
        for folder in (pipeline, tmp_path / "parts", flat):
            model = load(str(folder), "diffusers")
            assert difference(outputs(model, *args), expected) < PARITY
            assert torch.allclose(
                model.process.alphas_cumprod[:900], scheduler.alphas_cumprod[:900].double(), rtol=1e-3
            )
    assert load(
        flat, "diffusers", image_size=(16, 4), scheduler={"_class_name": "EulerDiscreteScheduler"}
    ).data_shape == (
        3,
        16,
        4,
    )


def test_defaults_are_the_packages():
    for kind, known in {"UNet2DModel": UNET_DEFAULTS, **DEFAULTS}.items():
        signature = inspect.signature(getattr(diffusers, kind).__init__).parameters
        theirs = {name: p.default for name, p in signature.items() if name != "self"}
        assert {k: theirs[k] for k in known if k in theirs} == {k: v for k, v in known.items() if k in theirs}
        # no class reads a key that it does not have
        assert known.keys() - theirs.keys() <= {"prediction_type"}
        if kind == "UNet2DModel":
            assert known == theirs


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"_class_name": "UNet2DConditionModel"}, "UNet2DConditionModel is not built here"),
        ({"down_block_types": ["DownBlock2D", "KDownBlock2D"]}, "KDownBlock2D is not built here"),
        ({"down_block_types": ["DownBlock2D", "DownBlock2D"]}, "attention at resolutions"),
        ({"down_block_types": ["SkipDownBlock2D", "AttnDownBlock2D"]}, "SkipDownBlock2D stands beside"),
        ({"downsample_type": "resnet", "down_block_types": ["AttnDownBlock2D"] * 2}, "attention at resolutions"),
        ({"up_block_types": ["AttnUpBlock2D"]}, "up_block_types has 1 blocks; expected 2"),
        ({"down_block_types": ["ResnetDownsampleBlock2D", "AttnDownBlock2D"]}, "resample by 'conv' and 'resnet'"),
        ({"act_fn": "gelu"}, "act_fn is 'gelu', which is not built here"),
        ({"class_embed_type": "timestep"}, "class_embed_type is 'timestep'"),
        ({"mid_block_type": None}, "mid_block_type is None"),
        ({"mid_block_scale_factor": 2}, "mid_block_scale_factor is 2"),
        ({"center_input_sample": True}, "center_input_sample is true"),
        ({"time_embedding_type": "learned"}, "time_embedding_type is 'learned'"),
        ({"time_embedding_type": "fourier"}, "with DDPMScheduler is not built here"),
        ({"freq_shift": 2}, "freq_shift is 2"),
        ({"resnet_time_scale_shift": "scale_shift"}, "attn_norm_num_groups is null"),
        ({"add_attention": False}, "add_attention is false"),
        ({"attention_head_dim": 24}, "attention_head_dim is 24; expected a divisor"),
        ({"norm_num_groups": 5}, "groups holds 5; expected a divisor"),
        ({"norm_num_groups": None}, "norm_num_groups is null"),
        ({"norm_num_groups": True}, "norm_num_groups is True"),
        ({"layers_per_block": 10**9}, "the weights have no down_blocks.0.resnets.999999999"),
        ({"layers_per_block": "2"}, "layers_per_block is '2'"),
        ({"block_out_channels": [10**9, 32]}, "of 1000000000 channels"),
        ({"block_out_channels": 3}, "block_out_channels is 3"),
        ({"out_channels": 4}, "out_channels is 4"),
        ({"in_channels": 4, "out_channels": 4}, "another size"),
        ({"sample_size": None}, "no sample_size; expected image_size="),
        ({"sample_size": "8"}, "sample_size is"),
        ({"num_class_embeds": 10**12}, "class_embedding.weight"),
        ({"dropout": "x"}, "dropout is 'x'"),
        ({"new_key": 1}, "new_key is not known of UNet2DModel"),
    ],
)
def test_what_is_not_built_here_is_named(tmp_path_factory, change, said, small_folder):
    folder = tmp_path_factory.mktemp("changed")
    for name in ("unet", "scheduler"):
        (folder / name).mkdir()
    config = json.loads((small_folder / "unet" / "config.json").read_text())
    (folder / "unet" / "config.json").write_text(json.dumps({**config, **change}))
    (folder / "unet" / f"{FILE}.safetensors").symlink_to(small_folder / "unet" / f"{FILE}.safetensors")
    (folder / "scheduler" / "scheduler_config.json").symlink_to(small_folder / "scheduler" / "scheduler_config.json")
    with pytest.raises(ValueError, match="can't be loaded as release='diffusers'") as caught:
        load(folder, "diffusers")
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def small_folder(tmp_path_factory):
    """The folder of a pipeline."""
    folder = tmp_path_factory.mktemp("small")
    scheduler = diffusers.DDPMScheduler(prediction_type="v_prediction")
    diffusers.DDPMPipeline(network(**SMALL), scheduler).save_pretrained(folder)
    return folder


def test_damaged_hostile_and_missing_files_are_said_in_a_line(tmp_path, small_folder):
    config = (small_folder / "unet" / "config.json").read_text()
    whole = (small_folder / "unet" / f"{FILE}.safetensors").read_bytes()

    def refused(said: str, release: str = "diffusers", at: Path = tmp_path) -> None:
        with pytest.raises(ValueError, match=said) as caught:
            load(at, release)
        assert "\n" not in str(caught.value)

    refused("is no folder", at=small_folder / "model_index.json")
    refused("is a folder; expected a file", "edm", small_folder)
    refused("holds no config.json")
    for text in ("{", "[]", "[" * 100_000, '{"a": "\\ud800"', "\x00"):
        (tmp_path / "config.json").write_text(text)
        refused("config.json is damaged or no config|config.json holds list")
    (tmp_path / "config.json").write_bytes(b"\xff\xfe{}")
    refused("config.json is damaged")
    (tmp_path / "config.json").write_text(config)
    refused(f"holds no {FILE}.safetensors")
    for size in (0, 100, len(whole) - 10):
        (tmp_path / f"{FILE}.safetensors").write_bytes(whole[:size])
        refused("is damaged")
    (tmp_path / f"{FILE}.safetensors").unlink()

    class Hostile:
        def __reduce__(self):
            return Path.touch, (tmp_path / "touched",)

    torch.save({"conv_in.weight": Hostile()}, tmp_path / f"{FILE}.bin")
    refused("is damaged, or holds more than weights")
    assert not (tmp_path / "touched").exists()
    (tmp_path / f"{FILE}.bin").unlink()
    index = tmp_path / f"{FILE}.safetensors.index.json"
    for text in ("{}", '{"weight_map": {"a": "../b.safetensors"}}', '{"weight_map": {"a": 3}}'):
        index.write_text(text)
        refused("has no weight_map of files beside it")
    index.write_text('{"weight_map": {"conv_in.weight": "part-1.safetensors"}}')
    refused("there is no file .*part-1.safetensors")
    save_file({"conv_in.weight": torch.zeros(3)}, tmp_path / "part-1.safetensors")
    refused("the weights have no down_blocks.0.resnets.0.conv1.weight")
    index.unlink()
    state = load_file(small_folder / "unet" / f"{FILE}.safetensors")
    for change, said in (
        ({"conv_in.weight": torch.zeros(3)}, "another size"),
        ({"more.weight": torch.zeros(3)}, "1 are not known"),
    ):
        save_file({**state, **change}, tmp_path / f"{FILE}.safetensors")
        refused(said)
    save_file({k: v for k, v in state.items() if k != "conv_in.bias"}, tmp_path / f"{FILE}.safetensors")
    refused("there are no weights 'conv_in.bias'")


MIXTURE = GaussianMixture(torch.tensor([[0.6, 0.2], [-0.5, 0.4], [0.1, -0.7]]), 0.2)


def theirs(scheduler, steps: int, x: torch.Tensor, generator=None) -> list[torch.Tensor]:
    """Every x, unscaled, of a scheduler of diffusers on the mixture's exact score."""
    scheduler.set_timesteps(steps)
    abar = scheduler.alphas_cumprod.double()
    table = ((1 - abar) / abar).sqrt()
    own = getattr(scheduler, "sigmas", None)
    scaled = torch.equal(scheduler.scale_model_input(x, scheduler.timesteps[0]), x)
    found, more = [], {} if generator is None else {"generator": generator}
    for i, t in enumerate(scheduler.timesteps):
        sigma = float(table[t]) if own is None else float(own[i])
        alpha = (1 + sigma**2) ** -0.5
        current = x * alpha if scaled and i == 0 else x
        inside = scheduler.scale_model_input(current, t)
        at = inside / alpha
        eps = -sigma * MIXTURE.score(at.double(), torch.tensor(sigma)).to(x.dtype)
        x0 = at - sigma * eps
        kind = scheduler.config.prediction_type
        output = {"epsilon": eps, "sample": x0, "v_prediction": alpha * eps - sigma * alpha * x0}[kind]
        x = scheduler.step(output, t, current, **more).prev_sample
        found.append(x)
    return found


def ends(found: list[torch.Tensor], sigmas: list[float], scaled: bool) -> list[torch.Tensor]:
    return [x * (1 + s**2) ** 0.5 if scaled else x for x, s in zip(found, sigmas, strict=True)]


def score(x, sigma):
    return MIXTURE.score(x.double(), sigma.double()).to(x.dtype)


SCHEDULERS = [
    ("DDIM", {"clip_sample": False}),
    ("DDIM", {}),
    ("DDIM", {"timestep_spacing": "trailing", "prediction_type": "v_prediction", "clip_sample": False}),
    ("DDIM", {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1, "beta_schedule": "scaled_linear"}),
    ("DDIM", {"clip_sample": False, "set_alpha_to_one": False, "beta_start": 0.00085, "beta_end": 0.012}),
    ("DDIM", {"trained_betas": np.linspace(0.001, 0.05, 300).tolist(), "num_train_timesteps": 300}),
    ("DDPM", {}),
    ("DDPM", {"clip_sample": False, "variance_type": "fixed_large", "beta_schedule": "squaredcos_cap_v2"}),
    ("DDPM", {"variance_type": "fixed_small_log", "prediction_type": "sample", "timestep_spacing": "linspace"}),
    ("DDPM", {"beta_schedule": "sigmoid", "clip_sample_range": 0.5, "timestep_spacing": "trailing"}),
    ("EulerDiscrete", {}),
    ("EulerDiscrete", {"timestep_spacing": "leading", "steps_offset": 1, "use_karras_sigmas": True}),
    ("EulerDiscrete", {"timestep_spacing": "trailing", "prediction_type": "sample"}),
    ("EulerDiscrete", {"final_sigmas_type": "sigma_min", "use_exponential_sigmas": True, "sigma_min": 0.05}),
    ("EulerAncestralDiscrete", {"timestep_spacing": "trailing", "prediction_type": "v_prediction"}),
    ("HeunDiscrete", {}),
    ("HeunDiscrete", {"clip_sample": True, "use_karras_sigmas": True}),
    ("DPMSolverMultistep", {}),
    ("DPMSolverMultistep", {"solver_type": "heun", "use_karras_sigmas": True}),
    ("DPMSolverMultistep", {"solver_order": 1, "timestep_spacing": "leading", "final_sigmas_type": "sigma_min"}),
    ("DPMSolverMultistep", {"final_sigmas_type": "sigma_min", "lower_order_final": False}),
    ("DPMSolverMultistep", {"beta_schedule": "squaredcos_cap_v2", "lambda_min_clipped": -5.1}),
    ("DPMSolverMultistep", {"algorithm_type": "sde-dpmsolver++", "timestep_spacing": "trailing"}),
    ("DPMSolverMultistep", {"algorithm_type": "sde-dpmsolver++", "solver_order": 1}),
    ("UniPCMultistep", {}),
    ("UniPCMultistep", {"solver_order": 1, "solver_type": "bh1", "final_sigmas_type": "sigma_min"}),
    ("UniPCMultistep", {"use_karras_sigmas": True}),
]


@pytest.mark.parametrize(
    ("name", "config"), SCHEDULERS, ids=lambda v: v if isinstance(v, str) else " ".join(map(str, v))
)
def test_configs_of_schedulers_are_levels_and_samplers(name, config):
    """The same x after every step, from the same noise."""
    kind, steps = getattr(diffusers, f"{name}Scheduler"), 10
    sigmas, sampler = from_scheduler(kind(**config), steps)
    x = torch.randn(64, 2, generator=torch.Generator().manual_seed(0)) * (1 + float(sigmas[0]) ** 2) ** 0.5
    random = name in ("DDPM", "EulerAncestralDiscrete") or "sde" in config.get("algorithm_type", "")
    run = trajectory(score, x, sigmas, sampler, generator=torch.Generator().manual_seed(1))
    ours = [step.x for step in run][1:]
    scaled = not name.startswith(("Euler", "Heun"))
    found = theirs(kind(**config), steps, x, torch.Generator().manual_seed(1) if random else None)
    # a step of Heun's is two there
    found = found[1::2] + found[-1:] if name == "HeunDiscrete" else found
    levels = sigmas.tolist()[1:]
    # a step to its own level, which changes nothing, is left out
    assert len(found) - len(levels) in (0, 1)
    for got, expected in zip(ours, ends(found[: len(levels)], levels, scaled), strict=True):
        assert difference(got, expected) < 1e-4


def test_ve_schedulers_are_levels_and_correctors():
    """Of one sample, for norms there are means over the batch."""
    scheduler = diffusers.ScoreSdeVeScheduler(sigma_max=10.0, correct_steps=2)
    steps = 30
    sigmas, sampler = from_scheduler(scheduler, steps)
    # many dimensions, and data narrow beside sigma: else the step is bounded here
    x = torch.randn(1, 256, generator=torch.Generator().manual_seed(0)) * 10
    ours = [
        step.x
        for step in trajectory(
            lambda x, s: -x / (1e-4 + s**2), x, sigmas, sampler, generator=torch.Generator().manual_seed(1)
        )
    ]
    scheduler.set_timesteps(steps)
    scheduler.set_sigmas(steps)
    generator = torch.Generator().manual_seed(1)
    for i, t in enumerate(scheduler.timesteps):
        sigma = scheduler.sigmas[i]
        for _ in range(2):
            x = scheduler.step_correct(-x / (1e-4 + sigma**2), x, generator=generator).prev_sample
        out = scheduler.step_pred(-x / (1e-4 + sigma**2), t, x, generator=generator)
        x = out.prev_sample
        if i + 1 < steps:
            assert difference(ours[i + 1], x) < 1e-3
    assert difference(ours[-1], out.prev_sample_mean) < 1e-3


def test_processes_and_predictions_of_schedulers():
    config = {"_class_name": "PNDMScheduler", "prediction_type": "v_prediction", "beta_schedule": "scaled_linear"}
    expected = diffusers.PNDMScheduler(beta_schedule="scaled_linear").alphas_cumprod
    assert torch.allclose(process_of(config).alphas_cumprod, expected.double(), rtol=1e-4)
    with pytest.raises(ValueError, match="prediction_type of PNDMScheduler is 'flow'; known"):
        prediction_of({**config, "prediction_type": "flow"})
    assert (prediction_of(config), prediction_of({**config, "prediction_type": "sample"})) == (V, X0)


@pytest.mark.parametrize(
    ("name", "config", "said"),
    [
        ("LCM", {}, "'LCMScheduler' is not built here"),
        ("PNDM", {}, "PNDMScheduler are none of scorelab's samplers; expected scorelab.interop.as_sampler"),
        ("DDPM", {"rescale_betas_zero_snr": True}, "a noise level of infinity"),
        ("DDPM", {"beta_schedule": "laplace"}, "beta_schedule of DDPMScheduler is 'laplace'"),
        ("DDPM", {"thresholding": True}, "thresholding of DDPMScheduler is True"),
        ("DDPM", {"variance_type": "learned"}, "variance_type is 'learned'; did you mean"),
        ("DDPM", {"variance_type": "fixed_large", "steps_offset": 1}, "adds noise to the end of steps"),
        ("DDPM", {"num_train_timesteps": 10**9}, "expected 100,000 at most"),
        ("DDPM", {"num_train_timesteps": "a"}, "num_train_timesteps of DDPMScheduler is 'a'"),
        ("DDPM", {"beta_start": -1.0}, "beta_start of DDPMScheduler is -1.0"),
        ("DDPM", {"trained_betas": [0.1, 0.2]}, "trained_betas of DDPMScheduler is no list of 1000"),
        ("DDIM", {"timestep_spacing": "linspace"}, "which is not where the next begins"),
        ("DDIM", {"set_alpha_to_one": False}, "set_alpha_to_one is false and clip_sample true"),
        ("DDIM", {"steps_offset": 200}, "each once; expected fewer"),
        ("EulerDiscrete", {"timestep_type": "continuous"}, "timestep_type of EulerDiscreteScheduler is 'continuous'"),
        ("EulerDiscrete", {"use_beta_sigmas": True}, "use_beta_sigmas of EulerDiscreteScheduler is True"),
        ("DPMSolverMultistep", {"solver_order": 3}, "its third order is not scorelab's"),
        ("DPMSolverMultistep", {"final_sigmas_type": "sigma_min"}, "lowers the order of its last step"),
        ("UniPCMultistep", {"solver_order": 3}, "the order of its last steps falls"),
        ("UniPCMultistep", {"disable_corrector": [0]}, "disable_corrector"),
    ],
)
def test_schedulers_that_are_not_built_here_are_named(name, config, said):
    whole = {"_class_name": f"{name}Scheduler", **config}
    with pytest.raises(ValueError, match="scheduler|Scheduler|expected|did you mean") as caught:
        from_scheduler(whole, 10)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="steps is 0; expected a whole number from 1 to 1000"):
        from_scheduler({"_class_name": "DDIMScheduler"}, 0)
    with pytest.raises(ValueError, match="got int; expected a scheduler"):
        from_scheduler(3, 10)


@pytest.mark.parametrize("clip", [False, True])
def test_ddim_of_a_network_is_the_same_trajectory(clip):
    net = network(**SMALL)
    with torch.no_grad():
        # a wild network makes one rounding another picture
        net.conv_out.weight.mul_(0.1)
    scheduler = diffusers.DDIMScheduler(clip_sample=clip)
    model = from_diffusers(net, scheduler)
    sigmas, sampler = from_scheduler(scheduler, 10)
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    ours = [step.x for step in trajectory(model, x * (1 + sigmas[0].float() ** 2).sqrt(), sigmas, sampler)]
    scheduler.set_timesteps(10)
    with torch.no_grad():
        for t, found, sigma in zip(scheduler.timesteps, ours[1:], sigmas.tolist()[1:], strict=True):
            x = scheduler.step(net(x, t).sample, t, x).prev_sample
            assert difference(found / (1 + sigma**2) ** 0.5, x) < 1e-4


def randomised(net: UNet) -> UNet:
    """A network of ours whose last layers are not 0."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for value in net.parameters():
            scale = (1.5 / value[0].numel()) ** 0.5 if value.ndim > 1 else 0.1
            value.copy_(scale * torch.randn(value.shape, generator=generator) + 0.5 * (value.ndim == 1))
    return net.eval()


WRITTEN = {
    "ddpm": (ddpm((3, 8, 8), width=32, multipliers=(1, 2), blocks=1), {"prediction": V}),
    "adm": (
        adm((1, 8, 4), width=32, multipliers=(1, 2), blocks=1, attention=(1,), head=16, variance=True),
        {"prediction": X0},
    ),
    "unet": (
        UNet(
            (2, 8, 8), width=16, multipliers=(1, 2), groups=(8,), embedding="positional", num_classes=3, null_class=True
        ),
        {},
    ),
}


@pytest.mark.parametrize("name", WRITTEN)
def test_models_written_for_diffusers_are_the_same(tmp_path, name):
    net, options = WRITTEN[name]
    process = DiscreteVP(torch.linspace(0.001, 0.1, 50) ** 1.5 if name == "unet" else linear_betas(50))
    variance, shape = net.config["variance"], net.config["data_shape"]
    model = ScoreModel(randomised(net), process, data_shape=shape, label="index", variance=variance, **options)
    to_diffusers(model, tmp_path / "out")
    pipeline = diffusers.DDPMPipeline.from_pretrained(tmp_path / "out")
    unet, scheduler = pipeline.unet.eval(), pipeline.scheduler
    x, t = torch.randn(2, *shape), torch.tensor([3, 40])
    classes = torch.tensor([1, 3]) if name == "unet" else None
    with torch.no_grad():
        expected = unet(x, t, classes).sample
        assert difference(model.net(x, t.float(), *(() if classes is None else (classes,))), expected) < PARITY
        again = load(tmp_path / "out", "diffusers")
        assert difference(outputs(again, x, t, classes), expected) < PARITY
    assert torch.allclose(again.process.betas, process.betas, rtol=1e-9)
    if name == "unet":
        # a pipeline gives no classes
        return
    made = pipeline(batch_size=2, num_inference_steps=10, output_type="np", generator=torch.Generator().manual_seed(3))
    generator = torch.Generator().manual_seed(3)
    begin = torch.randn(2, *shape, generator=generator)
    sigmas, sampler = from_scheduler(scheduler, 10)
    assert sampler == Ancestral("learned" if variance else "posterior")
    found = sample(model, begin * (1 + float(sigmas[0]) ** 2) ** 0.5, sigmas, sampler, generator=generator)
    expected = torch.as_tensor(made.images).movedim(-1, 1)
    assert difference((found / 2 + 0.5).clamp(0, 1), expected) < 1e-4
    assert float(((expected > 0) & (expected < 1)).float().mean()) > 0.1


def test_models_that_diffusers_cannot_express_are_refused(tmp_path):
    process = DiscreteVP(linear_betas(50))
    small = {"width": 32, "multipliers": (1, 2), "blocks": 1}

    def model(net=None, **options) -> ScoreModel:
        made = {"process": process, "label": "index", "data_shape": (3, 8, 8), **options}
        return ScoreModel(net or ddpm((3, 8, 8), **small), **made)

    for made, said in (
        (model(process=VP(), label="time"), "not one of steps"),
        (model(label_scale=0.5), "something else than the step"),
        (model(index_order="descending"), "something else than the step"),
        (model(levels=karras(50, sigma_min=0.02, sigma_max=50)[:-1]), "counts other levels"),
        (model(prediction=SCORE), "predicts score"),
        (model(data_mean=(5.0, 0.0, 0.0)), "data_mean"),
        (model(input_scale=lambda s: s), "sees x scaled otherwise"),
        (model(torch.nn.Identity()), "the network is Identity"),
        (model(UNet((3, 8, 8), **small)), "its embedding is 'fourier'"),
        (model(UNet((3, 8, 8), width=16, embedding="positional")), "its norms have 4, 8, 12, 16 groups"),
        (model(UNet((3, 8), **small, embedding="positional", group=1), data_shape=(3, 8)), "not that of images"),
        (model(ddpm((3, 8, 8), **small, attention_up="last")), "only the last block"),
        (model(UNet((3, 8, 8), **small, embedding="positional", group=1, inputs="skip")), "pyramids"),
        (model(UNet((3, 8, 8), **small, embedding="positional", group=1, rescaled=True)), "rescaled"),
        (model(UNet((3, 7, 8), **small, embedding="positional", group=1), data_shape=(3, 7, 8)), "odd"),
        (model(adm((3, 8, 8), width=32, multipliers=(2, 2), blocks=1, attention=())), "first multipliers"),
    ):
        with pytest.raises(ValueError, match="diffusers|expected a UNet") as caught:
            to_diffusers(made, tmp_path / "out")
        assert said in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("sampler", [DDIM(), Heun(), DDIM(eta=1.0), UniPC(2), Ancestral("forward")], ids=repr)
def test_samplers_are_schedulers_of_pipelines(sampler, small_folder):
    pipeline = diffusers.DDPMPipeline.from_pretrained(small_folder)
    model = load(small_folder, "diffusers")
    scheduler = as_scheduler(sampler, model)
    pipeline = diffusers.DDPMPipeline(pipeline.unet.eval(), scheduler)
    pipeline.set_progress_bar_config(disable=True)
    made = pipeline(batch_size=2, num_inference_steps=6, output_type="np", generator=torch.Generator().manual_seed(3))
    assert len(scheduler.timesteps) == (11 if sampler == Heun() else 6)
    assert (scheduler.order, scheduler.init_noise_sigma) == (2 if sampler == Heun() else 1, 1.0)
    sigmas, generator = from_betas(model.process.betas, 6), torch.Generator().manual_seed(3)
    x = torch.randn(2, 3, 8, 8, generator=generator) * (1 + float(sigmas[0]) ** 2) ** 0.5
    found = sample(model, x, sigmas, sampler, generator=generator)
    expected = torch.as_tensor(made.images).movedim(-1, 1)
    assert difference((found / 2 + 0.5).clamp(0, 1), expected) < 1e-4
    assert float(((expected > 0) & (expected < 1)).float().mean()) > 0.1


def test_a_sampler_in_ddim_pipelines_and_what_it_refuses(small_folder):
    pipeline = diffusers.DDIMPipeline.from_pretrained(small_folder)
    pipeline.set_progress_bar_config(disable=True)
    model, levels = load(small_folder, "diffusers"), lambda n: karras(n, sigma_min=0.02, sigma_max=80)
    scheduler = as_scheduler(Euler(), model, sigmas=levels)
    # of its config diffusers makes a DDIM
    assert diffusers.DDIMPipeline(pipeline.unet, scheduler).scheduler.config.num_train_timesteps == 1000
    pipeline.scheduler = scheduler
    made = pipeline(batch_size=1, num_inference_steps=5, output_type="np", generator=torch.Generator().manual_seed(3))
    assert scheduler.timesteps.is_floating_point()
    x = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(3)) * (1 + 80**2) ** 0.5
    found = sample(model, x, levels(5), Euler())
    assert difference((found / 2 + 0.5).clamp(0, 1), torch.as_tensor(made.images).movedim(-1, 1)) < 1e-4
    x = torch.zeros(1, 3, 8, 8)
    with pytest.raises(ValueError, match="there is no step left"):
        scheduler.step(x, 0, x)
    scheduler.set_timesteps(5)
    for options, said in (({"eta": 1.0}, "eta is 1; expected 0"), ({}, "timestep is 3; expected 9")):
        with pytest.raises(ValueError, match=said):
            scheduler.step(x, 3, x, **options)
    with pytest.raises(ValueError, match="ProbabilityFlow chooses levels for each sample"):
        as_scheduler(ProbabilityFlow(), model).set_timesteps(5)
    with pytest.raises(ValueError, match="expected levels in"):
        as_scheduler(Euler(), model, sigmas=lambda n: karras(n, sigma_min=1e-3, sigma_max=80)).set_timesteps(5)
    with pytest.raises(ValueError, match="expected a DiscreteVP"):
        as_scheduler(Euler(), process=VP())
    with pytest.raises(ValueError, match="expected EPS, V or X0"):
        as_scheduler(Euler(), process=model.process, prediction=SCORE)


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("DDIM", {"timestep_spacing": "linspace"}),
        ("HeunDiscrete", {"prediction_type": "v_prediction"}),
        ("DPMSolverMultistep", {"solver_order": 3}),
        ("DEISMultistep", {}),
        ("LMSDiscrete", {}),
    ],
)
def test_schedulers_are_samplers(name, config):
    kind = getattr(diffusers, f"{name}Scheduler")
    sampler = as_sampler({"_class_name": f"{name}Scheduler", **config}, 12)
    x = torch.randn(32, 2, generator=torch.Generator().manual_seed(0)) * (1 + sampler.sigmas[0] ** 2) ** 0.5
    found = sample(score, x, sampler=sampler)
    assert torch.equal(found, sample(score, x, sampler=sampler))
    expected = theirs(kind(**config), 12, x)[-1]
    assert difference(found, expected * (1 + sampler.sigmas[-1] ** 2) ** 0.5) < 1e-4


def test_random_schedulers_as_samplers_keep_samples_apart():
    sampler = as_sampler(diffusers.DDPMScheduler(), 20)
    whole = sample(score, (40, 2), sampler=sampler, data_std=1.0, generator=PerSampleNoise(0))
    parts = sample(score, (40, 2), sampler=sampler, data_std=1.0, generator=PerSampleNoise(0), batch_size=7)
    assert torch.allclose(whole, parts, atol=1e-5)
    large = sample(score, (4000, 2), sampler=sampler, data_std=1.0, generator=torch.Generator().manual_seed(0))
    # the law of Ancestral's steps on these levels
    alike = sample(
        score, (4000, 2), sampler.sigmas, Ancestral(), data_std=1.0, generator=torch.Generator().manual_seed(1)
    )
    deviation = float(alike.std())
    assert float((large.mean(0) - alike.mean(0)).abs().max()) < 5 * deviation * (2 / 4000) ** 0.5
    assert float(large.std()) == pytest.approx(deviation, rel=5 / math.sqrt(4000))


def test_schedulers_that_are_no_samplers_are_named():
    for name, said in (
        ("FlowMatchEulerDiscrete", "is no scheduler of DDPM's process"),
        ("ScoreSdeVe", "is no scheduler of DDPM's process"),
        ("EDMEuler", "is no scheduler of DDPM's process"),
        ("PNDM", "have no descending levels"),
    ):
        with pytest.raises(ValueError, match=said):
            as_sampler(getattr(diffusers, f"{name}Scheduler")(), 12)
    with pytest.raises(ValueError, match="diffusers has no scheduler 'UNet2DModel'"):
        as_sampler({"_class_name": "UNet2DModel"}, 12)


def test_without_the_package_folders_are_read_and_the_rest_is_said(tmp_path, small_folder, monkeypatch):
    plain = builtins.__import__
    for name in ("diffusers", "diffusers.configuration_utils"):
        monkeypatch.setitem(__import__("sys").modules, name, None)

    def without(name, *args, **kwargs):
        if name.partition(".")[0] == "diffusers":
            raise ImportError(name)
        return plain(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    model = load(small_folder, "diffusers")
    from_scheduler(small_folder, 10)
    to_diffusers(model, tmp_path / "out")
    for call in (lambda: as_scheduler(Euler(), model), lambda: as_sampler(small_folder, 10)):
        with pytest.raises(ValueError, match=r"pip install 'scorelab\[interop\]'"):
            call()


def test_the_command_line_converts_folders(tmp_path, small_folder, capsys):
    out = tmp_path / "model"
    assert main(["convert", str(small_folder), "--release=diffusers", f"--out={out}"]) == 0
    assert "UNet, " in capsys.readouterr().out
    assert main(["sample", f"--workdir={out}", "--n=2", "--nfe=3", f"--out={tmp_path / 'x.npz'}"]) == 0
    assert np.load(tmp_path / "x.npz")["samples"].shape == (2, 8, 8, 3)
    capsys.readouterr()
    assert main(["convert", str(small_folder), "--release=diffusers", f"--out={tmp_path / 'y'}", "--image=3"]) == 2
    found = capsys.readouterr().err
    assert "has no option 'image'; did you mean 'image_size'" in found
    assert found.count("\n") == 1
