"""One tiny model for all decoding tests, with an oracle that has no cache."""

import jax
import numpy as np
import pytest

from jaxllm.inference.decode import Decoder
from jaxllm.models.build import bind, graph, init_params
from jaxllm.models.config import ComputeConfig, ModelConfig

CONFIG = ModelConfig(vocab_size=61, d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, d_ff=48, max_seq_len=80)
COMPUTE = ComputeConfig(dtype="float32", layers="unroll")


@pytest.fixture(scope="session")
def params():
    """Weights large enough that answers are neither constant nor uniform."""
    drawn = jax.jit(lambda: init_params(CONFIG, 3))()
    return jax.tree.map(lambda leaf: leaf * 6 if leaf.ndim > 2 else leaf * 3, drawn)


@pytest.fixture(scope="session")
def decoder(params):
    return Decoder(CONFIG, params, COMPUTE)


@pytest.fixture(scope="session")
def forward(params):
    """Logits of whole rows, padded to the longest, so that one program serves all lengths."""
    model = jax.jit(lambda params, tokens: bind(graph(CONFIG, COMPUTE)[0], params)(tokens))

    def logits(tokens):
        row = np.zeros((1, CONFIG.max_seq_len), np.int32)
        row[0, : len(tokens)] = tokens
        return np.asarray(model(params, row))[0, : len(tokens)]

    return logits


@pytest.fixture(scope="session")
def oracle(forward):
    """Greedy continuation by a full forward pass per token."""

    def continue_(prompt, count):
        tokens = list(prompt)
        for _ in range(count):
            tokens.append(int(np.argmax(forward(tokens)[-1])))
        return tokens[len(prompt) :]

    return continue_
