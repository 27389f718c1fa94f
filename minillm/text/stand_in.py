"""A stand-in tokeniser for models with random weights: one fixed printable word per token id, nothing to download."""

from __future__ import annotations

import zlib
from collections.abc import Mapping

from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models

from minillm.text.tokenizer import Tokenizer
from minillm.types import check_unicode

__all__ = ["StandInTokenizer"]

CONSONANTS, VOWELS = "bdfghjklmnprstvz", "aeiou"
NUM_SYLLABLES = len(CONSONANTS) * len(VOWELS)
TEMPLATE = "{% for message in messages %}{{ message['content'] }}\n{% endfor %}"
NO_NAMES: Mapping[str, str] = {}


class StandInTokenizer(Tokenizer):
    """`encode(decode(ids)) == ids`. Words that stand for no id are hashed to one."""

    def __init__(self, vocab_size: int) -> None:
        backend = Backend(models.WordLevel({}, ""))
        backend.decoder = decoders.ByteLevel()
        super().__init__(backend, NO_NAMES, TEMPLATE)
        self.vocab_size = vocab_size
        self._num_syllables = 1
        while NUM_SYLLABLES**self._num_syllables < vocab_size:
            self._num_syllables += 1

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """One token id per word. Raises RequestError."""
        check_unicode("the text", text)
        return [self._id_of(word) for word in text.split()]

    def piece(self, token_id: int, *, skip_special_tokens: bool = True) -> bytes:
        """The word of an id and a space."""
        piece = self._pieces.get(token_id)
        if piece is None:
            piece = self._pieces[token_id] = f"{self._word_of(token_id)} ".encode()
        return piece

    def _word_of(self, token_id: int) -> str:
        syllables = []
        for _ in range(self._num_syllables):
            token_id, index = divmod(token_id, NUM_SYLLABLES)
            syllables.append(CONSONANTS[index // len(VOWELS)] + VOWELS[index % len(VOWELS)])
        return "".join(reversed(syllables))

    def _id_of(self, word: str) -> int:
        token_id = 0
        if len(word) == 2 * self._num_syllables:
            for consonant, vowel in zip(word[::2], word[1::2], strict=True):
                index = CONSONANTS.find(consonant) * len(VOWELS) + VOWELS.find(vowel)
                if consonant not in CONSONANTS or vowel not in VOWELS:
                    break
                token_id = token_id * NUM_SYLLABLES + index
            else:
                if token_id < self.vocab_size:
                    return token_id
        return zlib.crc32(word.encode()) % self.vocab_size
