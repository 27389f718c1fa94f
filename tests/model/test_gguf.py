"""GGUF files: the header reader against the gguf library's, weights against the folder that they came from, damage."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from minillm.errors import CheckpointError
from minillm.kernels import reference
from minillm.model.checkpoint_config import config_from_gguf
from minillm.model.gguf import ROPE_DIVISORS, GGUFFile
from minillm.model.rotary import llama3_divisors
from minillm.model.sources import load_config, load_weights, resolve
from minillm.model.stored import Shard, StoredTensor
from minillm.model.transformer import Transformer
from tests.model.conftest import make_hf_model
from tests.model.gguf_files import write_gguf

ARCHES = [("llama-biased", "llama"), ("llama-yarn", "llama"), ("qwen2", "qwen2"), ("qwen3", "qwen3")]
YARN = {
    "llama.rope.scaling.type": "yarn",
    "llama.rope.scaling.factor": 4.0,
    "llama.rope.scaling.original_context_length": 64,
}


def weights_of(source: Path) -> dict[str, torch.Tensor]:
    files = resolve(str(source))
    model = Transformer(load_config(files), ops=reference, dtype=torch.float32, device="cpu")
    load_weights(model, files)
    return {**model.state_dict(), "cos_sin": model.cos_sin_EH}


@pytest.mark.parametrize(("family", "arch"), ARCHES)
def test_weights_equal_the_folder_s(tmp_path: Path, family: str, arch: str) -> None:
    model = make_hf_model(family)
    model.save_pretrained(tmp_path / "folder")
    write_gguf(tmp_path / "model.gguf", model, arch, extra=YARN if family == "llama-yarn" else None)
    expected, found = weights_of(tmp_path / "folder"), weights_of(tmp_path / "model.gguf")
    assert expected.keys() == found.keys()
    for name, weight in expected.items():
        assert torch.equal(found[name], weight), name


@pytest.mark.parametrize("quant", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_quantised_weights_are_close(tmp_path: Path, quant: str) -> None:
    model = make_hf_model("llama")
    write_gguf(tmp_path / "exact.gguf", model, "llama")
    write_gguf(tmp_path / "small.gguf", model, "llama", quant)
    expected, found = weights_of(tmp_path / "exact.gguf"), weights_of(tmp_path / "small.gguf")
    for name, weight in expected.items():
        error = (found[name] - weight).abs().max() / weight.abs().max()
        assert error < (0.01 if quant in ("F16", "BF16", "Q8_0") else 0.2), name


@pytest.mark.parametrize("quant", gguf.quants._type_traits, ids=lambda kind: kind.name)
def test_every_type_expands_whole_and_in_rows(quant: gguf.GGMLQuantizationType) -> None:
    block_size, block_bytes = gguf.GGML_QUANT_SIZES[quant]
    rng = np.random.default_rng(0)
    data = rng.integers(0, 64, (6, 2 * block_bytes), dtype=np.uint8)
    expected = torch.from_numpy(gguf.quants.dequantize(data, quant))
    stored = StoredTensor("w", quant.name, (6, 2 * block_size), data)
    assert torch.equal(stored.dense(), expected)
    assert torch.equal(stored.dense(Shard(2, 3, 6)), expected[2:5])


def test_a_type_that_cannot_be_expanded_is_named() -> None:
    with pytest.raises(CheckpointError, match=r"tensor w has type I32.*take a file .* another type"):
        StoredTensor("w", "I32", (2, 2), np.zeros((2, 8), np.uint8)).dense()


def test_header_equals_the_library_s(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_gguf(path, make_hf_model("llama"), "llama", "Q4_1")
    ours, theirs = GGUFFile(path), gguf.GGUFReader(path)
    fields = {k: f.contents() for k, f in theirs.fields.items() if not k.startswith("GGUF.")}
    assert ours.metadata == fields
    assert {"test.strings", "test.numbers", "test.flag"} <= fields.keys()
    assert list(ours.tensors) == [t.name for t in theirs.tensors]
    for tensor in theirs.tensors:
        info = ours.tensors[tensor.name]
        assert (info.offset, info.num_bytes, info.format) == (
            tensor.data_offset,
            tensor.n_bytes,
            tensor.tensor_type.name,
        )
        assert info.shape == tuple(reversed(tensor.shape.tolist()))
        assert np.array_equal(ours.array(tensor.name), tensor.data)


def test_truncation_anywhere_is_a_checkpoint_error(tmp_path: Path) -> None:
    path, short = tmp_path / "model.gguf", tmp_path / "short.gguf"
    write_gguf(path, make_hf_model("llama"), "llama", "Q8_0")
    data = path.read_bytes()
    start = min(t.offset for t in GGUFFile(path).tensors.values())
    for size in (*range(0, start, 7), start, len(data) // 2, len(data) - 64):
        short.write_bytes(data[:size])
        with pytest.raises(CheckpointError, match="short.gguf"):
            GGUFFile(short)


def test_damaged_headers_are_checkpoint_errors(tmp_path: Path) -> None:
    path, bad = tmp_path / "model.gguf", tmp_path / "bad.gguf"
    write_gguf(path, make_hf_model("llama"), "llama")
    data = bytearray(path.read_bytes())
    start = min(t.offset for t in GGUFFile(path).tensors.values())
    rng = np.random.default_rng(0)
    num_refused = 0
    for _ in range(300):
        damaged = data.copy()
        for at in rng.integers(0, start, 4):
            damaged[at] = rng.integers(0, 256)
        bad.write_bytes(damaged)
        try:
            config_from_gguf(GGUFFile(bad))
        except CheckpointError:
            num_refused += 1
    assert num_refused > 50


@pytest.mark.parametrize(
    ("old", "new"),
    [("blk.1.ffn_norm.weight", "blk.0.ffn_norm.weight"), ("llama.rope.freq_basx", "llama.rope.freq_base")],
)
def test_what_is_there_twice_is_damage(tmp_path: Path, old: str, new: str) -> None:
    path = tmp_path / "model.gguf"
    write_gguf(path, make_hf_model("llama"), "llama", extra={"llama.rope.freq_basx": 7.0})
    path.write_bytes(path.read_bytes().replace(old.encode(), new.encode()))
    with pytest.raises(CheckpointError, match=rf"model\.gguf is damaged .*{new} is there twice"):
        GGUFFile(path)


@pytest.mark.parametrize("part", ["attn_q", "attn_k"])
@pytest.mark.parametrize("other", ["token_embd.weight", "output_norm.weight", "blk.0.ffn_gate.weight"])
def test_heads_of_a_wrong_shape_are_refused(tmp_path: Path, part: str, other: str) -> None:
    write_gguf(tmp_path / "model.gguf", make_hf_model("llama"), "llama")
    files = resolve(str(tmp_path / "model.gguf"))
    name = f"blk.0.{part}.weight"
    files.gguf.tensors[name] = files.gguf.tensors[other]._replace(name=name)
    model = Transformer(load_config(files), ops=reference, dtype=torch.float32, device="cpu")
    with pytest.raises(CheckpointError, match=rf"layers\.0\.self_attn\.{part[-1]}_proj\.weight has shape"):
        load_weights(model, files)


@pytest.mark.parametrize(
    ("extra", "factor"),
    [
        ({"llama.rope.scale_linear": 4.0}, 4.0),
        ({"llama.rope.scaling.factor": 4.0}, 4.0),
        ({"llama.rope.scaling.factor": 4.0, "llama.rope.scale_linear": 2.0}, 4.0),
        ({"llama.rope.scaling.factor": 4.0, "llama.rope.scaling.type": "none"}, None),
    ],
)
def test_linear_scaling_needs_no_type(tmp_path: Path, extra: dict[str, str | float], factor: float | None) -> None:
    write_gguf(tmp_path / "model.gguf", make_hf_model("llama"), "llama", extra=extra)
    scaling = load_config(resolve(str(tmp_path / "model.gguf"))).rope_scaling
    assert (scaling and (scaling.kind, scaling.factor)) == (factor and ("linear", factor))


@pytest.mark.parametrize("kind", ["F16", "I8"])
def test_divisors_of_other_types_are_read_or_refused(tmp_path: Path, kind: str) -> None:
    write_gguf(tmp_path / "model.gguf", make_hf_model("llama"), "llama")
    file = GGUFFile(tmp_path / "model.gguf")
    norm = file.tensors["output_norm.weight"]
    file.tensors[ROPE_DIVISORS] = norm._replace(format=kind, shape=(8,), num_bytes=16 if kind == "F16" else 8)
    with pytest.raises(CheckpointError, match="unknown rule" if kind == "F16" else "cannot be expanded"):
        config_from_gguf(file)


def test_llama3_scaling_is_recovered_from_its_divisors(tmp_path: Path) -> None:
    from minillm.config import Configs, ModelConfig

    def shape_of(config: ModelConfig, scale: float) -> CheckpointError | None:
        file = GGUFFile(tmp_path / "model.gguf")
        file.metadata["llama.rope.freq_base"] = config.rope_theta
        file.metadata["llama.attention.key_length"] = config.head_size
        file.metadata["llama.attention.value_length"] = config.head_size
        assert config.rope_scaling is not None
        divisors = (llama3_divisors(config, config.rope_scaling) * scale).numpy()
        file.tensors[ROPE_DIVISORS] = file.tensors["output_norm.weight"]
        file.array = lambda name: divisors  # type: ignore[method-assign]
        try:
            found = config_from_gguf(file).rope_scaling
        except CheckpointError as error:
            return error
        assert found is not None and found.factor == pytest.approx(config.rope_scaling.factor)
        return None

    write_gguf(tmp_path / "model.gguf", make_hf_model("llama"), "llama")
    for config in (Configs.LLAMA_3_1_8B, Configs.LLAMA_3_2_1B):
        assert shape_of(config, 1.0) is None
        assert "unknown rule" in str(shape_of(config, 1.5))


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"llama.expert_count": 8}, "mixture of experts"),
        ({"llama.rope.dimension_count": 8}, "rotates only a part"),
        ({"llama.rope.scaling.type": "longrope", "llama.rope.scaling.factor": 2.0}, "longrope"),
        ({"split.count": 3}, "one part of several"),
        ({"general.alignment": 0}, "damaged"),
    ],
)
def test_what_cannot_run_exactly_is_refused(tmp_path: Path, extra: dict[str, str | int | float], message: str) -> None:
    write_gguf(tmp_path / "model.gguf", make_hf_model("llama"), "llama", extra=extra)
    with pytest.raises(CheckpointError, match=message):
        load_config(resolve(str(tmp_path / "model.gguf")))


def test_another_architecture_is_refused(tmp_path: Path) -> None:
    write_gguf(tmp_path / "model.gguf", make_hf_model("llama"), "gemma3")
    with pytest.raises(CheckpointError, match="'gemma3'; known are llama"):
        load_config(resolve(str(tmp_path / "model.gguf")))
