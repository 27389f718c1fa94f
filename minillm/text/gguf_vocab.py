"""A tokeniser from the vocabulary that a GGUF file carries in its metadata (`tokenizer.ggml.*`).

Token ids are those that transformers makes from the same file. It knows metadata, not files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, TypeVar

from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

from minillm.errors import CheckpointError
from minillm.text.pieces import SPACE_MARK, byte_letters

__all__ = ["backend_from_gguf"]

T = TypeVar("T")
CONTROL, USER_DEFINED = 3, 4
"""Kinds of token: special ones, and text that is always one token."""

# How texts are cut before merging, as published with each model family.
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2_SPLIT = LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")
TEKKEN_SPLIT = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# None: GPT-2's own rule. SmolLM2 was trained with each digit cut off first, which differs from GPT-2's rule only where
# several blanks precede a digit; transformers does not do it for GGUF files, and its ids are the yardstick here.
SPLITS: Mapping[str, str | None] = MappingProxyType(
    {
        "default": None,
        "gpt-2": None,
        "gpt2": None,
        "smollm": None,
        "llama3": LLAMA3_SPLIT,
        "llama-v3": LLAMA3_SPLIT,
        "llama-bpe": LLAMA3_SPLIT,
        "smaug-bpe": LLAMA3_SPLIT,
        "qwen2": QWEN2_SPLIT,
        "deepseek-r1-qwen": QWEN2_SPLIT,
        "tekken": TEKKEN_SPLIT,
    }
)


def backend_from_gguf(metadata: Mapping[str, Any]) -> Backend:
    """The tokeniser that the metadata describes. Raises CheckpointError for kinds that are not known."""
    kind = metadata.get("tokenizer.ggml.model")
    if kind not in ("gpt2", "llama"):
        raise CheckpointError(f"tokenizer.ggml.model is {kind!r}; gpt2 and llama are known")
    tokens = entries(metadata, "tokenizer.ggml.tokens", str)
    kinds = entries(metadata, "tokenizer.ggml.token_type", int) if metadata.get("tokenizer.ggml.token_type") else []
    try:
        backend = (byte_level_backend if kind == "gpt2" else sentencepiece_backend)(metadata, tokens)
        add_whole_tokens(backend, tokens, kinds, kind == "gpt2")
    except CheckpointError:
        raise
    except Exception as error:  # the library raises nothing narrower
        raise CheckpointError(f"tokenizer.ggml.tokens and their merges make no vocabulary ({error})") from error
    return backend


def entries(metadata: Mapping[str, Any], key: str, kind: type[T]) -> list[T]:
    """A list of one kind of entries. Raises CheckpointError."""
    value = metadata.get(key)
    if value is None:
        raise CheckpointError(f"the GGUF file has no {key}")
    if not isinstance(value, list) or not all(isinstance(entry, kind) for entry in value):
        raise CheckpointError(f"{key} must be a list of {kind.__name__} and is none")
    return value


def merge_pairs(metadata: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The pairs of tokens that are merged, first ones first."""
    pairs = (merge.split(" ") for merge in entries(metadata, "tokenizer.ggml.merges", str))
    return [(left, right) for left, right in pairs]


def byte_level_backend(metadata: Mapping[str, Any], tokens: Sequence[str]) -> Backend:
    """Byte-level BPE (GPT-2, Llama 3, Qwen)."""
    rule = metadata.get("tokenizer.ggml.pre", "default")
    if not isinstance(rule, str) or rule not in SPLITS:
        raise CheckpointError(f"tokenizer.ggml.pre cuts text by the rule {rule!r:.100}; known are {', '.join(SPLITS)}")
    letters = byte_letters()
    alphabet = set(letters)
    vocab = {}
    for token_id, token in enumerate(tokens):
        is_spelled = alphabet.issuperset(token)
        vocab[token if is_spelled else "".join(letters[byte] for byte in token.encode())] = token_id
    merges = merge_pairs(metadata)
    backend = Backend(models.BPE(vocab=vocab, merges=merges, continuing_subword_prefix="", end_of_word_suffix=""))
    split = SPLITS[rule]
    if split is None:
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(split), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    backend.decoder = decoders.ByteLevel()
    return backend


def sentencepiece_backend(metadata: Mapping[str, Any], tokens: Sequence[str]) -> Backend:
    """SentencePiece BPE (Llama 1 and 2, Mistral 7B), whose merges follow from the vocabulary's scores."""
    vocab = {token: token_id for token_id, token in enumerate(tokens)}
    pairs = (
        scored_merges(vocab, entries(metadata, "tokenizer.ggml.scores", float))
        if metadata.get("tokenizer.ggml.merges") is None
        else merge_pairs(metadata)
    )
    has_prefix = metadata.get("tokenizer.ggml.add_space_prefix", True)
    backend = Backend(models.BPE(vocab=vocab, merges=pairs, fuse_unk=True, byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(
        replacement=SPACE_MARK, prepend_scheme="first" if has_prefix else "never", split=False
    )
    steps = [decoders.Replace(SPACE_MARK, " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if has_prefix else steps)
    return backend


def scored_merges(vocab: Mapping[str, int], scores: Sequence[float]) -> list[tuple[str, str]]:
    """Every pair of tokens that makes a token, best result first; pairs of equal results: longer parts first."""
    found = []
    for (token, _), score in zip(vocab.items(), scores, strict=True):
        cuts = [(token[:i], token[i:]) for i in range(1, len(token))]
        pairs = [pair for pair in cuts if pair[0] in vocab and pair[1] in vocab]
        pairs.sort(key=lambda pair: (vocab[pair[0]], vocab[pair[1]]))
        found += [(score, len(left), len(right), left, right) for left, right in pairs]
    found.sort(key=lambda entry: entry[:3], reverse=True)
    return [(left, right) for *_, left, right in found]


def add_whole_tokens(backend: Backend, tokens: Sequence[str], kinds: Sequence[int], is_byte_level: bool) -> None:
    """Make control tokens special, and user-defined ones whole.

    A control token that byte-level BPE cannot have spelled is a converter's mistake and would grow the vocabulary.
    """
    alphabet = set(byte_letters())
    special, whole = [], []
    for token, kind in zip(tokens, kinds, strict=False):
        if is_byte_level and not alphabet.issuperset(token):
            continue
        if kind == CONTROL:
            special.append(AddedToken(token, normalized=False, special=True))
        elif kind == USER_DEFINED:
            whole.append(AddedToken(token, normalized=False, special=False))
    backend.add_special_tokens(special)
    backend.add_tokens(whole)
