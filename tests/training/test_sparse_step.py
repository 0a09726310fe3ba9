"""Updates of a model with experts: the same on every mesh, and what routers add to loss and metrics."""

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from jaxllm.core.batch import Batch
from jaxllm.core.tree import named_leaves
from jaxllm.inference.decode import Decoder, Limits, Request
from jaxllm.inference.sampling import Sampler
from jaxllm.layers import moe
from jaxllm.layers.config import ClampedGate, Experts, Groups, LatentAttention, Rope
from jaxllm.models.balance import move_biases
from jaxllm.models.build import abstract_params, init_params
from jaxllm.models.config import ComputeConfig, DenseLayers, ModelConfig
from jaxllm.sharding.mesh import MeshConfig, make_mesh
from jaxllm.training.checkpoint import Checkpoints
from jaxllm.training.config import AdamW, Muon, StepConfig
from jaxllm.training.feed import place
from jaxllm.training.objectives import loss_sums
from jaxllm.training.optim import optimizer
from jaxllm.training.state import init_state
from jaxllm.training.step import compile_step, gradient_sums

EXPERTS = Experts(number=4, top_k=2, balance=0.1, router_z=0.01)
MODEL = ModelConfig(
    vocab_size=64, d_model=16, n_layers=2, n_heads=2, d_ff=12, max_seq_len=32, init_std=0.2, ffn=EXPERTS
)
DEEPSEEK = MODEL.model_copy(
    update={
        "n_layers": 3, "head_dim": 10, "mla": LatentAttention(rank=12, query_rank=8, rotated=4, value_dim=6),
        "positions": Rope(interleaved=True), "dense": DenseLayers(number=1, d_ff=20),
        "ffn": Experts(number=8, top_k=2, balance=0.01, score="sigmoid", biased=True, shared=1,
                       groups=Groups(number=4, top_k=2)),
    }
)  # fmt: skip
PLAIN = MODEL.model_copy(update={"ffn": EXPERTS.model_copy(update={"balance": 0.0, "router_z": 0.0})})
OSS = MODEL.model_copy(
    update={"ffn": EXPERTS.model_copy(update={"clamped": ClampedGate(limit=0.1)}), "bias": True, "sinks": True}
)
CPU = ComputeConfig(dtype="float32", layers="scan", loss_chunk=8)


def batch(rows=8, length=12):
    """Rows that end in padding, a different length of it each."""
    generator = np.random.default_rng(0)
    tokens = generator.integers(0, 64, (rows, length + 1)).astype(np.int32)
    real = np.arange(length)[None] < length - np.arange(rows)[:, None]
    positions = np.tile(np.arange(length, dtype=np.int32), (rows, 1))
    weights = (real & (generator.random(real.shape) < 0.7)).astype(np.float32)
    return Batch(tokens[:, :-1], tokens[:, 1:], weights, real.astype(np.int32), positions)


@functools.cache
def run(mesh=None, devices=1, model=MODEL, optim=AdamW(), step=StepConfig()):  # noqa: B008
    """Metrics, parameters and state after two updates."""
    mesh = make_mesh(mesh or MeshConfig(), jax.devices()[:devices])
    with jax.set_mesh(mesh):
        state, shardings = init_state(model, optimizer(optim), mesh, seed=0, ema=step.ema_decay is not None)
        update = compile_step(model, CPU, optim, step, shardings)
        history = []
        for _ in range(2):
            state, metrics = update(state, place(batch(), mesh), 1e-2)
            history.append({key: float(value) for key, value in metrics.items()})
        return history, jax.device_get(state.params), state


# Plain experts over twenty updates: sharding/test_parity.py.
@pytest.mark.parametrize("model", [DEEPSEEK, OSS], ids=["deepseek", "biases"])
@pytest.mark.parametrize(
    ("mesh", "split"),
    [
        (MeshConfig(data=2, expert=4), (None, "expert", None, None)),
        (MeshConfig(data=1, fsdp=2, expert=2, tensor=2), (None, "expert", "fsdp", "tensor")),
    ],
    ids=["expert", "all"],
)
def test_sharded_equals_one_device(mesh, split, model):
    history, params, placed = run(mesh, 8, model)
    expected, expected_params, _ = run(model=model)
    assert placed.params["blocks"]["ffn"]["experts"]["up"].sharding.spec == PartitionSpec(*split)
    for found, wanted in zip(history, expected, strict=True):
        for key in wanted:
            assert found[key] == pytest.approx(wanted[key], rel=2e-5), key
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=5e-4), params, expected_params)


