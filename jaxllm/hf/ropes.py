"""Rotary positions in config.json, as transformers 5 writes them (rope_parameters) and as versions before did."""

import math
from typing import Any

from jaxllm.hf.fields import Fields
from jaxllm.layers.config import LinearScaling, Llama3Scaling, LongRopeScaling, Rope, RopeScaling, YarnScaling


def read_rope(fields: Fields, theta: float, fraction: float | None = None) -> dict[str, Any]:
    """Return the fields of the rotary positions of a config.

    Args:
      theta, fraction: what the family means by leaving them out; None: it always rotates whole heads.
    """
    now, before = fields.take("rope_parameters"), fields.take("rope_scaling")
    found = dict(now or before or {})
    found.setdefault("rope_theta", fields.take("rope_theta", fields.take("rotary_emb_base", theta)))
    partial = fields.take("partial_rotary_factor", fields.take("rotary_pct", fraction or 1.0))
    found.setdefault("partial_rotary_factor", partial)
    longest = fields.take("original_max_position_embeddings", 0)
    if longest:
        found.setdefault("original_max_position_embeddings", longest)
    theta, share = float(found.pop("rope_theta")), float(found.pop("partial_rotary_factor"))
    if fraction is None and share != 1.0:
        fields.problems.append(f"partial_rotary_factor={share}: transformers ignores it in this family")
    scaling = read_scaling(found, fields, fields.take("max_position_embeddings", 0))
    found = {"kind": "rope", "theta": theta, "fraction": share, "scaling": scaling}
    return {f"positions.{field}": value for field, value in found.items()}


def read_scaling(found: dict[str, Any], fields: Fields, longest: int) -> RopeScaling | None:
    """Return the scaling of a rope dictionary; what it has beyond that is a problem.

    Args:
      longest: max_position_embeddings.
    """
    kind = found.pop("rope_type", found.pop("type", "default"))
    found.pop("type", None)
    original = found.pop("original_max_position_embeddings", None)
    scaling: RopeScaling | None = None
    needed = {"linear": ("factor",), "llama3": ("factor", "low_freq_factor", "high_freq_factor"), "yarn": ("factor",)}
    needed |= dict.fromkeys(("longrope", "su"), ("short_factor", "long_factor"))
    if missing := [key for key in needed.get(kind, ()) if key not in found]:
        fields.problems.append(f"rope_type={kind!r} without {', '.join(missing)}")
        return None
    match kind:
        case "default":
            pass
        case "linear":
            scaling = LinearScaling(factor=found.pop("factor"))
        case "llama3":
            scaling = Llama3Scaling(
                factor=found.pop("factor"), low=found.pop("low_freq_factor"), high=found.pop("high_freq_factor"),
                original_len=original,
            )  # fmt: skip
        case "yarn":
            scaling = _read_yarn(found, original or longest)
        case "longrope" | "su":
            scaling = _read_longrope(found, original or longest, longest)
        case _:
            fields.problems.append(f"rope_type={kind!r}: known are default, linear, llama3, yarn, longrope")
            return None
    fields.problems += [
        f"rope_parameters.{key}={value!r}: unknown" for key, value in found.items() if value is not None
    ]
    return scaling


def _read_yarn(found: dict[str, Any], original: int) -> YarnScaling:
    factor = found.pop("factor")
    magnitude, up, down = (found.pop(key, None) for key in ("attention_factor", "mscale", "mscale_all_dim"))
    scale = lambda mscale: 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0
    if magnitude is None:
        magnitude = scale(up) / scale(down) if up and down else scale(1.0)
    return YarnScaling(
        factor=factor, original_len=original, beta_fast=found.pop("beta_fast", None) or 32.0,
        beta_slow=found.pop("beta_slow", None) or 1.0, magnitude=magnitude,
        truncate=found.pop("truncate", None) is not False,
    )  # fmt: skip


def _read_longrope(found: dict[str, Any], original: int, longest: int) -> LongRopeScaling:
    magnitude, factor = found.pop("attention_factor", None), found.pop("factor", None) or longest / original
    if magnitude is None:
        magnitude = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    return LongRopeScaling(
        short_factors=tuple(found.pop("short_factor")), long_factors=tuple(found.pop("long_factor")),
        original_len=original, magnitude=magnitude,
    )  # fmt: skip


def write_rope(rope: Rope) -> dict[str, Any]:
    """Return the rope_parameters of transformers 5."""
    written: dict[str, Any] = {"rope_type": "default", "rope_theta": rope.theta}
    if rope.fraction != 1.0:
        written["partial_rotary_factor"] = rope.fraction
    match rope.scaling:
        case LinearScaling(factor=factor):
            written |= {"rope_type": "linear", "factor": factor}
        case Llama3Scaling() as s:
            written |= {
                "rope_type": "llama3", "factor": s.factor, "low_freq_factor": s.low, "high_freq_factor": s.high,
                "original_max_position_embeddings": s.original_len,
            }  # fmt: skip
        case YarnScaling() as s:
            written |= {
                "rope_type": "yarn", "factor": s.factor, "beta_fast": s.beta_fast, "beta_slow": s.beta_slow,
                "attention_factor": s.magnitude, "original_max_position_embeddings": s.original_len,
                "truncate": s.truncate,
            }  # fmt: skip
        case LongRopeScaling() as s:
            written |= {
                "rope_type": "longrope", "short_factor": list(s.short_factors), "long_factor": list(s.long_factors),
                "attention_factor": s.magnitude, "original_max_position_embeddings": s.original_len,
            }  # fmt: skip
    return written
