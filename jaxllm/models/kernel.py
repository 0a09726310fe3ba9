"""Which kernel computes the attention of a model: known from its configuration, before anything is compiled."""

from jaxllm.layers.choice import Asked, choose
from jaxllm.layers.config import Kernel, RelativeBias
from jaxllm.models.config import ComputeConfig, ModelConfig
from jaxllm.models.encoder_config import EncoderConfig
from jaxllm.models.seq2seq_config import Seq2SeqConfig


def attention_kernel(
    config: ModelConfig | EncoderConfig | Seq2SeqConfig, compute: ComputeConfig, platform: str, length: int,
    parts: int = 1,
) -> Kernel:  # fmt: skip
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
