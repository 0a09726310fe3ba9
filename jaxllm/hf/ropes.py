"""Rotary positions in config.json, as transformers 5 writes them (rope_parameters) and as versions before did."""

import math
from typing import Any

from jaxllm.hf.fields import Fields
from jaxllm.layers.config import Rope

ORIGINAL = "original_max_position_embeddings"
# {rope_type, which is also the kind of scaling: ({key: its field}, keys that must be there)}
SCALINGS: dict[str, tuple[dict[str, str], tuple[str, ...]]] = {
    "linear": ({"factor": "factor"}, ("factor",)),
    "llama3": (
        {"factor": "factor", "low_freq_factor": "low", "high_freq_factor": "high"},
        ("factor", "low_freq_factor", "high_freq_factor"),
    ),
    "yarn": (
        {"factor": "factor", "beta_fast": "beta_fast", "beta_slow": "beta_slow", "truncate": "truncate",
         "attention_factor": "magnitude"}, ("factor",),
    ),
    "longrope": (
        {"short_factor": "short_factors", "long_factor": "long_factors", "attention_factor": "magnitude"},
        ("short_factor", "long_factor"),
    ),
}  # fmt: skip
NUMBERS = frozenset(
    """
    rope_theta partial_rotary_factor original_max_position_embeddings factor low_freq_factor high_freq_factor beta_fast
    beta_slow attention_factor mscale mscale_all_dim
    """.split()  # noqa: SIM905
)


def read_rope(fields: Fields, theta: float, fraction: float | None = None) -> dict[str, Any]:
    """Return the fields of the rotary positions of a config.

    Args:
      theta, fraction: what the family means by leaving them out; None: it always rotates whole heads.
    """
    now, before = fields.take("rope_parameters", {}), fields.take("rope_scaling", {})
    found = _numbers(now or before, fields)
    found.setdefault("rope_theta", fields.take("rope_theta", fields.take("rotary_emb_base", theta)))
    partial = fields.take("partial_rotary_factor", fields.take("rotary_pct", fraction or 1.0))
    found.setdefault("partial_rotary_factor", partial)
    if longest := fields.take(ORIGINAL, 0):
        found.setdefault(ORIGINAL, longest)
    theta, share = found.pop("rope_theta"), found.pop("partial_rotary_factor")
    if fraction is None and share != 1.0:
        fields.problems.append(f"partial_rotary_factor={share}: transformers ignores it in this family")
    scaling = read_scaling(found, fields, fields.need("max_position_embeddings"))
    read = {"kind": "rope", "theta": theta, "fraction": share, "scaling": scaling}
    return {f"positions.{field}": value for field, value in read.items()}


def _numbers(found: dict[str, Any], fields: Fields) -> dict[str, Any]:
    """Return a rope dictionary without null, and without numbers that are none, which are problems."""
    wrong = {
        key: value for key, value in found.items()
        if key in NUMBERS and value is not None and (isinstance(value, bool) or not isinstance(value, int | float))
    }  # fmt: skip
    fields.problems += [f"rope_parameters.{key}={value!r}: must be a number" for key, value in wrong.items()]
    return {key: value for key, value in found.items() if value is not None and key not in wrong}


def read_scaling(found: dict[str, Any], fields: Fields, longest: int) -> dict[str, Any] | None:
    """Return the fields of the scaling of a rope dictionary; what it has beyond that is a problem.

    Args:
      longest: max_position_embeddings.
    """
    found = _numbers(found, fields)
    kind = found.pop("rope_type", found.pop("type", "default"))
    found.pop("type", None)
    original, known = found.pop(ORIGINAL, None), "longrope" if kind == "su" else kind
    if known not in ("default", *SCALINGS):
        fields.problems.append(f"rope_type={kind!r}: known are default, {', '.join(SCALINGS)}")
        return None
    names, needed = SCALINGS.get(known, ({}, ()))
    if missing := [key for key in needed if key not in found]:
        fields.problems.append(f"rope_type={kind!r} without {', '.join(missing)}")
        return None
    values = {field: found.pop(key, None) for key, field in names.items()}
    if known not in ("default", "linear"):
        values["original_len"] = original if known == "llama3" else original or longest
    if known in ("yarn", "longrope"):
        magnitude = (_yarn_magnitude if known == "yarn" else _longrope_magnitude)(found, values, longest)
        values["magnitude"] = magnitude if values["magnitude"] is None else values["magnitude"]
    fields.problems += [f"rope_parameters.{key}={value!r}: unknown" for key, value in found.items()]
    if known == "default":
        return None
    return {"kind": known} | {field: value for field, value in values.items() if value is not None}


def _yarn_magnitude(found: dict[str, Any], values: dict[str, Any], longest: int) -> float:
    factor, up, down = values["factor"], found.pop("mscale", None), found.pop("mscale_all_dim", None)
    scale = lambda mscale: 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0
    return scale(up) / scale(down) if up and down else scale(1.0)


def _longrope_magnitude(found: dict[str, Any], values: dict[str, Any], longest: int) -> float:
    original = values["original_len"]
    factor = found.pop("factor", None) or longest / original
    return 1.0 if factor <= 1 or original <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))


def write_rope(rope: Rope) -> dict[str, Any]:
    """Return the rope_parameters of transformers 5."""
    written: dict[str, Any] = {"rope_type": "default", "rope_theta": rope.theta}
    if rope.fraction != 1.0:
        written["partial_rotary_factor"] = rope.fraction
    if rope.scaling is not None:
        values = rope.scaling.model_dump(mode="json")
        written["rope_type"] = values["kind"]
        written |= {key: values[field] for key, field in SCALINGS[values["kind"]][0].items()}
        if "original_len" in values:
            written[ORIGINAL] = values["original_len"]
        if mscale := values.get("score_mscale"):
            written |= {"mscale_all_dim": mscale} | ({"mscale": mscale} if values["magnitude"] == 1.0 else {})
    return written
