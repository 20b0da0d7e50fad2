"""Published experiments: their networks have the published sizes, each family trains and samples as published."""

from __future__ import annotations

import runpy
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from ml_collections import ConfigDict
from test_files import idx

from scorelab import PerSampleNoise, ScoreModel, broadcast, experiments, trajectory
from scorelab.samplers import LangevinCorrector, PredictorCorrector, ReverseDiffusion
from scorelab.training import Trainer, build, build_sampling, in_turn, network, own_score, resolve
from scorelab.training.sampling import check_sampling
from scorelab.training.settings import part

CONFIGS = Path(__file__).parent.parent / "configs"
SMALL = ("digits", "fashion_mnist")
PUBLISHED = {
    # Ho et al., 2020, appendix B
    "cifar10/ddpm": 35.7,
    "bedroom/ddpm": 114,
    "church/ddpm": 114,
    "celebahq/ddpm": 114,
    # the names of improved-diffusion's files and its README
    "imagenet_64/improved_ddpm_conditional": (270, 0.02),
    "cifar10/improved_ddpm": (50, 0.06),
    # Dhariwal and Nichol, 2021, table 10 and appendix I
    "imagenet_64/adm": 296,
    "imagenet_128/adm": 422,
    "imagenet_256/adm": 554,
    "imagenet_512/adm": 559,
    "bedroom/adm": (552, 0.002),
    # Karras et al., 2022, table 7
    "cifar10/edm": 56,
    "cifar10/edm_conditional": 56,
    "ffhq/edm": 62,
    "afhq/edm": 62,
    "imagenet_64/edm": 296,
    # Karras et al., 2024, table 6
    "imagenet_512/edm2_xs": 125,
    "imagenet_512/edm2_s": 280,
    "imagenet_512/edm2_m": 498,
    "imagenet_512/edm2_l": 777,
    "imagenet_512/edm2_xl": (1120, 0.002),
    "imagenet_512/edm2_xxl": (1520, 0.003),
    "imagenet_64/edm2_s": 280,
    "imagenet_64/edm2_m": 498,
    "imagenet_64/edm2_l": 777,
    "imagenet_64/edm2_xl": (1120, 0.002),
    # Peebles and Xie, 2023, tables 1 and 4
    "imagenet_256/dit_s_2": 33,
    "imagenet_256/dit_s_4": 33,
    "imagenet_256/dit_s_8": 33,
    "imagenet_256/dit_b_2": 130,
    "imagenet_256/dit_b_4": 130,
    "imagenet_256/dit_b_8": 131,
    "imagenet_256/dit_l_2": 458,
    "imagenet_256/dit_l_4": 458,
    "imagenet_256/dit_l_8": 459,
    "imagenet_256/dit_xl_2": 675,
    "imagenet_256/dit_xl_4": 675,
    "imagenet_256/dit_xl_8": 676,
    "imagenet_512/dit_xl_2": 675,
}
"""Millions of parameters, to the digit that is given or to a share."""


def config_of(path: Path) -> ConfigDict:
    return runpy.run_path(str(path))["get_config"]()


def size_of(name: str, config: ConfigDict) -> int:
    """How many parameters an experiment's network has, at its true size, which no memory is taken for."""
    c = resolve(config)
    side = 64 if name.startswith("imagenet_512") else 32
    shape = {"cifar10": (3, 32, 32), "folder": (3, *c.data.size), "arrays": (4, side, side)}[c.data.source]
    classes = {"num_classes": 10 if name.startswith("cifar10") else 1000, "null_class": c.training.label_dropout > 0}
    with torch.device("meta"):
        net = network(c, shape, **(classes if c.model.conditional else {}))
    return sum(p.numel() for p in net.parameters())


@pytest.mark.parametrize("folder", sorted(p.name for p in CONFIGS.iterdir() if p.is_dir() and p.name not in SMALL))
def test_networks_have_their_published_sizes(folder):
    for path in sorted((CONFIGS / folder).glob("*.py")):
        name = f"{folder}/{path.stem}"
        millions = size_of(name, config_of(path)) / 1e6
        expected = PUBLISHED.get(name)
        if isinstance(expected, tuple):
            assert millions == pytest.approx(expected[0], rel=expected[1]), name
        elif expected is not None:
            digits = 1 if isinstance(expected, float) else 0
            assert round(millions, digits) == expected, name
        assert path.read_text().count("\n") < 30, name


def test_every_published_experiment_is_there():
    there = {f"{p.parent.name}/{p.stem}" for p in CONFIGS.glob("*/*.py")}
    assert set(PUBLISHED) <= there
    assert sum(name.split("/")[1].startswith("score_sde") and name.split("/")[0] not in SMALL for name in there) == 39


