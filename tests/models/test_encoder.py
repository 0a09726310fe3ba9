import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.core.batch import Batch
from jaxllm.core.tree import map_named
from jaxllm.layers import kernels
from jaxllm.layers.config import Experts, LayerNorm, Learned, Plain, Rope, SlidingWindow
from jaxllm.layers.masks import FullMask
from jaxllm.models.build import abstract_params, bind, graph, init_params, logical_axes
from jaxllm.models.config import ComputeConfig, ModelConfig
from jaxllm.models.encoder_config import Classes, Embeddings, EncoderConfig, MaskedLM
from jaxllm.sharding.config import MeshConfig
from jaxllm.sharding.mesh import make_mesh
from jaxllm.training.objectives import loss_sums
from jaxllm.training.state import param_shardings

STACK = ModelConfig(
    vocab_size=96, d_model=32, n_layers=2, n_heads=4, d_ff=48, max_seq_len=160, norm=LayerNorm(),
    positions=Learned(offset=2), norm_placement="post", embed_norm=True, ffn=Plain(activation="gelu"), bias=True,
    tie_embeddings=True,
)  # fmt: skip
ROBERTA = EncoderConfig(stack=STACK, head=MaskedLM())
LABELS = ROBERTA.model_copy(update={"head": Classes(labels=("no", "yes"))})
CPU = ComputeConfig(dtype="float32", layers="scan", loss_chunk=8)
TOKENS = np.random.default_rng(0).integers(0, 96, (1, 160))  # three blocks of queries: 64, 64 and 32


def noisy_params(config, seed=0):
    """Every leaf random, without the wait for a compiled initialisation."""
    generator = np.random.default_rng(seed)
    draw = lambda name, leaf: jnp.asarray(generator.normal(name.endswith("scale"), 0.2, leaf.shape), jnp.float32)
    return map_named(draw, abstract_params(config))


def forward(config, params, *rows):
    return jax.jit(lambda p, *a: bind(graph(config, CPU)[0], p)(*a))(params, *rows)


def test_full_mask_literal():
    mask = FullMask(jnp.array([[1, 1, 2, 0]]))
    literal = [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]
    np.testing.assert_array_equal(mask.dense(slice(0, 4), slice(0, 4))[0].astype(int), literal)
    assert FullMask().dense(slice(1, 3), slice(0, 4)).shape == (1, 2, 4)


@pytest.mark.parametrize("length", [5, 160])
def test_attention_over_blocks_of_queries_equals_the_full_square(length):
    q, k, v = (np.random.default_rng(i).normal(size=(2, length, 2, 8)).astype(np.float32) for i in range(3))
    segments = np.sort(np.random.default_rng(3).integers(0, 3, (2, length)))
    scores = np.einsum("btnh,bsnh->bnts", q, k) / np.sqrt(8)
    scores = np.where((segments[:, :, None] == segments[:, None, :])[:, None], scores, -np.inf)
    probs = np.exp(scores - scores.max(-1, keepdims=True))
    expected = np.einsum("bnts,bsnh->btnh", probs / probs.sum(-1, keepdims=True), v)
    np.testing.assert_allclose(kernels.attend(q, k, v, FullMask(jnp.asarray(segments))), expected, atol=2e-6)


def test_every_token_sees_every_other():
    changed = np.array([-1, 159, 0, 100])  # in the first row nothing
    rows = np.where(np.arange(160)[None] == changed[:, None], (TOKENS + 1) % 96, TOKENS)
    logits = forward(ROBERTA, noisy_params(ROBERTA), rows)
    for row, seen in ((1, 0), (2, 159), (3, 70)):
        assert np.abs(logits[row] - logits[0])[seen].max() > 1e-4


def test_packed_equals_unpacked_and_ignores_neighbours_and_padding_bitwise():
    params = noisy_params(ROBERTA)
    segments = np.array([[1] * 70 + [2] * 80 + [0] * 10])
    positions = np.array([[*range(70), *range(80), *[0] * 10]])
    types = np.random.default_rng(1).integers(0, 2, (1, 160))
    packed = forward(ROBERTA, params, TOKENS, segments, types, positions)
    alone = forward(ROBERTA, params, TOKENS[:, 70:150], None, types[:, 70:150])
    np.testing.assert_allclose(packed[:, 70:150], alone, atol=2e-5)
    other = np.where(segments == 2, TOKENS, 7)
    np.testing.assert_array_equal(forward(ROBERTA, params, other, segments, types, positions)[:, 70:150],
                                  packed[:, 70:150])  # fmt: skip


