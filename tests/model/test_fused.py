"""Steps of a few rows through a kernel set's fused layers, against transformers: every family, in the interpreter."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from minillm.kernels import gpu, hopper_linear, reference
from minillm.kernels.hopper_linear import Tile
from minillm.model.layers import DecoderLayer
from minillm.model.parallel import TPGroup
from minillm.model.sources import load_config, load_weights, resolve
from minillm.model.transformer import Transformer
from tests.model.paged import PagedRun

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="runs Triton's interpreter on a CPU")


def loaded(folder: Path) -> Transformer:
    """A checkpoint in float32, where every difference shows, on the GPU's kernel set."""
    files = resolve(str(folder))
    model = Transformer(load_config(files), ops=gpu, dtype=torch.float32, device="cpu")
    load_weights(model, files)
    return model


def preparations(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """What is prepared for steps from now on."""
    prepared: list[object] = []
    prepare = gpu.prepare_step

    def prepare_step(**inputs: Any) -> gpu.PreparedStep:
        prepared.append(prepare(**inputs))
        return prepared[-1]

    monkeypatch.setattr(gpu, "prepare_step", prepare_step)
    return prepared


def test_fused_layers_equal_transformers(tiny_checkpoint: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    folder, oracle = tiny_checkpoint
    model = loaded(folder)
    assert model.max_fused_rows == 0
    model.max_fused_rows = 2
    calls = []
    forward = DecoderLayer.forward_fused
    monkeypatch.setattr(
        DecoderLayer, "forward_fused", lambda self, *args: calls.append(len(args[0])) or forward(self, *args)
    )
    prepared = preparations(monkeypatch)
    generator = torch.Generator().manual_seed(1)
    # Rows of a chunk are no decodes, and three rows are too many; the two steps between are fused.
    steps = [(17, 2, 1), (1, 1, 0), (0, 1, 0), (1, 1, 1)]
    lengths = [sum(column) for column in zip(*steps, strict=True)]
    sequences = [torch.randint(0, model.config.vocab_size, (n,), generator=generator).tolist() for n in lengths]
    for sequence, logits in zip(sequences, PagedRun(model, sequences).run(steps), strict=True):
        with torch.no_grad():
            expected = oracle(torch.tensor([sequence])).logits[0]
        assert expected.abs().max() > 1
        assert (logits - expected).abs().max() <= 1e-4
    num_layers = model.config.num_layers
    assert calls == [2] * num_layers + [1] * num_layers
    assert len(prepared) == 2  # those that are not fused


def test_rows_of_one_sequence_see_each_other(
    tiny_checkpoint: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Drafts: fused products, and keys that are all written before any is read."""
    folder, oracle = tiny_checkpoint
    model = loaded(folder)
    sequence = torch.randint(0, model.config.vocab_size, (22,), generator=torch.Generator().manual_seed(2)).tolist()
    run = PagedRun(model, [sequence])
    run.step([17])
    model.max_fused_rows = 8
    _, batch = run.batch([5])
    as_rows = replace(
        batch,
        rows_R=batch.rows_R.repeat(5),
        query_starts_R1=torch.arange(6, dtype=torch.int32),
        context_lens_R=batch.positions_T + 1,
        num_decodes=5,
        max_query_len=1,
        shares_tables=True,
    )
    prepared = preparations(monkeypatch)
    for other in ("fused_decode", "silu_mul"):  # what takes rows of different sequences, and what fuses nothing
        monkeypatch.setattr(gpu, other, None)
    with torch.no_grad():
        logits = model(as_rows, run.kv_cache, torch.arange(5))
        assert len(prepared) == 1  # their attention is that of other steps
        expected = oracle(torch.tensor([sequence])).logits[0, 17:]
    assert (logits - expected).abs().max() <= 1e-4


def test_ranks_that_share_the_work_fuse_nothing(tiny_checkpoint: tuple[Path, Any]) -> None:
    config = load_config(resolve(str(tiny_checkpoint[0])))
    for num_ranks, num_rows in ((1, 8), (2, 0)):
        if config.num_kv_heads % num_ranks == 0:
            tp = TPGroup(size=num_ranks)
            assert Transformer(config, ops=gpu, dtype=torch.float16, device="cpu", tp=tp).max_fused_rows == num_rows


def streamed_twin(
    x_TD: Tensor, weight_OD: Tensor, bias_O: Tensor | None, y: Tensor, tile: Tile, is_gated: bool
) -> Tensor:
    """What `hopper_linear.launch` computes: sums of equal shares of the inputs."""
    share = -(-x_TD.shape[1] // tile.parts)
    halves = [x_TD[:, at : at + share] @ weight_OD[:, at : at + share].T for at in range(0, x_TD.shape[1], share)]
    parts = torch.stack(halves)
    if bias_O is not None:
        parts[0] += bias_O
    return y.copy_(reference.silu_mul(parts[0]) if is_gated else parts if y.ndim == 3 else parts[0])


def test_layers_whose_norms_add_parts_equal_transformers(
    tiny_checkpoint: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a Hopper GPU, where products of the output and down projections come in parts."""
    folder, oracle = tiny_checkpoint
    model = loaded(folder)
    kinds = []

    def streamed(x_TD: Tensor, num_out: int, **kind: bool) -> Tile | None:
        kinds.append(tuple(kind))
        return None if num_out == model.config.vocab_size else Tile(32, 2 if "is_shared" in kind else 1, 64, 1)

    monkeypatch.setattr(gpu, "streamed", streamed)
    monkeypatch.setattr(hopper_linear, "launch", streamed_twin)
    sequence = torch.randint(0, model.config.vocab_size, (5,), generator=torch.Generator().manual_seed(1)).tolist()
    (logits,) = PagedRun(model, [sequence]).run([(4,), (1,)])
    with torch.no_grad():
        expected = oracle(torch.tensor([sequence])).logits[0]
    assert (logits - expected).abs().max() <= 1e-4
    num_layers = model.config.num_layers
    assert kinds[: 4 * num_layers] == [(), ("is_shared",), ("is_gated",), ("is_shared",)] * num_layers


@pytest.mark.parametrize("adding", [("out", "down"), ("out",), ("down",)])
def test_layers_whose_products_add_to_the_residual_equal_transformers(
    tiny_checkpoint: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch, adding: tuple[str, ...]
) -> None:
    """As in large steps in half precision; a projection with a bias leaves its output to the norm."""
    folder, oracle = tiny_checkpoint
    model = loaded(folder)
    names = {id(p): name.split(".")[-2] for name, p in model.named_parameters()}
    added = []

    def into(residual_TO: Tensor, x_TD: Tensor, weight_OD: Tensor, bias_O: Tensor | None) -> Tensor | None:
        y_TO = reference.linear(x_TD, weight_OD, bias_O)
        if names[id(weight_OD)] not in adding:
            return y_TO
        added.append(names[id(weight_OD)])
        residual_TO += y_TO
        return None

    monkeypatch.setattr(gpu, "linear_into", into)
    sequence = torch.randint(0, model.config.vocab_size, (5,), generator=torch.Generator().manual_seed(1)).tolist()
    (logits,) = PagedRun(model, [sequence]).run([(5,)])
    with torch.no_grad():
        expected = oracle(torch.tensor([sequence])).logits[0]
    assert (logits - expected).abs().max() <= 1e-4
    assert added == list(adding) * model.config.num_layers
