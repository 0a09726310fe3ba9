"""jaxllm: raw text to an instruction-following language model, in pure JAX.

Names load on first use, so that `import jaxllm` costs milliseconds.
"""

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from jaxllm.encoder import Encoder
    from jaxllm.encoder_decoder import EncoderDecoder
    from jaxllm.huggingface import export
    from jaxllm.inference.sampling import Sampler
    from jaxllm.language_model import Generation, LanguageModel, load
    from jaxllm.vae import VAE

_HOMES = {
    "Encoder": "jaxllm.encoder",
    "EncoderDecoder": "jaxllm.encoder_decoder",
    "export": "jaxllm.huggingface",
    "load": "jaxllm.language_model",
    "LanguageModel": "jaxllm.language_model",
    "Generation": "jaxllm.language_model",
    "Sampler": "jaxllm.inference.sampling",
    "VAE": "jaxllm.vae",
}
__all__ = [
    "VAE", "Encoder", "EncoderDecoder", "Generation", "LanguageModel", "Sampler", "__version__", "export", "load",
]  # fmt: skip


def __getattr__(name: str):
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'jaxllm' has no attribute {name!r}; it has {', '.join(__all__)}")


def __dir__():
    return sorted(__all__)
