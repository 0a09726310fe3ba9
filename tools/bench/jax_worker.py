"""Our process for train_speed.py and decode_speed.py: the product's own start-up, step, placement and decoder."""

import functools
import json
import sys
from collections.abc import Callable

import jax
import numpy as np
from shapes import OPTIMIZER, SCHEDULE, token_batch
from workers import measured, serve

from jaxllm.core.batch import Batch
from jaxllm.core.tree import named_leaves
from jaxllm.inference.decode import Decoder, Limits, Request
from jaxllm.inference.sampling import Sampler
from jaxllm.models.build import Params, init_params
from jaxllm.models.config import ComputeConfig, ModelConfig
from jaxllm.sharding import distributed
from jaxllm.sharding.mesh import MeshConfig, make_mesh
from jaxllm.training.feed import place
from jaxllm.training.optim import AdamW, optimizer
from jaxllm.training.schedules import Cosine, learning_rate
from jaxllm.training.state import init_state
from jaxllm.training.step import StepConfig, compile_step


def save(params: Params, path: str) -> dict:
    """Write the parameters to an npz file of {path name: array}."""
    arrays = {name: np.asarray(leaf) for name, leaf in named_leaves(params).items()}
    np.savez(path, **arrays)
    return {"parameters": sum(array.size for array in arrays.values())}


def training(settings: dict) -> dict[str, Callable[..., dict]]:
    """Handlers that train as `jaxllm.wiring.train` does, on batches of one segment per row."""
    rows = settings["rows"]
    distributed.start(distributed.PlatformConfig(cpu_devices=settings["devices"]), rows)
    model = ModelConfig(**settings["shape"])
    compute = ComputeConfig().resolve(jax.default_backend(), model.n_layers)
    optim = AdamW(schedule=Cosine(**SCHEDULE), **OPTIMIZER)
    mesh = make_mesh(MeshConfig())
    jax.set_mesh(mesh)
    state, shardings = init_state(model, optimizer(optim), mesh, seed=0)
    step = compile_step(model, compute, optim, StepConfig(), shardings)
    length = model.max_seq_len
    ones = np.ones((rows, length), np.int32)
    positions = np.tile(np.arange(length, dtype=np.int32), (rows, 1))
    done = 0

    def run(steps: int) -> dict:
        nonlocal state, done
        metrics = []
        for _ in range(steps):
            row = token_batch(done, rows, length, model.vocab_size).astype(np.int32)
            batch = Batch(row[:, :-1], row[:, 1:], ones.astype(np.float32), ones, positions)
            lr = learning_rate(optim.schedule, optim.lr, done, settings["steps"])
            state, values = step(state, place(batch, mesh), lr)
            metrics.append(values)
            done += 1
        jax.block_until_ready(state)
        return {"losses": [float(values["loss"]) for values in metrics]}

    return {
        "save": lambda path: save(state.params, path),
        "run": lambda steps: measured(lambda: run(steps)),
    }


def decoding(settings: dict) -> dict[str, Callable[..., dict]]:
    """Handlers that decode greedily with the decoder behind `jaxllm.LanguageModel`: token ids, no stop tokens."""
    model = ModelConfig(**settings["shape"])
    distributed.start(distributed.PlatformConfig())
    params = jax.jit(functools.partial(init_params, model, 0))()
    decoder = Decoder(model, params, ComputeConfig().resolve(jax.default_backend(), model.n_layers))

    def run(prompt: list[int], new_tokens: int) -> dict:
        completion = decoder.generate([Request(prompt)], Sampler(temperature=0.0), Limits(new_tokens))[0]
        return {"tokens": completion.tokens}

    return {"save": lambda path: save(params, path), "run": lambda **request: measured(lambda: run(**request))}


if __name__ == "__main__":
    settings = json.loads(sys.argv[1])
    handlers = training(settings) if settings["task"] == "train" else decoding(settings)
    serve(handlers, ("jax", "jaxlib", "flax", "optax", "numpy"))
