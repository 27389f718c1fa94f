"""Attention, feed-forward and decoder layer of the Llama family. They call the kernel set and pass state explicitly.

Shapes: T tokens, D hidden size, C = (N + 2K) * H fused q, k, v, N query heads, K key/value heads, H head size,
F intermediate size, B blocks, P block size, E positions.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from minillm.config import ModelConfig
from minillm.model.batch import ForwardBatch
from minillm.model.parallel import Build, Linear, Target, Vector
from minillm.model.stored import Shard

__all__ = ["Attention", "DecoderLayer", "FeedForward"]


class Attention(nn.Module):
    """Grouped-query attention over the paged cache, with rotary positions and optional norms on each head."""

    def __init__(self, config: ModelConfig, build: Build) -> None:
        super().__init__()
        self.ops, self.eps, self.scale = build.ops, config.rms_norm_eps, config.head_size**-0.5
        heads = build.tp.shard(config.num_heads, "num_heads")
        kv_heads = build.tp.head_shard(config.num_kv_heads)
        self.num_heads, self.num_kv_heads = heads.num, kv_heads.num
        q_rows, kv_rows = (Shard(*(n * config.head_size for n in shard)) for shard in (heads, kv_heads))
        self.qkv = Linear(
            build,
            Shard.whole(config.hidden_size),
            {"q_proj": q_rows, "k_proj": kv_rows, "v_proj": kv_rows},
            bias=config.attention_bias,
        )
        self.out = Linear(build, q_rows, {"o_proj": Shard.whole(config.hidden_size)}, bias=config.output_bias)
        self.q_norm = Vector(build, config.head_size) if config.qk_norm else None
        self.k_norm = Vector(build, config.head_size) if config.qk_norm else None

    def forward(
        self, residual_TD: Tensor, x_TD: Tensor, batch: ForwardBatch, kv_2BKPH: Tensor, cos_sin_EH: Tensor
    ) -> Tensor | None:
        """What `Linear.into` leaves of the output; the tokens' keys and values are written to `kv_2BKPH` first."""
        o_TNH = self.attend(self.qkv.forward(x_TD), batch, kv_2BKPH, cos_sin_EH)
        return self.out.into(residual_TD, o_TNH.flatten(1))

    def attend(self, qkv_TC: Tensor, batch: ForwardBatch, kv_2BKPH: Tensor, cos_sin_EH: Tensor) -> Tensor:
        """What lies between the two products -> o_TNH."""
        q_TNH = self.ops.rotary_and_store(
            qkv_TC,
            cos_sin_EH=cos_sin_EH,
            positions_T=batch.positions_T,
            slots_T=batch.slots_T,
            kv_2BKPH=kv_2BKPH,
            q_norm_H=None if self.q_norm is None else self.q_norm.weight,
            k_norm_H=None if self.k_norm is None else self.k_norm.weight,
            eps=self.eps,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            **batch.shared,
        )
        attention = self.ops.attention if batch.attention is None else batch.attention
        o_TNH: Tensor = attention(
            q_TNH,
            kv_2BKPH=kv_2BKPH,
            block_tables_SM=batch.block_tables_SM,
            rows_R=batch.rows_R,
            query_starts_R1=batch.query_starts_R1,
            context_lens_R=batch.context_lens_R,
            scale=self.scale,
            num_decodes=batch.num_decodes,
            max_query_len=batch.max_query_len,
            max_context_len=batch.max_context_len,
            **batch.shared,
        )
        return o_TNH

    def attend_fused(self, qkv_TC: Tensor, batch: ForwardBatch, kv_2BKPH: Tensor, cos_sin_EH: Tensor) -> Tensor:
        """`attend` for rows of one token, all of different requests: no row's keys wait for another's."""
        o_TNH: Tensor = self.ops.fused_decode(
            qkv_TC,
            cos_sin_EH=cos_sin_EH,
            slots_T=batch.slots_T,
            kv_2BKPH=kv_2BKPH,
            q_norm_H=None if self.q_norm is None else self.q_norm.weight,
            k_norm_H=None if self.k_norm is None else self.k_norm.weight,
            eps=self.eps,
            num_heads=self.num_heads,
            block_tables_SM=batch.block_tables_SM,
            rows_R=batch.rows_R,
            context_lens_R=batch.context_lens_R,
            scale=self.scale,
            max_context_len=batch.max_context_len,
        )
        return o_TNH

    def targets(self, prefix: str) -> Iterator[tuple[str, Target]]:
        """(name in a checkpoint, target)."""
        yield from self.qkv.targets(prefix)
        yield from self.out.targets(prefix)
        if self.q_norm is not None and self.k_norm is not None:
            yield from self.q_norm.targets(f"{prefix}q_norm")
            yield from self.k_norm.targets(f"{prefix}k_norm")


