"""Numbers that follow from counters alone."""

from __future__ import annotations

import pytest
import torch
from scipy import stats

from scorelab.data import Drawn
from scorelab.distributions import target
from scorelab.noise import counted, streams

MASK = 2**64 - 1


def philox(key: list[int], counter: list[int]) -> list[int]:
    """Four words of Philox4x64-10, by its definition: Salmon et al., 2011, table 2."""
    k, c = list(key), list(counter)
    for _ in range(10):
        a, b = 0xD2E7470EE14C6C93 * c[0], 0xCA5A826395121157 * c[2]
        c = [(b >> 64) ^ c[1] ^ k[0], b & MASK, (a >> 64) ^ c[3] ^ k[1], a & MASK]
        k = [(k[0] + 0x9E3779B97F4A7C15) & MASK, (k[1] + 0xBB67AE8584CAA73B) & MASK]
    return c


@pytest.mark.parametrize("counters", [(0, 5, 9), (7, 2**40 + 3, 6), (-1, 0, 8, 2)])
def test_uniform_numbers_are_philoxs_of_the_counters(counters):
    """24 bits of each half of a word; the second block has 1 in the counter's second word."""
    words = [c & MASK for c in (*counters, 0)[:4]]
    size = 2**14
    found = counted("uniform", (), range(size + 8), *counters)
    for block, place in ((0, 0), (1, size)):
        right = []
        for n in (1, 2):
            for word in philox(words[:2], [n, block, *words[2:]]):
                right += [(word & 0xFFFFFFFF) >> 8, word >> 40]
        assert found[place : place + 8].double().mul(2**24).tolist() == right[:8]


def test_rows_do_not_depend_on_the_rows_beside_them():
    shape = (3, 50)
    whole = counted("normal", shape, range(400), 1, 2, 3)
    assert torch.equal(counted("normal", shape, range(105, 230), 1, 2, 3), whole[105:230])
    assert torch.equal(counted("normal", shape, range(399, 400), 1, 2, 3), whole[399:])


def test_normal_numbers_are_normal_and_streams_differ():
    parts = [counted("normal", (4,), range(2000), *c) for c in ((0, 1, 9), (1, 1, 9), (0, 2, 9), (0, 1, 8))]
    x = torch.stack(parts).flatten(1)
    assert stats.kstest(x.flatten().numpy(), "norm").pvalue > 1e-5
    assert (torch.corrcoef(x) - torch.eye(4)).abs().max() < 5 / 8000**0.5
    # steps whose 32-bit seeds were the same
    assert not torch.equal(
        counted("normal", (4,), range(2), 0, 5562, 9), counted("normal", (4,), range(2), 0, 33460, 9)
    )


def test_no_two_steps_draw_the_same_fresh_samples():
    """A bijection of 2^32 places: 20,000 steps anywhere have 20,000 seeds."""
    seeds = [s.initial_seed() for s in streams((0, 2), 2**31, 20_000)]
    assert len(set(seeds)) == 20_000
    data = Drawn(target("ring"))
    assert torch.equal(data.batch(3, 7, 10).x0, data.batch(3, 7, 10).x0)
    assert not torch.equal(data.batch(3, 7, 10).x0, data.batch(3, 8, 10).x0)
    with pytest.raises(ValueError, match=r"expected fewer than 2\^32: take a new seed"):
        streams(0, 2**32, 1)
