"""Products of groups of rows against a loop over the rows, values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.layers.grouped import MAX_BLOCK, grouped_product, tpu_gradients


@pytest.mark.parametrize("sizes", [[3, 0, 2, 4], [0, 0, 9, 0], [1, 1, 1, 1], [MAX_BLOCK * 5, 7, 0, MAX_BLOCK]], ids=str)
@pytest.mark.parametrize("rest", [0, 3], ids=["all", "some_in_no_group"])
def test_each_row_meets_the_matrix_of_its_group(sizes, rest):
    generator = np.random.default_rng(0)
    owner = np.repeat(np.arange(4), sizes)
    x = generator.normal(size=(len(owner) + rest, 6)).astype(np.float32)
    kernels, dy = generator.normal(size=(4, 6, 5)).astype(np.float32), generator.normal(size=(len(x), 5))
    dy[len(owner) :] = 0  # as `moe` makes them
    inside = np.arange(len(x)) < len(owner)
    function = lambda x, kernels: grouped_product(x, kernels, jnp.asarray(sizes, jnp.int32))
    y, pull = jax.vjp(jax.jit(function), x, kernels)
    dx, dkernels = pull(jnp.asarray(dy, jnp.float32))
    expected = np.einsum("rd,rdf->rf", x[inside], kernels[owner])
    np.testing.assert_allclose(np.asarray(y)[inside], expected, atol=1e-5)
    np.testing.assert_allclose(np.asarray(dx)[inside], np.einsum("rf,rdf->rd", dy[inside], kernels[owner]), atol=1e-5)
    gradient = np.zeros_like(kernels)
    np.add.at(gradient, owner, np.einsum("rd,rf->rdf", x[inside], dy[inside]))
    np.testing.assert_allclose(dkernels, gradient, atol=2e-4)


@pytest.mark.parametrize("sizes", [[300, 0, 212, 100], [0, 0, 0, 40], [5, 0, 0, 0]], ids=str)
def test_the_gradients_of_the_kernels_for_tpus(sizes):
    generator = np.random.default_rng(0)
    owner = np.repeat(np.arange(4), sizes)
    x, dy = generator.normal(size=(700, 8)).astype(np.float32), generator.normal(size=(700, 6)).astype(np.float32)
    kernels, inside = generator.normal(size=(4, 8, 6)).astype(np.float32), np.arange(700) < len(owner)
    x[~inside], dy[~inside] = np.nan, np.nan  # of no group: never read
    arrays = tuple(jnp.asarray(each) for each in (x, kernels, np.asarray(sizes, np.int32)))
    dx, dkernels, _ = tpu_gradients(arrays, jnp.asarray(dy), interpret=True)
    np.testing.assert_allclose(np.asarray(dx)[inside], np.einsum("rf,rdf->rd", dy[inside], kernels[owner]), atol=1e-4)
    expected = [x[inside][owner == expert].T @ dy[inside][owner == expert] for expert in range(4)]
    np.testing.assert_allclose(dkernels, expected, atol=1e-3)


def test_no_product_is_of_all_rows_with_all_matrices():
    """16 groups of 16 rows: ragged_dot would take 16 times the work of the blocks."""
    arguments = jnp.ones((256, 32)), jnp.ones((16, 32, 32)), jnp.full(16, 16, jnp.int32)
    text = jax.jit(grouped_product).lower(*arguments).as_text()
    assert "stablehlo.while" in text and "chlo.ragged_dot" not in text
