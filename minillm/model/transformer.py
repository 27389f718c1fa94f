"""Transformer: one decoder for Llama, Qwen2, Qwen3 and Mistral, whose differences are fields of ModelConfig.

`model(batch, kv_cache, rows)` is all it does: no state, no phases, no gradients. It knows neither requests nor files.

Shapes: T tokens, L rows of logits, D hidden size, V vocabulary, E positions, H head size.
"""

from __future__ import annotations

from dataclasses import replace
from types import ModuleType

import torch
from torch import Tensor, nn

from minillm.config import ModelConfig
from minillm.model.batch import ForwardBatch
from minillm.model.layers import DecoderLayer
from minillm.model.parallel import Build, Embedding, Linear, Target, TPGroup, Vector, VocabHead
from minillm.model.rotary import rotary_table

__all__ = ["Transformer"]


class Transformer(nn.Module):
    """A decoder with uninitialised weights: load them, then call `finish_loading` (`load_weights` does both)."""

    cos_sin_EH: Tensor

    def __init__(
        self,
        config: ModelConfig,
        *,
        ops: ModuleType,
        dtype: torch.dtype,
        device: torch.device | str,
        tp: TPGroup | None = None,
        max_positions: int | None = None,
        keeps_codes: bool = False,
    ) -> None:
        """`ops`: a kernel set. `max_positions`: length of the rotary table; None takes the model's own limit.

        `keeps_codes`: whether products may use a file's 4-bit codes as they are, beside the weights in `dtype`.
        """
        super().__init__()
        build = Build(ops=ops, dtype=dtype, device=torch.device(device), tp=tp or TPGroup(), keeps_codes=keeps_codes)
        self.config, self.ops, self.tp = config, ops, build.tp
        self.embedding = Embedding(build, config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config, build) for _ in range(config.num_layers))
        self.norm = Vector(build, config.hidden_size)
        self.head = VocabHead(build, self.embedding, is_tied=config.tie_word_embeddings)
        num_positions = config.max_position if max_positions is None else max_positions
        self.register_buffer("cos_sin_EH", rotary_table(config, num_positions, build.device), persistent=False)
        self.max_fused_rows = max_fused_rows(config, build)
        self.num_weight_bytes = sum(p.numel() * p.element_size() for p in self.parameters())

    def forward(self, batch: ForwardBatch, kv_cache: Tensor, rows_L: Tensor) -> Tensor:
        """Logits [L, V] in the model's dtype, of the tokens `rows_L`; writes the keys and values of all.

        `kv_cache` is [layers, 2, blocks, kv heads, block size, head size].
        """
        return self.logits(self.run_layers(batch, kv_cache)[rows_L])

    def run_layers(self, batch: ForwardBatch, kv_cache: Tensor) -> Tensor:
        """All layers -> x_TD, which the last norm is still to see. Writes the tokens' keys and values."""
        is_fused = self._is_fused(batch)
        # Before the embedding, an ordinary kernel: a layer's may start before those before it have ended.
        if not is_fused or batch.shares_tables:
            batch = self._with_shared(batch, kv_cache[0])
        residual_TD: Tensor = self.embedding(batch.input_ids_T)
        if is_fused:
            for layer, kv_2BKPH in zip(self.layers, kv_cache.unbind(0), strict=True):
                assert isinstance(layer, DecoderLayer)
                layer.forward_fused(residual_TD, batch, kv_2BKPH, self.cos_sin_EH)
            return residual_TD
        x_TD: Tensor | None = None
        for layer, kv_2BKPH in zip(self.layers, kv_cache.unbind(0), strict=True):
            assert isinstance(layer, DecoderLayer)
            x_TD = layer.forward(residual_TD, x_TD, batch, kv_2BKPH, self.cos_sin_EH)
        if x_TD is None:
            return residual_TD
        return residual_TD.add_(x_TD.sum(0) if x_TD.ndim == 3 else x_TD)  # parts, which a layer's norm would add

    def _is_fused(self, batch: ForwardBatch) -> bool:
        """Whether the step is a few rows of one token each, in order, and the kernel set fuses such."""
        num_tokens = batch.input_ids_T.shape[0]
        is_decode = batch.max_query_len == 1 and num_tokens == batch.num_decodes == batch.rows_R.shape[0]
        return is_decode and num_tokens <= self.max_fused_rows and batch.attention is None

    def _with_shared(self, batch: ForwardBatch, kv_2BKPH: Tensor) -> ForwardBatch:
        """The batch with what its layers share, if the kernel set computes such once per step."""
        if not hasattr(self.ops, "prepare_step"):
            return batch
        prepared = self.ops.prepare_step(
            cos_sin_EH=self.cos_sin_EH,
            positions_T=batch.positions_T,
            slots_T=batch.slots_T,
            kv_2BKPH=kv_2BKPH,
            block_tables_SM=batch.block_tables_SM,
            rows_R=batch.rows_R,
            query_starts_R1=batch.query_starts_R1,
            context_lens_R=batch.context_lens_R,
            num_decodes=batch.num_decodes,
            max_context_len=batch.max_context_len,
        )
        return replace(batch, shared={"prepared": prepared})

    def logits(self, x_LD: Tensor) -> Tensor:
        """Logits [L, V] of rows of what `run_layers` gave."""
        if x_LD.shape[0] == 0:  # a step inside prompts: kernels need not know empty inputs
            return x_LD.new_empty(0, self.config.vocab_size)
        logits_LV: Tensor = self.head(self.ops.rms_norm(x_LD, self.norm.weight, self.config.rms_norm_eps))
        return logits_LV

    def targets(self) -> dict[str, Target]:
        """Every tensor that a checkpoint must hold, by its Hugging Face name."""
        found = dict(self.embedding.targets("model.embed_tokens"))
        for index, layer in enumerate(self.layers):
            assert isinstance(layer, DecoderLayer)
            found.update(layer.targets(f"model.layers.{index}."))
        found.update(self.norm.targets("model.norm"))
        if not self.config.tie_word_embeddings:
            found.update(self.head.table.targets("lm_head"))
        return found

    def finish_loading(self) -> None:
        """After the last weight: let the kernel set lay weights out anew, if it offers `pack_linear`."""
        for module in self.modules():
            if isinstance(module, (Linear, VocabHead)):
                module.finish_loading()


def max_fused_rows(config: ModelConfig, build: Build) -> int:
    """Most rows of a step whose layers the kernel set fuses; 0 if it has no such kernels or ranks share the work."""
    if build.tp.size > 1 or not hasattr(build.ops, "fused_decode"):
        return 0
    num_rows: int = build.ops.max_fused_rows(
        hidden_size=config.hidden_size,
        inner_sizes=(config.num_heads * config.head_size, config.intermediate_size),
        head_size=config.head_size,
        dtype=build.dtype,
        device=build.device,
    )
    return num_rows