def test_labels_are_read_off_the_first_token_that_is_not_padding():
    params = noisy_params(LABELS)
    plain = forward(LABELS, params, TOKENS[:, :12])
    left = np.concatenate([TOKENS[:, -5:], TOKENS[:, :12]], axis=1)
    segments = np.array([[0] * 5 + [1] * 12])
    positions = np.maximum(np.cumsum(segments, 1) - 1, 0)
    np.testing.assert_allclose(forward(LABELS, params, left, segments, None, positions), plain, atol=2e-5)


def test_a_mesh_gives_the_loss_and_gradient_of_one_device():
    config = ROBERTA.model_copy(update={"stack": STACK.model_copy(update={"max_seq_len": 16})})
    params = noisy_params(config)
    generator = np.random.default_rng(0)
    tokens, targets = (generator.integers(0, 96, (8, 16)) for _ in range(2))
    segments = np.sort(generator.integers(0, 3, (8, 16)))[:, ::-1]
    weights = ((generator.random((8, 16)) < 0.3) & (segments > 0)).astype(np.float32)
    batch = Batch(tokens, targets, weights, segments, np.tile(np.arange(16), (8, 1)))
    loss = jax.jit(jax.value_and_grad(lambda p, b: loss_sums(p, b, config, CPU)[0]))
    expected = loss(params, batch)
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    shardings = param_shardings(config, mesh)
    with jax.set_mesh(mesh):
        found = loss(jax.device_put(params, shardings), batch)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5), found, expected)
    split = sum(not leaf.is_fully_replicated for leaf in jax.tree.leaves(shardings))
    assert split >= 8  # four tables and matrices of the stack at least are really cut


def test_every_parameter_has_axes():
    for head in (MaskedLM(), Classes(labels=("a",)), Embeddings(pooler=True), Embeddings(pooler=False)):
        config = ROBERTA.model_copy(update={"head": head})
        is_axes = lambda node: isinstance(node, tuple)
        fits = jax.tree.map(
            lambda a, p: len(a) == p.ndim, logical_axes(config), abstract_params(config), is_leaf=is_axes
        )
        assert all(jax.tree.leaves(fits))
        assert ("head" in logical_axes(config)) == (head != Embeddings(pooler=False))


def test_initial_parameters():
    params = jax.jit(lambda: init_params(LABELS, 3))()
    blocks = params["stack"]["blocks"]
    assert "final_norm" not in params["stack"]
    assert not (blocks["ffn"]["up"]["kernel"][0] == blocks["ffn"]["up"]["kernel"][1]).all()
    for kernel in (blocks["ffn"]["down"]["kernel"], blocks["attention"]["o"]["kernel"]):
        np.testing.assert_allclose(kernel.std(), 0.02, rtol=0.1)  # not smaller with depth, as before norms


def test_heads_that_are_not_there():
    config = LABELS.model_copy(update={"head": Embeddings(pooler=False)})
    module = bind(graph(config, CPU)[0], noisy_params(config))
    with pytest.raises(TypeError, match="no head that gives logits"):
        module.logits(jnp.zeros((1, 2, 32)))
    with pytest.raises(TypeError, match="no pooler"):
        module.pooled(jnp.zeros((1, 2, 32)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"positions": Rope()}, r"kind=rope, norm_placement=post"),
        ({"norm_placement": "pre"}, r"kind=learned, norm_placement=pre"),
        ({"window": SlidingWindow(size=3)}, "window of the stack"),
        ({"ffn": Experts(number=2, top_k=1)}, r"ffn\.kind=experts: an encoder has no loss"),
        ({"embed_norm": False}, "embed_norm=False"),
    ],
)
def test_stacks_that_an_encoder_does_not_compute(change, message):
    stack = STACK.model_copy(update=change)
    with pytest.raises(ValueError, match=message):
        EncoderConfig(stack=stack)


def test_post_norm_is_not_parallel():
    with pytest.raises(ValueError, match="parallel must be false"):
        ModelConfig.model_validate({**STACK.model_dump(), "parallel": True})
