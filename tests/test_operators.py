"""Operators of measurements: adjoints and singular values against their definitions, in float64."""

from __future__ import annotations

import math

import pytest
import torch
from problems import F64, randn

from scorelab.inverse import (
    Blur,
    Colourisation,
    Composition,
    Inpainting,
    LinearFunction,
    LinearOperator,
    Matrix,
    Measurement,
    NonlinearFunction,
    PhaseRetrieval,
    SuperResolution,
)

KNOWN = torch.tensor([[True, False, True, True], [False, False, True, False]])
SKEWED = torch.tensor([[0.1, 0.4, 0.0], [0.3, -0.2, 0.05]], dtype=F64)

LINEAR: dict[str, LinearOperator] = {
    "inpainting": Inpainting(KNOWN),
    "inpainting, all channels": Inpainting(KNOWN[None], (3, 2, 4)),
    "colourisation": Colourisation((3, 4, 2)),
    "colourisation of one channel": Colourisation((1, 5)),
    "colourisation of points": Colourisation((4,)),
    "super-resolution 1-D": SuperResolution((2, 6), 3),
    "super-resolution 2-D": SuperResolution((3, 4, 6), 2),
    "super-resolution 3-D": SuperResolution((1, 2, 4, 2), 2),
    "wide matrix": Matrix(randn(3, 6), (2, 3)),
    "tall matrix": Matrix(randn(7, 4)),
    "matrix of rank 2": Matrix(randn(4, 2) @ randn(2, 5, seed=1)),
    "blur 1-D": Blur(randn(4), (2, 7)),
    "blur 2-D": Blur(SKEWED, (3, 4, 5)),
    "blur 3-D": Blur(randn(2, 3, 1), (1, 4, 3, 2)),
    "blur, zeros outside": Blur(SKEWED, (3, 4, 5), "zero"),
    "composition": SuperResolution((3, 4, 6), 2) @ Blur(SKEWED, (3, 4, 6)),
    "function": LinearFunction(lambda x: x.cumsum(1)[:, ::2], randn(2, 5)),
    "function with its adjoint": LinearFunction(lambda x: 2 * x.flip(1), randn(2, 5), lambda y: 2 * y.flip(1)),
}
SPECTRAL = {name: a for name, a in LINEAR.items() if a.svd is not None}


@pytest.mark.parametrize("name", LINEAR)
def test_adjoints_are_adjoints(name):
    a = LINEAR[name]
    x, y = randn(5, *a.data_shape), randn(5, *a.shape, seed=1)
    assert a(x).shape == y.shape
    left, right = (a(x) * y).flatten(1).sum(1), (x * a.adjoint(y)).flatten(1).sum(1)
    torch.testing.assert_close(left, right, rtol=1e-13, atol=1e-13)
    # row by row, and in single precision
    torch.testing.assert_close(a(x[2:3]), a(x)[2:3])
    if "function" not in name:
        torch.testing.assert_close(a(x.float()).double(), a(x), rtol=1e-5, atol=1e-5)
    assert (a(x[:0]).shape, a.adjoint(y[:0]).shape) == ((0, *a.shape), (0, *a.data_shape))


@pytest.mark.parametrize("name", SPECTRAL)
def test_singular_values_and_vectors_are_those_of_the_matrix(name):
    a = SPECTRAL[name]
    assert a.svd is not None
    n, x, y = math.prod(a.data_shape), randn(4, *a.data_shape), randn(4, *a.shape, seed=1)
    dense = a(torch.eye(n, dtype=F64).reshape(n, *a.data_shape)).flatten(1).T
    s, r = a.svd.s(x), len(a.svd.s(x))
    expected = torch.linalg.svdvals(dense)
    found = s.sort(descending=True).values
    torch.testing.assert_close(found[: len(expected)], expected, rtol=1e-12, atol=1e-12)
    c = a.svd.vt(x)
    assert c.shape == (4, n)
    # V and U' are unitary
    torch.testing.assert_close(a.svd.v(c), x)
    torch.testing.assert_close(c.abs().square().sum(1), x.flatten(1).square().sum(1))
    within = a.svd.u(a.svd.ut(y))
    torch.testing.assert_close(a.svd.u(a.svd.ut(within)), within)
    # A = U s V', A' = V s U'
    torch.testing.assert_close(a.svd.u(s * c[:, :r]), a(x))
    torch.testing.assert_close(a.svd.v(s * a.svd.ut(y)), a.adjoint(y))


