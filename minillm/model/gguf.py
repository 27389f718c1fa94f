"""Reads a GGUF file: metadata, tensor table, and tensors under their Hugging Face names. No torch model, no tokeniser.

The header is parsed here, since the gguf library makes an array object of every string of a vocabulary (seconds);
block types and their expansion are the library's. Layout, little-endian:

    "GGUF" version:u32 tensors:u64 pairs:u64 | pairs: key type:u32 value | tensors: name dims type:u32 offset:u64 | data
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from numpy.typing import NDArray

from minillm.errors import CheckpointError

if TYPE_CHECKING:
    from minillm.model.stored import StoredTensor

__all__ = ["GGUFFile", "TensorInfo"]

SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
STRING, ARRAY = 8, 9
MAX_DIMS = 4
FLOATS: dict[str, type[np.floating[Any]]] = {"F32": np.float32, "F16": np.float16}
LAYER_PARTS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
WHOLE_PARTS = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
ROPE_DIVISORS = "rope_freqs.weight"
PERMUTED_ARCHITECTURES = ("llama", "mistral")
"""Their converters interleave each head's query and key rows, so that rotary pairs are neighbours."""


class TensorInfo(NamedTuple):
    """Where a tensor lies. `shape` is outermost first."""

    name: str
    shape: tuple[int, ...]
    format: str
    offset: int
    num_bytes: int


