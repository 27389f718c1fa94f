"""Finds the tokeniser of a model: in a GGUF file, in a folder, or a stand-in where a model has random weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from minillm.errors import CheckpointError
from minillm.text.stand_in import StandInTokenizer
from minillm.text.tokenizer import Tokenizer

__all__ = ["TokenizerFiles", "load_tokenizer"]


class TokenizerFiles(Protocol):
    """What is needed of a model's files to find its tokeniser (`model.sources.ModelFiles` has it)."""

    @property
    def kind(self) -> str:
        """folder, gguf or random."""

    @property
    def path(self) -> Path | None:
        """The folder or file."""

    @property
    def metadata(self) -> Mapping[str, Any]:
        """A GGUF file's metadata."""

    @property
    def vocab_size(self) -> int | None:
        """Size of the vocabulary of a random model."""


def load_tokenizer(files: TokenizerFiles) -> Tokenizer:
    """The tokeniser of a model. Raises CheckpointError if its files have none that can be read."""
    if files.kind == "gguf":
        try:
            return Tokenizer.from_gguf(files.metadata)
        except CheckpointError as error:
            raise CheckpointError(f"{files.path} has no tokeniser that can be read: {error}") from error
    if files.kind == "folder":
        assert files.path is not None
        return Tokenizer.from_folder(files.path)
    assert files.vocab_size is not None
    return StandInTokenizer(files.vocab_size)
