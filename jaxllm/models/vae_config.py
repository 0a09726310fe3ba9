"""What a variational autoencoder has beside its decoder: a latent, who infers it, and how the decoder reads it."""

from pydantic import Field

from jaxllm.core.config import Config


class Latent(Config):
    """A normal latent per text, between an encoder of the same blocks and the decoder."""

    size: int = Field(32, ge=1, description="dimensions of the latent of a text, Z")
    slots: int = Field(8, ge=1, description="vectors made of the latent, which every layer of the decoder attends to")
    encoder_layers: int = Field(2, ge=1, description="blocks that read the text, in both directions")
