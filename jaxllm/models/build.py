"""Any model from its configuration: structure, parameters and their axes. Which class it is, is decided here alone."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Int

from jaxllm.core import rng
from jaxllm.layers.choice import Asked, choose
from jaxllm.layers.config import Kernel, RelativeBias
from jaxllm.layers.dropout import Drop
from jaxllm.models.config import ComputeConfig, ModelConfig, is_vae
from jaxllm.models.decoder import Transformer
from jaxllm.models.encoder import TransformerEncoder
from jaxllm.models.encoder_config import EncoderConfig
from jaxllm.models.seq2seq import Seq2Seq
from jaxllm.models.seq2seq_config import Seq2SeqConfig
from jaxllm.models.vae import TransformerVae

AnyConfig = ModelConfig | EncoderConfig | Seq2SeqConfig
AnyModel = Transformer | TransformerEncoder | Seq2Seq | TransformerVae
Params = dict[str, Any]  # nested plain dict of arrays, float32, blocks stacked on L
STACKS = ("dense_blocks", "blocks")  # names in it, by `ModelConfig.stacks`
EXACT = ("router", "choice_bias", "relative/table")  # parameters that are read in float32, whatever a model computes in
_CLASSES = {ModelConfig: Transformer, EncoderConfig: TransformerEncoder, Seq2SeqConfig: Seq2Seq}


def _class(config: AnyConfig) -> type[AnyModel]:
    return TransformerVae if is_vae(config) else _CLASSES[type(config)]


def check_vocabulary(tokenizer_size: int, vocab_size: int) -> None:
    """Refuse a tokenizer that has more ids than the model.

    Raises:
      ValueError: it has.
    """
    if tokenizer_size > vocab_size:
        raise ValueError(
            f"the tokenizer has {tokenizer_size} ids and the model {vocab_size}; use the one that the model was "
            "trained with"
        )


def token_rows(tokens: Any, vocab_size: int, longest: int) -> Int[Array, "B T"]:
    """Return token ids as an array; under jit their values cannot be looked at.

    Raises:
      ValueError: they are no rows of one length, too long for the model, or outside of its vocabulary, where an array
        of JAX would silently give the nearest row of a table.
    """
    if not isinstance(tokens, jax.core.Tracer):
        try:
            tokens = np.asarray(tokens)
        except ValueError as error:
            raise ValueError("rows of tokens differ in length; fill them up to one, and say where in `mask`") from error
    if tokens.ndim != 2:
        raise ValueError(f"tokens have shape {list(tokens.shape)}, expected rows [B, T]; a single one is [tokens]")
    if not tokens.size or tokens.shape[1] > longest:
        rows = f"rows of {tokens.shape[1]} tokens" if len(tokens) else "no rows"
        raise ValueError(f"{rows}; the model takes 1 to max_seq_len={longest}")
    if not np.issubdtype(tokens.dtype, np.integer):
        raise ValueError(f"tokens are {tokens.dtype}, expected rows of ids, as the tokenizer gives them")
    if isinstance(tokens, np.ndarray) and not 0 <= tokens.min() <= tokens.max() < vocab_size:
        raise ValueError(f"token ids {tokens.min()} to {tokens.max()}; the model's are 0 to {vocab_size - 1}")
    return jnp.asarray(tokens, jnp.int32)


@functools.cache
def graph(config: AnyConfig, compute: ComputeConfig, **how: bool) -> tuple[nnx.GraphDef, nnx.State]:
    """Return (graph definition, abstract parameters with their logical axes), not to be changed; allocates nothing.

    Args:
      how: stacked=False: the blocks that write text are cut into layers (`unstack`), for decoding.
    """
    build = lambda: _class(config)(config, compute, nnx.Rngs(0), **how)
    return nnx.split(nnx.eval_shape(build), nnx.Param)


def bind(graphdef: nnx.GraphDef, params: Params, drop: Drop | None = None) -> AnyModel:
    """Join structure and parameters to a module, with dropout if any; free under jit (trace time only)."""
    model = nnx.merge(graphdef, params)
    if drop is not None:
        stacks = [each for each in (model, *vars(model).values()) if isinstance(each, Transformer)]
        for number, stack in enumerate(stacks):
            stack.drop = nnx.data(drop.at(number))
    return model


def init_params(config: AnyConfig, seed: int) -> Params:
    """Draw the initial parameters; call under jit with out_shardings to have them born sharded."""
    model = _class(config)(config, ComputeConfig(), nnx.Rngs(rng.key(seed, "init")))
    return nnx.to_pure_dict(nnx.state(model, nnx.Param))


def logical_axes(config: AnyConfig) -> dict[str, Any]:
    """Return the tree of logical axis names of `init_params`, e.g. blocks/ffn/up/kernel: (layers, embed, mlp)."""
    return nnx.to_pure_dict(graph(config, ComputeConfig())[1], lambda leaf: leaf.get_metadata()["axes"])


def abstract_params(config: AnyConfig) -> Params:
    """Return ShapeDtypeStructs of the parameters without allocating them."""
    return nnx.to_pure_dict(graph(config, ComputeConfig())[1])


def attention_kernel(config: AnyConfig, compute: ComputeConfig, platform: str, length: int, parts: int = 1) -> Kernel:
    """Return what computes attention over packed rows of `length` tokens, each of them on `parts` devices.

    Args:
      compute: resolved for the platform.
    Raises:
      ValueError: the kernel that `compute` names cannot do it, or none can.
    """
    match config:
        case EncoderConfig():
            config = config.stack
        case Seq2SeqConfig():
            config = config.decoder  # what scores are made of is the same in both halves
    asked = Asked(
        platform, compute.dtype, length, config.head_width, config.value_width, segments=True,
        softcap=config.score_softcap is not None, sinks=config.sinks,
        bias=isinstance(config.positions, RelativeBias), parts=parts,
    )  # fmt: skip
    return choose(compute.kernel, asked)


def unstack(params: Params) -> Params:
    """Cut the stacked blocks that write text into layers: the tree of a model with stacked=False."""
    if "decoder" in params:
        return {**params, "decoder": unstack(params["decoder"])}

    def cut(blocks: Params) -> Params:
        layers = range(jax.tree.leaves(blocks)[0].shape[0])
        return {i: jax.tree.map(lambda leaf, i=i: leaf[i], blocks) for i in layers}

    return {name: cut(part) if name in STACKS else part for name, part in params.items()}