def test_a_mesh_of_tpus_whose_kernels_do_not_say_what_varies(monkeypatch):
    monkeypatch.setattr(moe, "shards", SimpleNamespace(platform=lambda: "tpu"))
    history, params, _ = run.__wrapped__(MeshConfig(data=1, fsdp=2, expert=2, tensor=2), 8)
    expected, expected_params, _ = run()
    assert history[1]["loss"] == pytest.approx(expected[1]["loss"], rel=2e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=5e-4), params, expected_params)


@pytest.mark.soak
def test_muon_and_a_moving_average_on_a_mesh_where_devices_share_all_experts():
    options = {"model": DEEPSEEK, "optim": Muon(), "step": StepConfig(ema_decay=0.5)}
    history, params, state = run(MeshConfig(data=1, fsdp=4, tensor=2), 8, **options)
    expected, expected_params, one = run(**options)
    for found, wanted in zip(history, expected, strict=True):
        assert found == pytest.approx(wanted, rel=1e-4)
    for name, leaf in named_leaves(params).items():
        np.testing.assert_allclose(leaf, named_leaves(expected_params)[name], atol=2e-3, err_msg=name)
    ema, alone = named_leaves(state.ema), named_leaves(one.ema)
    assert {name: leaf.sharding for name, leaf in ema.items()} == {
        name: leaf.sharding for name, leaf in named_leaves(state.params).items()
    }
    for name, leaf in ema.items():
        np.testing.assert_allclose(leaf, alone[name], atol=2e-3, err_msg=name)


def test_a_restored_state_of_two_stacks_goes_on_to_the_last_bit(tmp_path):
    mesh, step, optim = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2)), StepConfig(ema_decay=0.9), Muon()
    with jax.set_mesh(mesh), Checkpoints(tmp_path) as checkpoints:
        state, shardings = init_state(DEEPSEEK, optimizer(optim), mesh, seed=0, ema=True)
        update = compile_step(DEEPSEEK, CPU, optim, step, shardings)
        rows = place(batch(), mesh)
        state, _ = update(state, rows, 1e-2)
        checkpoints.save(state, {"step": 1})
        checkpoints.wait()
        abstract = jax.eval_shape(lambda: state)
        straight, metrics = update(state, rows, 1e-2)
        again, others = update(checkpoints.restore(abstract, shardings)[0], rows, 1e-2)
    jax.tree.map(np.testing.assert_array_equal, (again, others), (straight, metrics))


def test_a_step_after_decoding_is_the_same_leaves_the_decoder_alone_and_compiles_once(caplog):
    """A decoder is in the memory of the parameters, which a step may write its new ones into."""
    mesh, optim = make_mesh(MeshConfig(), jax.devices()[:1]), AdamW()
    answer = lambda decoder: decoder.generate([Request([5, 6, 7])], Sampler(temperature=0.0), Limits(8))
    found = []
    for decodes in (False, True):
        with jax.set_mesh(mesh):
            state, shardings = init_state(DEEPSEEK, optimizer(optim), mesh, seed=0)
            update = compile_step(DEEPSEEK, CPU, optim, StepConfig(), shardings)
            rows = place(batch(), mesh)
            for turn in range(3):
                caplog.clear()
                with jax.log_compiles():
                    decoder = Decoder(DEEPSEEK, state.params, CPU) if decodes else None
                    first = decodes and answer(decoder)
                    held = decodes and jax.tree.map(np.array, decoder.params["blocks"])
                    state, _ = update(state, rows, 1e-2)
                compiled = [record.message for record in caplog.records if record.message.startswith("Compiling")]
                assert (not compiled) == (turn > 0), compiled
                if decodes:
                    jax.tree.map(np.testing.assert_array_equal, decoder.params["blocks"], held)
            found.append(jax.device_get(state))
    assert first[0].tokens
    jax.tree.map(np.testing.assert_array_equal, *found)


def test_biases_of_experts_move_by_one_step_per_update_and_not_by_the_gradient():
    _, params, _ = run(model=DEEPSEEK)
    bias = params["blocks"]["ffn"]["choice_bias"]
    assert set(np.round(np.unique(bias), 6)) <= {np.float32(x).round(6) for x in (-0.002, -0.001, 0.0, 0.001, 0.002)}
    assert all(len(set(layer)) > 1 for layer in bias)
    start = jax.jit(lambda: init_params(DEEPSEEK, 0))()
    _, (_, routers) = jax.jit(functools.partial(loss_sums, model=DEEPSEEK, compute=CPU))(start, batch())
    moved = move_biases(start, routers, 0.5)["blocks"]["ffn"]["choice_bias"]
    counts = np.asarray(routers.counts)
    assert counts.shape == (2, 8)
    np.testing.assert_array_equal(moved, 0.5 * np.sign(counts.mean(-1, keepdims=True) - counts))


