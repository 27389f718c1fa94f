"""Options of the engine and shapes of a model: frozen, keyword-only, checked when made. It knows no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

from minillm.errors import ConfigError
from minillm.types import MAX_SEED, shown

__all__ = ["Configs", "EngineConfig", "ModelConfig", "RopeScaling"]

DTYPES = ("auto", "float32", "bfloat16", "float16")
BLOCK_SIZES = (16, 32, 64, 128)
MAX_SIZE = 2**31 - 1
MAX_NUMBER = 1e30
SCALES = 1e-6, 1e6
"""Between them lie the numbers of all models; far beyond, a table of float32 has infinities and NaN."""
MAX_DRAFTS = 32
NGRAM_DRAFTS, MODEL_DRAFTS = 7, 4
NGRAM = "ngram"
MAX_SIZES: Mapping[str, int] = MappingProxyType(
    {
        "max_model_len": 2**24,
        "max_num_batched_tokens": 2**20,
        "max_num_seqs": 2**14,
        "num_kv_blocks": 2**31 - 2,
        "min_chunk_size": 2**20,
        "max_chunk_size": 2**20,
    }
)
"""Most that a size may be: beyond any machine, and within 32 bits on the device."""


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """How to run a model. None means: chosen from the device and the model when the engine starts."""

    dtype: str = "auto"
    """float32, bfloat16 or float16; auto is bfloat16 on a GPU and the measured best on a CPU: float32, with steps of
    few rows on the 4-bit codes of a GGUF file as they are. Only float32 gives the same tokens in any batch."""
    device: str = "auto"
    """cpu, cuda or cuda:N; auto takes a GPU if there is one."""
    max_model_len: int | None = None
    """Most positions of a request, prompt and output together, at least 2; None takes the model's, or less if memory
    holds less."""
    max_num_batched_tokens: int | None = None
    """Hard cap on the tokens of one step: it sets the activation memory."""
    max_num_seqs: int | None = None
    """Most requests that run at once (rows of device state)."""
    block_size: int | None = None
    """Tokens per KV block: 16, 32, 64 or 128."""
    enable_prefix_caching: bool = True
    """Reuse the blocks of a prompt that was computed before."""
    enable_chunked_prefill: bool = True
    """Split prompts over steps; False runs a prompt whole or not at all."""
    min_chunk_size: int = 16
    """Smallest part of a prompt worth a place in a step, unless it is the last."""
    max_chunk_size: int | None = None
    """Largest part of a prompt in one step."""
    gpu_memory_utilization: float = 0.9
    """Share of the device's memory that the engine may use, in (0, 1]; on a CPU, of what is free."""
    num_kv_blocks: int | None = None
    """Blocks of the KV cache that requests can use; None fills the memory that is left."""
    enforce_eager: bool = False
    """Launch every kernel by itself rather than replaying CUDA graphs."""
    overlap: bool = True
    """Plan the next step while the device runs this one; False waits for each step."""
    seed: int = 0
    """Draws the seeds of requests that bring none, and random weights."""
    speculative: str | None = None
    """Who drafts tokens for the model to verify, which changes no output: ngram (what followed the last tokens when
    they appeared before) or the name of a small model with the same tokeniser. None drafts nothing."""
    num_drafts: int | None = None
    """Most drafts of a request in a step, 1 to 32; None is 7 for ngram, 4 for a model. Fewer if they do not pay."""
    draft_device: str | None = None
    """Where the small model runs: cpu, cuda or cuda:N; None is beside the large one."""
    recorded_steps: int = 512
    """Steps that the flight recorder keeps at least, without contents; 0 turns it off."""

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ConfigError(f"dtype must be one of {', '.join(DTYPES)}, not {shown(self.dtype)}")
        if not isinstance(self.device, str):
            raise ConfigError(f"device must be auto, cpu, cuda or cuda:N, not {shown(self.device)}")
        for name, high in MAX_SIZES.items():
            value = getattr(self, name)
            low = 2 if name == "max_model_len" else 1  # a prompt of one token, and the one that follows it
            if not is_int_in(value, low, high) and (value is not None or name == "min_chunk_size"):
                raise ConfigError(f"{name} must be an integer from {low} to {high}, not {shown(value)}")
        if self.block_size is not None and not (is_int_in(self.block_size, 1, 128) and self.block_size in BLOCK_SIZES):
            raise ConfigError(f"block_size must be one of {BLOCK_SIZES}, not {shown(self.block_size)}")
        if self.max_chunk_size is not None and self.max_chunk_size < self.min_chunk_size:
            raise ConfigError(f"max_chunk_size {self.max_chunk_size} is below min_chunk_size {self.min_chunk_size}")
        share = self.gpu_memory_utilization
        if not isinstance(share, (int, float)) or isinstance(share, bool) or not 0.0 < share <= 1.0:
            raise ConfigError(f"gpu_memory_utilization must be a number in (0, 1], not {shown(share)}")
        for name in ("enable_prefix_caching", "enable_chunked_prefill", "enforce_eager", "overlap"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} must be True or False, not {shown(getattr(self, name))}")
        if not is_int_in(self.seed, 0, MAX_SEED):
            raise ConfigError(f"seed must be an integer from 0 to 2**63-1, not {shown(self.seed)}")
        if not is_int_in(self.recorded_steps, 0, 2**20):
            raise ConfigError(f"recorded_steps must be an integer from 0 to {2**20}, not {shown(self.recorded_steps)}")
        if not self.enable_chunked_prefill and self.max_chunk_size is not None:
            raise ConfigError("max_chunk_size means nothing without chunked prefill: leave it out, or chunk prompts")
        self._check_speculation()

    def _check_speculation(self) -> None:
        for name in ("speculative", "draft_device"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, str) and value):
                raise ConfigError(f"{name} must be a name or None, not {shown(value)}")
        if self.num_drafts is not None and not is_int_in(self.num_drafts, 1, MAX_DRAFTS):
            raise ConfigError(f"num_drafts must be an integer from 1 to {MAX_DRAFTS}, not {shown(self.num_drafts)}")
        if self.speculative is None and self.num_drafts is not None:
            raise ConfigError("num_drafts means nothing without speculative: name who drafts")
        if self.speculative in (None, NGRAM) and self.draft_device is not None:
            raise ConfigError("draft_device means nothing without a small model: name one as speculative")

    @property
    def max_drafts(self) -> int:
        """Most drafts of a request in a step; 0 without speculation."""
        if self.speculative is None:
            return 0
        return self.num_drafts or (NGRAM_DRAFTS if self.speculative == NGRAM else MODEL_DRAFTS)


