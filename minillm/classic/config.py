"""Configs of the classic API: mutable, as its documents need, and frozen into `Settings` when a model is built.

It knows shapes, places and defaults, not how they are used.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from minillm.config import DTYPES, is_int_in
from minillm.config import ModelConfig as Shape
from minillm.errors import ConfigError
from minillm.runtime.startup import Place, choose_device, choose_dtype, kernel_set
from minillm.types import shown

__all__ = ["AUTO", "Configs", "ModelConfig", "Settings", "check_chunk_size"]

AUTO = "auto"
MAX_CHUNK_SIZE = 2**20


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a model keeps of a ModelConfig: checked, and out of reach of later assignments."""

    shape: Shape
    place: Place
    chunk_size: int | str
    enable_chunked_prefill: bool
    min_chunk_size: int
    max_chunk_size: int
    use_flash_attention: bool
    memory_efficient: bool


@dataclass(kw_only=True)
class ModelConfig:
    """Shape of a decoder, where it computes, and how prompts are computed. Change it freely until a model is built."""

    vocab_size: int = 32_000
    hidden_size: int = 512
    intermediate_size: int = 1408
    num_layers: int = 8
    num_heads: int = 8
    num_kv_heads: int | None = None
    """Key/value heads; None: as many as heads."""
    head_size: int | None = None
    """None: hidden_size over num_heads."""
    max_position: int = 2048
    """Positions that the model is made for."""
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10_000.0
    tie_word_embeddings: bool = True
    eos_token_id: int | None = None
    """Token that ends a text; None: none does."""
    dtype: str = AUTO
    """float32, bfloat16 or float16; auto as in EngineConfig."""
    device: str = AUTO
    """cpu, cuda or cuda:N; auto takes a GPU if there is one."""
    chunk_size: int | str = 512
    """Tokens of each sequence in a pass over a prompt; auto takes what free memory and the stairs of matrix products
    suggest, from min_chunk_size to max_chunk_size."""
    enable_chunked_prefill: bool = True
    """False computes every prompt in one pass."""
    min_chunk_size: int = 64
    """Least that auto takes."""
    max_chunk_size: int = 2048
    """Most that auto takes."""
    use_flash_attention: bool = True
    """Flash Attention; False is standard attention, which holds the whole matrix of scores."""
    memory_efficient: bool = True
    """One chunk after the other, whose activations are freed; False computes all chunks side by side in one pass, whose
    activations are those of the whole prompt."""

    def freeze(self) -> Settings:
        """Check every field. Raises ConfigError, which names the field and its range."""
        flags = ("enable_chunked_prefill", "use_flash_attention", "memory_efficient", "tie_word_embeddings")
        for name in flags:
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} must be True or False, not {shown(getattr(self, name))}")
        for name in ("min_chunk_size", "max_chunk_size"):
            if not is_int_in(getattr(self, name), 1, MAX_CHUNK_SIZE):
                raise ConfigError(
                    f"{name} must be an integer from 1 to {MAX_CHUNK_SIZE}, not {shown(getattr(self, name))}"
                )
        if self.max_chunk_size < self.min_chunk_size:
            raise ConfigError(f"max_chunk_size {self.max_chunk_size} is below min_chunk_size {self.min_chunk_size}")
        check_chunk_size(self.chunk_size)
        if self.dtype not in DTYPES:
            raise ConfigError(f"dtype must be one of {', '.join(DTYPES)}, not {shown(self.dtype)}")
        if not isinstance(self.device, str):
            raise ConfigError(f"device must be auto, cpu, cuda or cuda:N, not {shown(self.device)}")
        device = choose_device(self.device)
        kept = {field.name: getattr(self, field.name) for field in fields(Settings) if hasattr(self, field.name)}
        place = Place(device, choose_dtype(self.dtype, device), kernel_set(device))
        return Settings(shape=self._shape(), place=place, **kept)

    def _shape(self) -> Shape:
        head_size = self.head_size
        if head_size is None:
            if not is_int_in(self.num_heads, 1, 2**31 - 1) or not is_int_in(self.hidden_size, 1, 2**31 - 1):
                raise ConfigError(
                    f"hidden_size and num_heads must be integers from 1, not {shown(self.hidden_size)} and "
                    f"{shown(self.num_heads)}"
                )
            if self.hidden_size % self.num_heads:
                raise ConfigError(
                    f"hidden_size {self.hidden_size} is no multiple of num_heads {self.num_heads}: give head_size"
                )
            head_size = self.hidden_size // self.num_heads
        return Shape(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_layers=self.num_layers,
            num_heads=self.num_heads,
            num_kv_heads=self.num_heads if self.num_kv_heads is None else self.num_kv_heads,
            head_size=head_size,
            max_position=self.max_position,
            rms_norm_eps=self.rms_norm_eps,
            rope_theta=self.rope_theta,
            tie_word_embeddings=self.tie_word_embeddings,
            eos_token_ids=() if self.eos_token_id is None else (self.eos_token_id,),
        )


def check_chunk_size(value: object) -> None:
    """Raise ConfigError unless `value` can be a chunk size."""
    if value != AUTO and not is_int_in(value, 1, MAX_CHUNK_SIZE):
        raise ConfigError(f"chunk_size must be {AUTO} or an integer from 1 to {MAX_CHUNK_SIZE}, not {shown(value)}")


class Configs:
    """Three sizes, each call a config of its own. Parameters, embeddings included: 42, 110 and 330 million."""

    @staticmethod
    def small() -> ModelConfig:
        """8 layers, 512 wide: in float32 the cache of 2,048 positions takes 64 MiB."""
        return ModelConfig()

    @staticmethod
    def medium() -> ModelConfig:
        """10 layers, 640 wide."""
        return ModelConfig(hidden_size=640, intermediate_size=1728, num_layers=10, num_heads=10, max_position=4096)

    @staticmethod
    def large() -> ModelConfig:
        """24 layers, 1,024 wide."""
        return ModelConfig(hidden_size=1024, intermediate_size=2816, num_layers=24, num_heads=16, max_position=8192)