def test_operators_are_what_their_names_say():
    image = randn(2, 3, 4, 6)
    blocks = SuperResolution((3, 4, 6), 2)(image)
    torch.testing.assert_close(blocks, torch.nn.functional.avg_pool2d(image, 2))
    torch.testing.assert_close(Colourisation((3, 4, 6))(image)[:, 0], (image[:, 0] + image[:, 1] + image[:, 2]) / 3)
    assert torch.equal(Inpainting(KNOWN)(image[:, 0, :2, :4])[1], image[1, 0, :2, :4][KNOWN])
    # a convolution turns the kernel round: torch's, a correlation, has it the other way
    turned = SKEWED.flip(0, 1)[None, None].expand(3, 1, 2, 3)
    for padding, mode in (("circular", "circular"), ("zero", "constant")):
        # y_i = sum_j k_j x_(i - j), j from -1 to 0 in lines and from -1 to 1 in columns
        wide = torch.nn.functional.pad(image, (1, 1, 0, 1), mode=mode)
        expected = torch.nn.functional.conv2d(wide, turned, groups=3)
        torch.testing.assert_close(Blur(SKEWED, (3, 4, 6), padding)(image), expected)
    amplitudes = PhaseRetrieval((3, 4, 6), 1.5)
    assert amplitudes.shape == (3, 6, 9)
    # Parseval, and what can't be told from amplitudes
    torch.testing.assert_close(amplitudes(image).square().sum((1, 2, 3)), image.square().sum((1, 2, 3)))
    torch.testing.assert_close(amplitudes(-image), amplitudes(image))
    torch.testing.assert_close(amplitudes(image.flip(2, 3)), amplitudes(image))


def test_chains_are_linear_where_both_are():
    blur, mean = Blur(SKEWED, (3, 4, 6)), Colourisation((3, 4, 6))
    assert isinstance(mean @ blur, Composition)
    x = randn(2, 3, 4, 6)
    torch.testing.assert_close((mean @ blur)(x), mean(blur(x)))
    after = PhaseRetrieval((1, 4, 6)) @ mean
    assert not isinstance(after, LinearOperator)
    torch.testing.assert_close(after(x), PhaseRetrieval((1, 4, 6))(mean(x)))
    assert after.lipschitz == pytest.approx(3**-0.5)
    with pytest.raises(ValueError, match=r"takes \(3, 4, 6\), the inner one gives \(1, 4, 6\)"):
        blur @ mean


def test_functions_are_looked_at():
    with pytest.raises(ValueError, match=r"differs from fn\(a\) \+ fn\(b\) by .*; expected a linear function"):
        LinearFunction(torch.abs, randn(2, 3))
    with pytest.raises(ValueError, match="expected a linear function"):
        LinearFunction(lambda x: 2 * x + 1, randn(2, 3))
    with pytest.raises(ValueError, match="expected a linear function"):
        LinearFunction(torch.square, torch.zeros(1, 3))
    with pytest.raises(ValueError, match="autograd can't follow it; expected adjoint="):
        LinearFunction(lambda x: 2 * x.detach(), randn(2, 3)).adjoint(randn(2, 3))
    with pytest.raises(ValueError, match=r"fn returned \(\) for 2 samples"):
        NonlinearFunction(lambda x: x.sum(), randn(2, 3))