class FeedForward(nn.Module):
    """SwiGLU (Shazeer 2020): down(silu(gate x) * up x)."""

    def __init__(self, config: ModelConfig, build: Build) -> None:
        super().__init__()
        self.ops = build.ops
        inner = build.tp.shard(config.intermediate_size, "intermediate_size")
        whole = Shard.whole(config.hidden_size)
        self.gate_up = Linear(build, whole, {"gate_proj": inner, "up_proj": inner}, bias=config.mlp_bias)
        self.down = Linear(build, inner, {"down_proj": whole}, bias=config.mlp_bias)

    def forward(self, residual_TD: Tensor, x_TD: Tensor) -> Tensor | None:
        """What `Linear.into` leaves of the output."""
        return self.down.into(residual_TD, self.gate_up.gated(x_TD))

    def targets(self, prefix: str) -> Iterator[tuple[str, Target]]:
        """(name in a checkpoint, target)."""
        yield from self.gate_up.targets(prefix)
        yield from self.down.targets(prefix)


class DecoderLayer(nn.Module):
    """Attention and feed-forward, each on the normed sum of all that came before."""

    def __init__(self, config: ModelConfig, build: Build) -> None:
        super().__init__()
        self.ops, self.eps = build.ops, config.rms_norm_eps
        self.input_norm = Vector(build, config.hidden_size)
        self.attention = Attention(config, build)
        self.post_norm = Vector(build, config.hidden_size)
        self.feed_forward = FeedForward(config, build)

    def forward(
        self, residual_TD: Tensor, x_TD: Tensor | None, batch: ForwardBatch, kv_2BKPH: Tensor, cos_sin_EH: Tensor
    ) -> Tensor | None:
        """Adds to `residual_TD` in place; returns what is still to be added, if anything: the output, or parts of it.

        `x_TD` is what the layer before left to be added.
        """
        x_TD = self._normed(residual_TD, x_TD, self.input_norm)
        x_TD = self.attention.forward(residual_TD, x_TD, batch, kv_2BKPH, cos_sin_EH)
        return self.feed_forward.forward(residual_TD, self._normed(residual_TD, x_TD, self.post_norm))

    def _normed(self, residual_TD: Tensor, x_TD: Tensor | None, norm: Vector) -> Tensor:
        """The norm of the residual, to which `x_TD` is added first."""
        normed_TD: Tensor
        if x_TD is None:
            normed_TD = self.ops.rms_norm(residual_TD, norm.weight, self.eps)
        else:
            normed_TD = self.ops.add_rms_norm(x_TD, residual_TD, norm.weight, self.eps)
        return normed_TD

    def forward_fused(self, residual_TD: Tensor, batch: ForwardBatch, kv_2BKPH: Tensor, cos_sin_EH: Tensor) -> None:
        """`forward` for a few rows of one token, by the kernel set's fused products: adds all to `residual_TD`."""
        ops, attention, feed_forward = self.ops, self.attention, self.feed_forward
        qkv, out, gate_up, down = attention.qkv, attention.out, feed_forward.gate_up, feed_forward.down
        qkv_TC = ops.norm_linear(residual_TD, self.input_norm.weight, self.eps, qkv.weight, qkv.bias)
        # One kernel that writes a row's key and reads the others' cannot give a row the keys written in the same step.
        attend = attention.attend if batch.shares_tables else attention.attend_fused
        o_TNH = attend(qkv_TC, batch, kv_2BKPH, cos_sin_EH)
        ops.add_linear(residual_TD, o_TNH.flatten(1), out.weight, out.bias)
        y_TF = ops.norm_gated_linear(residual_TD, self.post_norm.weight, self.eps, gate_up.weight, gate_up.bias)
        ops.add_linear(residual_TD, y_TF, down.weight, down.bias)

    def targets(self, prefix: str) -> Iterator[tuple[str, Target]]:
        """(name in a checkpoint, target)."""
        yield from self.input_norm.targets(f"{prefix}input_layernorm")
        yield from self.attention.targets(f"{prefix}self_attn.")
        yield from self.post_norm.targets(f"{prefix}post_attention_layernorm")
        yield from self.feed_forward.targets(f"{prefix}mlp.")
