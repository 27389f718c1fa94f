"""A word tokeniser for checkpoints that tests make, which hold weights only."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer, decoders, models


def write_word_tokenizer(folder: Path, vocab_size: int) -> None:
    """tokenizer.json with one word per id."""
    backend = Tokenizer(models.WordLevel({f"w{i}": i for i in range(vocab_size)}, unk_token="w0"))
    backend.decoder = decoders.ByteLevel()
    backend.save(str(folder / "tokenizer.json"))
