"""One update: gradient of the summed loss over the global batch, divided once, clipped, applied, guarded."""

import functools

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from jaxllm.core import rng
from jaxllm.models.balance import move_biases, router_metrics
from jaxllm.models.build import AnyConfig, Drop, Params
from jaxllm.models.config import ComputeConfig, is_vae
from jaxllm.sharding import shards
from jaxllm.sharding.rules import constrain
from jaxllm.sharding.xla import compiler_options
from jaxllm.training.block_norms import block_norms
from jaxllm.training.config import AdamW, Muon, StepConfig
from jaxllm.training.objectives import AnyBatch, loss_sums
from jaxllm.training.optim import optimizer
from jaxllm.training.state import TrainState
from jaxllm.training.vae_losses import Texts, draw, elbo_sums, vae_metrics

Metrics = dict[str, Array]
NORM_MEAN_DECAY = 0.98  # the spike guard compares with about the last 50 gradient norms


def gradient_sums(
    params: Params, batch: AnyBatch | Texts, model: AnyConfig, compute: ComputeConfig, step: StepConfig,
    number: Int[Array, ""] | int = 0,
) -> tuple[Params, Float[Array, ""], tuple]:  # fmt: skip
    """Return (gradient of the loss sum, loss sum, (nats sum, other sums)), in `step.accumulate` microbatches.

    Args:
      number: of the update; decides what dropout drops.
    """
    loss_of = (
        functools.partial(elbo_sums, free_bits=step.elbo.free_bits) if isinstance(batch, Texts)
        else functools.partial(loss_sums, smoothing=step.label_smoothing)
    )  # fmt: skip
    key, rate = rng.key(step.dropout.seed, "dropout", number), step.dropout.rate

    def loss_of_rows(params: Params, batch: AnyBatch | Texts, rows: Int[Array, "B"]) -> tuple:
        drop = Drop(key, rows, rate) if rate else None
        return loss_of(params, batch, model=model, compute=compute, z=step.z_loss, drop=drop)

    both = jax.value_and_grad(loss_of_rows, has_aux=True)
    batch = batch, jnp.arange(jax.tree.leaves(batch)[0].shape[0])

    def split(x: Array) -> Array:
        # Strided, so that each device's rows stay on it: [B] -> [B / A, A] -> [A, B / A].
        x = jnp.swapaxes(x.reshape(x.shape[0] // step.accumulate, step.accumulate, *x.shape[1:]), 0, 1)
        return constrain(x, *(None, "rows", "length", None)[: x.ndim])

    def add(carry: tuple, microbatch: tuple) -> tuple[tuple, None]:
        return jax.tree.map(jnp.add, carry, both(params, *microbatch)), None

    if step.accumulate == 1:
        (loss, rest), gradient = both(params, *batch)
        return gradient, loss, rest
    parts = jax.tree.map(split, batch)
    shapes = jax.eval_shape(both, params, *jax.tree.map(lambda x: x[0], parts))
    zero = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    (loss, rest), gradient = jax.lax.scan(add, zero, parts)[0]
    return gradient, loss, rest


def train_step(
    state: TrainState, batch: AnyBatch, lr: Float[Array, ""], *, model: AnyConfig, compute: ComputeConfig,
    optim: AdamW | Muon, step: StepConfig, texts_per_row: int = 1,
) -> tuple[TrainState, Metrics]:  # fmt: skip
    """Return the state after one update on `batch`, and the step's metrics.

    A step whose loss, gradient or new parameters are not finite, or whose gradient norm is a spike, leaves parameters
    and optimizer untouched and reports skipped = 1.

    Args:
      lr: learning rate of this update; `schedules.learning_rate` of the step.
      texts_per_row: the most of a row, at least; read by a VAE alone.
    Returns:
      metrics: loss (mean nats per weighted token, or text that has a label), objective (with smoothing, z-loss and what
      routers add), grad_norm, lr, tokens (sum of weights), skipped, and `balance.router_metrics` of a model with
      experts; float32 scalars, and with `step.block_norms` those of all blocks [L]. The loss of a VAE is -ELBO, with
      `vae_losses.vae_metrics` and kl_weight beside it.
    """
    vae = is_vae(model)
    rows = draw(batch, step.elbo, model.latent.size, state.step, texts_per_row) if vae else batch
    gradient, loss, (nats, sums) = gradient_sums(state.params, rows, model, compute, step, state.step)
    routers = None if vae else sums
    with jax.named_scope("optimizer"):
        tokens = jnp.sum(batch.weights)
        scale = 1.0 / jnp.maximum(tokens, 1.0)
        gradient = jax.tree.map(lambda g: g * scale, gradient)
        norm = optax.tree.norm(gradient)
        kept = jax.device_put(state.opt_state, jax.memory.Space.Device) if step.offload else state.opt_state

        def updated(gradient: Params, kept: optax.OptState, params: Params) -> tuple[Params, optax.OptState]:
            direction, opt_state = optimizer(optim).update(gradient, kept, params)
            params = jax.tree.map(lambda p, u: p + lr * u, params, direction)
            if routers is not None and model.ffn.biased:
                params = move_biases(params, routers, step.router_bias_step)
            return params, opt_state

        before = gradient, kept, state.params
        params, opt_state = updated(*before)
        # A finite gradient may still make parameters that overflow: the norm of the new ones says so.
        good = jnp.isfinite(loss) & jnp.isfinite(norm) & jnp.isfinite(optax.tree.norm(params))
        if step.spike_factor is not None:
            good &= (state.norm_mean == 0) | (norm <= step.spike_factor * state.norm_mean)
        # Computed again: else all new parameters would lie beside the old ones until now. A CPU has the room.
        if isinstance(optim, AdamW) and shards.platform() != "cpu":
            params, opt_state = updated(*jax.lax.optimization_barrier(before))
        keep = lambda new, old: jnp.where(good, new, old)
        params, opt_state = jax.tree.map(keep, (params, opt_state), (state.params, kept))
        ema = state.ema
        if step.ema_decay is not None:
            # A short memory at first, or the random start would stay in the average for 1 / (1 - decay) updates.
            done = state.step.astype(jnp.float32)
            decay = jnp.minimum(step.ema_decay, (1.0 + done) / (10.0 + done))
            ema = jax.tree.map(lambda e, p: jnp.where(good, decay * e + (1 - decay) * p, e), ema, params)
        mean = jnp.where(state.norm_mean == 0, norm, NORM_MEAN_DECAY * state.norm_mean + (1 - NORM_MEAN_DECAY) * norm)
        mean = jnp.where(good, mean, state.norm_mean)
    metrics = {
        "loss": nats * scale, "objective": loss * scale, "grad_norm": norm, "lr": lr, "tokens": tokens,
        "skipped": 1.0 - good.astype(jnp.float32),
    }  # fmt: skip
    if step.block_norms:
        updates = jax.tree.map(jnp.subtract, params, state.params)
        metrics |= {f"grad_norm/{key}": value for key, value in block_norms(gradient).items()}
        metrics |= {f"update_norm/{key}": value for key, value in block_norms(updates).items()}
    if vae:
        metrics |= {**vae_metrics(sums, tokens), "kl_weight": rows.kl_weight[0]}
    elif routers is not None:
        metrics |= router_metrics(routers, model.ffn)
    return TrainState(state.step + 1, params, opt_state, ema, mean), metrics


def compile_step(
    model: AnyConfig, compute: ComputeConfig, optim: AdamW | Muon, step: StepConfig, shardings: TrainState,
    texts_per_row: int = 1,
) -> jax.stages.Wrapped:  # fmt: skip
    """Return `train_step` jitted for states laid out as `shardings`; the state that is passed in is consumed."""
    function = functools.partial(
        train_step, model=model, compute=compute, optim=optim, step=step, texts_per_row=texts_per_row
    )
    options = compiler_options(shardings.step.mesh.devices.flat[0])
    # Metrics are everywhere: each process reads them, also norms of blocks that are on other stages.
    return jax.jit(function, donate_argnums=0, out_shardings=(shardings, shardings.step), compiler_options=options)


def device_bytes(compiled: jax.stages.Compiled) -> dict[str, float]:
    """Return the bytes that a device holds of a step, by the compiler; empty where the platform does not tell.

    Returns:
      arguments (state and batch), results that reuse no argument, temporary (gradients, activations, logits), and what
      is in the host's memory.
    """
    found = compiled.memory_analysis()
    if found is None:
        return {}
    host = found.host_argument_size_in_bytes + found.host_temp_size_in_bytes
    return {
        "arguments": found.argument_size_in_bytes,
        "results": found.output_size_in_bytes - found.alias_size_in_bytes,
        "temporary": found.temp_size_in_bytes,
    } | ({"on the host": host} if host else {})