class GGUFFile:
    """A GGUF file, its header read and checked, its data mapped."""

    def __init__(self, path: Path) -> None:
        """Raises CheckpointError if it is no GGUF file, is truncated, or is one part of several."""
        self.path = path
        try:
            with open(path, "rb") as file:
                self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path} cannot be read ({error})") from error
        try:
            self.metadata, self.tensors = self._parse()
        except (struct.error, KeyError, ValueError, TypeError, ArithmeticError) as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(f"{path} is damaged or truncated ({error!r}); download it again") from error

    @property
    def architecture(self) -> str:
        """llama, qwen2 …"""
        return str(self.metadata.get("general.architecture", ""))

    def array(self, name: str) -> NDArray[np.generic]:
        """A tensor as stored: rows of numbers for F32 and F16, rows of bytes otherwise."""
        info = self.tensors[name]
        flat = np.frombuffer(self._data, np.uint8, info.num_bytes, info.offset)
        if info.format in FLOATS:
            return flat.view(FLOATS[info.format]).reshape(info.shape)
        return flat.reshape(*info.shape[:-1], -1)

    def stored(self) -> Iterator[StoredTensor]:
        """Every tensor of the model under its Hugging Face name, query and key rows in the Hugging Face order."""
        from minillm.model.stored import DENSE, StoredTensor  # torch, which reading metadata does without

        is_permuted = self.architecture in PERMUTED_ARCHITECTURES
        for info in self.tensors.values():
            if info.name == ROPE_DIVISORS:  # part of the config
                continue
            name = checkpoint_name(info.name)
            data = self.array(info.name)
            if is_permuted and ".self_attn." in name and name.split(".")[-2] in ("q_proj", "k_proj"):
                data = unpermuted(data, self._num_heads(is_query=".q_proj." in name))
            stored = StoredTensor(name, info.format, info.shape, data)
            # Blocks run along the last dimension: without rows there is nothing to cut shards from.
            yield stored if len(info.shape) > 1 else StoredTensor(name, DENSE, info.shape, stored.dense())

    def _num_heads(self, *, is_query: bool) -> int:
        arch = self.architecture
        num_heads = self.metadata[f"{arch}.attention.head_count"]
        return int(num_heads if is_query else self.metadata.get(f"{arch}.attention.head_count_kv", num_heads))

    def _parse(self) -> tuple[dict[str, Any], dict[str, TensorInfo]]:
        data = self._data
        if data[:4] != b"GGUF":
            raise CheckpointError(f"{self.path} is not a GGUF file (it does not start with GGUF)")
        version, num_tensors, num_pairs = struct.unpack_from("<IQQ", data, 4)
        if version not in (2, 3):
            raise CheckpointError(f"{self.path} has GGUF version {version}; versions 2 and 3 (little-endian) are read")
        at = 24
        metadata: dict[str, Any] = {}
        for _ in range(num_pairs):
            key, at = self._string(at)
            if key in metadata:
                raise ValueError(f"{key} is there twice")
            (kind,) = struct.unpack_from("<I", data, at)
            metadata[key], at = self._value(at + 4, kind)
        if metadata.get("split.count", 0) > 1:
            raise CheckpointError(f"{self.path} is one part of several; merge them into one file (gguf-split --merge)")
        infos: dict[str, TensorInfo] = {}
        for _ in range(num_tensors):
            info, at = self._tensor_info(at)
            if info.name in infos:
                raise ValueError(f"tensor {info.name} is there twice")
            infos[info.name] = info
        alignment = int(metadata.get("general.alignment", 32))
        start = -(-at // alignment) * alignment
        tensors = {name: info._replace(offset=start + info.offset) for name, info in infos.items()}
        end = max((info.offset + info.num_bytes for info in tensors.values()), default=0)
        if end > len(data):
            raise CheckpointError(
                f"{self.path} is truncated: it has {len(data)} bytes and its tensors need {end}; download it again"
            )
        return metadata, tensors

    def _string(self, at: int) -> tuple[str, int]:
        (length,) = struct.unpack_from("<Q", self._data, at)
        end = at + 8 + length
        if end > len(self._data):
            raise ValueError(f"a string of {length} bytes at {at}")
        return self._data[at + 8 : end].decode("utf-8"), end

    def _value(self, at: int, kind: int) -> tuple[Any, int]:
        if kind == STRING:
            return self._string(at)
        if kind != ARRAY:
            return struct.unpack_from(SCALARS[kind], self._data, at)[0], at + struct.calcsize(SCALARS[kind])
        item_kind, count = struct.unpack_from("<IQ", self._data, at)
        at += 12
        if count > len(self._data):
            raise ValueError(f"an array of {count} entries at {at}")
        if item_kind == STRING:
            strings = []
            for _ in range(count):
                string, at = self._string(at)
                strings.append(string)
            return strings, at
        layout = f"<{count}{SCALARS[item_kind][1]}"
        return list(struct.unpack_from(layout, self._data, at)), at + struct.calcsize(layout)

    def _tensor_info(self, at: int) -> tuple[TensorInfo, int]:
        name, at = self._string(at)
        (num_dims,) = struct.unpack_from("<I", self._data, at)
        if not 1 <= num_dims <= MAX_DIMS:
            raise ValueError(f"tensor {name} of {num_dims} dimensions")
        *dims, kind, offset = struct.unpack_from(f"<{num_dims}QIQ", self._data, at + 4)
        at += 4 + 8 * num_dims + 12
        block_size, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
        if dims[0] % block_size or 0 in dims:
            raise ValueError(f"tensor {name} with rows of {dims[0]} entries in blocks of {block_size}")
        num_bytes = block_bytes
        for dim in (dims[0] // block_size, *dims[1:]):
            num_bytes *= dim
        return TensorInfo(name, tuple(reversed(dims)), GGMLQuantizationType(kind).name, offset, num_bytes), at


def checkpoint_name(name: str) -> str:
    """The Hugging Face name of a tensor; unknown names stay as they are (and are then reported as left over).

    >>> checkpoint_name("blk.3.attn_q.weight")
    'model.layers.3.self_attn.q_proj.weight'
    """
    if name in WHOLE_PARTS:
        return WHOLE_PARTS[name]
    pieces = name.split(".")
    if len(pieces) == 4 and pieces[0] == "blk" and pieces[2] in LAYER_PARTS:
        return f"model.layers.{pieces[1]}.{LAYER_PARTS[pieces[2]]}.{pieces[3]}"
    return name


def unpermuted(rows: NDArray[np.generic], num_heads: int) -> NDArray[np.generic]:
    """Query or key rows in the halves order: a head's rows 0 2 4 … then 1 3 5 … (rows move with their blocks).

    Rows that cannot be those heads stay as they are: whoever takes them checks the shape.
    """
    if rows.shape[0] % (2 * num_heads):
        return rows
    heads = rows.reshape(num_heads, rows.shape[0] // num_heads // 2, 2, *rows.shape[1:])
    return np.ascontiguousarray(heads.swapaxes(1, 2)).reshape(rows.shape)
