"""Text as tokens come, however many at once; and when it is read."""

from __future__ import annotations

import random
from typing import Any

import pytest

from minillm import LLM, SamplingParams
from minillm.engine.output import TextReader, TextStream
from minillm.text.detokenizer import Detokenizer
from minillm.text.stand_in import StandInTokenizer
from minillm.types import FinishReason
from tests.engine.clockwork import engine_of

TOKENIZER = StandInTokenizer(300)
OPTIONS: dict[str, Any] = {"device": "cpu", "dtype": "float32", "max_model_len": 256, "num_kv_blocks": 64}


@pytest.mark.parametrize("min_tokens", [0, 5])
def test_text_is_the_same_in_any_cuts(min_tokens: int) -> None:
    rng = random.Random(min_tokens)
    num_matched = 0
    for _ in range(200):
        tokens = [rng.randrange(10) for _ in range(12)]
        word = TOKENIZER.decode([rng.randrange(10), rng.randrange(10)])
        stops = rng.choice([(), (word[1:9],), (word[:2], word)])
        one, other = (TextReader(TOKENIZER, [7], stops, {4}, min_tokens) for _ in range(2))
        pieces, num_one = [], 0
        for token in tokens:
            if not one.is_matched:
                pieces.append(one.read([token])[0])
                num_one += 1
        at = rng.randrange(13)
        text, num_other = other.read(tokens[:at])
        if not other.is_matched:
            rest, num_rest = other.read(tokens[at:])
            text, num_other = text + rest, num_other + num_rest
        assert other.is_matched == one.is_matched and num_other == num_one
        assert text + other.finish() == "".join(pieces) + one.finish()
        num_matched += one.is_matched
    assert 10 < num_matched < 190


def test_generate_reads_text_once_unless_it_may_have_to_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    """What nobody reads before the end is cheaper then."""
    fed: list[int] = []

    def counted(detokenizer: Detokenizer, *token_ids: int) -> str:
        fed.append(len(token_ids))
        return feed(detokenizer, *token_ids)

    feed = Detokenizer.feed
    with LLM("random:tiny-llama", **OPTIONS) as llm:
        params = {"temperature": 0.0, "max_tokens": 8, "ignore_eos": True}
        chunks = list(llm.stream([5, 6, 7], SamplingParams(**params)))
        monkeypatch.setattr(Detokenizer, "feed", counted)
        out = llm.generate([[5, 6, 7]], SamplingParams(**params))[0]
        assert sorted(fed)[-1] == sum(fed) == 8
        assert out.text == "".join(chunk.text for chunk in chunks) == llm.tokenizer.decode(out.token_ids)
        fed.clear()
        llm.generate([[5, 6, 7]], SamplingParams(**params, stop="no such text"))
        assert fed == [1] * 8


def test_a_request_that_is_ended_from_outside_keeps_its_tokens_and_their_text() -> None:
    engine = engine_of()
    generation = engine.add([7, 8], SamplingParams(max_tokens=9, ignore_eos=True))
    stream = TextStream(engine, TOKENIZER, generation, [7, 8])
    for _ in range(3):
        engine.step()
    engine.finish(generation, FinishReason.ABORT)
    out = stream.output("0")
    assert out.token_ids == list(generation.request.tokens[2:]) and len(out.token_ids) == 3
    assert out.text == TOKENIZER.decode(out.token_ids) and out.finish_reason is FinishReason.ABORT
