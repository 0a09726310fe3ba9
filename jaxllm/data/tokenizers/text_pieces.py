"""Tokenizers of encoder-decoders that come as SentencePiece models: T5's, and Marian's two for two languages."""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from jaxllm.core import files
from jaxllm.data.tokenizers.pieces import SPACE_MARK

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor

Text = str | tuple[str, str]
EXTRA_IDS = 100  # of T5: placeholders behind the pieces, the last id is the first of them


class Encoded(NamedTuple):
    """One text: its ids, special tokens included, and which text of a pair each belongs to."""

    ids: list[int]
    types: list[int]


def too_long(index: int, length: int, longest: int) -> ValueError:
    """Return the error for a text that a model cannot read whole."""
    return ValueError(
        f"text {index} has {length} tokens and the model takes {longest} (max_seq_len); shorten it, or pass "
        "truncate=True to read its beginning alone"
    )


class TextPieces:
    """SentencePiece models and a numbering of their pieces; what is read ends with the end token.

    Args:
      directory: of the checkpoint, with spiece.model (T5), or source.spm, target.spm and vocab.json (Marian).
    Raises:
      FileNotFoundError: these files are not there, or not all of them.
      ValueError: there are no tokens for padding, the end, or what is unknown.

    Attributes:
      size, pad_id, original: as of `PairTokenizer`. files: names and contents. ids, pieces: either by the other.
      skipped: ids that have no text.
    """

    original = None

    def __init__(self, directory: str | Path):
        directory = Path(directory)
        one = (directory / "spiece.model").is_file()
        names = ("spiece.model",) if one else ("source.spm", "target.spm", "vocab.json")
        if missing := [name for name in names if not (directory / name).is_file()]:
            raise FileNotFoundError(f"{directory} has no {' and no '.join(missing)}, which its tokenizer is made of")
        self.files = {name: (directory / name).read_bytes() for name in names}
        settings = files.read_json(directory / "tokenizer_config.json", None)
        if settings is not None:
            self.files["tokenizer_config.json"] = (directory / "tokenizer_config.json").read_bytes()
        models = [self._model(directory / name) for name in names[:2]]
        self._source, self._target = models[0], models[-1]
        if one:
            pieces, extra = self._source.get_piece_size(), (settings or {}).get("extra_ids", EXTRA_IDS)
            self.ids = {self._source.id_to_piece(i): i for i in range(pieces)}
            self.ids |= {f"<extra_id_{i}>": pieces + extra - 1 - i for i in range(extra)}
        else:
            self.ids = files.read_json(directory / "vocab.json")
        if missing := [name for name in ("<pad>", "</s>", "<unk>") if name not in self.ids]:
            raise ValueError(f"the vocabulary in {directory} lacks {', '.join(missing)}")
        self.pad_id, self.eos_id, self._unknown = (self.ids[name] for name in ("<pad>", "</s>", "<unk>"))
        self.size = max(self.ids.values()) + 1
        self.pieces = {token: piece for piece, token in self.ids.items()}
        self.skipped = {self.pad_id, self.eos_id, self._unknown}

    def _model(self, path: Path) -> "SentencePieceProcessor":
        from sentencepiece import SentencePieceProcessor

        try:
            return SentencePieceProcessor(model_proto=self.files[path.name])
        except RuntimeError as error:
            raise ValueError(f"{path} is no SentencePiece model ({len(self.files[path.name]):,} bytes)") from error

    def encode(
        self, texts: Sequence[Text], longest: int, *, truncate: bool = False, special: bool = False
    ) -> list[Encoded]:
        """Return texts as ids; arguments as of `PairTokenizer.encode`.

        A language that a text of Marian's begins with (">>deu<< ...") is its token.
        """
        found = []
        for index, text in enumerate(texts):
            if not isinstance(text, str):
                raise ValueError(f"text {index} is a pair; an encoder-decoder reads one text")
            ids = [*self._ids(text, special=special), self.eos_id]
            if len(ids) > longest:
                if not truncate:
                    raise too_long(index, len(ids), longest)
                ids = [*ids[: longest - 1], self.eos_id]
            found.append(Encoded(ids, [0] * len(ids)))
        return found

    def side(self, text: str, *, target: bool) -> list[int]:
        """Return the ids of a source or of a target, without its end."""
        if target:
            return [self.ids.get(piece, self._unknown) for piece in self._target.encode_as_pieces(text)]
        return self._ids(text, special=False)

    def _ids(self, text: str, *, special: bool) -> list[int]:
        named = r"<extra_id_\d+>|</s>|<pad>|" if special else ""
        ids: list[int] = []
        for part in re.split(f"({named}^>>[^<>]+<<)", text):
            if part and (special or part.startswith(">>")) and part in self.ids:
                ids.append(self.ids[part])
            else:
                ids += (self.ids.get(piece, self._unknown) for piece in self._source.encode_as_pieces(part))
        return ids

    def decode(self, ids: Iterable[int], *, special: bool = False) -> str:
        """Return the text of `ids`, with special tokens or without."""
        pieces = (self.pieces[int(token)] for token in ids if special or int(token) not in self.skipped)
        # Marian: what the source alone has is no piece of the target model, which leaves the marks of its spaces
        return self._target.decode_pieces(list(pieces)).replace(SPACE_MARK, " ").strip()

    def save(self, directory: str | Path) -> None:
        """Write the files that the tokenizer was read from."""
        for name, content in self.files.items():
            files.write_bytes(Path(directory) / name, content)


class SidePieces:
    """`TextPieces` as the piece model of a `Tokenizer`, for preparing data; `encode` is of sources."""

    kind, prefix, leading_space = "texts", (), True

    def __init__(self, directory: str | Path):
        self.texts = texts = TextPieces(directory)
        self.files, self.size = tuple(texts.files.items()), texts.size
        self.special, self.suffix = {"<pad>": texts.pad_id, "</s>": texts.eos_id}, (texts.eos_id,)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        return [self.texts.side(text, target=False) for text in texts]

    def bytes_of(self, token: int) -> bytes:
        piece = "" if token in self.texts.skipped else self.texts.pieces.get(token, "")
        return piece.replace(SPACE_MARK, " ").encode("utf-8")


def is_texts(directory: str | Path) -> bool:
    """Whether a directory has a tokenizer that `TextPieces` reads: Marian's, or T5's without a better one."""
    directory = Path(directory)
    if not (directory / "spiece.model").is_file():
        return (directory / "source.spm").is_file()
    return "model" not in files.read_json(directory / "tokenizer.json", {})
