"""What a front end needs of a model beside its engine: the tokeniser. No weights, no device."""

from __future__ import annotations

from minillm.model.sources import resolve
from minillm.text.loading import load_tokenizer
from minillm.text.tokenizer import Tokenizer

__all__ = ["load_front_tokenizer"]


def load_front_tokenizer(model_name: str) -> Tokenizer:
    """The tokeniser of a model. Raises ModelNotFoundError, CheckpointError, DownloadError."""
    return load_tokenizer(resolve(model_name))
