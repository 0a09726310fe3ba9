"""The tokenizer in the metadata of a GGUF file, translated to a tokenizer.json and a tokenizer_config.json.

Two models: "llama", SentencePiece's BPE with a score for each piece, and "gpt2", byte-level BPE with merges, whose way
of cutting text before merging has only a name there (`tokenizer.ggml.pre`) and is spelled out here.

What the file does not say is lost: whether a token that looks like `<|word|>` was special to the original (llama.cpp's
converter takes it for special), whether an added token swallows the space beside it, and whether SentencePiece's space
comes before a text that follows a special token (it does in llama.cpp and in Llama 2; not in Mistral v0.3).

Source: gguf.md of ggml for the keys; llama-vocab.cpp of llama.cpp for the names and what absent keys mean; the
tokenizer.json of SmolLM2, Llama 3, Qwen2 and Mistral Nemo for the expressions.
"""

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from jaxllm.data.fast_export import merges_of
from jaxllm.data.pieces import SPACE_MARK

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6  # tokenizer.ggml.token_type
_LETTERS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_MARKED = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_REST = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_TEKKEN = "|".join(
    r"[^\r\n\p{L}\p{N}]?" + "".join(f"{kind}{count}" for kind, count in zip(_MARKED, counts, strict=True))
    for counts in ("*+", "+*")
)


class Cut(NamedTuple):
    """How a byte-level BPE cuts text before it merges.

    Attributes:
      pattern: a regular expression whose matches are the words; None: GPT-2's, which the library has built in.
      digits: each digit is cut off first.
      ignore_merges: a word that is a token is that token, whatever the merges would make of it.
      add_bos: what an absent add_bos_token means.
    """

    pattern: str | None = None
    digits: bool = False
    normalizer: str | None = None
    ignore_merges: bool = False
    add_bos: bool = False


_LLAMA3 = Cut(
    rf"{_CONTRACTIONS}|{_LETTERS}|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_REST}",
    ignore_merges=True,
    add_bos=True,
)
CUTS: Mapping[str, Cut] = {
    "gpt-2": Cut(), "smollm": Cut(digits=True), "starcoder": Cut(digits=True),
    "llama-bpe": _LLAMA3, "llama3": _LLAMA3, "llama-v3": _LLAMA3,
    "qwen2": Cut(rf"{_CONTRACTIONS}|{_LETTERS}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_REST}", normalizer="NFC"),
    "tekken": Cut(rf"{_TEKKEN}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_REST}", ignore_merges=True, add_bos=True),
}  # fmt: skip

# Names of tokens that end an answer; llama.cpp stops at them too, because many files name only one end.
ENDS = ("<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<|end_of_text|>")
KNOWN = frozenset(
    """
    model pre tokens token_type token_type_count scores merges add_bos_token add_eos_token add_space_prefix
    remove_extra_whitespaces
    """.split()  # noqa: SIM905
)


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
    if problems := _problems(metadata, keys):
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
    parts = _spm(keys, tokens, types) if keys["model"] == "llama" else _bpe(keys, tokens)
    source = {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": [
            {"id": token, "content": tokens[token], "single_word": False, "lstrip": False, "rstrip": False,
             "normalized": False, "special": token in special} for token in added
        ],
        **parts, "post_processor": _template(keys, tokens),
    }  # fmt: skip
    roles = {"bos_token": "bos", "eos_token": "eos", "pad_token": "padding"}
    ids = {role: keys.get(f"{key}_token_id") for role, key in roles.items()}
    config = {role: None if token is None else tokens[token] for role, token in ids.items()}
    return json.dumps(source, ensure_ascii=False), {**config, "chat_template": metadata.get("tokenizer.chat_template")}


def stop_ids(metadata: Mapping[str, Any]) -> list[int]:
    """Return the tokens that end an answer: those that the file declares, and control tokens named as ends."""
    declared = [metadata.get(f"tokenizer.ggml.{role}_token_id") for role in ("eos", "eot", "eom")]
    types = metadata.get("tokenizer.ggml.token_type", ())
    tokens = zip(metadata["tokenizer.ggml.tokens"], types, strict=False)
    named = [token for token, (text, kind) in enumerate(tokens) if kind == CONTROL and text in ENDS]
    return list(dict.fromkeys([token for token in declared if token is not None] + named))


