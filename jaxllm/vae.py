"""A Transformer VAE as one object: texts to latents and back, new texts from the prior, ways between two texts.

vae = jaxllm.load("runs/vae")
vae.interpolate("A man is riding a bike.", "Two dogs play in the snow.")
"""

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from jaxllm.data.tokenizers.tokenizer import Tokenizer
from jaxllm.inference.decode import Limits, Request, padded
from jaxllm.inference.sampling import Sampler
from jaxllm.models.build import Params, bind, graph
from jaxllm.models.config import ComputeConfig, ModelConfig
from jaxllm.models.vae import Posterior
from jaxllm.sharding.mesh import on_mesh_of
from jaxllm.trained import Trained


class VAE(Trained):
    """A variational autoencoder of texts with its tokenizer.

    Arguments as of `Trained`; `config` has `latent`.

    Raises:
      ValueError: it has none, or the tokenizer is another model's.
    """

    def __init__(
        self, config: ModelConfig, params: Params, tokenizer: Tokenizer, *, compute: ComputeConfig | None = None
    ):
        if config.latent is None:
            raise ValueError("model.latent is not set: this is no VAE; load it as a LanguageModel")
        super().__init__(config, params, tokenizer, tokenizer.vocab_size, compute)

    def encode(self, texts: str | Sequence[str]) -> Posterior:
        """Return q(z | text) of each text: mean and logvar, float32 [B, Z].

        Raises:
          ValueError: no texts, or one that is longer than the model's rows.
        """
        texts = [texts] if isinstance(texts, str) else texts
        if not texts:
            raise ValueError("no texts; give at least one")
        rows = [[self.tokenizer.bos_id, *self.tokenizer.encode(text)] for text in texts]
        longest = self.config.max_seq_len
        for index, row in enumerate(rows):
            if not 0 < len(row) <= longest:
                raise ValueError(f"text {index} has {len(row)} tokens; the model takes 1 to {longest} (max_seq_len)")
        tokens, segments = padded(rows, len(rows), longest)
        found = on_mesh_of(self.params, _posterior(self.config, self.compute))(self.params, tokens, segments)
        return Posterior(*(np.asarray(each[:, 0]) for each in found))

    def decode(
        self, latents: Float[np.ndarray, "B Z"], *, temperature: float = 0.0, seed: int = 0,
        max_new_tokens: int | None = None,
    ) -> list[str]:  # fmt: skip
        """Return the text of each latent: the likeliest token at each place, or one drawn at `temperature`."""
        most = self.config.max_seq_len if max_new_tokens is None else max_new_tokens
        limits = Limits(most, (self.tokenizer.eos_id,))
        begin = (self.tokenizer.bos_id,)  # as every row of our data, with or without a prefix of the tokenizer's own
        requests = [Request(begin, source=latent) for latent in np.asarray(latents, np.float32)]
        found = self.decoder.generate(requests, Sampler(temperature=temperature, seed=seed), limits)
        return [self.tokenizer.decode(each.tokens) for each in found]

    def sample(self, count: int = 1, *, seed: int = 0, temperature: float = 0.0) -> list[str]:
        """Return `count` texts of latents drawn from the prior N(0, 1); `temperature` is that of their tokens."""
        if count < 1:
            raise ValueError(f"count={count} must be at least 1")
        latents = np.random.default_rng(seed).standard_normal((count, self.config.latent.size), np.float32)
        return self.decode(latents, temperature=temperature, seed=seed)

    def reconstruct(self, texts: str | Sequence[str]) -> list[str]:
        """Return what the decoder makes of each text's mean latent, without a look at the text."""
        return self.decode(self.encode(texts).mean)

    def interpolate(self, one: str, other: str, steps: int = 7) -> list[str]:
        """Return the texts of `steps` latents on the straight line between the means of two texts, both included."""
        if steps < 2:
            raise ValueError(f"steps={steps} must be at least 2: both ends are texts of the line")
        ends = self.encode([one, other]).mean
        return self.decode(np.linspace(*ends, steps))

    def save(self, directory: str | Path) -> None:
        """Write a run directory that `jaxllm.load` reads: recipe, tokenizer, one checkpoint."""
        self._save(directory, self.tokenizer)


@cache
def _posterior(config: ModelConfig, compute: ComputeConfig) -> Callable[..., Posterior]:
    """Return q of rows of one text each, compiled once: a run makes a VAE of its state whenever samples are due."""
    graphdef, _ = graph(config, compute)
    positions = lambda tokens: jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    return jax.jit(
        lambda params, tokens, segments: bind(graphdef, params).posterior(tokens, segments, positions(tokens), 1)
    )
