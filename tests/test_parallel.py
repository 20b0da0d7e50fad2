"""Requests in parts, in a budget of memory, and in several processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from problems import mixture, randn

from scorelab import PerSampleNoise, parallel, sample, sigmas
from scorelab.samplers import Ancestral, Heun

GRID = sigmas.geometric(8, sigma_min=0.1, sigma_max=10.0)

SHARE = """
import sys
import torch
sys.path.insert(0, sys.argv[1])
from problems import mixture
from scorelab import PerSampleNoise, parallel, sample, sigmas
from scorelab.samplers import Ancestral
torch.set_num_threads(1)
parallel.join()
parallel.join()
rank, size = parallel.world()
grid = sigmas.geometric(8, sigma_min=0.1, sigma_max=10.0)
score = mixture().score
x = sample(score, (7, 2), grid, Ancestral(), generator=PerSampleNoise(3), sharded=True, dtype=torch.float64)
start = torch.arange(10.0, dtype=torch.float64).reshape(5, 2)
y = sample(score, start, grid, sharded=True, batch_size=2, generator=PerSampleNoise(0))
one = sample(score, (1, 2), grid, generator=PerSampleNoise(3), sharded=True, dtype=torch.float64)
torch.save((rank, size, x, y, one, list(parallel.shard(7))), f"{sys.argv[2]}/{rank}.pt")
try:
    sample(score, start, grid, sharded=True)
except ValueError as error:
    assert "PerSampleNoise" in str(error)
else:
    raise AssertionError("two processes drew the same noise")


def broken(x, sigma):
    # in the second process alone
    if rank == 1:
        raise ValueError("out of range")
    return score(x, sigma)


try:
    sample(broken, (7, 2), grid, generator=PerSampleNoise(3), sharded=True)
except (ValueError, RuntimeError) as error:
    said = str(error)
assert said == ("another process failed, and says why", "out of range")[rank], said
"""


def test_processes_share_a_request_and_all_get_the_whole(tmp_path):
    (tmp_path / "share.py").write_text(SHARE)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    subprocess.run(
        [*launcher, str(tmp_path / "share.py"), str(Path(__file__).parent), str(tmp_path)],
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=300,
    )
    start = torch.arange(10.0, dtype=torch.float64).reshape(5, 2)
    noise = PerSampleNoise(3)
    expected = sample(mixture().score, (7, 2), GRID, Ancestral(), generator=noise, dtype=torch.float64)
    one = sample(mixture().score, (1, 2), GRID, generator=noise, dtype=torch.float64)
    shards = []
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt")
        assert found[:2] == (rank, 2)
        torch.testing.assert_close(found[2], expected, rtol=0, atol=1e-9)
        torch.testing.assert_close(found[3], sample(mixture().score, start, GRID), rtol=0, atol=1e-9)
        torch.testing.assert_close(found[4], one, rtol=0, atol=1e-9)
        shards += found[5]
    assert shards == list(range(7))


def test_one_process_is_its_own_world():
    assert parallel.world() == (0, 1)
    assert list(parallel.shard(5)) == [0, 1, 2, 3, 4]
    x = randn(5, 2)
    assert torch.equal(parallel.gather(x, 5), x)
    noise = torch.Generator().manual_seed(0)
    assert sample(mixture().score, (5, 2), GRID, generator=noise, sharded=True).shape == (5, 2)


def test_rows_within_counts_the_tensors_that_live_at_once():
    """x (8 KiB a row), twice x, and their sum live together: 24 KiB a row beside a fixed 1 MiB."""
    fixed = 2**20

    def run(rows):
        weight = torch.zeros(fixed // 4)
        x = torch.zeros(rows, 2048)
        y = 2 * x
        z = x + y
        del y
        (z + 0).sum().item()
        return weight

    assert parallel.rows_within(fixed + 100 * 24 * 2**10, run) == 99
    assert parallel.rows_within(10, run) == 1


def test_a_budget_of_memory_splits_the_request_and_changes_nothing():
    sizes = []

    def score(x, sigma):
        sizes.append(len(x))
        return mixture().score(x, sigma)

    budget = 5 * 2**20
    x = sample(score, (3000, 2), GRID, Heun(), generator=PerSampleNoise(1), memory=budget)
    whole = sample(mixture().score, (3000, 2), GRID, Heun(), generator=PerSampleNoise(1))
    torch.testing.assert_close(x, whole, rtol=1e-5, atol=1e-5)
    assert 8 < max(sizes) < 3000
    assert max(sizes) * PerSampleNoise.stream_bytes < budget


@pytest.mark.parametrize(
    "options",
    [
        {"batch_size": 0},
        {"memory": 10**6, "callback": print},
        {"memory": 10**6, "differentiable": True},
    ],
)
def test_bad_parts_are_refused(options):
    with pytest.raises(ValueError, match="expected"):
        sample(mixture().score, (10, 2), GRID, **options)
