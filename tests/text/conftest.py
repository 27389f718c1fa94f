"""Tokenisers to compare with transformers, and strings that are hard to cut."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers

FRAGMENTS = [
    "the", " quick", "Brown", " fox's", "don't", "WE'LL", " it's", "naïve", "façade", "Ünïcödé", "straße", "ﬁ",
    "Ⅷ", "①²½", "人工智能", "今天天气很好，", "こんにちは", "カタカナ", "안녕하세요", "Привет, мир",
    "مرحبا بالعالم", "שלום", "สวัสดี", "नमस्ते", "🙂", "👩\u200d👩\u200d👧\u200d👦", "🏳\ufe0f\u200d🌈", "🇫🇷",
    "é", "e\u0301", "\u200b", "\ufeff", "\u00a0", "\u3000", "\u2028", "\x00", "\x07", "\x7f", "\ufffd", " ",
    "  ", "   ", "       ", "\n", "\n\n", "\r\n", "\t", "\t\t", " \n ", "0", "7", "42", "1234567890",
    " 3.14159", "1,000,000", "def f(x):\n    return x**2", "for (int i=0;i<n;++i){", "</div>", "&nbsp;",
    "#include <stdio.h>", "a_b.c[d]", "==", "!=", "->", "...", "http://example.com/?q=1&r=2",
    "SELECT * FROM t;", "$x^2$", "\\n", "'", "\"", "''", "'s", "'LL", "!?!?", "(", ")", "[]", "{}",
    "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|im_start|>user\n", "<|im_start", "|>", "<s>", "</s>",
    "<unk>", "<0x0A>", "[INST]",
]  # fmt: skip


def varied_strings(num: int, seed: int = 0) -> list[str]:
    """Strings of one to twelve fragments, or of random code points."""
    rng = random.Random(seed)
    strings = ["", *FRAGMENTS]
    while len(strings) < num:
        if rng.random() < 0.1:
            strings.append(
                "".join(chr(rng.choice([rng.randrange(0xD800), rng.randrange(0xE000, 0x110000)])) for _ in range(8))
            )
        else:
            strings.append("".join(rng.choice(FRAGMENTS) for _ in range(rng.randint(1, 12))))
    return strings[:num]


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The default model's file, fetched into the cache if it is not there."""
    from minillm.model.sources import pull

    return pull("smollm2")


@pytest.fixture(scope="session")
def byte_level_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer.json of byte-level BPE with special tokens and added words, saved by transformers."""
    from transformers import PreTrainedTokenizerFast

    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(varied_strings(2000, seed=1), trainer)
    backend.add_tokens(["1234567890", "今天"])
    folder = tmp_path_factory.mktemp("byte-level")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<|im_start|>", eos_token="<|im_end|>", unk_token="<|endoftext|>"
    )
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def sentencepiece_vocab() -> dict[str, object]:
    """GGUF metadata of a SentencePiece vocabulary with lone bytes and scores, as converters write it."""
    backend = Backend(models.BPE(byte_fallback=True, fuse_unk=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=True)
    trainer = trainers.BpeTrainer(vocab_size=700, limit_alphabet=80, show_progress=False)
    backend.train_from_iterator([s for s in varied_strings(2000, seed=2) if "<" not in s], trainer)
    learned = sorted(backend.get_vocab(), key=lambda token: (len(token) > 1, backend.token_to_id(token)))
    head = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokens = head + [token for token in learned if token not in head]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [0.0] * len(head) + [-float(i) for i in range(len(tokens) - len(head))],
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * (len(tokens) - len(head)),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }
