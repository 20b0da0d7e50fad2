"""Training by several processes, started by torchrun on the CPU (gloo)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from scorelab import ScoreModel
from scorelab.cli.runs import is_autoencoder
from scorelab.training import Trainer, build, checkpoint, train
from scorelab.training.watch import TIMINGS

ROOT = Path(__file__).parent.parent

# every process of torchrun runs this: a config, the directory, and after which step it is killed
SCRIPT = """
import os, signal, sys, threading, warnings
sys.path.insert(0, {tests!r})
from scorelab import training
from scorelab.training import engine
from test_distributed import config

workdir, die = sys.argv[1], int(sys.argv[2])
advance = engine.Trainer.advance

def counted(self, measure=True):
    if self.step == die:
        os.kill(os.getpid(), signal.SIGKILL)
    return advance(self, measure)

engine.Trainer.advance = counted
for kind in sys.argv[3:]:
    training.train(config(kind), workdir + kind, progress=False)
"""


def config(kind: str):
    """ "plain": nothing depends on the process, with conditions; "fsdp": likewise; "codes": an autoencoder; "latent": a
    score of its codes; "full": workers, dropout, several averages and accumulation."""
    from test_training import small

    c = small(20)
    c.model.net.dropout, c.training.precision, c.training.batch_size = 0.0, "fp32", 100
    c.training.checkpoint_every, c.training.validate_every, c.data.validation = 10, 10, 50
    c.training.fsdp = kind == "fsdp"
    if kind in ("plain", "fsdp"):
        c.model.conditional, c.training.label_dropout, c.data.workers = True, 0.2, 2
        c.sampling.grid.n, c.evaluation.pixels = 3, {"name": "distance", "every": 20, "n": 41}
    if kind == "codes":
        c.model.net = {"name": "autoencoder", "width": 8, "multipliers": (1, 2), "latent": 2, "critic": 4}
        c.training.objective = {"name": "elbo", "adversarial": 0.1, "adversarial_from": 5}
        c.training.sample_every = 20
    if kind == "latent":
        c.model.codec = {"name": "autoencoder", "path": os.environ["CODES"]}
    if kind == "full":
        c.model.net.dropout, c.data.workers, c.training.accumulate = 0.2, 2, 5
        c.training.steps, c.training.batch_size, c.training.checkpoint_every = 12, 200, 3
        c.optim.ema, c.optim.ema_power, c.optim.name = (0.9, 0.99), (0.1,), "adamw"
    return c


def launch(
    tmp_path: Path, kinds: list[str], workdir: Path, processes: int, die: int = -1
) -> subprocess.CompletedProcess[str]:
    """One after the other, each in the directory whose name ends in the kind's."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(tests=str(ROOT / "tests")))
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [*launcher, str(script), str(workdir), str(die), *kinds]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)


def rows(workdir: Path) -> list[dict]:
    found = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in TIMINGS} for row in found]


def test_two_processes_do_what_one_does(tmp_path, monkeypatch):
    """Loss after 20 steps within 1e-5, and the loss at fixed noise; so do weights that are spread over them, an
    autoencoder and a score of its codes."""
    monkeypatch.setenv("CODES", str(tmp_path / "one_codes"))
    for kind in ("plain", "codes", "latent"):
        train(config(kind), tmp_path / f"one_{kind}", progress=False)
    done = launch(tmp_path, ["plain", "fsdp", "codes", "latent"], tmp_path / "two_", 2)
    assert done.returncode == 0, done.stderr
    for kind in ("plain", "fsdp", "codes", "latent"):
        agree(tmp_path / f"one_{'plain' if kind == 'fsdp' else kind}", tmp_path / f"two_{kind}")


def agree(one: Path, two: Path) -> None:
    """Metrics and weights of two runs, up to the order of sums."""
    for a, b in zip(rows(one), rows(two), strict=True):
        assert a["step"] == b["step"]
        for key in a.keys() & {"loss", "validation_loss", "gradient_norm", "lr"}:
            assert b[key] == pytest.approx(a[key], rel=1e-5)
        if "pixels_distance" in a:
            assert b["pixels_distance"] == pytest.approx(a["pixels_distance"], rel=1e-3)
    assert rows(one)[-1].keys() == rows(two)[-1].keys()
    a, b = (load_file(p / "checkpoints" / "step_00000020" / "ema.safetensors") for p in (one, two))
    if not is_autoencoder(one):
        models = [ScoreModel.load(p / "checkpoints" / "step_00000020") for p in (one, two)]
        x = torch.zeros(1, *models[0].data_shape)
        scores = [model(x, torch.tensor(1.0)) for model in models]
        torch.testing.assert_close(scores[1], scores[0], rtol=1e-3, atol=1e-5)
    for name, value in a.items():
        torch.testing.assert_close(b[name], value, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("processes", [1, 2])
def test_a_killed_run_goes_on_bit_for_bit(tmp_path, processes):
    """Killed in the middle of an epoch, with workers, dropout, three averages and accumulation on."""
    whole, killed = tmp_path / "whole_full", tmp_path / "killed_full"
    assert launch(tmp_path, ["full"], tmp_path / "whole_", processes).returncode == 0
    assert launch(tmp_path, ["full"], tmp_path / "killed_", processes, die=8).returncode != 0
    assert checkpoint.verify(checkpoint.latest(killed / "checkpoints")) == 6
    done = launch(tmp_path, ["full"], tmp_path / "killed_", processes)
    assert done.returncode == 0, done.stderr
    for file in sorted((whole / "checkpoints" / "step_00000012").glob("*.safetensors")):
        assert file.read_bytes() == (killed / "checkpoints" / "step_00000012" / file.name).read_bytes(), file.name
    assert rows(whole) == rows(killed)


FAMILIES = """
import json, sys
sys.path.insert(0, {tests!r})
from scorelab import parallel
from scorelab.training import Trainer, build
from test_distributed import family

parallel.join()
found = {{}}
for name in {names!r}:
    for fsdp in (False, True):
        c = family(name)
        c.training.fsdp = fsdp
        trainer = Trainer(build(c), c)
        found[f"{{name}} {{fsdp}}"] = [trainer.advance().loss for _ in range(3)]
if parallel.world()[0] == 0:
    print(json.dumps(found))
"""
NAMES = (
    "cifar10/score_sde_ve_ncsnpp_continuous",
    "cifar10/ncsn",
    "cifar10/ddpm",
    "imagenet_64/adm",
    "imagenet_64/edm2_s",
)
NAMES += ("imagenet_256/dit_b_4",)


def family(name: str):
    """A published experiment with a small network, without what differs between processes."""
    from test_experiments import CONFIGS, config_of, shrunk

    c = shrunk(config_of(CONFIGS / f"{name}.py"))
    c.training.batch_size, c.training.label_dropout, c.training.precision = 32, 0.0, "fp32"
    if "dropout" in c.model.net or c.model.net.name in ("ncsnpp", "ddpm", "adm"):
        c.model.net.dropout = 0.0
    return c


@pytest.mark.slow
def test_every_family_trains_in_two_processes_as_in_one(tmp_path):
    """By DDP, and with weights spread over them: the losses of three steps, the last two after weights have moved."""
    script = tmp_path / "families.py"
    script.write_text(FAMILIES.format(tests=str(ROOT / "tests"), names=NAMES))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    for name in NAMES:
        c = family(name)
        trainer = Trainer(build(c), c)
        expected = [trainer.advance().loss for _ in range(3)]
        for fsdp in (False, True):
            assert found[f"{name} {fsdp}"] == pytest.approx(expected, rel=1e-4), (name, fsdp)
