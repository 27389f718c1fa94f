"""Token ids against transformers, on a thousand strings: SmolLM2's GGUF, other GGUF vocabularies, tokenizer.json."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import pytest

from minillm.errors import CheckpointError, RequestError
from minillm.model.gguf import GGUFFile
from minillm.model.sources import resolve
from minillm.text.loading import load_tokenizer
from minillm.text.tokenizer import Tokenizer
from tests.text.conftest import varied_strings

NUM_STRINGS = 1000


def oracle_of(path: Path) -> Any:
    """The tokeniser that transformers makes of a folder or a GGUF file."""
    from transformers import AutoTokenizer

    if path.is_dir():
        return AutoTokenizer.from_pretrained(path)
    return AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name, local_files_only=True)


def check_equal(tokenizer: Tokenizer, oracle: Any) -> None:
    strings = varied_strings(NUM_STRINGS)
    num_tokens = 0
    for text in strings:
        ids = oracle.encode(text)
        assert tokenizer.encode(text) == ids, repr(text)
        plain_ids = oracle.encode(text, add_special_tokens=False)
        assert tokenizer.encode(text, add_special_tokens=False) == plain_ids, repr(text)
        num_tokens += len(ids)
        for skip in (True, False):
            expected = oracle.decode(ids, skip_special_tokens=skip)
            assert tokenizer.decode(ids, skip_special_tokens=skip) == expected, repr(text)
    assert num_tokens > 5 * NUM_STRINGS
    assert tokenizer.vocab_size == len(oracle)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (oracle.bos_token_id, oracle.eos_token_id)
    assert tokenizer.special_ids >= set(oracle.all_special_ids)


def test_smollm2_equals_transformers(smollm2: Path) -> None:
    tokenizer, oracle = load_tokenizer(resolve(str(smollm2))), oracle_of(smollm2)
    check_equal(tokenizer, oracle)
    messages = [{"role": "user", "content": "What is 2+2?"}, {"role": "assistant", "content": "4 🙂"}]
    for prompted in (True, False):
        expected = oracle.apply_chat_template(messages, add_generation_prompt=prompted, return_dict=False)
        assert tokenizer.encode_chat(messages, add_generation_prompt=prompted) == expected


def test_tokenizer_json_equals_transformers(byte_level_folder: Path) -> None:
    tokenizer = Tokenizer.from_folder(byte_level_folder)
    check_equal(tokenizer, oracle_of(byte_level_folder))
    assert not tokenizer.has_chat_template
    with pytest.raises(RequestError, match="no chat template"):
        tokenizer.encode_chat([{"role": "user", "content": "x"}])


def test_tokenizer_json_alone_says_what_frames_a_text(byte_level_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "framed"
    shutil.copytree(byte_level_folder, folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "add_bos_token": True}))
    check_equal(Tokenizer.from_folder(folder), oracle_of(folder))
    assert Tokenizer.from_folder(folder).encode("") == []
    frame = {
        "single": [{"SpecialToken": {"id": "<|im_start|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    }
    special = {"<|im_start|>": {"id": "<|im_start|>", "ids": [1], "tokens": ["<|im_start|>"]}}
    processor = {"type": "TemplateProcessing", **frame, "pair": frame["single"], "special_tokens": special}
    processor["pair"] = [*frame["single"], {"Sequence": {"id": "B", "type_id": 1}}]
    raw = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps({**raw, "post_processor": processor}))
    check_equal(Tokenizer.from_folder(folder), oracle_of(folder))
    assert Tokenizer.from_folder(folder).encode("") == [1]


@pytest.mark.parametrize(
    ("beside", "expected"),
    [
        ({"chat_template.jinja": "file"}, "file"),
        ({"tokenizer_config.json": {"chat_template": "config"}}, "config"),
        ({"tokenizer_config.json": {"chat_template": "config"}, "chat_template.jinja": "file"}, "file"),
        (
            {
                "tokenizer_config.json": {
                    "chat_template": [{"name": "tool", "template": "t"}, {"name": "default", "template": "d"}]
                }
            },
            "d",
        ),
    ],
)
def test_chat_templates_are_found(
    byte_level_folder: Path, tmp_path: Path, beside: dict[str, Any], expected: str
) -> None:
    shutil.copy(byte_level_folder / "tokenizer.json", tmp_path)
    for name, content in beside.items():
        (tmp_path / name).write_text(content if isinstance(content, str) else json.dumps(content))
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer.render_chat([{"role": "user", "content": "x"}]) == expected


def write_vocab(path: Path, metadata: dict[str, Any]) -> None:
    """A GGUF file of a tiny model's metadata and this vocabulary, without tensors."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(64)
    writer.add_block_count(1)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(4)
    writer.add_layer_norm_rms_eps(1e-5)
    for key, value in metadata.items():
        if isinstance(value, list):
            writer.add_array(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, bool):
            writer.add_bool(key, value)
        else:
            writer.add_uint32(key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_sentencepiece_vocabulary_equals_transformers(tmp_path: Path, sentencepiece_vocab: dict[str, Any]) -> None:
    path = tmp_path / "model.gguf"
    write_vocab(path, sentencepiece_vocab)
    tokenizer = Tokenizer.from_gguf(GGUFFile(path).metadata)
    assert tokenizer.encode("hi")[0] == tokenizer.bos_token_id == 1
    assert tokenizer.drops_first_space
    check_equal(tokenizer, oracle_of(path))


@pytest.mark.parametrize("rule", ["llama-bpe", "qwen2", "tekken", "gpt-2", "default"])
@pytest.mark.parametrize("adds_bos", [True, False])
def test_ways_of_cutting_equal_transformers(tmp_path: Path, byte_level_folder: Path, rule: str, adds_bos: bool) -> None:
    model = json.loads((byte_level_folder / "tokenizer.json").read_text())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    kinds = [3, 3, 3] + [1] * (len(tokens) - 3)
    kinds[400] = 4  # a word that is always one token
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": rule,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.merges": [" ".join(merge) for merge in model["merges"]],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.add_bos_token": adds_bos,
    }
    path = tmp_path / "model.gguf"
    write_vocab(path, metadata)
    check_equal(Tokenizer.from_gguf(GGUFFile(path).metadata), oracle_of(path))


