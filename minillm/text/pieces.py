"""Which bytes a token stands for, from how its vocabulary spells it. It knows spellings, not vocabularies.

Two spellings cover the models that run here: byte-level BPE writes each byte as a printable letter, SentencePiece
writes text with a mark for the space and lone bytes as <0xNN>.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer as Backend

from minillm.errors import CheckpointError

__all__ = ["Spelling", "byte_letters", "spelling_of"]

SPACE_MARK = "\u2581"
LONE_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def byte_letters() -> list[str]:
    """The letter that byte-level BPE (GPT-2) writes for each byte: itself if printable, else one from U+0100 on."""
    letters, num_moved = [], 0
    for byte in range(256):
        is_printable = 33 <= byte <= 126 or 161 <= byte <= 172 or 174 <= byte <= 255
        letters.append(chr(byte) if is_printable else chr(256 + num_moved))
        num_moved += not is_printable
    return letters


@dataclass(frozen=True, slots=True, kw_only=True)
class Spelling:
    """How a vocabulary writes bytes."""

    byte_of_letter: dict[str, int] | None = None
    """Byte-level BPE: the byte of each letter. None: SentencePiece."""
    has_lone_bytes: bool = False
    """SentencePiece: <0xNN> is a byte."""
    drops_first_space: bool = False
    """SentencePiece: a text's first space was put there by the encoder."""

    def bytes_of(self, token: str) -> bytes:
        """What a token adds to the text."""
        if self.byte_of_letter is not None:
            try:
                return bytes([self.byte_of_letter[letter] for letter in token])
            except KeyError:  # an added token, written as it is
                return token.encode()
        if self.has_lone_bytes and (match := LONE_BYTE.fullmatch(token)):
            return bytes([int(match[1], 16)])
        return token.replace(SPACE_MARK, " ").encode()


def spelling_of(backend: Backend) -> Spelling:
    """The spelling that a tokeniser's decoder undoes. Raises CheckpointError for decoders of other model families."""
    state: dict[str, Any] = (
        json.loads(backend.decoder.__getstate__()) if backend.decoder is not None else {"type": None}
    )
    steps: list[dict[str, Any]] = state["decoders"] if state["type"] == "Sequence" else [state]
    kinds = [step["type"] for step in steps]
    if kinds == ["ByteLevel"]:
        return Spelling(byte_of_letter={letter: byte for byte, letter in enumerate(byte_letters())})
    if kinds == ["Metaspace"]:
        return Spelling(drops_first_space=steps[0].get("prepend_scheme", "always") != "never")
    strips = [step for step in steps if step["type"] == "Strip"]
    is_marked = any(s["type"] == "Replace" and s["pattern"] == {"String": SPACE_MARK} for s in steps)
    has_usual_strip = all((s["content"], s["start"], s["stop"]) == (" ", 1, 0) for s in strips)
    if is_marked and has_usual_strip and set(kinds) <= {"Replace", "ByteFallback", "Fuse", "Strip"}:
        return Spelling(has_lone_bytes="ByteFallback" in kinds, drops_first_space=bool(strips))
    raise CheckpointError(f"the tokeniser has a decoder of unknown kind ({', '.join(map(str, kinds))})")