def is_int_in(value: object, low: int, high: int) -> bool:
    """Whether `value` is an integer, no bool, in [low, high]."""
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def check_whole(config: object, names: Sequence[str]) -> None:
    """Raise ConfigError unless these fields are whole numbers from 1 to MAX_SIZE."""
    for name in names:
        value = getattr(config, name)
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= MAX_SIZE:
            raise ConfigError(f"{name} must be a whole number from 1 to {MAX_SIZE}, not {value!r}")


def check_between(config: object, names: Sequence[str], low: float, high: float) -> None:
    """Raise ConfigError unless these fields are numbers above `low` and below `high`."""
    for name in names:
        value = getattr(config, name)
        if not isinstance(value, (int, float)) or not low < value < high:
            raise ConfigError(f"{name} must be a number above {low:g} and below {high:g}, not {shown(value)}")


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How rotary frequencies are stretched beyond the length a model was trained on."""

    kind: str
    """linear, llama3 or yarn."""
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None

    def __post_init__(self) -> None:
        check_whole(self, ("original_max_position",))
        names = ("factor", "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow")
        check_between(self, names, *SCALES)
        if self.attention_factor is not None:
            check_between(self, ("attention_factor",), *SCALES)
        if not self.low_freq_factor < self.high_freq_factor:
            raise ConfigError(
                f"low_freq_factor {self.low_freq_factor} is not below high_freq_factor {self.high_freq_factor}"
            )
        if self.beta_slow > self.beta_fast:
            raise ConfigError(f"beta_slow {self.beta_slow} is above beta_fast {self.beta_fast}")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Shapes and variations of a decoder of the Llama family."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    max_position: int
    """Positions the model was made for."""
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    """Biases on the query, key and value projections (Qwen2)."""
    output_bias: bool = False
    """Bias on attention's output projection (Llama with attention_bias)."""
    mlp_bias: bool = False
    qk_norm: bool = False
    """RMSNorm on each head's queries and keys (Qwen3)."""
    eos_token_ids: tuple[int, ...] = ()
    """Tokens that end a text."""
    bos_token_id: int | None = None

    def __post_init__(self) -> None:
        check_whole(self, ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads"))
        check_whole(self, ("head_size", "max_position"))
        check_between(self, ("rms_norm_eps",), 0.0, MAX_NUMBER)
        check_between(self, ("rope_theta",), 1.0, MAX_NUMBER)  # frequencies fall
        for token_id in (*self.eos_token_ids, *(() if self.bos_token_id is None else (self.bos_token_id,))):
            if not isinstance(token_id, int) or isinstance(token_id, bool) or token_id < 0:
                raise ConfigError(f"a token id must be a whole number from 0, not {token_id!r}")
            if token_id >= self.vocab_size:
                raise ConfigError(f"token {token_id} begins or ends a text, but vocab_size is {self.vocab_size}")
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(f"num_heads {self.num_heads} is no multiple of num_kv_heads {self.num_kv_heads}")
        if self.head_size % 2:
            raise ConfigError(f"head_size must be even, not {self.head_size}")

    @property
    def num_layer_params(self) -> int:
        """Weights of one decoder layer's matrices."""
        qkv = self.hidden_size * (self.num_heads + 2 * self.num_kv_heads) * self.head_size
        out = self.num_heads * self.head_size * self.hidden_size
        return qkv + out + 3 * self.hidden_size * self.intermediate_size

    @property
    def num_step_params(self) -> int:
        """Weights that a decode step reads: every layer and the output head (the input embedding is a gather)."""
        return self.num_layers * self.num_layer_params + self.vocab_size * self.hidden_size

    @property
    def num_params(self) -> int:
        """All weights of matrices and embeddings."""
        return self.num_step_params + (0 if self.tie_word_embeddings else self.vocab_size * self.hidden_size)

    def kv_bytes_per_token(self, dtype_size: int) -> int:
        """Bytes that one token takes in the cache, all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_size * dtype_size

    @property
    def attention_equivalence(self) -> float:
        """Context length at which a token's attention costs as much as its matrices (design's kappa)."""
        return 2 * self.num_layers * self.num_layer_params / (4 * self.num_layers * self.num_heads * self.head_size)


def llama3_rope(factor: float) -> RopeScaling:
    """The stretch of Llama 3.1 and later."""
    return RopeScaling(kind="llama3", factor=factor, original_max_position=8192)


class Configs:
    """Shapes of known models, from their published config.json, and of tiny ones for tests. `random:NAME` uses them."""

    SMOLLM2_135M = ModelConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_layers=30,
        num_heads=9,
        num_kv_heads=3,
        head_size=64,
        max_position=8192,
        rope_theta=100_000.0,
        tie_word_embeddings=True,
    )
    QWEN2_5_0_5B = ModelConfig(
        vocab_size=151936,
        hidden_size=896,
        intermediate_size=4864,
        num_layers=24,
        num_heads=14,
        num_kv_heads=2,
        head_size=64,
        max_position=32768,
        rms_norm_eps=1e-6,
        rope_theta=1_000_000.0,
        tie_word_embeddings=True,
        attention_bias=True,
    )
    QWEN3_0_6B = ModelConfig(
        vocab_size=151936,
        hidden_size=1024,
        intermediate_size=3072,
        num_layers=28,
        num_heads=16,
        num_kv_heads=8,
        head_size=128,
        max_position=40960,
        rms_norm_eps=1e-6,
        rope_theta=1_000_000.0,
        tie_word_embeddings=True,
        qk_norm=True,
    )
    QWEN3_1_7B = replace(QWEN3_0_6B, hidden_size=2048, intermediate_size=6144)
    QWEN3_8B = replace(
        QWEN3_0_6B,
        hidden_size=4096,
        intermediate_size=12288,
        num_layers=36,
        num_heads=32,
        tie_word_embeddings=False,
    )
    LLAMA_3_1_8B = ModelConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_layers=32,
        num_heads=32,
        num_kv_heads=8,
        head_size=128,
        max_position=131072,
        rope_theta=500_000.0,
        rope_scaling=llama3_rope(8.0),
    )
    LLAMA_3_2_1B = replace(
        LLAMA_3_1_8B,
        hidden_size=2048,
        intermediate_size=8192,
        num_layers=16,
        head_size=64,
        rope_scaling=llama3_rope(32.0),
        tie_word_embeddings=True,
    )
    MISTRAL_7B = replace(LLAMA_3_1_8B, vocab_size=32768, max_position=32768, rope_theta=1_000_000.0, rope_scaling=None)
    TINY_LLAMA = ModelConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=128,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_size=16,
        max_position=2048,
        rope_scaling=RopeScaling(kind="llama3", factor=8.0, original_max_position=256),
        tie_word_embeddings=True,
    )
    TINY_QWEN2 = replace(TINY_LLAMA, num_layers=3, rope_scaling=None, attention_bias=True)
    TINY_QWEN3 = replace(TINY_LLAMA, head_size=32, rope_scaling=None, qk_norm=True, tie_word_embeddings=False)
    TINY_MISTRAL = replace(TINY_LLAMA, num_heads=8, num_kv_heads=1, rope_scaling=None, tie_word_embeddings=False)

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """Names that `find` knows, as in `random:NAME`."""
        return tuple(BY_NAME)

    @classmethod
    def find(cls, name: str) -> ModelConfig | None:
        """The shape of that name, or None."""
        return BY_NAME.get(name.lower())


BY_NAME: Mapping[str, ModelConfig] = MappingProxyType(
    {
        "smollm2-135m": Configs.SMOLLM2_135M,
        "qwen2.5-0.5b": Configs.QWEN2_5_0_5B,
        "qwen3-0.6b": Configs.QWEN3_0_6B,
        "qwen3-1.7b": Configs.QWEN3_1_7B,
        "qwen3-8b": Configs.QWEN3_8B,
        "llama-3.2-1b": Configs.LLAMA_3_2_1B,
        "llama-3.1-8b": Configs.LLAMA_3_1_8B,
        "mistral-7b": Configs.MISTRAL_7B,
        "tiny-llama": Configs.TINY_LLAMA,
        "tiny-qwen2": Configs.TINY_QWEN2,
        "tiny-qwen3": Configs.TINY_QWEN3,
        "tiny-mistral": Configs.TINY_MISTRAL,
    }
)
