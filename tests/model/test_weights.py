"""Safetensors folders: shards, what is missing or left over, damage, and pickles that are never opened."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from minillm.errors import CheckpointError
from minillm.kernels import reference
from minillm.model.sources import load_config, load_weights, resolve
from minillm.model.transformer import Transformer
from tests.model.conftest import make_hf_model

Weights = dict[str, Tensor]


def load(folder: Path, dtype: torch.dtype = torch.float32) -> Transformer:
    files = resolve(str(folder))
    model = Transformer(load_config(files), ops=reference, dtype=dtype, device="cpu")
    load_weights(model, files)
    return model


def change(folder: Path, edit: Callable[[Weights], None]) -> None:
    weights = load_file(folder / "model.safetensors")
    edit(weights)
    save_file(weights, folder / "model.safetensors")


def test_missing_and_left_over_tensors_are_named(llama_folder: Path) -> None:
    def edit(weights: Weights) -> None:
        weights["model.layers.1.self_attn.odd.weight"] = weights.pop("model.layers.1.self_attn.k_proj.weight")

    change(llama_folder, edit)
    with pytest.raises(CheckpointError) as caught:
        load(llama_folder)
    assert "missing tensors: model.layers.1.self_attn.k_proj.weight" in str(caught.value)
    assert "left-over tensors: model.layers.1.self_attn.odd.weight" in str(caught.value)


def test_many_missing_tensors_are_counted(llama_folder: Path) -> None:
    change(llama_folder, lambda weights: [weights.pop(name) for name in list(weights)[:20]] and None)
    with pytest.raises(CheckpointError, match="and 12 more"):
        load(llama_folder)


def test_spare_tensors_are_tolerated(llama_folder: Path) -> None:
    def edit(weights: Weights) -> None:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
        weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)

    before = load(llama_folder).state_dict()
    change(llama_folder, edit)
    after = load(llama_folder).state_dict()
    assert all(torch.equal(after[name], weight) for name, weight in before.items())


def test_an_untied_head_is_no_spare(tmp_path: Path) -> None:
    make_hf_model("llama-biased").save_pretrained(tmp_path)
    change(tmp_path, lambda weights: weights.pop("lm_head.weight") is None)  # type: ignore[arg-type, return-value]
    with pytest.raises(CheckpointError, match=r"missing tensors: lm_head\.weight$"):
        load(tmp_path)


def test_shapes_of_another_model_are_refused(llama_folder: Path) -> None:
    def edit(weights: Weights) -> None:
        weights["model.norm.weight"] = torch.ones(65)

    change(llama_folder, edit)
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight has shape \[65\] and the config asks for \[64\]"):
        load(llama_folder)


def test_integer_weights_are_refused(llama_folder: Path) -> None:
    def edit(weights: Weights) -> None:
        weights["model.norm.weight"] = torch.ones(64, dtype=torch.int8)

    change(llama_folder, edit)
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight.*torch\.int8"):
        load(llama_folder)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_are_rounded_to_the_model_s_dtype(llama_folder: Path, dtype: torch.dtype) -> None:
    exact, rounded = load(llama_folder).state_dict(), load(llama_folder, dtype).state_dict()
    assert all(torch.equal(rounded[name], weight.to(dtype)) for name, weight in exact.items())


def test_sharded_folder_equals_single_file(tmp_path: Path) -> None:
    model = make_hf_model("qwen3")
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "many", max_shard_size="40KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    one, many = load(tmp_path / "one").state_dict(), load(tmp_path / "many").state_dict()
    assert all(torch.equal(many[name], weight) for name, weight in one.items())
    next((tmp_path / "many").glob("*-00002-*.safetensors")).unlink()
    with pytest.raises(CheckpointError, match=r"00002.*is missing"):
        load(tmp_path / "many")


def test_an_index_cannot_leave_its_folder(llama_folder: Path) -> None:
    (llama_folder / "model.safetensors").unlink()
    index = {"weight_map": {"model.norm.weight": "../model.safetensors"}}
    (llama_folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="outside its folder"):
        load(llama_folder)


@pytest.mark.parametrize("text", ["{", "[]", '{"weight_map": 3}', '{"weight_map": {"a": 3}}'])
def test_a_damaged_index_is_a_checkpoint_error(llama_folder: Path, text: str) -> None:
    (llama_folder / "model.safetensors").unlink()
    (llama_folder / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointError, match="index.json is damaged"):
        load(llama_folder)


def test_a_shard_of_an_impossible_name_is_missing(llama_folder: Path) -> None:
    (llama_folder / "model.safetensors").unlink()
    index = {"weight_map": {"model.norm.weight": f"{'x' * 300}.safetensors"}}
    (llama_folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"xxx\.safetensors is missing"):
        load(llama_folder)


def test_what_lies_beside_the_whole_model_is_not_loaded(llama_folder: Path) -> None:
    expected = load(llama_folder).state_dict()
    for name in ("adapter_model.safetensors", "consolidated.safetensors"):
        save_file({"model.norm.weight": torch.zeros(64), "layers.0.wq.weight": torch.ones(2)}, llama_folder / name)
    (llama_folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-00001.safetensors"}}')
    assert all(torch.equal(weight, expected[name]) for name, weight in load(llama_folder).state_dict().items())


@pytest.mark.parametrize("size", [0, 4, 100, 0.5, -1])
def test_truncated_safetensors_name_the_file(llama_folder: Path, size: float) -> None:
    path = llama_folder / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * size) if 0 < size < 1 else int(size)])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is damaged or truncated.*download it again"):
        load(llama_folder)


class Canary:
    """Leaves a file behind if it is ever unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str, str]]:
        return open, (str(self.path), "w")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth"])
def test_pickles_are_never_opened(llama_folder: Path, name: str) -> None:
    (llama_folder / "model.safetensors").unlink()
    (llama_folder / name).write_bytes(pickle.dumps(Canary(llama_folder / "canary")))
    with pytest.raises(CheckpointError, match="convert them to safetensors"):
        load(llama_folder)
    assert not (llama_folder / "canary").exists()


def test_a_folder_without_weights_says_so(llama_folder: Path) -> None:
    (llama_folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"has no \*\.safetensors file"):
        load(llama_folder)
