"""The tokenizer in the metadata of a GGUF file, translated to a tokenizer.json and a tokenizer_config.json.

Two models: "llama", SentencePiece's BPE with a score for each piece, and "gpt2", byte-level BPE with merges, whose way
of cutting text before merging has only a name there (`tokenizer.ggml.pre`) and is spelled out in gguf_tokens.yaml.

What the file does not say is lost: whether a token that looks like `<|word|>` was special to the original (llama.cpp's
converter takes it for special), whether an added token swallows the space beside it, and whether SentencePiece's space
comes before a text that follows a special token (it does in llama.cpp and in Llama 2; not in Mistral v0.3).

Source: gguf.md of ggml for the keys; llama-vocab.cpp of llama.cpp for the names and what absent keys mean; the
tokenizer.json of SmolLM2, Llama 3, Qwen2 and Mistral Nemo for the expressions.
"""

from collections.abc import Iterator, Mapping
from importlib import resources
from typing import Any

import yaml

from jaxllm.data.tokenizers.fast_export import BPE, FALLBACK, MARKS_TO_SPACES, SPACES_TO_MARKS, compose, merges_of
from jaxllm.data.tokenizers.pieces import SPACE_MARK

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6  # tokenizer.ggml.token_type
TABLE = yaml.safe_load(resources.files(__package__).joinpath("gguf_tokens.yaml").read_text("utf-8"))
CUTS: Mapping[str, Mapping[str, Any]] = TABLE["cuts"]


def describe(metadata: Mapping[str, Any], name: str) -> tuple[str, dict[str, Any]]:
    """Return (tokenizer.json, what tokenizer_config.json would say).

    Args:
      name: what errors call the file.
    Raises:
      ValueError: no tokenizer, or one that is not known to be exact; the message lists everything.
    """
    keys = {key.removeprefix("tokenizer.ggml."): value for key, value in metadata.items()}
    if "tokens" not in keys or "model" not in keys:
        raise ValueError(f"{name} has no tokenizer (tokenizer.ggml.model and .tokens); take a file that has one")
    if problems := list(_problems(metadata, keys)):
        raise ValueError(f"{name}: the tokenizer cannot be read exactly:\n  " + "\n  ".join(problems))
    types = keys.get("token_type") or [NORMAL] * len(keys["tokens"])
    tokens = [
        text.replace(SPACE_MARK, " ") if kind == USER_DEFINED else text  # found in the text as it is, before marks
        for text, kind in zip(keys["tokens"], types, strict=True)
    ]
    special = {token for role in ("bos", "eos", "eot", "eom", "padding", "unknown")
               if (token := keys.get(f"{role}_token_id")) is not None}  # fmt: skip
    special |= {token for token, kind in enumerate(types) if kind in (CONTROL, UNKNOWN)}
    added = sorted(special | {token for token, kind in enumerate(types) if kind == USER_DEFINED})
    starts = keys.get("add_bos_token", keys["model"] == "llama" or CUTS[keys["pre"]].get("add_bos"))
    before, after = (
        [(tokens[token], token)] if wanted and (token := keys.get(f"{role}_token_id")) is not None else []
        for role, wanted in (("bos", starts), ("eos", keys.get("add_eos_token")))
    )
    parts = _spm(keys, tokens, types) if keys["model"] == "llama" else _bpe(keys, tokens)
    source = compose({token: tokens[token] for token in added}, special, before, after, **parts)
    roles = {"bos_token": "bos", "eos_token": "eos", "pad_token": "padding"}
    ids = {role: keys.get(f"{key}_token_id") for role, key in roles.items()}
    config = {role: None if token is None else tokens[token] for role, token in ids.items()}
    return source, {**config, "chat_template": metadata.get("tokenizer.chat_template")}


def stop_ids(metadata: Mapping[str, Any]) -> list[int]:
    """Return the tokens that end an answer: those that the file declares, and control tokens named as ends."""
    declared = [metadata.get(f"tokenizer.ggml.{role}_token_id") for role in ("eos", "eot", "eom")]
    types = metadata.get("tokenizer.ggml.token_type", ())
    tokens = zip(metadata["tokenizer.ggml.tokens"], types, strict=False)
    named = [token for token, (text, kind) in enumerate(tokens) if kind == CONTROL and text in TABLE["ends"]]
    return list(dict.fromkeys([token for token in declared if token is not None] + named))


