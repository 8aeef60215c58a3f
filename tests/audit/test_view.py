"""A parameter cut into heads, and the sums of g·w over them, against NumPy."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from rankdecay.attention import Window
from rankdecay.attention.layer import WHOLE
from rankdecay.attention.scale import Terms, cancels
from rankdecay.audit.view import ParameterView, size, terms_of

WINDOW = Window("rows", 4, 8, 8, 2)  # the second of two matrices, with two heads of 2


def view(shape, window) -> ParameterView:
    generator = torch.Generator().manual_seed(0)
    weight, gradient = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    return ParameterView("weight", nn.Parameter(weight), gradient, window)


def test_a_windowed_matrix_is_cut_into_its_heads():
    b = view((8, 3), WINDOW)
    assert b.heads == 2
    assert torch.equal(b.cut(b.parameter), b.parameter.detach()[4:].reshape(2, 2, 3))
    assert torch.equal(b.whole(b.gradient), b.gradient[4:])


def test_a_bias_is_cut_as_the_rows_of_its_matrix_even_if_that_is_transposed():
    b = view((8,), Window("rows", 4, 8, 8, 2, transposed=True))
    assert torch.equal(b.cut(b.parameter).flatten(1), b.parameter.detach()[4:].reshape(2, 2))


def test_a_whole_parameter_is_one_head():
    b = view((3,), WHOLE)
    assert b.heads == 1
    assert torch.equal(b.cut(b.parameter), b.parameter.detach()[None])


@pytest.mark.parametrize(("shape", "window"), [((8, 3), WINDOW), ((8,), WINDOW)])
def test_scaling_multiplies_the_heads_and_nothing_else(shape, window):
    b = view(shape, window)
    expected = b.parameter.detach().clone()
    expected[4:6] *= 2
    expected[6:] *= 3
    with torch.no_grad():
        b.scale(torch.tensor([2.0, 3.0]))
    assert torch.equal(b.parameter.detach(), expected)


def test_the_whole_parameter_is_scaled_by_one_factor():
    b = view((2, 2), WHOLE)
    expected = 5 * b.parameter.detach()
    with torch.no_grad():
        b.scale(torch.tensor([5.0]))
    assert torch.equal(b.parameter.detach(), expected)


def test_terms_are_those_of_numpy():
    b = view((8, 3), WINDOW)
    products = (b.gradient.numpy() * b.parameter.detach().numpy())[4:].reshape(2, 6)
    terms = terms_of([b, view((8,), WHOLE)._replace(gradient=None)])
    np.testing.assert_allclose(terms.total, products.sum(1))
    np.testing.assert_allclose(terms.square, (products**2).sum(1))
    np.testing.assert_allclose(terms.grouped(1).total, products.sum())


def test_what_cancels_is_zero_and_what_does_not_is_large():
    assert cancels(Terms(torch.tensor([0.0]), torch.tensor([4.0]))) == 0
    assert cancels(Terms(torch.tensor([3.0, 4.0]), torch.tensor([9.0, 16.0]))) == 1
    assert cancels(Terms(torch.tensor([0.0]), torch.tensor([0.0]))) == math.inf


def test_the_size_of_a_sum_is_the_product_of_the_norms():
    assert size(torch.tensor([3.0, 4.0]), torch.tensor([6.0, 8.0])) == 50
