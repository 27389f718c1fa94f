"""Streaming text: pieces add up to the whole, and no piece ends in half a character."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from minillm.text.detokenizer import Detokenizer
from minillm.text.tokenizer import Tokenizer
from tests.text.conftest import varied_strings


@pytest.fixture(scope="module", params=["byte-level", "sentencepiece"])
def tokenizer(
    request: pytest.FixtureRequest, byte_level_folder: Path, sentencepiece_vocab: dict[str, Any]
) -> Tokenizer:
    if request.param == "byte-level":
        return Tokenizer.from_folder(byte_level_folder)
    return Tokenizer.from_gguf(sentencepiece_vocab)


@pytest.mark.parametrize("skip", [True, False])
def test_pieces_add_up_to_the_whole(tokenizer: Tokenizer, skip: bool) -> None:
    for text in varied_strings(400, seed=3):
        ids = tokenizer.encode(text)
        stream = Detokenizer(tokenizer, skip_special_tokens=skip)
        pieces = [stream.feed(i) for i in ids] + [stream.finish()]
        assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=skip)
        assert pieces[-1] == ""
        if "\ufffd" not in text:
            assert not any("\ufffd" in piece for piece in pieces)


def test_any_ids_add_up_to_the_whole(tokenizer: Tokenizer) -> None:
    rng = random.Random(4)
    num_broken = 0
    for _ in range(300):
        ids = [rng.randrange(tokenizer.vocab_size) for _ in range(rng.randint(0, 30))]
        stream = Detokenizer(tokenizer)
        text = "".join(stream.feed(i) for i in ids) + stream.finish()
        assert text == tokenizer.decode(ids)
        at, stream = rng.randint(0, 30), Detokenizer(tokenizer)
        assert stream.feed(*ids[:at]) + stream.feed(*ids[at:]) + stream.finish() == text
        num_broken += "\ufffd" in text
    assert num_broken > 10


def test_random_bytes_decode_as_the_library_does(byte_level_folder: Path) -> None:
    tokenizer = Tokenizer.from_folder(byte_level_folder)
    rng = random.Random(5)
    for _ in range(300):
        ids = [rng.randrange(tokenizer.vocab_size) for _ in range(20)]
        assert tokenizer.decode(ids) == tokenizer._backend.decode(ids)


def test_a_character_of_several_tokens_comes_whole(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("a𓀀b", add_special_tokens=False)
    assert len(ids) >= 6
    stream = Detokenizer(tokenizer)
    pieces = [piece for piece in (stream.feed(i) for i in ids) if piece]
    assert "".join(pieces) == "a𓀀b"
    assert "𓀀" in pieces


def test_an_unfinished_character_becomes_one_mark_at_the_end(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("x𓀀", add_special_tokens=False)[:-1]
    stream = Detokenizer(tokenizer)
    assert "".join(stream.feed(i) for i in ids) == "x"
    assert stream.finish() == "\ufffd"


def test_first_space_belongs_to_the_text_after_a_prompt(sentencepiece_vocab: dict[str, Any]) -> None:
    tokenizer = Tokenizer.from_gguf(sentencepiece_vocab)
    prompt, ids = tokenizer.encode("the"), tokenizer.encode("the", add_special_tokens=False)
    alone, after = Detokenizer(tokenizer), Detokenizer(tokenizer, prompt)
    assert "".join(map(alone.feed, ids)) == "the"
    assert "".join(map(after.feed, ids)) == " the"
