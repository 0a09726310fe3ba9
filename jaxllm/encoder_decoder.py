"""An encoder-decoder as one object: a text in, its translation or summary out.

model = jaxllm.load("t5-small")
model.generate(["translate English to German: That is good."])[0].text
"""

from collections.abc import Callable, Sequence
from functools import cached_property

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxllm.data.text_pairs import PairTokenizer
from jaxllm.data.text_pieces import TextPieces
from jaxllm.inference.decode import Decoder, Limits, Request
from jaxllm.inference.sampling import Sampler
from jaxllm.language_model import Generation
from jaxllm.models.build import Params, bind, check_vocabulary, graph, token_rows
from jaxllm.models.config import ComputeConfig
from jaxllm.models.seq2seq_config import Seq2SeqConfig
from jaxllm.sharding.mesh import on_mesh_of

GREEDY = Sampler(temperature=0.0)


class EncoderDecoder:
    """A model with its tokenizer.

    Args:
      params: blocks stacked on L, as `models.build.init_params` makes them.
      stop_ids: tokens that end a target.
      forced: tokens that every target begins with, behind the start token (BART: <s>).
      compute: precision; default: what suits this machine.
    """

    def __init__(
        self, config: Seq2SeqConfig, params: Params, tokenizer: PairTokenizer | TextPieces, *, stop_ids: Sequence[int],
        forced: Sequence[int] = (), compute: ComputeConfig | None = None,
    ):  # fmt: skip
        check_vocabulary(tokenizer.size, config.vocab_size)
        self.config = config
        self.params = params
        self.tokenizer = tokenizer
        self.stop_ids, self.forced = tuple(stop_ids), tuple(forced)
        n_layers = max(config.encoder.n_layers, config.decoder.n_layers)
        self.compute = (compute or ComputeConfig()).resolve(jax.default_backend(), n_layers)

    @cached_property
    def decoder(self) -> Decoder:
        """The same model for token ids; made at the first use."""
        return Decoder(self.config, self.params, self.compute, vocab_size=self.tokenizer.size)

    def logits(
        self, tokens: Int[Array, "B S"], mask: Bool[Array, "B S"] | None = None, *, targets: Int[Array, "B T"],
        target_mask: Bool[Array, "B T"] | None = None,
    ) -> Float[Array, "B T V"]:  # fmt: skip
        """Return the decoder's next-token logits, float32.

        Args:
          mask, target_mask: True = token, False = padding; logits at padding mean nothing.
          targets: what the decoder reads: `config.start_token`, then the target without its last token.
        """
        segments = lambda x, mask: jnp.ones(x.shape, jnp.int32) if mask is None else jnp.asarray(mask).astype(jnp.int32)
        config = self.config
        tokens = token_rows(tokens, config.vocab_size, config.encoder.max_seq_len)
        targets = token_rows(targets, config.vocab_size, config.max_seq_len)
        return self._logits(self.params, tokens, targets, segments(tokens, mask), segments(targets, target_mask))

    @cached_property
    def _logits(self) -> Callable[..., Array]:
        graphdef, _ = graph(self.config, self.compute)
        return on_mesh_of(self.params, jax.jit(lambda params, *rows: bind(graphdef, params)(*rows)))

    def generate(
        self, texts: str | Sequence[str], *, max_new_tokens: int = 256, sampler: Sampler = GREEDY,
        num_samples: int = 1, truncate: bool = False,
    ) -> list[Generation]:  # fmt: skip
        """Return `num_samples` targets of each text; those of a text stand together, in its place.

        Args:
          sampler: default: always the likeliest token.
          truncate: read the beginning of a text that is too long, instead of an error.
        Raises:
          ValueError: no texts, a text that is too long, num_samples < 1.
        """
        texts = [texts] if isinstance(texts, str) else list(texts)
        if not texts or num_samples < 1:
            raise ValueError(f"{len(texts)} texts, num_samples={num_samples}; give at least one of each")
        encoded = self.tokenizer.encode(texts, self.config.encoder.max_seq_len, truncate=truncate)
        begin = [self.config.start_token, *self.forced]
        requests = [Request(begin, sample, each.ids) for each in encoded for sample in range(num_samples)]
        completions = self.decoder.generate(requests, sampler, Limits(max_new_tokens, self.stop_ids))
        return [
            Generation(self.tokenizer.decode(found.tokens), *found, i // num_samples, i % num_samples)
            for i, found in enumerate(completions)
        ]
