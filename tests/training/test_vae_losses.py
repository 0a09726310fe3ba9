"""The bound of a VAE: KL against sampling, sums and their one division, free bits, annealing, the step."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.core.batch import Batch
from jaxllm.layers.config import Learned
from jaxllm.models.build import abstract_params, bind, graph, init_params
from jaxllm.models.config import ComputeConfig, Latent, ModelConfig
from jaxllm.sharding.config import MeshConfig
from jaxllm.sharding.mesh import make_mesh
from jaxllm.training.config import AdamW, Elbo, Muon, StepConfig
from jaxllm.training.feed import place
from jaxllm.training.objectives import eval_step
from jaxllm.training.optim import _muon_dimensions, optimizer
from jaxllm.training.state import init_state
from jaxllm.training.step import compile_step
from jaxllm.training.vae_losses import (
    VaeSums,
    draw,
    elbo_sums,
    kl_divergence,
    kl_weight,
    vae_eval_metrics,
    vae_metrics,
)

MODEL = ModelConfig(
    vocab_size=24, d_model=16, n_layers=1, n_heads=2, d_ff=24, max_seq_len=8, positions=Learned(),
    latent=Latent(size=5, slots=2, encoder_layers=1),
)  # fmt: skip
CPU = ComputeConfig(dtype="float32", layers="scan", loss_chunk=3)
PARAMS = functools.cache(jax.jit(lambda: jax.tree.map(lambda x: x * 3, init_params(MODEL, 0))))  # some KL
BOUND = jax.jit(functools.partial(elbo_sums, model=MODEL, compute=CPU))


def batch(rows=8, seed=0):
    """Rows of 8: one text of 3 and one of 4 tokens, then padding; the last row has the first text only."""
    tokens = np.random.default_rng(seed).integers(1, 24, (rows, 9)).astype(np.int32)
    segments = np.tile([1, 1, 1, 2, 2, 2, 2, 0], (rows, 1)).astype(np.int32)
    segments[-1, 3:] = 0
    positions = np.tile([0, 1, 2, 0, 1, 2, 3, 0], (rows, 1)).astype(np.int32)
    return Batch(tokens[:, :-1], tokens[:, 1:], (segments > 0).astype(np.float32), segments, positions)


def test_kl_is_that_of_samples_and_of_the_formula_of_torch():
    mean, logvar = jnp.array([0.0, 0.5, -1.0]), jnp.array([0.0, -1.0, 0.5])
    found = kl_divergence(mean, logvar)
    assert found[0] == 0
    x = np.asarray(mean) + np.exp(0.5 * np.asarray(logvar)) * np.random.default_rng(0).normal(size=(400_000, 3))
    log_q = -0.5 * (np.asarray(logvar) + (x - np.asarray(mean)) ** 2 / np.exp(np.asarray(logvar)))
    np.testing.assert_allclose(found, (log_q + 0.5 * x**2).mean(0), atol=5e-3)
    torch = pytest.importorskip("torch", reason="the comparison needs torch")
    normal = lambda m, s: torch.distributions.Normal(torch.tensor(np.asarray(m)), torch.tensor(np.asarray(s)))
    theirs = torch.distributions.kl_divergence(normal(mean, np.exp(0.5 * np.asarray(logvar))), normal(0.0, 1.0))
    np.testing.assert_allclose(found, theirs, rtol=1e-5, atol=1e-7)


def test_the_bound_is_the_sum_over_tokens_and_texts():
    texts = draw(batch(), Elbo(warmup=0, kl_weight=0.5), 5, 0, 2)
    loss, (nats, sums) = BOUND(PARAMS(), texts)
    model, rows = bind(graph(MODEL, CPU)[0], PARAMS()), texts.batch
    q = model.posterior(rows.tokens, rows.segments, rows.positions, 2)
    latents = q.mean + jnp.exp(q.logvar / 2) * texts.noise
    log_probs = jax.nn.log_softmax(model.logits(model.states(rows.tokens, rows.segments, rows.positions, latents)))
    right = np.take_along_axis(np.asarray(log_probs), rows.targets[..., None], -1)[..., 0]
    kl = np.asarray(kl_divergence(*q))
    kl = kl.sum() - kl[-1, 1].sum()  # 15 texts: the last row has one
    assert sums.texts == 15
    np.testing.assert_allclose(sums.reconstruction, -(right * rows.weights).sum(), rtol=1e-5)
    np.testing.assert_allclose(sums.kl, kl, rtol=1e-5)
    np.testing.assert_allclose(nats, sums.reconstruction + kl, rtol=1e-5)
    np.testing.assert_allclose(loss, sums.reconstruction + 0.5 * kl, rtol=1e-5)


def test_free_bits_are_per_text_and_latent():
    texts = draw(batch(), Elbo(warmup=0), 5, 0, 2)
    free = lambda bits: BOUND(PARAMS(), texts, free_bits=bits)
    rows = texts.batch
    q = bind(graph(MODEL, CPU)[0], PARAMS()).posterior(rows.tokens, rows.segments, rows.positions, 2)
    kl = np.asarray(kl_divergence(*q)).reshape(-1, 5)[:15]
    bits = float(np.median(kl))
    loss, (nats, sums) = free(bits)
    np.testing.assert_allclose(loss, sums.reconstruction + np.maximum(kl, bits).sum(), rtol=1e-5)
    assert nats == free(0.0)[1][0]  # the bound itself has no free bits
    np.testing.assert_allclose(free(100.0)[0], sums.reconstruction + 15 * 5 * 100.0, rtol=1e-5)


def test_annealing_literals():
    weights = lambda config: [float(kl_weight(config, step)) for step in range(6)]
    assert weights(Elbo(warmup=4, kl_weight=2.0)) == [0.5, 1.0, 1.5, 2.0, 2.0, 2.0]
    assert weights(Elbo(warmup=2, period=4)) == [0.5, 1.0, 1.0, 1.0, 0.5, 1.0]
    assert weights(Elbo(warmup=0)) == [1.0] * 6


def test_draws_depend_on_the_step_and_the_seed_alone_and_the_first_token_is_kept():
    config = Elbo(word_dropout=0.5)
    one, again, later = (draw(batch(), config, 5, step, 2) for step in (3, 3, 4))
    other = draw(batch(), Elbo(word_dropout=0.5, seed=1), 5, 3, 2)
    jax.tree.map(np.testing.assert_array_equal, one, again)
    assert np.abs(one.noise - later.noise).min() > 0 < np.abs(one.noise - other.noise).min()
    assert one.kept[batch().positions == 0].all()
    assert 0.3 < one.kept[batch().positions > 0].mean() < 0.7
    assert draw(batch(), Elbo(), 5, 0, 2).kept is None


def test_active_units_literal():
    mean = np.array([[0.0, 1.0, 0.3], [0.0, -1.0, 0.31]])
    sums = VaeSums(*map(jnp.asarray, (6.0, 4.0, 2.0, mean.sum(0), (mean**2).sum(0), 0.0)))
    found = vae_metrics(sums, jnp.array(3.0))
    assert {key: float(value) for key, value in found.items()} == {"reconstruction": 2, "kl": 2, "active_units": 1}


def test_evaluation_adds_up_batches_and_counts_right_guesses():
    program = jax.jit(functools.partial(eval_step, model=MODEL, compute=CPU, texts_per_row=2))
    step = functools.partial(program, PARAMS())
    one, two = step(batch(4)), step(batch(6, seed=1))
    found = vae_eval_metrics([one, two])
    assert found["accuracy"] == float(one["correct"] + two["correct"]) / float(one["tokens"] + two["tokens"])
    np.testing.assert_allclose(found["kl"], float(one["kl"] + two["kl"]) / (7 + 11), rtol=1e-5)
    jax.tree.map(np.testing.assert_array_equal, one, step(batch(4)))
    assert step(batch(6, seed=1)._replace(weights=np.zeros((6, 8), np.float32)))["correct"] == 0


def run(step, devices=1, optim=AdamW(lr=1e-2), steps=3):  # noqa: B008
    mesh = make_mesh(MeshConfig(), jax.devices()[:devices])
    with jax.set_mesh(mesh):
        state, shardings = init_state(MODEL, optimizer(optim), mesh, seed=0)
        update = compile_step(MODEL, CPU, optim, step, shardings, 2)
        for _ in range(steps):
            state, metrics = update(state, place(batch(), mesh), optim.lr)
        return {key: float(value) for key, value in metrics.items()}, jax.device_get(state.params)


@pytest.mark.parametrize(("accumulate", "devices"), [(1, 8), (2, 2)])
def test_microbatches_and_devices_change_nothing(accumulate, devices):
    elbo = Elbo(warmup=4, free_bits=0.01, word_dropout=0.2)
    expected, params = run(StepConfig(elbo=elbo))
    assert expected["kl_weight"] == 0.75
    assert expected["loss"] == pytest.approx(expected["reconstruction"] + expected["kl"] * 15 / expected["tokens"])
    found, others = run(StepConfig(elbo=elbo, accumulate=accumulate), devices)
    assert found == pytest.approx(expected, rel=1e-4)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), others, params)


def test_muon_takes_the_matrices_of_both_stacks():
    found = _muon_dimensions(abstract_params(MODEL))
    assert found["decoder"]["blocks"]["cross_attention"]["o"]["kernel"].reduction_axis == (1, 2)
    assert found["encoder"]["blocks"]["ffn"]["up"]["kernel"].reduction_axis == (1,)
    assert found["mean"]["kernel"] is None
    assert np.isfinite(run(StepConfig(), optim=Muon(lr=1e-2))[0]["loss"])
