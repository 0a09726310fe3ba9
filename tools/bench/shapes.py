"""The model shapes and batches that every benchmark shares. Imports nothing, because both environments read it."""

# Parameters without the embedding table: 3.2M and 14.2M. Field names are those of jaxllm's ModelConfig.
SHAPES = {
    "3M": {
        "vocab_size": 4096, "d_model": 256, "n_layers": 4, "n_heads": 4, "d_ff": 704, "max_seq_len": 256,
        "tie_embeddings": True,
    },
    "15M": {
        "vocab_size": 8192, "d_model": 384, "n_layers": 8, "n_heads": 6, "d_ff": 1024, "max_seq_len": 512,
        "tie_embeddings": True,
    },
    "tiny": {
        "vocab_size": 512, "d_model": 64, "n_layers": 2, "n_heads": 4, "d_ff": 192, "max_seq_len": 64,
        "tie_embeddings": False,
    },
}  # fmt: skip
BATCHES = {"3M": 16, "15M": 8, "tiny": 8}  # rows of max_seq_len tokens

# One optimizer for both sides; names are those of jaxllm's AdamW.
OPTIMIZER = {"lr": 1e-3, "b1": 0.9, "b2": 0.95, "eps": 1e-8, "weight_decay": 0.1, "clip": 1.0}
SCHEDULE = {"warmup": 10, "final": 0.1}  # linear warm-up, half a cosine down to final * lr


def token_batch(step: int, rows: int, length: int, vocab_size: int):
    """Return the same learnable rows on both sides, int64 [rows, length + 1]; eight different batches come round.

    The distribution is that of text, p(i) ~ 1 / (i + 10): a loss that falls tells more than one that cannot.
    """
    import numpy as np

    weights = 1.0 / (np.arange(vocab_size) + 10)
    return np.random.default_rng(step % 8).choice(vocab_size, size=(rows, length + 1), p=weights / weights.sum())