@pytest.mark.parametrize(
    ("made", "error", "said"),
    [
        (lambda: Inpainting(KNOWN.float()), TypeError, "known has dtype torch.float32; expected bool, True where"),
        (lambda: Inpainting(KNOWN, (3, 4, 2)), ValueError, r"known has shape \(2, 4\); expected that of the data"),
        (lambda: Inpainting(~KNOWN & KNOWN), ValueError, "known is False everywhere"),
        (lambda: SuperResolution((3, 4, 6), 4), ValueError, r"factor is 4 for data \(3, 4, 6\); expected one that"),
        (lambda: Blur(SKEWED, (3, 8)), ValueError, r"kernel has shape \(2, 3\) for data \(3, 8\)"),
        (lambda: Blur(SKEWED, (3, 8, 8), "reflect"), ValueError, "padding is 'reflect'; expected 'circular' or"),
        (lambda: Matrix(randn(3, 4), (5,)), ValueError, r"matrix has shape \(3, 4\) for data \(5,\)"),
        (lambda: Matrix(randn(3, 4) * math.nan), ValueError, "matrix holds NaN or infinity"),
        (lambda: Inpainting(KNOWN)(randn(1, 4, 2)), ValueError, r"x0 has shape \(1, 4, 2\); expected \(B, 2, 4\)"),
        (lambda: Inpainting(KNOWN).adjoint(randn(1, 5)), ValueError, r"y has shape \(1, 5\); expected \(B, 4\)"),
        (lambda: Composition(PhaseRetrieval((1, 4)), Colourisation((3, 4))), TypeError, "expected linear operators"),
        (lambda: Measurement(torch.abs, randn(1, 4)), TypeError, "expected an Operator: wrap a function"),
        (
            lambda: Measurement(Inpainting(KNOWN), randn(1, 2, 4)),
            ValueError,
            r"y has shape \(1, 2, 4\); expected \(B, 4\) or \(1, ...\), as operator\(x0\) gives for x0 \(B, 2, 4\)",
        ),
        (lambda: Measurement(Inpainting(KNOWN), randn(1, 4) / 0), ValueError, "y is not finite at 1 of 1 samples"),
        (lambda: Matrix(randn(0, 6)), ValueError, "matrix holds 0 rows, torch.float64; expected finite real numbers"),
        (lambda: Matrix(randn(2, 6) + 0j), ValueError, "matrix holds 2 rows, torch.complex128; expected finite real"),
        (lambda: Blur(randn(2, 2) / 0, (1, 4, 4)), ValueError, "kernel holds .*; expected finite numbers"),
        (lambda: Blur(randn(0, 2), (1, 4, 4)), ValueError, "kernel holds .*; expected finite numbers"),
        (lambda: LinearFunction(lambda x: 2 * x, randn(2, 5), lambda y: 5 * y), ValueError, "expected fn's adjoint"),
        (
            lambda: LinearFunction(lambda x: x[:, :2], randn(2, 5), lambda y: y),
            ValueError,
            r"adjoint returned \(2, 2\)",
        ),
        (lambda: Measurement(Inpainting(KNOWN), randn(1, 4), -0.1), ValueError, "noise_std is -0.1; expected a finite"),
        (
            lambda: Measurement(Inpainting(KNOWN), randn(1, 4), 1e200),
            ValueError,
            r"noise_std is 1e\+200; .* below 1e19",
        ),
        (
            lambda: Measurement(Inpainting(KNOWN), 200 + randn(1, 4), 0.1, data_range=(-1, 1)),
            ValueError,
            r"y spans .* but the declared data_range is \[-1.6, 1.6\]",
        ),
        (
            lambda: Measurement(Inpainting(KNOWN), randn(3, 4)).residual(randn(64, 2, 4)),
            ValueError,
            "y has 3 rows for 64 samples; expected 1, or one for each sample",
        ),
        (
            lambda: Measurement(Inpainting(KNOWN), randn(3, 4)).log_likelihood(randn(3, 2, 4)),
            ValueError,
            "noise_std is 0, and this method divides by it",
        ),
    ],
)
def test_what_does_not_fit_is_refused(made, error, said):
    with pytest.raises(error, match=said):
        made()


def test_a_likelihood_is_its_gaussians():
    m = Measurement(Matrix(randn(2, 3)), randn(4, 2, seed=2), 0.3)
    x = randn(4, 3, seed=3)
    gap = m.log_likelihood(x) - torch.distributions.Normal(x @ randn(2, 3).T, 0.3).log_prob(m.y).sum(1)
    torch.testing.assert_close(gap, gap[:1].expand(4))
    torch.testing.assert_close(m.rows(torch.tensor([2, 0])).residual(x[[2, 0]]), m.residual(x)[[2, 0]])