@pytest.mark.parametrize(
    ("name", "weight"),
    [
        ("cifar10/improved_ddpm", 4.0),
        ("imagenet_64/improved_ddpm", 4.0),
        ("imagenet_64/improved_ddpm_conditional", 1.0),
        ("bedroom/improved_ddpm", 1.0),
        ("imagenet_64/adm", 1.0),
        ("imagenet_256/dit_xl_2", 1.0),
    ],
)
def test_the_bounds_term_weighs_as_published(name, weight):
    """T/1000 with --rescale_learned_sigmas, the default of improved-diffusion's scripts, 1 without."""
    c = resolve(config_of(CONFIGS / f"{name}.py"))
    assert c.training.objective.bound * part(c, "process").steps == pytest.approx(weight)


FAMILIES = {
    "cifar10/ncsn": 1000,
    "cifar10/ncsnv2": 1160 + 1,
    "cifar10/ddpm": 1000,
    "cifar10/score_sde_ve_ncsnpp_continuous": 2000,
    "cifar10/score_sde_ve_ncsnpp": 2000,
    "cifar10/score_sde_vp_ddpmpp_continuous": 1000,
    "cifar10/score_sde_subvp_ncsnpp_continuous": 1000,
    "imagenet_64/adm": 250,
    "cifar10/improved_ddpm": 4000,
    "cifar10/edm": 35,
    "cifar10/edm_vp": 35,
    "cifar10/edm_ve": 35,
    "imagenet_64/edm": 511,
    "imagenet_64/edm2_s": 63,
    "imagenet_256/dit_b_4": 250,
}
"""Evaluations of the published sampler on the published grid."""


def shrunk(config: ConfigDict) -> ConfigDict:
    """The experiment on digits, with a tiny network, for two steps."""
    c, net = config, config.model.net
    c.data.source, c.data.size, c.data.flip, c.data.dequantise = "digits", (), False, False
    small = {"width": 8, "multipliers": (1, 2), "blocks": 1, "attention": (1,), "head": 4, "heads": 2, "depth": 1}
    small |= {"levels": net.get("levels"), "patch": 4, "uncertainty": 8}
    known = resolve(config).model.net
    net.update({k: v for k, v in small.items() if k in known and v is not None})
    if net.name == "refinenet":
        net.depth = 4
    if net.name in ("adm", "unet"):
        net.head, net.heads = 0, 2
    c.training.steps, c.training.batch_size, c.optim.warmup = 2, 8, 0
    return c


class Quick:
    """Of what a network says the first ten times, then of black images: (score, v) where it learns a variance."""

    def __init__(self, score):
        self.score, self.calls, self.device, self.sigma_range = score, 0, score.device, score.sigma_range
        if hasattr(score, "score_and_variance"):
            self.score_and_variance = self.both

    def __call__(self, x, sigma):
        self.calls += 1
        return self.score(x, sigma) if self.calls <= 10 else -(x + 1) / broadcast(sigma, x) ** 2

    def both(self, x, sigma):
        self.calls += 1
        black = -(x + 1) / broadcast(sigma, x) ** 2, torch.zeros_like(x)
        return self.score.score_and_variance(x, sigma) if self.calls <= 10 else black


@pytest.mark.parametrize("whole", [pytest.param(True, marks=pytest.mark.slow), False])
@pytest.mark.parametrize("name", FAMILIES)
def test_each_family_trains_and_samples_as_published(name, whole):
    """The whole grid is the published one; the network itself goes through all of it in the slow test."""
    c = shrunk(config_of(CONFIGS / f"{name}.py"))
    trainer = Trainer(build(c), c)
    losses = [trainer.advance().loss for _ in range(2)]
    assert all(0 < loss < 1e4 for loss in losses)
    model = trainer.model.eval()
    levels, sampler = build_sampling(c, model)
    score = own_score(model, c, in_turn(model, 2))
    score = score if whole else Quick(score)
    *_, last = trajectory(score, (2, 1, 8, 8), levels, sampler, generator=PerSampleNoise(0))
    assert last.nfe == FAMILIES[name]
    assert bool(last.x.isfinite().all())


