"""From a model's name to a running engine: files, tokeniser, runner, scheduler. It knows no requests."""

from __future__ import annotations

from dataclasses import dataclass, replace

from minillm.config import NGRAM, EngineConfig, ModelConfig
from minillm.core.scheduler import Scheduler, SchedulerLimits
from minillm.decoding.controller import Controller
from minillm.decoding.draft_model import DraftModel
from minillm.decoding.ngram_drafter import NgramDrafter
from minillm.decoding.speculator import Speculator
from minillm.engine.driver import EngineDriver
from minillm.engine.engine import Engine
from minillm.engine.recorder import make_scheduler
from minillm.errors import ConfigError
from minillm.model.sources import DEFAULT_MODEL, load_config, load_weights, resolve
from minillm.runtime.runner import Runner
from minillm.runtime.startup import Started, start_runner
from minillm.text.loading import load_tokenizer
from minillm.text.tokenizer import Tokenizer

__all__ = ["DEFAULT_MODEL", "Launched", "launch", "launch_driver"]

DRAFT_CACHE_TOKENS = 65_536
"""Slots of a small model's cache: what has no room is computed again."""
MIN_BLOCK_SIZE = 16
NUM_WORDS_COMPARED = 64


@dataclass(kw_only=True)
class Launched:
    """A running engine and what it was made from."""

    engine: Engine
    runner: Runner
    tokenizer: Tokenizer
    model_config: ModelConfig


@dataclass(kw_only=True)
class Parts:
    """A model that takes plans, and a scheduler that makes them."""

    model_config: ModelConfig
    tokenizer: Tokenizer
    started: Started
    scheduler: Scheduler


def launch(model_name: str, config: EngineConfig) -> Launched:
    """Load a model and start its engine.

    Raises ModelNotFoundError, CheckpointError, DownloadError, ConfigError, MemoryFitError.
    """
    # A small model comes first: what it takes, the large one's cache leaves.
    small = None if config.speculative in (None, NGRAM) else start_small(str(config.speculative), model_name, config)
    parts = start_parts(model_name, config)
    if small is not None:
        check_same_words(small, parts)
    engine = Engine(
        parts.scheduler,
        parts.started.runner,
        vocab_size=parts.model_config.vocab_size,
        eos_token_ids=parts.model_config.eos_token_ids,
        tokenizer=parts.tokenizer,
        overlap=config.overlap,
        seed=config.seed,
        speculator=make_speculator(config, small, parts.started),
    )
    return Launched(
        engine=engine, runner=parts.started.runner, tokenizer=parts.tokenizer, model_config=parts.model_config
    )


def launch_driver(model_name: str, config: EngineConfig) -> EngineDriver:
    """The same for a front end that reaches the engine through a Link. Raises what `launch` raises."""
    return EngineDriver(launch(model_name, config).engine)


def start_parts(model_name: str, config: EngineConfig) -> Parts:
    """Find a model's files, load it, make a scheduler of the sizes that memory allows. Raises what `launch` raises."""
    files = resolve(model_name)
    model_config = load_config(files)
    tokenizer = load_tokenizer(files)
    started = start_runner(config, model_config, lambda model: load_weights(model, files, seed=config.seed))
    sizes = started.sizes
    limits = SchedulerLimits(
        max_num_batched_tokens=sizes.max_num_batched_tokens,
        soft_cap=sizes.soft_cap,
        soft_cap_few=sizes.soft_cap_few,
        many_keys=sizes.many_keys,
        attention_equivalence=sizes.attention_equivalence,
        tile_steps=sizes.tile_steps,
        max_num_seqs=sizes.max_num_seqs,
        max_model_len=sizes.max_model_len,
        num_kv_blocks=started.num_kv_blocks,
        block_size=sizes.block_size,
        enable_prefix_caching=config.enable_prefix_caching,
        enable_chunked_prefill=config.enable_chunked_prefill,
        min_chunk_size=config.min_chunk_size,
        max_chunk_size=config.max_chunk_size,
    )
    scheduler = make_scheduler(limits, config.recorded_steps)
    return Parts(model_config=model_config, tokenizer=tokenizer, started=started, scheduler=scheduler)


def start_small(small_name: str, model_name: str, config: EngineConfig) -> Parts:
    """The model that drafts, with a prefix cache of its own. Raises what `launch` raises."""
    small, large = (load_config(resolve(name)) for name in (small_name, model_name))
    if small.vocab_size != large.vocab_size:
        raise ConfigError(
            f"{small_name!r} has a vocabulary of {small.vocab_size} tokens and {model_name!r} one of "
            f"{large.vocab_size}: as speculative name a model with the same tokeniser"
        )
    options = replace(
        config,
        device=config.draft_device or config.device,
        max_model_len=min(small.max_position, config.max_model_len or large.max_position),
        num_kv_blocks=DRAFT_CACHE_TOKENS // (config.block_size or MIN_BLOCK_SIZE),
        enable_prefix_caching=True,
        recorded_steps=0,
        speculative=None,
        num_drafts=None,
        draft_device=None,
    )
    return start_parts(small_name, options)


def check_same_words(small: Parts, large: Parts) -> None:
    """Raise ConfigError unless both tokenisers mean the same by some token ids."""
    vocab_size = large.model_config.vocab_size
    for token in range(0, vocab_size, max(1, vocab_size // NUM_WORDS_COMPARED)):
        words = [parts.tokenizer.decode([token]) for parts in (small, large)]
        if words[0] != words[1]:
            raise ConfigError(
                f"token {token} is {words[0]!r} to the small model and {words[1]!r} to the large one: as speculative "
                "name a model with the same tokeniser"
            )


def make_speculator(config: EngineConfig, small: Parts | None, large: Started) -> Speculator | None:
    """Whoever drafts, if anybody is to."""
    if config.speculative is None:
        return None
    drafter = NgramDrafter() if small is None else make_draft_model(small, large.runner)
    return Speculator(drafter, Controller(config.max_drafts), large.sizes.max_num_samples)


def make_draft_model(small: Parts, large: Runner) -> DraftModel:
    """The small model, which works on while the large one verifies, unless both compute on the CPU's few cores."""
    runner = small.started.runner
    runner.use_own_stream()
    kinds = (runner.device.type, large.device.type)
    return DraftModel(small.scheduler, runner, goes_on="cuda" in kinds, is_lazy=kinds[0] == "cpu")
