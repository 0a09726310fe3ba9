"""One update: gradient of the summed loss over the global batch, divided once, clipped, applied, guarded."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from jaxllm.core import rng
from jaxllm.core.batch import Batch, LabelledTexts, TextPairs
from jaxllm.models.balance import move_biases, router_loss, router_metrics
from jaxllm.models.build import AnyConfig, Drop, Params, bind, graph
from jaxllm.models.config import ComputeConfig, ModelConfig, is_vae
from jaxllm.models.encoder_config import EncoderConfig
from jaxllm.models.seq2seq_config import Seq2SeqConfig
from jaxllm.sharding.rules import constrain
from jaxllm.sharding.xla import compiler_options
from jaxllm.training.block_norms import block_norms
from jaxllm.training.config import AdamW, Muon, StepConfig
from jaxllm.training.encoder_losses import answer_sums, class_sums, masked_lm_sums, target_sums
from jaxllm.training.losses import cross_entropy, token_nats
from jaxllm.training.optim import optimizer
from jaxllm.training.state import TrainState
from jaxllm.training.vae_losses import Texts, draw, elbo_sums, vae_metrics

Metrics = dict[str, Array]
AnyBatch = Batch | TextPairs | LabelledTexts  # what the loader makes for the model that learns from it
NORM_MEAN_DECAY = 0.98  # the spike guard compares with about the last 50 gradient norms


def loss_sums(
    params: Params, batch: AnyBatch, model: AnyConfig, compute: ComputeConfig, z: float = 0.0, smoothing: float = 0.0,
    drop: Drop | None = None,
) -> tuple:  # fmt: skip
    """Return (loss, (nats, router sums)), summed over the weights of `batch`; see `losses.cross_entropy`.

    Experts add their `balance.router_loss`, times the weights, to the loss; the router sums of other models are None.
    """
    match model, batch:
        case EncoderConfig(), LabelledTexts():
            loss, nats = class_sums(params, batch, model, compute, smoothing=smoothing, drop=drop)
        case EncoderConfig(), _:
            loss, nats = masked_lm_sums(params, batch, model, compute, z=z, smoothing=smoothing, drop=drop)
        case Seq2SeqConfig(), _:
            loss, nats = target_sums(params, batch, model, compute, z, smoothing, drop)
        case _:
            return _next_token_sums(params, batch, model, compute, z, smoothing, drop)
    return loss, (nats, None)


def _next_token_sums(
    params: Params, batch: Batch, model: ModelConfig, compute: ComputeConfig, z: float, smoothing: float,
    drop: Drop | None,
) -> tuple:  # fmt: skip
    module = bind(graph(model, compute)[0], params, drop)
    hidden, routers = module.routed_states(batch.tokens, batch.segments, batch.positions)
    with jax.named_scope("loss"):
        table, cap = module.output_table(), model.logit_softcap
        loss, nats = cross_entropy(hidden, table, batch.targets, batch.weights, z, compute.loss_chunk, cap, smoothing)
        if routers is not None:
            loss += router_loss(routers, model.ffn) * jnp.sum(batch.weights)
        return loss, (nats, routers)


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
        direction, opt_state = optimizer(optim).update(gradient, kept, state.params)
        params = jax.tree.map(lambda p, u: p + lr * u, state.params, direction)
        if routers is not None and model.ffn.biased:
            params = move_biases(params, routers, step.router_bias_step)
        # A finite gradient may still make parameters that overflow: the norm of the new ones says so.
        good = jnp.isfinite(loss) & jnp.isfinite(norm) & jnp.isfinite(optax.tree.norm(params))
        if step.spike_factor is not None:
            good &= (state.norm_mean == 0) | (norm <= step.spike_factor * state.norm_mean)
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


def eval_step(params: Params, batch: AnyBatch, *, model: AnyConfig, compute: ComputeConfig) -> Metrics:
    """Return the summed nats and weights of `batch`, of an encoder its `answer_sums`: add over batches, then divide."""
    if isinstance(model, EncoderConfig):
        return {**answer_sums(params, batch, model, compute), "tokens": jnp.sum(batch.weights)}
    _, (nats, _) = loss_sums(params, batch, model, compute)
    return {"nats": nats, "tokens": jnp.sum(batch.weights)}


def token_losses(params: Params, batch: Batch, *, model: ModelConfig, compute: ComputeConfig) -> Float[Array, "B T"]:
    """Return the nats of each target of `batch`: times the weights, what `eval_step` sums."""
    module = bind(graph(model, compute)[0], params)
    hidden = module.routed_states(batch.tokens, batch.segments, batch.positions)[0]
    return token_nats(hidden, module.output_table(), batch.targets, compute.loss_chunk, model.logit_softcap)[0]


def jit_step(
    model: AnyConfig, compute: ComputeConfig, optim: AdamW | Muon, step: StepConfig, shardings: TrainState,
    texts_per_row: int = 1,
) -> jax.stages.Wrapped:  # fmt: skip
    """Return `train_step` jitted for states laid out as `shardings`; the state that is passed in is consumed."""
    function = functools.partial(
        train_step, model=model, compute=compute, optim=optim, step=step, texts_per_row=texts_per_row
    )
    options = compiler_options(shardings.step.mesh.devices.flat[0])
    return jax.jit(function, donate_argnums=0, out_shardings=(shardings, None), compiler_options=options)


class Program:
    """What `jit_step` returns, called with a learning rate that is a number of Python.

    Called at once it compiles for what it gets, as any jitted function; `compile` does that before, and once.
    """

    def __init__(self, jitted: jax.stages.Wrapped):
        self._jitted = jitted
        self._compiled: jax.stages.Compiled | None = None

    @property
    def is_compiled(self) -> bool:
        """Whether `compile` was called."""
        return self._compiled is not None

    def compile(self, state: TrainState, batch: AnyBatch) -> dict[str, float]:
        """Compile for arrays of these shapes and places; return the bytes that a device holds, by the compiler.

        Returns:
          arguments (state and batch), results that reuse no argument, temporary (gradients, activations, logits), and
          what is in the host's memory. Empty where the platform does not tell.
        """
        self._compiled = self._jitted.lower(state, batch, np.float32(0)).compile()
        found = self._compiled.memory_analysis()
        if found is None:
            return {}
        sizes = {
            "arguments": found.argument_size_in_bytes,
            "results": found.output_size_in_bytes - found.alias_size_in_bytes,
            "temporary": found.temp_size_in_bytes,
        }
        host = found.host_argument_size_in_bytes + found.host_temp_size_in_bytes
        return sizes | ({"on the host": host} if host else {})

    def __call__(self, state: TrainState, batch: AnyBatch, lr: float) -> tuple[TrainState, Metrics]:
        return (self._compiled or self._jitted)(state, batch, np.float32(lr))


def compile_step(*of: Any) -> Program:
    """Return `jit_step(*of)` as a `Program`."""
    return Program(jit_step(*of))
