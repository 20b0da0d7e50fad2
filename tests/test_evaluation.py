from __future__ import annotations

import math

import pytest
import torch
from problems import F64, generator, mixture, randn

from scorelab.evaluation import energy_distance, kl_to_model, nearest_distances


def test_energy_distance_of_shifted_points():
    """Two sets on a line, by hand: 2 E|X-Y| - E|X-X'| - E|Y-Y'|."""
    x, y = torch.tensor([[0.0], [2.0]]), torch.tensor([[1.0], [5.0]])
    assert energy_distance(x, y) == pytest.approx(2 * (1 + 5 + 1 + 3) / 4 - 2 - 4)


def test_energy_distance_is_unbiased_and_sees_a_shift():
    d = mixture()
    values = [energy_distance(d.sample(300, generator(i)), d.sample(300, generator(500 + i))) for i in range(60)]
    t = torch.tensor(values)
    assert abs(float(t.mean())) < 4 * float(t.std()) / math.sqrt(60)
    assert energy_distance(d.sample(300, generator()) + 0.5, d.sample(300, generator(1))) > 10 * float(t.std())


def test_nearest_distances():
    data = torch.tensor([[0.0, 0.0], [3.0, 4.0], [0.0, 1.0]])
    distance, index = nearest_distances(torch.tensor([[3.0, 3.0]]), data)
    assert (float(distance), int(index)) == (1.0, 1)
    own, _ = nearest_distances(data, data, same=True)
    assert own.tolist() == pytest.approx([1, math.hypot(3, 3), 1])


@pytest.mark.parametrize("offset", [0.0, 1000.0, -70000.0])
def test_nearest_distances_far_from_the_origin(offset):
    """Beside differences in float64, of the same float32 numbers: two clusters, no one centre suits both."""
    data = torch.cat([randn(250, 3), 40 + randn(250, 3)]).float() + offset
    x = data[::3] + 0.3 * randn(len(data[::3]), 3, seed=1).float()
    right = (x.double().unsqueeze(1) - data.double()).square().sum(2).sqrt().min(1)
    distance, index = nearest_distances(x, data)
    assert distance.dtype == torch.float32
    torch.testing.assert_close(distance.double(), right.values, rtol=1e-6, atol=1e-6)
    assert torch.equal(index, right.indices)
    own, _ = nearest_distances(data[:9], data[:9], same=True)
    assert float(own.min()) > 0
    assert nearest_distances(x[:0], data)[0].shape == (0,)


def test_kl_of_the_true_score_is_zero_and_of_a_wrong_one_is_known():
    """A score of N(0, 2^2 + sigma^2) for data N(0, 1) is a model N(0, 4 + sigma_min^2): the Gaussian KL, twice."""
    from scorelab.distributions import Gaussian

    data, wrong = Gaussian(torch.zeros(2, dtype=F64), 1.0), Gaussian(torch.zeros(2, dtype=F64), 4.0)
    right = kl_to_model(data, data.score, 0.1, 50.0, count=500, data_std=1.0, generator=generator())
    assert abs(right.value) < 1e-3
    found = kl_to_model(data, wrong.score, 0.1, 50.0, count=4000, data_std=2.0, generator=generator())
    ratio = 1.01 / 4.01
    assert found.value == pytest.approx(ratio - 1 - math.log(ratio), abs=4 * found.stderr)


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="at least 2"):
        energy_distance(randn(1, 2), randn(5, 2))
    with pytest.raises(ValueError, match="data has shape"):
        nearest_distances(randn(5, 2), randn(5, 3))
    with pytest.raises(ValueError, match="y has shape"):
        energy_distance(randn(5, 2), randn(5, 3))