def _problems(metadata: Mapping[str, Any], keys: Mapping[str, Any]) -> list[str]:
    problems, tokens = [], keys["tokens"]
    if keys["model"] not in ("llama", "gpt2"):
        problems.append(f"tokenizer.ggml.model={keys['model']!r}: known are 'llama' and 'gpt2'")
    if keys["model"] == "gpt2":
        if keys.get("pre") not in CUTS:
            problems.append(
                f"tokenizer.ggml.pre={keys.get('pre')!r}: how it cuts text is not known; known are {', '.join(CUTS)}"
            )
        if keys.get("add_space_prefix"):
            problems.append("tokenizer.ggml.add_space_prefix=True: only for the model 'llama'")
        if wrong := [merge for merge in keys.get("merges", ()) if merge.count(" ") != 1]:
            problems.append(f"tokenizer.ggml.merges has {wrong[0]!r}: a merge is two pieces with one space between")
    for key, size in (("token_type", len(tokens)), ("scores", len(tokens))):
        if key in keys and len(keys[key]) != size:
            problems.append(f"tokenizer.ggml.{key} has {len(keys[key])} entries for {size} tokens")
    needed = {"llama": ("scores", "token_type"), "gpt2": ("merges",)}.get(keys["model"], ())
    problems += [f"tokenizer.ggml.{key}: missing" for key in needed if key not in keys]
    if len(set(tokens)) < len(tokens):
        problems.append(f"tokenizer.ggml.tokens names {len(tokens) - len(set(tokens))} tokens twice")
    if keys.get("remove_extra_whitespaces"):
        problems.append("tokenizer.ggml.remove_extra_whitespaces=True: only False is computed here")
    unknown = [
        key for key in metadata if key.startswith("tokenizer.ggml.") and not key.endswith(("_token_id", "_token_ids"))
        and key.removeprefix("tokenizer.ggml.") not in KNOWN
    ]  # fmt: skip
    return problems + [f"{key}: unknown, and it may change the ids" for key in unknown]


def _bpe(keys: Mapping[str, Any], tokens: list[str]) -> dict[str, Any]:
    """Return the parts of a tokenizer.json of a byte-level BPE."""
    cut = CUTS[keys["pre"]]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": not cut.pattern}
    first = [{"type": "Digits", "individual_digits": True}] if cut.digits else []
    if cut.pattern:
        first.append({"type": "Split", "pattern": {"Regex": cut.pattern}, "behavior": "Isolated", "invert": False})
    model = _model(tokens, [merge.split(" ") for merge in keys["merges"]], ignore_merges=cut.ignore_merges)
    return {
        "normalizer": {"type": cut.normalizer} if cut.normalizer else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*first, byte_level]},
        "decoder": byte_level | {"add_prefix_space": True, "use_regex": True}, "model": model,
    }  # fmt: skip


def _spm(keys: Mapping[str, Any], tokens: list[str], types: list[int]) -> dict[str, Any]:
    """Return the parts of a tokenizer.json of SentencePiece's BPE, as transformers converts one.

    The piece with the highest score is joined first. Pieces that are no plain text are never joined.
    """
    scores, prefix = keys["scores"], keys.get("add_space_prefix", True)
    ids = {text: token for token, text in enumerate(tokens) if types[token] == NORMAL}
    order = sorted(ids, key=lambda text: (-scores[ids[text]], ids[text]))
    unknown = next((text for text, kind in zip(tokens, types, strict=True) if kind == UNKNOWN), None)
    model = _model(tokens, merges_of(ids, order), unk_token=unknown, fuse_unk=True, byte_fallback=BYTE in types)
    marks = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE_MARK}
    spaces = {"type": "Replace", "pattern": {"String": SPACE_MARK}, "content": " "}
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []
    prepend = [{"type": "Prepend", "prepend": SPACE_MARK}] if prefix else []
    return {
        "normalizer": {"type": "Sequence", "normalizers": [*prepend, marks]}, "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": [spaces, {"type": "ByteFallback"}, {"type": "Fuse"}, *strip]},
        "model": model,
    }  # fmt: skip


def _model(tokens: list[str], merges: list[Any], **options: Any) -> dict[str, Any]:
    plain = {
        "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
        "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
    }  # fmt: skip
    return plain | options | {"vocab": {text: token for token, text in enumerate(tokens)}, "merges": merges}


def _template(keys: Mapping[str, Any], tokens: list[str]) -> dict[str, Any] | None:
    """Return the post-processor: bos before and eos after a text, where the file says so."""
    starts = keys.get("add_bos_token", keys["model"] == "llama" or CUTS[keys["pre"]].add_bos)
    around = [
        keys.get("bos_token_id") if starts else None,
        keys.get("eos_token_id") if keys.get("add_eos_token") else None,
    ]
    if around == [None, None]:
        return None
    before, after = (
        [{"SpecialToken": {"id": tokens[token], "type_id": 0}}] if token is not None else [] for token in around
    )
    sequence = lambda name: [*before, {"Sequence": {"id": name, "type_id": 0}}, *after]
    named = {tokens[token]: token for token in around if token is not None}
    return {
        "type": "TemplateProcessing", "single": sequence("A"), "pair": sequence("A") + sequence("B"),
        "special_tokens": {text: {"id": text, "ids": [token], "tokens": [text]} for text, token in named.items()},
    }  # fmt: skip
