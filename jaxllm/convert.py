"""python -m jaxllm.convert: a Hugging Face directory or a GGUF file to a run, or a run to a Hugging Face directory.

A Hugging Face directory has config.json and safetensors files; a run directory is what train and tune write. What FROM
is decides the direction. sample, evaluate and tune read all three, so that converting is for other programs' sake.

examples:
  python -m jaxllm.convert runs/quickstart exported
  python -m jaxllm.convert Llama-3.2-1B runs/llama-1b
  python -m jaxllm.convert model.Q4_K_M.gguf runs/model
"""

import sys

from jaxllm.core import files
from jaxllm.core.command import command, parser


@command
def main(argv: list[str] | None = None) -> int | None:
    """Load, write, compare what was written with what was loaded."""
    line = parser(__doc__)
    line.add_argument("source", metavar="FROM", help="model to read")
    line.add_argument("target", metavar="TO", help="directory to write; must not exist or be empty")
    arguments = line.parse_args(argv)
    from jaxllm.locate import is_huggingface, look
    from jaxllm.models.accounting import param_count
    from jaxllm.models.config import ComputeConfig, is_vae

    config, source = look(arguments.source, encoders=True)
    if is_vae(config):
        raise ValueError(f"{arguments.source} is a VAE, which no other program reads; copy its directory instead")
    files.check_empty(arguments.target)  # now, and not after loading
    import jaxllm
    from jaxllm import golden
    from jaxllm.sharding import distributed

    distributed.start(distributed.PlatformConfig())
    exact = ComputeConfig(dtype="float32")  # both sides alike, whatever the recipe or this machine would choose
    lm = jaxllm.load(source, compute=exact, text=True)
    expected = golden.logits(lm)
    if is_huggingface(arguments.source):
        lm.save(arguments.target)
        golden.write(expected, arguments.target)
    else:
        jaxllm.export(lm, arguments.target)
    difference = golden.compare(expected, jaxllm.load(arguments.target, compute=exact))
    same = f"up to {difference:.1e}" if difference else "to the last bit"
    before, after = param_count(config), param_count(look(arguments.target, encoders=True)[0])
    why = "where shared ones stand twice" if after > before else "without rows that are of no token"
    written = f" ({after:,} as written, {why})" if after != before else ""
    sys.stdout.write(
        f"{arguments.target}: {before:,} parameters{written}; the logits of a fixed prompt are those of "
        f"{arguments.source}, {same}\n"
    )
    return None


if __name__ == "__main__":
    sys.exit(main())
