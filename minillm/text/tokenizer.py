"""Tokenizer: text to token ids and back, and chat messages to token ids. It knows neither models nor requests."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, processors
from tokenizers import Tokenizer as Backend

from minillm.errors import CheckpointError, RequestError
from minillm.text.gguf_vocab import backend_from_gguf
from minillm.text.pieces import spelling_of
from minillm.text.template import ChatTemplate

__all__ = ["Tokenizer"]

NAMED = ("bos_token", "eos_token", "unk_token", "pad_token")
GGUF_NAMED = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}


class Tokenizer:
    """A tokeniser of the `tokenizers` library with its special tokens and chat template."""

    def __init__(self, backend: Backend, named: Mapping[str, str], template: str | None) -> None:
        """`named`: bos_token, eos_token … as text. Raises CheckpointError for a decoder that is not known."""
        backend.no_truncation()
        backend.no_padding()
        added = {token.content: token.special for token in backend.get_added_tokens_decoder().values()}
        known = [t for t in dict.fromkeys(named.values()) if not added.get(t) and backend.token_to_id(t) is not None]
        backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in known])
        self._backend, self._named, self._template = backend, dict(named), template
        self._spelling = spelling_of(backend)
        self._pieces: dict[int, bytes] = {}
        decoder = backend.get_added_tokens_decoder()
        self.special_ids = frozenset(token_id for token_id, token in decoder.items() if token.special)
        self.vocab_size: int = backend.get_vocab_size(with_added_tokens=True)

    @classmethod
    def from_folder(cls, folder: Path) -> Tokenizer:
        """From tokenizer.json and the files beside it. Raises CheckpointError."""
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise CheckpointError(f"{folder} has no tokenizer.json; save the model's fast tokeniser there")
        try:
            backend = Backend.from_file(str(path))
        except Exception as error:  # the library raises nothing narrower
            raise CheckpointError(f"{path} cannot be read ({error}); download it again") from error
        config = read_object(folder / "tokenizer_config.json")
        named = named_tokens({**read_object(folder / "special_tokens_map.json"), **config})
        return cls(backend, named, folder_template(folder, config))

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any]) -> Tokenizer:
        """From a GGUF file's metadata. Raises CheckpointError."""
        backend = backend_from_gguf(metadata)
        tokens = metadata["tokenizer.ggml.tokens"]
        named = {}
        for name, key in GGUF_NAMED.items():
            token_id = metadata.get(f"tokenizer.ggml.{key}_token_id")
            if token_id is not None and (not isinstance(token_id, int) or token_id < 0):
                raise CheckpointError(f"tokenizer.ggml.{key}_token_id is {token_id!r:.100} and no token id")
            if token_id is not None and token_id < len(tokens):
                named[name] = tokens[token_id]
        # SentencePiece files without the flag start with BOS, others do not.
        adds_bos = metadata.get("tokenizer.ggml.add_bos_token", metadata["tokenizer.ggml.model"] == "llama")
        frame_texts(backend, named, adds_bos, metadata.get("tokenizer.ggml.add_eos_token", False))
        template = metadata.get("tokenizer.chat_template")
        if not isinstance(template, str | None):
            raise CheckpointError("tokenizer.chat_template is no text")
        return cls(backend, named, template)

    @property
    def drops_first_space(self) -> bool:
        """Whether a text's first space is the encoder's own (SentencePiece)."""
        return self._spelling.drops_first_space

    @property
    def bos_token_id(self) -> int | None:
        """The token that begins a text."""
        return self._named_id("bos_token")

    @property
    def eos_token_id(self) -> int | None:
        """The token that ends a text; a model may have more (ModelConfig.eos_token_ids)."""
        return self._named_id("eos_token")

    @property
    def has_chat_template(self) -> bool:
        """Whether `encode_chat` can work."""
        return self._template is not None

    @property
    def has_tools(self) -> bool:
        """Whether the chat template writes tools."""
        return self._template is not None and "tools" in self._template

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text, with the tokens that the model expects around it. Raises RequestError."""
        try:
            ids: list[int] = self._backend.encode(text, add_special_tokens=add_special_tokens).ids
        except TypeError as error:
            raise RequestError(f"the text is no Unicode text ({error}); remove lone surrogates") from error
        return ids

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """The text of token ids; bytes that are no character become U+FFFD."""
        pieces = [self.piece(token_id, skip_special_tokens=skip_special_tokens) for token_id in ids]
        text = b"".join(pieces).decode("utf-8", "replace")
        return text.removeprefix(" ") if self.drops_first_space else text

    def piece(self, token_id: int, *, skip_special_tokens: bool = True) -> bytes:
        """The bytes that a token adds to a text; none for an id beyond the vocabulary."""
        if skip_special_tokens and token_id in self.special_ids:
            return b""
        piece = self._pieces.get(token_id)
        if piece is None:
            token = self._backend.id_to_token(token_id)
            piece = self._pieces[token_id] = b"" if token is None else self._spelling.bytes_of(token)
        return piece

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
    ) -> str:
        """Messages as the text that the model was trained on. Raises RequestError."""
        if self._template is None:
            raise RequestError("this model has no chat template; give a text or token ids instead of messages")
        return self.chat_template.render(messages, tools=tools, add_generation_prompt=add_generation_prompt)

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
    ) -> list[int]:
        """Token ids of messages through the chat template, which writes its special tokens itself."""
        text = self.render_chat(messages, tools=tools, add_generation_prompt=add_generation_prompt)
        return self.encode(text, add_special_tokens=False)

    @cached_property
    def chat_template(self) -> ChatTemplate:
        """The compiled template. Raises CheckpointError if it cannot be compiled."""
        assert self._template is not None
        return ChatTemplate(self._template, self._named)

    def _named_id(self, name: str) -> int | None:
        token = self._named.get(name)
        token_id: int | None = None if token is None else self._backend.token_to_id(token)
        return token_id


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file, empty if there is no file. Raises CheckpointError."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); download it again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} is no JSON object; download it again")
    return value


def named_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """bos_token, eos_token …, each written as text or as an object with its content."""
    named = {}
    for name in NAMED:
        value = config.get(name)
        content = value.get("content") if isinstance(value, dict) else value
        if isinstance(content, str):
            named[name] = content
    return named


def folder_template(folder: Path, config: Mapping[str, Any]) -> str | None:
    """The chat template of a folder: a file of its own, or in tokenizer_config.json (`default` if several).

    Raises CheckpointError.
    """
    path = folder / "chat_template.jinja"
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path} cannot be read ({error}); download it again") from error
    template = config.get("chat_template")
    if isinstance(template, list) and all(isinstance(entry, dict) for entry in template):
        template = next((entry.get("template") for entry in template if entry.get("name") == "default"), None)
    if not isinstance(template, str | None):
        raise CheckpointError(f"{folder / 'tokenizer_config.json'} has a chat_template that is no text")
    return template


def frame_texts(backend: Backend, named: Mapping[str, str], adds_bos: bool, adds_eos: bool) -> None:
    """Put BOS before and EOS after every text, as far as asked for and known."""
    ends = [named.get("bos_token") if adds_bos else None, named.get("eos_token") if adds_eos else None]
    ids = {token: backend.token_to_id(token) for token in ends if token is not None}
    bos, eos = (token if token is not None and ids[token] is not None else None for token in ends)
    backend.post_processor = processors.TemplateProcessing(
        single=[token for token in (bos, "$A", eos) if token is not None],
        special_tokens=[(token, token_id) for token, token_id in ids.items() if token_id is not None],
    )
