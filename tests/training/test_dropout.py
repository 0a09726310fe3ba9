"""Dropout depends on the seed, the update, the place and the row, and on nothing else."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.core.batch import Batch, LabelledTexts, TextPairs
from jaxllm.layers.config import LayerNorm, Learned, Plain, Sinusoids
from jaxllm.layers.dropout import Drop
from jaxllm.models.build import bind, graph, init_params
from jaxllm.models.config import ComputeConfig, Latent, ModelConfig, Pipeline
from jaxllm.models.encoder_config import Classes, EncoderConfig
from jaxllm.models.seq2seq_config import Seq2SeqConfig
from jaxllm.sharding.mesh import MeshConfig, make_mesh
from jaxllm.training.config import Dropout, Elbo, StepConfig
from jaxllm.training.objectives import loss_sums
from jaxllm.training.step import gradient_sums
from jaxllm.training.vae_losses import draw, elbo_sums

CPU = ComputeConfig(dtype="float32", layers="scan", loss_chunk=8)
PLAIN = ModelConfig(vocab_size=32, d_model=16, n_layers=2, n_heads=2, d_ff=24, max_seq_len=16)
POST = PLAIN.model_copy(
    update={"norm": LayerNorm(), "norm_placement": "post", "bias": True, "ffn": Plain(), "positions": Learned(),
            "embed_norm": True}
)  # fmt: skip
STACK = POST.model_copy(update={"positions": Sinusoids(), "embed_norm": False})
MODELS = {
    "decoder": PLAIN, "labels": EncoderConfig(stack=POST, head=Classes(labels=("a", "b"))),
    "pairs": Seq2SeqConfig(encoder=STACK, decoder=STACK),
    "vae": PLAIN.model_copy(update={"latent": Latent(size=4, encoder_layers=2)}),
}  # fmt: skip
TOKENS = np.random.default_rng(0).integers(1, 32, (8, 12)).astype(np.int32)
ONES = np.ones_like(TOKENS)


@functools.cache
def large_params(model):
    return jax.jit(lambda: jax.tree.map(lambda x: 6 * x, init_params(model, 0)))()


def batch(kind):
    match kind:
        case "labels":
            return LabelledTexts(TOKENS, ONES, TOKENS[:, 0] % 2, np.ones(8, np.float32))
        case "pairs":
            return TextPairs(TOKENS, ONES, TOKENS, ONES.astype(np.float32), ONES)
    plain = Batch(TOKENS, np.roll(TOKENS, -1, 1), ONES.astype(np.float32), ONES, np.tile(np.arange(12), (8, 1)))
    return draw(plain, Elbo(), 4, 0, 1) if kind == "vae" else plain


def test_a_share_of_the_numbers_is_dropped_by_row():
    drop = Drop(jax.random.key(0), jnp.arange(4), 0.25)
    found = np.asarray(drop(jnp.ones((4, 50, 40))))
    assert set(np.unique(found)) == {0.0, np.float32(4 / 3)}
    assert (found == 0).mean() == pytest.approx(0.25, abs=0.02)
    some = drop._replace(rows=jnp.array([3, 1]))
    np.testing.assert_array_equal(some(jnp.ones((2, 50, 40))), found[[3, 1]])
    others = [found[0], found[1], drop.at(1)(jnp.ones((4, 50, 40)))[0], drop.at(2)(jnp.ones((4, 50, 40)))[0]]
    for i, one in enumerate(others):
        assert all(((one == 0) != (other == 0)).mean() == pytest.approx(0.375, abs=0.05) for other in others[:i])


@pytest.mark.parametrize("kind", list(MODELS))
def test_every_kind_of_model_drops_the_same_in_any_part_of_a_batch(kind):
    model, rows = MODELS[kind], jnp.arange(8)
    params = large_params(model)
    loss_of = functools.partial(elbo_sums if kind == "vae" else loss_sums, model=model, compute=CPU)
    loss = jax.jit(lambda batch, rows, rate: loss_of(params, batch, drop=Drop(jax.random.key(1), rows, rate))[0],
                   static_argnums=2)  # fmt: skip
    whole, off = loss(batch(kind), rows, 0.5), jax.jit(loss_of)(params, batch(kind))[0]
    assert abs(whole - off) > 1e-3 * off
    np.testing.assert_allclose(loss(batch(kind), rows, 0.0), off, rtol=1e-6)
    parts = [loss(jax.tree.map(lambda x, part=part: x[part], batch(kind)), rows[part], 0.5) for part in
             (np.arange(0, 8, 2), np.arange(1, 8, 2))]  # fmt: skip
    np.testing.assert_allclose(sum(parts), whole, rtol=1e-5)


@pytest.mark.parametrize("kind", ["decoder", "pairs"])
def test_stages_drop_the_same_and_have_the_gradient_of_one_device(kind):
    params = large_params(MODELS[kind])
    compute = CPU.model_copy(update={"pipeline": Pipeline(microbatches=2)})
    step = StepConfig(dropout=Dropout(rate=0.3))

    def gradient(mesh):
        function = jax.jit(lambda p, b: gradient_sums(p, b, MODELS[kind], compute, step, 3)[:2])
        with jax.set_mesh(make_mesh(mesh, jax.devices()[: mesh.stage * mesh.data])):
            return jax.device_get(function(params, batch(kind)))

    found, expected = (gradient(MeshConfig(data=size, stage=size)) for size in (2, 1))
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=max(1e-5, 1e-4 * np.abs(b).max()))
    jax.tree.map(close, found, expected)


def test_both_halves_and_all_layers_drop_by_themselves():
    model = MODELS["pairs"]
    bound = bind(graph(model, CPU)[0], large_params(model), Drop(jax.random.key(0), jnp.arange(8), 0.5))
    ones = jnp.ones((8, 12, 16))
    places = [half.drop.at(n) for half in (bound.encoder, bound.decoder) for n in range(3)]
    places += [layer.at(part) for layer in places[:2] for part in range(3)]
    patterns = {np.asarray(place(ones)).tobytes() for place in places}
    assert len(patterns) == len(places)


def test_microbatches_devices_and_remat_change_nothing_and_the_update_does():
    params = large_params(PLAIN)

    def gradient(number=3, rate=0.3, accumulate=1, compute=CPU, mesh=None, seed=0):
        step = StepConfig(accumulate=accumulate, dropout=Dropout(rate=rate, seed=seed))
        function = jax.jit(lambda p, b, n: gradient_sums(p, b, PLAIN, compute, step, n)[:2])
        with jax.set_mesh(make_mesh(mesh or MeshConfig(), jax.devices()[: 8 if mesh else 1])):
            return jax.device_get(function(params, batch("decoder"), number))

    expected = gradient()
    remat = CPU.model_copy(update={"remat": "full", "layers": "unroll"})
    for other in ({"accumulate": 4, "compute": remat}, {"mesh": MeshConfig(data=2, fsdp=2, tensor=2)}):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=2e-3), gradient(**other), expected)
    losses = [float(gradient(**other)[1]) for other in ({"number": 4}, {"seed": 1})]
    assert len({*losses, float(expected[1])}) == 3