def _problems(metadata: Mapping[str, Any], keys: Mapping[str, Any]) -> Iterator[str]:
    tokens, pre = keys["tokens"], keys.get("pre")
    if keys["model"] not in ("llama", "gpt2"):
        yield f"tokenizer.ggml.model={keys['model']!r}: known are 'llama' and 'gpt2'"
    if keys["model"] == "gpt2":
        if pre not in CUTS:
            yield f"tokenizer.ggml.pre={pre!r}: how it cuts text is not known; known are {', '.join(CUTS)}"
        if keys.get("add_space_prefix"):
            yield "tokenizer.ggml.add_space_prefix=True: only for the model 'llama'"
        if wrong := [merge for merge in keys.get("merges", ()) if merge.count(" ") != 1]:
            yield f"tokenizer.ggml.merges has {wrong[0]!r}: a merge is two pieces with one space between"
    for key in ("token_type", "scores"):
        if key in keys and len(keys[key]) != len(tokens):
            yield f"tokenizer.ggml.{key} has {len(keys[key])} entries for {len(tokens)} tokens"
    needed = {"llama": ("scores", "token_type"), "gpt2": ("merges",)}.get(keys["model"], ())
    yield from (f"tokenizer.ggml.{key}: missing" for key in needed if key not in keys)
    if len(set(tokens)) < len(tokens):
        yield f"tokenizer.ggml.tokens names {len(tokens) - len(set(tokens))} tokens twice"
    if keys.get("remove_extra_whitespaces"):
        yield "tokenizer.ggml.remove_extra_whitespaces=True: only False is computed here"
    for key in metadata:
        word = key.removeprefix("tokenizer.ggml.")
        if word != key and not key.endswith(("_token_id", "_token_ids")) and word not in TABLE["known"]:
            yield f"{key}: unknown, and it may change the ids"


def _bpe(keys: Mapping[str, Any], tokens: list[str]) -> dict[str, Any]:
    """Return the parts of a tokenizer.json of a byte-level BPE."""
    cut = CUTS[keys["pre"]]
    words, normalizer = cut.get("words"), cut.get("normalizer")
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": not words}
    first = [{"type": "Digits", "individual_digits": True}] if cut.get("digits") else []
    if words:
        first.append({"type": "Split", "pattern": {"Regex": "|".join(words)}, "behavior": "Isolated", "invert": False})
    options = {"ignore_merges": cut.get("ignore_merges", False)}
    return {
        "normalizer": {"type": normalizer} if normalizer else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*first, byte_level]},
        "decoder": byte_level | {"add_prefix_space": True, "use_regex": True},
        "model": BPE | options | {"vocab": _ids(tokens), "merges": [merge.split(" ") for merge in keys["merges"]]},
    }


def _spm(keys: Mapping[str, Any], tokens: list[str], types: list[int]) -> dict[str, Any]:
    """Return the parts of a tokenizer.json of SentencePiece's BPE, as transformers converts one.

    The piece with the highest score is joined first. Pieces that are no plain text are never joined.
    """
    scores, prefix = keys["scores"], keys.get("add_space_prefix", True)
    ids = {text: token for token, text in enumerate(tokens) if types[token] == NORMAL}
    order = sorted(ids, key=lambda text: (-scores[ids[text]], ids[text]))
    unknown = next((text for text, kind in zip(tokens, types, strict=True) if kind == UNKNOWN), None)
    options = {"unk_token": unknown, "fuse_unk": True, "byte_fallback": BYTE in types}
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []
    prepend = [{"type": "Prepend", "prepend": SPACE_MARK}] if prefix else []
    return {
        "normalizer": {"type": "Sequence", "normalizers": [*prepend, SPACES_TO_MARKS]},
        "decoder": {"type": "Sequence", "decoders": [MARKS_TO_SPACES, *FALLBACK, *strip]},
        "model": BPE | options | {"vocab": _ids(tokens), "merges": merges_of(ids, order)},
    }


def _ids(tokens: list[str]) -> dict[str, int]:
    return {text: token for token, text in enumerate(tokens)}