def test_unknown_vocabularies_are_refused(sentencepiece_vocab: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match=r"model is 'wpm'"):
        Tokenizer.from_gguf({**sentencepiece_vocab, "tokenizer.ggml.model": "wpm"})
    with pytest.raises(CheckpointError, match="rule 'martian'"):
        Tokenizer.from_gguf({**sentencepiece_vocab, "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "martian"})
    with pytest.raises(CheckpointError, match=r"no tokenizer\.ggml\.tokens"):
        Tokenizer.from_gguf({"tokenizer.ggml.model": "llama"})


@pytest.mark.parametrize("model", ["llama", "gpt2"])
@pytest.mark.parametrize("value", ["x", -1, 1.5, [1, "a", None], [], ["a b c"], ["x", ""], None, True, {}])
@pytest.mark.parametrize(
    "key",
    ["model", "pre", "tokens", "token_type", "scores", "merges", *(f"{n}_token_id" for n in ("bos", "eos", "padding"))],
)
def test_metadata_of_odd_types_is_read_or_refused(
    sentencepiece_vocab: dict[str, Any], model: str, key: str, value: Any
) -> None:
    whole = {**sentencepiece_vocab, "tokenizer.ggml.model": model}
    if model == "gpt2":
        whole["tokenizer.ggml.merges"] = []
    try:
        Tokenizer.from_gguf({**whole, f"tokenizer.ggml.{key}": value})
    except CheckpointError as error:
        assert "tokenizer.ggml." in str(error)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("ggml.pre", ["x"]),
        ("ggml.tokens", [1]),
        ("ggml.tokens", "abc"),
        ("ggml.token_type", 5),
        ("ggml.token_type", ["3"]),
        ("ggml.merges", "a b"),
        ("ggml.merges", [1]),
        ("ggml.bos_token_id", "1"),
        ("ggml.eos_token_id", -1),
        ("chat_template", 5),
    ],
)
def test_odd_metadata_is_refused_with_file_and_field(sentencepiece_vocab: dict[str, Any], key: str, value: Any) -> None:
    vocab = {**sentencepiece_vocab, "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.merges": []}
    metadata = {**vocab, f"tokenizer.{key}": value}
    files = SimpleNamespace(kind="gguf", path=Path("odd.gguf"), metadata=metadata, vocab_size=None)
    with pytest.raises(CheckpointError, match=rf"odd\.gguf .*tokenizer\.{key}"):
        load_tokenizer(files)


@pytest.mark.parametrize("template", [5, ["x"], [{"name": "default", "template": 5}], {"default": "x"}])
def test_odd_templates_are_refused(byte_level_folder: Path, tmp_path: Path, template: Any) -> None:
    shutil.copy(byte_level_folder / "tokenizer.json", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json has a chat_template"):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[" * 100_000)
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json cannot be read"):
        Tokenizer.from_folder(tmp_path)


def test_a_template_of_odd_bytes_is_refused(byte_level_folder: Path, tmp_path: Path) -> None:
    shutil.copy(byte_level_folder / "tokenizer.json", tmp_path)
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(CheckpointError, match=r"chat_template\.jinja cannot be read"):
        Tokenizer.from_folder(tmp_path)


def test_folders_without_a_readable_tokeniser_say_so(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json"):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json cannot be read"):
        Tokenizer.from_folder(tmp_path)


def test_decoders_of_other_families_are_refused() -> None:
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models

    backend = Backend(models.WordPiece({"a": 0}, unk_token="a"))
    backend.decoder = decoders.WordPiece()
    with pytest.raises(CheckpointError, match="WordPiece"):
        Tokenizer(backend, {}, None)


def test_lone_surrogates_are_a_request_error(byte_level_folder: Path) -> None:
    with pytest.raises(RequestError, match="surrogates"):
        Tokenizer.from_folder(byte_level_folder).encode("a\ud800b")


def test_ids_beyond_the_vocabulary_add_no_text(byte_level_folder: Path) -> None:
    tokenizer = Tokenizer.from_folder(byte_level_folder)
    ids = tokenizer.encode("plain text")
    assert tokenizer.decode([*ids, tokenizer.vocab_size + 5]) == "plain text"


def test_stand_in_gives_one_printable_word_per_id() -> None:
    tokenizer = load_tokenizer(resolve("random:qwen3-0.6b"))
    assert tokenizer.vocab_size == 151936
    ids = [0, 1, 79, 80, 6399, 6400, 151935, 7, 7]
    text = tokenizer.decode(ids)
    assert text.isprintable() and len(text.split()) == len(ids)
    assert tokenizer.encode(text) == ids
    words = {tokenizer.piece(i) for i in range(20_000)}
    assert len(words) == 20_000
    hashed = tokenizer.encode("Any words, even 人工智能 🙂")
    assert len(hashed) == 5 and all(0 <= i < tokenizer.vocab_size for i in hashed)
    assert hashed == tokenizer.encode("Any words, even 人工智能 🙂")
    assert tokenizer.encode_chat([{"role": "user", "content": "hello you"}]) == tokenizer.encode("hello you")
    assert tokenizer.encode("") == []