@pytest.mark.parametrize(
    "path", sorted(p for s in SMALL for p in (CONFIGS / s).glob("*.py")), ids=lambda p: "/".join(p.parts[-2:])
)
def test_small_experiments_are_whole(path, tmp_path):
    """Two of its samples go through the objective, and the sampler takes its first step."""
    c = config_of(path)
    if path.parent.name == "fashion_mnist":
        images = np.random.default_rng(0).integers(0, 256, (80, 28, 28), dtype=np.uint8)
        (tmp_path / "train-images-idx3-ubyte").write_bytes(idx(images))
        (tmp_path / "train-labels-idx1-ubyte").write_bytes(idx((np.arange(80) % 10).astype(np.uint8)))
        c.data.path, c.data.validation = str(tmp_path), 10
    if of := {"autoencoder": "autoencoder", "semantic": "diffae"}.get(c.model.codec.name):
        of_codes = config_of(path.with_name(f"{of}.py"))
        of_codes.data = c.data
        c.model.codec.path = str(tmp_path / of)
        build(of_codes).model.save(c.model.codec.path)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "explicit steps as long as|step_size = ")
        experiment = build(c)
        Trainer(experiment, c).rehearse()
        if isinstance(experiment.model, ScoreModel):
            check_sampling(c, experiment.model)


@pytest.mark.parametrize(
    ("name", "sigma_max", "levels", "ema", "batch", "snr"),
    [
        ("cifar10/score_sde_ve_ncsnpp_continuous", 50, 1000, 0.999, 128, 0.16),
        ("celeba/score_sde_ve_ncsnpp", 90, 1000, 0.999, 128, 0.17),
        ("bedroom/score_sde_ve_ncsnpp_continuous", 378, 2000, 0.999, 64, 0.075),
        ("church/score_sde_ve_ncsnpp_continuous", 380, 2000, 0.999, 64, 0.075),
        ("ffhq/score_sde_ve_ncsnpp_continuous", 348, 2000, 0.999, 64, 0.075),
        ("celebahq/score_sde_ve_ncsnpp_continuous", 348, 2000, 0.999, 64, 0.075),
        ("celebahq/score_sde_ve_ncsnpp_continuous_1024", 1348, 2000, 0.9999, 8, 0.15),
    ],
)
def test_ve_has_the_published_constants(name, sigma_max, levels, ema, batch, snr):
    """Noise levels are twice the release's, whose data has half the range."""
    c = resolve(config_of(CONFIGS / f"{name}.py"))
    process = part(c, "process")
    assert process.sigma_range == pytest.approx((0.02, 2 * sigma_max))
    assert (c.sampling.grid.n, tuple(c.optim.ema), c.training.batch_size) == (levels, (ema,), batch)
    sampler = part(c, "sampling.sampler", process=process)
    assert sampler == PredictorCorrector(ReverseDiffusion(process), LangevinCorrector(snr), corrector_first=True)


def test_annealed_langevin_has_the_published_steps():
    """score_sde's 2 (snr sigma)^2 is NCSN's 2e-5 and NCSNv2's 6.2e-6, times sigma^2/0.01^2."""
    found = {n: config_of(CONFIGS / f"cifar10/{n}.py").sampling for n in ("ncsn", "score_sde_ve_ncsn", "ncsnv2")}
    # x + a score + sqrt(2 a) z has a "size" of 2 a; in units of half the range it is four times as large
    assert found["ncsn"].sampler.step_size == 4 * 2 * 2e-5
    assert found["score_sde_ve_ncsn"].sampler.step_size == pytest.approx(4 * 2 * 2e-5, rel=2e-3)
    assert found["ncsnv2"].sampler.step_size == 4 * 2 * 6.2e-6
    assert config_of(CONFIGS / "cifar10/score_sde_ve_ncsnv2.py").sampling.sampler.step_size == pytest.approx(
        4 * 2 * 6.2e-6, rel=2e-3
    )


def test_edm_has_the_published_constants():
    c = config_of(CONFIGS / "cifar10/edm.py")
    assert (c.training.sigmas.mean, c.training.sigmas.std, c.process.sigma_min, c.process.sigma_max) == (
        *(-1.2, 1.2),
        *(0.002, 80.0),
    )
    # half of what was 500,000 images ago
    assert c.optim.ema[0] ** (500_000 / c.training.batch_size) == pytest.approx(0.5)
    assert c.training.steps * c.training.batch_size == 200_000_000
    # the release's number, without what it is told of augmentation
    assert size_of("cifar10/edm", c) == 55_733_891 - 9 * 128


def test_a_release_that_sums_its_loss_has_its_bounds_divided():
    """Half a sum over 3,072 values is 1,536 times their mean: gradients, their bound and Adam's eps go together."""
    found = config_of(CONFIGS / "cifar10/score_sde_ve_ncsnpp_continuous.py")
    assert (found.optim.clip, found.optim.eps) == (1 / 1536, 1e-8 / 1536)
    with pytest.raises(ValueError, match="preconditioning is 'eps'; expected edm, vp or ve"):
        experiments.edm(64, preconditioning="eps")
