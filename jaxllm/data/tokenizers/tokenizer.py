"""Tokenizers: text <-> ids, special tokens, chat template, and the directory that holds them.

Text never produces a special id: specials are inserted by whoever builds a sequence (`[bos] + text + [eos]`, the chat
template).
"""

import codecs
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from jaxllm.core import files
from jaxllm.core.bucket import here
from jaxllm.core.gguf_file import GgufFile, is_gguf
from jaxllm.data.chat import BOS, DEFAULT_TEMPLATE, EOS, PAIR_TEMPLATE, ROLE_TOKENS, ChatTemplate
from jaxllm.data.tokenizers import gguf_tokens
from jaxllm.data.tokenizers.fast_pieces import FastPieces, name_of, read_source
from jaxllm.data.tokenizers.pieces import BytePieces, SentencePieces
from jaxllm.data.tokenizers.pieces_training import TokenizerConfig, train_pieces
from jaxllm.data.tokenizers.text_pieces import SidePieces, is_texts

PAD = "<pad>"
MASKS = ("[MASK]", "<mask>")  # what checkpoints of others call it
VERSION = 1


class Tokenizer:
    """A piece model with its special tokens.

    Attributes:
      special: special tokens by name; `encode` never returns their ids and `decode` drops them.
      chat: None if the vocabulary lacks the tokens of a chat template.
      prefix: ids that come before a text which a model is to continue; default: bos.
      surrounds: whether its file itself says how a text begins and ends, as those of models with an encoder do.
    """

    def __init__(
        self,
        pieces: BytePieces | SentencePieces | FastPieces | SidePieces,
        special: dict[str, int],
        ids: tuple[int, int, int],
        chat: ChatTemplate | None,
    ):
        self.pieces, self.special, self.chat = pieces, special, chat
        self.pad_id, self.bos_id, self.eos_id = ids
        own = isinstance(pieces, BytePieces | SentencePieces)
        self.prefix = (self.bos_id,) if own else pieces.prefix
        self.surrounds = not own and pieces.suffix == (self.eos_id,)

    @property
    def vocab_size(self) -> int:
        return self.pieces.size

    @cached_property
    def fingerprint(self) -> str:
        """Changes whenever some text or conversation could be encoded otherwise."""
        model = b"".join(content for _, content in self.pieces.files)
        template = self.chat.source if self.chat else ""
        return files.fingerprint(self.pieces.kind, model, repr(sorted(self.special.items())), template)

    @property
    def mask_id(self) -> int:
        """Id that stands for a hidden token: of the mask, or where there is none the one behind all others."""
        return next((self.special[name] for name in MASKS if name in self.special), self.vocab_size)

    def encode(self, text: str) -> list[int]:
        """Ids of `text` alone: no bos, no eos, no special token even if `text` spells one."""
        return self.pieces.encode([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of many texts, on all cores where the piece model can."""
        return self.pieces.encode(texts)

    def token_bytes(self, token: int) -> bytes:
        """UTF-8 bytes of one id: b"" for a special token, maybe a part of a character."""
        return self.pieces.bytes_of(token)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`, special tokens dropped; bytes that are not UTF-8 become U+FFFD."""
        text = b"".join(self.token_bytes(int(token)) for token in ids).decode("utf-8", errors="replace")
        return text.removeprefix(" ") if self.pieces.leading_space else text

    def stream(self) -> "TokenStream":
        """Return a decoder for ids that arrive one by one."""
        return TokenStream(self)

    def save(self, directory: str | Path) -> None:
        """Write `tokenizer.json`, the piece model and `chat_template.jinja` (the last two where they apply)."""
        directory = Path(directory)
        for name, content in self.pieces.files:
            files.write_bytes(directory / name, content)
        if self.chat:
            files.write_text(directory / "chat_template.jinja", self.chat.source)
        description = {
            "version": VERSION,
            "kind": self.pieces.kind,
            "lossless": not isinstance(self.pieces, SentencePieces) or self.pieces.escape_mark,
            "vocab_size": self.vocab_size,
            "pad_id": self.pad_id,
            "bos_id": self.bos_id,
            "eos_id": self.eos_id,
            "special": self.special,
            "chat_template": "chat_template.jinja" if self.chat else None,
            "fingerprint": self.fingerprint,
        }
        files.write_json(directory / "tokenizer.json", description)


class TokenStream:
    """Decodes ids one by one and holds back the bytes of an unfinished character.

    Joining every `push` and the final `flush` gives exactly `Tokenizer.decode` of all the ids.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._strip_space = tokenizer.pieces.leading_space

    def push(self, token: int) -> str:
        """Return the characters that `token` completes: "" while one is unfinished, and for special tokens."""
        return self._strip(self._decoder.decode(self._tokenizer.token_bytes(token)))

    def flush(self) -> str:
        """Return what is held back; an unfinished character becomes U+FFFD."""
        return self._strip(self._decoder.decode(b"", final=True))

    def _strip(self, text: str) -> str:
        if text and self._strip_space:
            self._strip_space = False
            return text.removeprefix(" ")
        return text


def byte_tokenizer() -> Tokenizer:
    """Return the tokenizer of 256 bytes and the six special tokens; needs no training and never meets an unknown."""
    special = {name: index for index, name in enumerate((PAD, BOS, EOS, *ROLE_TOKENS))}
    return Tokenizer(BytePieces(len(special)), special, (0, 1, 2), ChatTemplate())


def train(texts: Iterable[str], config: TokenizerConfig) -> Tokenizer:
    """Train a SentencePiece tokenizer on `texts`; the same texts and config give the same model, byte for byte.

    The vocabulary can come out smaller than asked when the text has too few distinct pieces: see
    `Tokenizer.vocab_size`.

    Raises:
      ValueError: no text, or vocab_size smaller than the alphabet of the text.
    """
    return _from_sentencepiece(SentencePieces(train_pieces(texts, config), escape_mark=True))


def load(path: str | Path) -> Tokenizer:
    """Load a tokenizer directory, a dataset or whatever else means a run (`files.named_run`) that holds one, a
    Hugging Face directory, a GGUF file, or any `.model` file.

    Raises:
      FileNotFoundError: nothing is there.
      ValueError: the directory is damaged (a file does not match the recorded fingerprint) or the model has no bos or
        eos.
    """
    path = here(path)
    if is_gguf(path):
        return from_gguf(GgufFile(path))
    if path.is_file():
        return _from_sentencepiece(_read_pieces(path, escape_mark=False))
    path = files.named_run(path)[0]
    path = path / "tokenizer" if (path / "tokenizer").is_dir() else path
    description = files.read_json(path / "tokenizer.json", {})
    if not description or "model" in description:
        return _from_huggingface(path)
    if description.get("version") != VERSION:
        raise ValueError(
            f"{path / 'tokenizer.json'} has version {description.get('version')}; this jaxllm reads version {VERSION}"
        )
    special = description["special"]
    match description["kind"]:
        case "bytes":
            pieces = BytePieces(len(special))
        case "tokenizers":
            pieces = FastPieces((path / "huggingface.json").read_text(encoding="utf-8"))
        case "texts":
            pieces = SidePieces(path)
        case _:
            pieces = _read_pieces(path / "spm.model", escape_mark=description["lossless"])
    bos, eos = description["bos_id"], description["eos_id"]
    template = description["chat_template"]
    source = (path / template).read_bytes().decode("utf-8") if template else None
    tokenizer = Tokenizer(pieces, special, (description["pad_id"], bos, eos), _chat(source, special, bos, eos))
    if tokenizer.fingerprint != description["fingerprint"]:
        raise ValueError(
            f"{path} was changed: its files have fingerprint {tokenizer.fingerprint}, tokenizer.json records "
            f"{description['fingerprint']}; restore it, since a model trained with it needs exactly these ids"
        )
    return tokenizer


def _read_pieces(path: Path, *, escape_mark: bool) -> SentencePieces:
    try:
        return SentencePieces(path.read_bytes(), escape_mark)
    except ValueError as error:
        raise ValueError(f"{path} is {error}; it was damaged, or is another kind of file") from error


def _chat(source: str | None, special: Mapping[str, int], bos: int | None, eos: int) -> ChatTemplate | None:
    names = {token: name for name, token in special.items()}
    return None if source is None else ChatTemplate(source, tuple(special), names.get(bos, ""), names[eos])


def _from_huggingface(directory: Path) -> Tokenizer:
    """Read the tokenizer of a Hugging Face directory: tokenizer.json, tokenizer.model, vocab.json ..."""
    config = files.read_json(directory / "tokenizer_config.json", {})
    if (directory / "chat_template.jinja").is_file():
        config["chat_template"] = (directory / "chat_template.jinja").read_text(encoding="utf-8")
    if is_texts(directory):
        pieces = SidePieces(directory)
        pad, eos = pieces.special.values()
        return Tokenizer(pieces, pieces.special, (pad, eos, eos), _chat(PAIR_TEMPLATE, pieces.special, None, eos))
    source = read_source(directory)
    if source is None:
        if (path := directory / "tokenizer.model").is_file():
            return _from_sentencepiece(_read_pieces(path, escape_mark=False), _template(config))
        raise FileNotFoundError(
            f"{directory} is no tokenizer: expected a directory with tokenizer.json, tokenizer.model or vocab.json and "
            "merges.txt, or a SentencePiece .model file"
        )
    try:
        return _from_fast(FastPieces(source), config, directory / "tokenizer_config.json")
    except ValueError as error:
        raise ValueError(f"{directory}: {error}") from error


def from_gguf(file: GgufFile) -> Tokenizer:
    """Return the tokenizer in the metadata of a GGUF file.

    Raises:
      ValueError: there is none, or one that would not give the ids of the original.
    """
    source, config = gguf_tokens.describe(file.metadata, str(file.path))
    return _from_fast(FastPieces(source), config, file.path)


def _from_fast(pieces: FastPieces, config: Mapping[str, Any], origin: Path) -> Tokenizer:
    """Return a tokenizer of Hugging Face's kind.

    Args:
      config: tokenizer_config.json; origin: what errors call it.
    """
    bos, eos, pad = (pieces.special.get(name_of(config.get(f"{role}_token"))) for role in ("bos", "eos", "pad"))
    if eos is None:
        usual = ("</s>", "<|endoftext|>", "<eos>", "[SEP]")
        eos = next((token for name, token in pieces.special.items() if name in usual), None)
    if eos is None:
        raise ValueError(f"{origin} names no eos_token among the special tokens")
    if bos is None:
        bos = pieces.prefix[0] if pieces.prefix else eos  # BERT's [CLS]
    ids = (eos if pad is None else pad, bos, eos)
    template = _template(config) or (PAIR_TEMPLATE if pieces.suffix == (eos,) else None)
    return Tokenizer(pieces, pieces.special, ids, _chat(template, pieces.special, bos, eos))


def _template(config: Mapping[str, Any]) -> str | None:
    """Return the chat template of a tokenizer_config.json, of several the default one."""
    template = config.get("chat_template")
    if isinstance(template, list):
        return {each["name"]: each["template"] for each in template}.get("default")
    return template


def _from_sentencepiece(pieces: SentencePieces, template: str | None = None) -> Tokenizer:
    """Read the special tokens from the model; without a template, ours applies if all roles are control symbols."""
    bos, eos, pad, unknown = (pieces.id_of(role) for role in ("bos", "eos", "pad", "unk"))
    if bos is None or eos is None:
        raise ValueError(f"the SentencePiece model has bos id {bos} and eos id {eos}; both are needed (bos_id, eos_id)")
    source = template or (DEFAULT_TEMPLATE if all(name in pieces.control for name in ROLE_TOKENS) else None)
    # Padding is never attended nor trained, so a model without a pad id can pad with any id it has.
    padding = next(token for token in (pad, unknown, eos) if token is not None)
    return Tokenizer(pieces, pieces.control, (padding, bos, eos), _chat(source, pieces.control, bos, eos))
