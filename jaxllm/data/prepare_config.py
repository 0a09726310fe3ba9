"""Everything that `prepare` needs to know."""

from typing import Annotated, Literal

from pydantic import Field

from jaxllm.core.config import Config
from jaxllm.data.beam import BeamEngine
from jaxllm.data.cleaning.clean import CleanConfig
from jaxllm.data.cleaning.decontaminate import DecontaminateConfig
from jaxllm.data.cleaning.dedup import DedupConfig
from jaxllm.data.engine import LocalEngine
from jaxllm.data.problems import Policy
from jaxllm.data.reading import sources
from jaxllm.data.shards import Kind
from jaxllm.data.tokenizers.pieces_training import TokenizerConfig


class BytesTokenizer(Config):
    """One id per byte."""

    kind: Literal["bytes"] = "bytes"


class ExistingTokenizer(Config):
    """A tokenizer that exists: what a model was trained with, above all."""

    kind: Literal["existing"] = "existing"
    path: str = Field(description="tokenizer directory, dataset or run that holds one, or SentencePiece .model file")


class PrepareConfig(Config):
    """Everything `prepare` needs."""

    inputs: tuple[sources.Input, ...] = Field(min_length=1, description="where the text comes from, in this order")
    out: str = Field(description="dataset directory to make")
    chat: bool = Field(False, description="read conversations and learn the assistant's answers only, not every token")
    tokenizer: Annotated[TokenizerConfig | BytesTokenizer | ExistingTokenizer, Field(discriminator="kind")] = Field(
        TokenizerConfig(), description="how text becomes ids"
    )
    clean: CleanConfig = Field(CleanConfig(), description="rules that change or drop documents")
    dedup: DedupConfig = Field(DedupConfig(), description="near duplicates, and paragraphs that come back")
    decontaminate: DecontaminateConfig = Field(
        DecontaminateConfig(), description="documents that hold texts of evaluation sets"
    )
    validation: float = Field(0.01, ge=0, description="documents to hold out: a share if below 1, else a number")
    seed: int = Field(0, ge=0, description="decides which documents are held out")
    errors: Policy = Field(
        "error", description="unreadable input: stop, skip it, or replace bad bytes; skipped input is counted"
    )
    seq_len: int = Field(
        512, ge=2, description="row length for which the report gives the padding; training may use another"
    )
    overwrite: bool = Field(False, description="replace the dataset if it exists, once the new one is complete")
    part_bytes: int = Field(
        32_000_000,
        ge=1,
        description="input is cut into pieces up to this size, but for compressed files: a kill costs one",
    )
    engine: Annotated[LocalEngine | BeamEngine, Field(discriminator="kind")] = Field(
        LocalEngine(), description="what does the work; the data are the same"
    )

    @property
    def dataset_kind(self) -> Kind:
        return "chat" if self.chat else "text"