def test_biases_alone_even_out_the_load():
    mesh, optim = make_mesh(MeshConfig(), jax.devices()[:1]), AdamW()
    with jax.set_mesh(mesh):
        state, shardings = init_state(DEEPSEEK, optimizer(optim), mesh, seed=0)
        update = compile_step(DEEPSEEK, CPU, optim, StepConfig(router_bias_step=0.02), shardings)
        busiest = []
        for _ in range(40):
            state, metrics = update(state, place(batch(), mesh), 0.0)
            busiest.append(float(metrics["router_busiest"]))
    even = DEEPSEEK.ffn.top_k / DEEPSEEK.ffn.number
    assert busiest[-1] - even < 0.5 * (busiest[0] - even)


def test_weights_decay_and_no_bias_norm_sink_or_gate_does():
    model = OSS.model_copy(update={"residual_gate": True})
    params = jax.tree.map(lambda leaf: np.ones(leaf.shape, leaf.dtype), abstract_params(model))
    tx = optimizer(AdamW(weight_decay=1.0))
    step = lambda params: tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)[0]
    updates = jax.jit(step)(params)
    kept = {name for name, leaf in named_leaves(updates).items() if not np.any(leaf)}
    attention = {f"attention/{name}/bias" for name in "qkvo"} | {"attention/sinks", "attention_norm/scale"}
    gates = {"attention_gate", "ffn_gate"}
    ffn = {f"ffn/experts/{name}_bias" for name in ("gate", "up", "down")} | {"ffn/router_bias", "ffn_norm/scale"}
    assert kept == {f"blocks/{name}" for name in attention | ffn | gates} | {"final_norm/scale"}


def test_muon_takes_each_expert_for_a_matrix_of_its_own():
    params = jax.jit(lambda: init_params(OSS, 0))()
    tx = optimizer(Muon(weight_decay=0.0))
    updates = jax.jit(lambda params: tx.update(params, tx.init(params), params)[0])(params)  # noise for a gradient
    sizes = np.linalg.svd(updates["blocks"]["ffn"]["experts"]["up"], compute_uv=False)
    assert sizes.shape == (2, 4, 12)
    assert sizes.min() > 0.5 * sizes.max()  # orthogonalised


@functools.cache
def sums(model=MODEL, accumulate=1):
    function = functools.partial(gradient_sums, model=model, compute=CPU, step=StepConfig(accumulate=accumulate))
    return jax.jit(function)(init_params(MODEL, 0), batch())


def test_the_loss_has_the_routers_losses_over_the_tokens_that_count():
    _, loss, (nats, routers) = sums()
    one = batch()
    count = (one.segments != 0).sum()
    np.testing.assert_array_equal(routers.tokens, count)
    np.testing.assert_array_equal(routers.counts.sum(-1), 2 * count)
    np.testing.assert_allclose(routers.probs.sum(-1), count, rtol=1e-5)
    chosen, probs = routers.counts.sum(0) / (2 * count), routers.probs.sum(0) / (2 * count)
    added = 0.1 * 4 * np.sum(chosen * probs) + 0.01 * routers.z.sum() / (2 * count)
    np.testing.assert_allclose(loss - nats, added * one.weights.sum(), rtol=1e-3)


def test_what_stands_in_padding_changes_nothing():
    one = batch()
    other = one._replace(tokens=np.where(one.segments == 0, 63 - one.tokens, one.tokens))
    function = jax.jit(functools.partial(loss_sums, model=MODEL, compute=CPU))
    first, second = (function(init_params(MODEL, 0), each) for each in (one, other))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), first, second)


def test_accumulation_adds_up_what_is_no_product_of_sums():
    """Where the balance loss is on, each microbatch balances its own tokens; the sums are those of the whole batch."""
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-4), sums(PLAIN), sums(PLAIN, 4))


def test_the_balance_loss_moves_the_router_and_only_through_probabilities():
    difference = jax.tree.map(jnp.subtract, sums()[0], sums(PLAIN)[0])
    size = {name: float(jnp.max(jnp.abs(leaf))) for name, leaf in named_leaves(difference).items()}
    assert size["blocks/ffn/router"] > 1e-2
    assert size["head"] == 0.0
