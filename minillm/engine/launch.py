"""From a model's name to a running engine: files, tokeniser, runner, scheduler. It knows no requests."""

from __future__ import annotations

from dataclasses import dataclass

from minillm.config import EngineConfig, ModelConfig
from minillm.core.scheduler import Scheduler, SchedulerLimits
from minillm.decoding.controller import Controller
from minillm.decoding.ngram_drafter import NgramDrafter
from minillm.decoding.speculator import Speculator
from minillm.engine.driver import EngineDriver
from minillm.engine.engine import Engine
from minillm.engine.recorder import RecordingScheduler
from minillm.model.sources import DEFAULT_MODEL, load_config, load_weights, resolve
from minillm.runtime.runner import Runner
from minillm.runtime.startup import start_runner
from minillm.text.tokenizer import Tokenizer, load_tokenizer

__all__ = ["DEFAULT_MODEL", "Launched", "launch", "launch_driver"]


@dataclass(kw_only=True)
class Launched:
    """A running engine and what it was made from."""

    engine: Engine
    runner: Runner
    tokenizer: Tokenizer
    model_config: ModelConfig


def launch(model_name: str, config: EngineConfig) -> Launched:
    """Load a model and start its engine.

    Raises ModelNotFoundError, CheckpointError, DownloadError, ConfigError, MemoryFitError.
    """
    files = resolve(model_name)
    model_config = load_config(files)
    tokenizer = load_tokenizer(files)
    started = start_runner(config, model_config, lambda model: load_weights(model, files, seed=config.seed))
    sizes = started.sizes
    limits = SchedulerLimits(
        max_num_batched_tokens=sizes.max_num_batched_tokens,
        soft_cap=sizes.soft_cap,
        attention_equivalence=model_config.attention_equivalence,
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
    num_steps = config.recorded_steps
    scheduler = RecordingScheduler(limits, num_steps) if num_steps else Scheduler(limits)
    engine = Engine(
        scheduler,
        started.runner,
        vocab_size=model_config.vocab_size,
        eos_token_ids=model_config.eos_token_ids,
        tokenizer=tokenizer,
        overlap=config.overlap,
        seed=config.seed,
        speculator=make_speculator(config, sizes.max_num_samples),
    )
    return Launched(engine=engine, runner=started.runner, tokenizer=tokenizer, model_config=model_config)


def launch_driver(model_name: str, config: EngineConfig) -> EngineDriver:
    """The same for a front end that reaches the engine through a Link. Raises what `launch` raises."""
    return EngineDriver(launch(model_name, config).engine)


def make_speculator(config: EngineConfig, max_num_samples: int) -> Speculator | None:
    """Whoever drafts, if anybody is to."""
    if config.speculative is None:
        return None
    return Speculator(NgramDrafter(), Controller(config.max_drafts), max_num_samples)
