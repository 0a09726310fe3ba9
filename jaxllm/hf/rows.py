"""The rows of a checkpoint: for each parameter that a model has, the tensor that a family keeps it in.

Which parameters there are, our own tree says; a family's table has only names, and here is how a tensor lies in it.
"""

import math
from collections.abc import Iterator, Mapping, Sequence

from jaxllm.core.tree import named_leaves
from jaxllm.hf.table import Part, Row, Sizes
from jaxllm.layers.config import Experts
from jaxllm.models.build import AnyConfig, abstract_params
from jaxllm.models.encoder_config import EncoderConfig
from jaxllm.models.seq2seq_config import Seq2SeqConfig

QUERIES = "heads head_dim"
# Inputs and outputs of a matrix with heads, by its name; of others no axis is cut or joined.
AXES = {
    "q": ("inputs", QUERIES), "q_up": ("inputs", QUERIES), "k": ("inputs", "kv_heads key_dim"),
    "v": ("inputs", "kv_heads value_dim"), "o": ("heads value_dim", "outputs"),
}  # fmt: skip
WITHOUT_END = ("choice_bias", "sinks")  # what the files call by a name without an end like ".weight"
AS_THEY_ARE = ("/table", "/scale", "")  # what lies in the files as it does here; the last is the head


def sizes_of(config: AnyConfig) -> Sizes:
    """Return the lengths of the axes that rows name, and of what the names of tensors count."""
    if isinstance(config, Seq2SeqConfig):
        stack = config.decoder
        sizes = dict.fromkeys(("head_dim", "key_dim", "value_dim"), stack.head_width)
        sizes |= {"heads": stack.n_heads, "kv_heads": stack.kv_heads, "one": 1}
        return sizes | {"encoders": config.encoder.n_layers, "decoders": stack.n_layers}
    config = config.stack if isinstance(config, EncoderConfig) else config
    return {
        "layers": config.n_layers, "dense_layers": config.dense.number if config.dense else 0,
        "heads": config.n_heads, "kv_heads": config.kv_heads, "head_dim": config.head_width,
        "key_dim": config.head_width - (config.mla.rotated if config.mla else 0),
        "value_dim": config.value_width, "mlp": config.d_ff,
        "experts": config.ffn.number if isinstance(config.ffn, Experts) else 0,
    }  # fmt: skip


def rows_of(
    tensors: Mapping[str, str], config: AnyConfig, *, transposed: bool = False, interleaved: bool = False,
    also: Sequence[Row] = (),
) -> list[Row]:  # fmt: skip
    """Return a row for each parameter of a model.

    Args:
      tensors: {part of our tree: its name in the files, without ".weight"}; "attention/q,k,v" are one tensor, and what
        the model does not have is left out.
      transposed: matrices are [inputs, outputs], and not as in a torch Linear.
      interleaved: tensors of several parts have those of each head together.
      also: rows that the table has no words for.
    Raises:
      ValueError: a parameter that the table does not name.
    """
    leaves, sizes = named_leaves(abstract_params(config)), sizes_of(config)
    first = [(f"dense_{ours}", theirs.replace("{layer}", "{dense_layer}")) for ours, theirs in tensors.items()]
    entries = (_rows(ours, theirs, sizes, transposed, interleaved) for ours, theirs in [*tensors.items(), *first])
    rows = [row for entry in entries for row in entry if row.ours in leaves] + [*also]
    if missing := leaves.keys() - {row.ours for row in rows}:
        raise ValueError(f"the family's table has no tensor for {', '.join(sorted(missing))}; add them to it")
    return rows


def _rows(ours: str, theirs: str, sizes: Sizes, transposed: bool, interleaved: bool) -> Iterator[Row]:
    """Yield every row that an entry of the table may stand for, whatever there is in our tree."""
    section, slash, last = ours.rpartition("/")
    if last in WITHOUT_END:
        yield Row(ours, theirs, "... -> ...")
        return
    parts = last.split(",")
    by_head = interleaved and len(parts) > 1
    axes = [AXES.get(part, ("inputs", "mlp"))[1].split()[by_head:] for part in parts if len(parts) > 1]
    lengths = tuple(math.prod(sizes[axis] for axis in each) for each in axes)
    whole = "(heads parts) ... -> heads parts ..." if by_head else ""
    for index, name in enumerate(parts):
        part = lambda axis, index=index: Part(axis + by_head, index, lengths) if lengths else None
        path, weight = f"{section}{slash}{name}", f"{theirs}.weight"
        if section.endswith("/experts") and "{expert}" not in theirs:  # all in one, as ours are; parts take turns
            turn = lambda axis, index=index: Part(axis, index, lengths, turns=True) if lengths else None
            yield Row(path, theirs, "... -> ...", turn(2))
            yield Row(f"{path}_bias", f"{theirs}_bias", "... -> ...", turn(1))
            continue
        inputs, outputs = AXES.get(name, ("inputs", "outputs"))
        joined = outputs if by_head else f"({outputs})"
        matrix = f"({inputs}) {joined}" if transposed else f"{joined} ({inputs})"
        bare = name == "router" or section.endswith("/experts")  # a kernel without a name of its own
        yield Row(
            path if bare else f"{path}/kernel", weight, f"{matrix} -> {inputs} {outputs}", part(int(transposed)), whole
        )
        yield Row(f"{path}{'_' if bare else '/'}bias", f"{theirs}.bias", f"{joined} -> {outputs}", part(0), whole)
        for kind in () if bare else AS_THEY_ARE:
            yield Row(f"{path}{kind}", weight, "... -> ...")
