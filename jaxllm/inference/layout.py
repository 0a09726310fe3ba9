"""How the parameters of a model are held to decode: cut into layers, widened, turned, or as they are."""

import functools
import os
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxllm.core.tree import map_named, named_leaves
from jaxllm.models.build import EXACT, STACKS, AnyModel, Params, unstack
from jaxllm.models.config import ComputeConfig

MAX_WIDENED = 0.4  # of the host's memory: a copy in float32 may take so much
MAX_COPIED = 256 * 2**20  # bytes of float32 that are held a second time: the table turned, and the layers joined


class Layout(NamedTuple):
    """What a `Transformer` is told of its parameters; its docstring says what these mean."""

    stacked: bool = False
    columns: bool = False
    joined: bool = False
    packed: str | None = None


def choose_layout(params: Params, compute: ComputeConfig) -> Layout:
    """Choose how to hold `params` where they are; `compute` is resolved.

    Layers are cut, because a loop over a stacked array copies the weights per token. Only where a float32 copy of
    narrow weights takes most of a CPU's memory, they stay stacked and packed; then the cache is copied per token, which
    is little beside widening all weights unless a text is very long.

    Matrices that are multiplied by one input are joined: a CPU reads long lines of memory faster than short ones, and
    a token of a model of 15M parameters takes a sixth less time. They are copied for it, so a large model stays apart.
    """
    if not _one_cpu(params) or compute.dtype != "float32":
        return Layout()
    writer = params.get("decoder", params)
    matrices = [leaf for leaf in jax.tree.leaves([writer.get(name) for name in STACKS]) if leaf.ndim > 2]
    size = 4 * sum(leaf.size for leaf in matrices)
    narrow = {str(leaf.dtype) for leaf in matrices} & {"bfloat16", "float16"}
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if len(narrow) != 1 or size < MAX_WIDENED * memory:
        table = _output_table(writer)
        columns = table.dtype != "float32" or table.nbytes <= MAX_COPIED  # a narrow one is copied anyway
        return Layout(columns=columns, joined=size <= MAX_COPIED)
    return Layout(stacked=True, packed=narrow.pop())


def prepare(params: Params, layout: Layout, dtype: str) -> Params:
    """Return `params` as `layout` says, matrices cast to `dtype` as each use would; norms are float32 and stay.

    What needs no cast is not copied where that can be: tables stay the caller's own arrays (jit copies them), and on
    one CPU device the layers are parts of the stacked arrays, so that a model is in memory once.
    """
    if layout.packed:
        bits = lambda leaf: leaf.view(np.uint16) if leaf.dtype == layout.packed and leaf.ndim > 2 else leaf
        return params | {name: _share(jax.tree.map(bits, _host(params[name]))) for name in STACKS if name in params}
    params = _turn(params) if layout.columns else params
    stay = lambda tree: all(_stays(name, leaf, dtype) for name, leaf in named_leaves(tree).items())
    looked_up = ("embed",) if layout.columns else ()  # rows are cast when they are read
    uncut = {name: part for name, part in params.items() if name not in (*STACKS, "decoder")}
    same = {name: part for name, part in uncut.items() if name in looked_up or stay({name: part})}
    rest = {name: part for name, part in params.items() if name not in same}
    if _one_cpu(params) and stay(rest):
        return _share(unstack(_host(rest))) | same
    return cut(rest, dtype) | same


@functools.partial(jax.jit, static_argnames="dtype")
def cut(params: Params, dtype: str) -> Params:
    """Return `params` as a decoder holds them on accelerators: by layer, matrices in `dtype`."""
    return map_named(lambda name, leaf: leaf if _stays(name, leaf, dtype) else leaf.astype(dtype), unstack(params))


def _stays(name: str, leaf: jax.Array, dtype: str) -> bool:
    return leaf.ndim <= 1 or leaf.dtype == dtype or name.endswith(EXACT)


def _one_cpu(params: Params) -> bool:
    devices = jax.tree.leaves(params)[0].sharding.device_set
    return len(devices) == 1 and next(iter(devices)).platform == "cpu"


def _host(params: Params) -> Params:
    return jax.tree.map(np.asarray, params)


def _share(params: Params) -> Params:
    """Return arrays of JAX in the memory of NumPy's."""
    return jax.tree.map(lambda leaf: jax.device_put(leaf, jax.devices("cpu")[0], may_alias=True), params)


def join(model: AnyModel) -> Params:
    """Return the parameters of a cut model as one that is `joined` has them."""
    getattr(model, "decoder", model).join()
    return nnx.to_pure_dict(nnx.state(model, nnx.Param))


def _turn(params: Params) -> Params:
    """Hold the output table as `columns`, beside the input table if they are one."""
    if "decoder" in params:
        return {**params, "decoder": _turn(params["decoder"])}
    rest = {name: part for name, part in params.items() if name != "head"}
    return {**rest, "columns": {"kernel": jnp.asarray(_output_table(params), jnp.float32).T}}


def _output_table(params: Params) -> jax.Array:
    return params["head"] if "head" in params else params["embed"]["table"]
