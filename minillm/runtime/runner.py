"""Runs plans on one device: `submit` enqueues a step and never waits, `Pending.wait` waits for that step alone.

It owns the weights, the KV memory and the rows' device state, and obeys plans. It knows no requests and no policy.
A GPU is asynchronous by itself. On a CPU steps run in order when one is waited for, on the waiter's thread: OpenMP
threads of two callers would outnumber the cores, where GNU's library sleeps at every barrier (measured: half as fast).
"""

from __future__ import annotations

import time
from array import array
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from types import ModuleType
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from minillm.core.plan import StepPlan, StepResult
from minillm.kernels.edits_reference import NUM_EDIT_COLUMNS
from minillm.kernels.sampling_reference import NOT_FINITE
from minillm.model.batch import ForwardBatch
from minillm.model.transformer import Transformer
from minillm.runtime.batching import PaddedShapes, StepWords, step_words, trailing
from minillm.runtime.cuda_graphs import Finished, StepGraphs
from minillm.runtime.edits import LogitEdits
from minillm.runtime.logprobs import LogprobRows, logprob_columns, score_step
from minillm.runtime.rows import NUM_PARAM_WORDS, Ints, Rows
from minillm.runtime.step_buffer import StepBuffer, to_device
from minillm.runtime.verify import verified

Arrival = Future[tuple[Ints, float]]
"""A step's samples, and the seconds that it took."""
Arrive = Callable[[], tuple[Ints, float]]
"""Waits for them."""


class Pending:
    """A step on its way. `wait` blocks until its own tokens have arrived on the host."""

    def __init__(self, plan: StepPlan, words: StepWords, sample: Callable[[], Arrive]) -> None:
        """`sample` enqueues what follows the samples of plain rows."""
        self._plan, self._words = plan, words
        edits = words.edits
        waits = edits is not None and edits.num_masks > 0
        self._sample = sample if waits else None
        self._arrive = None if waits else sample()

    def mask(self, bits: Ints) -> None:
        """Say which tokens may be sampled: for a step in which rows with a grammar sample, whose pass runs already.

        int32 [masks, vocabulary / 32], one for each sample of such rows in the plan's order; bit i of word w is token
        32 w + i.
        """
        edits = self._words.edits
        assert self._sample is not None and edits is not None and len(bits) == edits.num_masks
        edits.masks = bits
        self._arrive, self._sample = self._sample(), None  # which holds the step's logits

    def wait(self) -> StepResult:
        """The step's result, in the order of the plan's rows; raises what the step raised."""
        assert self._arrive is not None, "the step waits for masks"
        samples, seconds = self._arrive()
        return step_result(self._plan, self._words, samples, seconds)


class Passed(NamedTuple):
    """A step whose rows are sampled as if none were edited."""

    x_TD: Tensor
    finished: Finished
    columns_7K: Tensor | None
    """Edited rows (`kernels.edits_reference`)."""
    scored: tuple[Tensor, Tensor] | None
    """Rows, and tokens of prompts, whose logprobs are to be reported."""


class Runner:
    """One device's share of the engine: `submit(plan).wait()` gives a StepResult."""

    def __init__(
        self, model: Transformer, ops: ModuleType, kv_cache: Tensor, rows: Rows, shapes: PaddedShapes | None = None
    ) -> None:
        """`shapes`: what steps are padded to; None pads nothing."""
        self.model, self.ops, self.kv_cache, self.rows = model, ops, kv_cache, rows
        self.shapes = PaddedShapes() if shapes is None else shapes
        self.device = kv_cache.device
        self.block_size = kv_cache.shape[4]
        self._buffer = StepBuffer(self.shapes, self.device)
        self._graphs: StepGraphs | None = None
        self._edits = LogitEdits(
            len(rows.last_tokens_S), model.config.vocab_size, rows.max_blocks * self.block_size, self.device
        )
        self._logprobs = LogprobRows(len(rows.last_tokens_S))
        self._queue: deque[tuple[StepWords, Arrival]] = deque()
        self._stream = torch.cuda.default_stream(self.device) if self.device.type == "cuda" else None

    def use_own_stream(self) -> None:
        """From now on share the GPU with other runners, step beside step, rather than take turns with them."""
        if self._stream is not None:
            torch.cuda.synchronize(self.device)
            self._stream = torch.cuda.Stream(self.device)

    @torch.inference_mode()
    def capture(self) -> None:
        """Capture CUDA graphs for every padded shape; without them each step is launched kernel by kernel."""
        self._graphs = StepGraphs(self, self.shapes, self._buffer, self.device)

    @property
    def num_compiles(self) -> int:
        """Kernels that this process has compiled, or read from Triton's cache; 0 where none are used."""
        if self.device.type != "cuda":
            return 0
        from minillm.kernels.compiling import compilations

        return compilations().num

    @property
    def num_captures(self) -> int:
        """CUDA graphs captured so far."""
        return 0 if self._graphs is None else self._graphs.num_captured

    def submit(self, plan: StepPlan) -> Pending:
        """Enqueue a step."""
        words = step_words(plan, self.rows, self.shapes)
        words.edits = self._edits.words(plan, words.order)
        words.scores = self._logprobs.words(plan, words.order)
        if self.device.type == "cuda":
            return Pending(plan, words, self._launch(words))
        arrival: Arrival = Future()
        self._queue.append((words, arrival))
        return Pending(plan, words, lambda: partial(self._run_until, arrival))

    def close(self) -> None:
        """Drop the steps that nobody waited for."""
        self._queue.clear()

    def run_layers(self, columns_5R: Tensor, tokens_T: Tensor, has_drafts: bool = False) -> Tensor:
        """Hidden states [T, D] of a padded step, for rows of any length: what a graph holds."""
        num_rows, num_tokens = columns_5R.shape[1], tokens_T.shape[0]
        max_query_len = 1 if num_rows == num_tokens else num_tokens  # a decode step, or a mixed one
        bounds = Bounds(num_tokens, num_rows, has_drafts, max_query_len, self.rows.max_blocks * self.block_size)
        return self._run_layers(bounds, columns_5R, tokens_T)

    def finish(self, x_TD: Tensor, samples_3L: Tensor, kind: tuple[bool, bool]) -> Finished:
        """Samples (NOT_FINITE where a row failed) and the logits behind them; the device keeps the last tokens.

        `samples_3L`: rows of `x_TD`, their seats, the sampled tokens' positions. `kind`: (is_random, is_filtered).
        """
        rows_L, seats_L, positions_L = samples_3L.unbind()
        logits_LV = self._logits(x_TD, rows_L)
        tokens_L, is_finite_L = self._sample(logits_LV, seats_L, positions_L, kind)
        # A row with drafts stores several samples; it is closed, so nothing reads its last token from the device.
        samples_L = self.ops.keep_tokens(tokens_L, is_finite_L, seats_L=seats_L, last_tokens_S=self.rows.last_tokens_S)
        return Finished(samples_L, logits_LV)

    def finish_edited(self, finished: Finished, kind: tuple[bool, bool]) -> None:
        """Sample padding again, with edits that change nothing: what steps with edited rows launch beside `finish`."""
        columns_7K = torch.zeros(NUM_EDIT_COLUMNS, len(finished.samples_L), dtype=torch.int32, device=self.device)
        columns_7K[2:4] = 1
        edits = self._edits.padding()
        edits.note(self.ops, columns_7K, self.rows.last_tokens_S)
        self._sample_edited(edits, finished, columns_7K, None, kind)

    def finish_scored(self, finished: Finished) -> None:
        """Score padding's samples: what steps with logprobs launch beside `finish`, however many they ask for."""
        samples_L, logits_LV = finished
        self.ops.score_tokens(logits_LV, samples_L, torch.zeros_like(samples_L), 1)

    def _sample_edited(
        self,
        edits: LogitEdits,
        finished: Finished,
        columns_7K: Tensor,
        masks_MW: Tensor | None,
        kind: tuple[bool, bool],
    ) -> None:
        """Sample edited rows again, from what their logits become, in place of their samples and last tokens."""
        scores_KV = edits.scores(self.ops, finished.logits_LV, columns_7K, masks_MW)
        tokens_K, is_finite_K = self._sample(scores_KV, columns_7K[1], columns_7K[2], kind)
        self.ops.keep_edited(
            tokens_K,
            is_finite_K,
            columns_7K,
            samples_L=finished.samples_L,
            last_tokens_S=self.rows.last_tokens_S,
        )

    def _logits(self, x_TD: Tensor, rows_L: Tensor) -> Tensor:
        logits_LV: Tensor = self.model.logits(x_TD.index_select(0, rows_L))
        return logits_LV

    def _sample(
        self, logits_LV: Tensor, seats_L: Tensor, positions_L: Tensor, kind: tuple[bool, bool]
    ) -> tuple[Tensor, Tensor]:
        """Tokens at `positions_L` [L] int32, and whether their logits were finite [L]."""
        params_4L = self.rows.params_4S.index_select(1, seats_L)
        floats_4L = params_4L.view(torch.float32)
        tokens_L, is_finite_L = self.ops.sample(
            logits_LV,
            temperature_L=floats_4L[0],
            top_k_L=params_4L[1],
            top_p_L=floats_4L[2],
            min_p_L=floats_4L[3],
            seeds_L=self.rows.seeds_S.index_select(0, seats_L),
            positions_L=positions_L,
            is_random=kind[0],
            is_filtered=kind[1],
        )
        return tokens_L, is_finite_L

    def _run_until(self, arrival: Arrival) -> tuple[Ints, float]:
        while not arrival.done():
            words, arriving = self._queue.popleft()
            start = time.perf_counter()
            try:
                samples = self._sampled(words, self._pass(words))
                arriving.set_result((samples.numpy(), time.perf_counter() - start))
            except Exception as error:  # for the one who waits for this step
                arriving.set_exception(error)
        return arrival.result()

    def _launch(self, words: StepWords) -> Callable[[], Arrive]:
        """Enqueue a step's pass; what is returned enqueues the rest."""
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        with torch.cuda.stream(self._stream):
            begin.record()
            passed = self._pass(words)

        def sample() -> Arrive:
            with torch.cuda.stream(self._stream):
                samples = self._sampled(words, passed)
                # The host copy is of torch's pinned pool, which keeps it until the stream has passed this point.
                on_host = torch.empty(samples.shape, dtype=samples.dtype, pin_memory=True)
                on_host.copy_(samples, non_blocking=True)
                end.record()

            def arrive() -> tuple[Ints, float]:
                end.synchronize()
                return on_host.numpy(), begin.elapsed_time(end) / 1e3

            return arrive

        return sample

    @torch.inference_mode()
    def _pass(self, words: StepWords) -> Passed:
        """Apply the deltas, run the layers, and sample all rows as if none were edited."""
        samples_3L, columns_5R, tokens_T = self._buffer.send(words)
        columns_7K, scored = self._apply(words)
        shape = (columns_5R.shape[1], len(tokens_T), words.has_drafts)
        x_TD = None if self._graphs is None else self._graphs.run_layers(*shape)
        if x_TD is None:
            x_TD = self._run_layers(self._bounds(words), columns_5R, tokens_T)
        return Passed(x_TD, self._finished(words, x_TD, samples_3L), columns_7K, scored)

    def _finished(self, words: StepWords, x_TD: Tensor, samples_3L: Tensor) -> Finished:
        if not words.num_samples:
            return Finished(samples_3L[0], x_TD[:0])
        kind = (words.is_random, words.is_filtered)
        finished = None if self._graphs is None else self._graphs.finish(x_TD, words.num_samples, kind)
        return self.finish(x_TD, samples_3L, kind) if finished is None else finished

    def _apply(self, words: StepWords) -> tuple[Tensor | None, tuple[Tensor, Tensor] | None]:
        """Apply the deltas, and note edited rows' inputs while these are the last tokens; the ends of `Passed`."""
        edits, scores = words.edits, words.scores
        sections = (
            *words.deltas,
            *(() if edits is None else edits.sections),
            *(() if scores is None else (scores.rows, scores.targets)),
        )
        if not any(section.size for section in sections):
            return None, None
        sent = to_device(sections, self.device)
        places, blocks, seated, params, copy_from, copy_to = sent[:6]
        self.rows.scatter(places, blocks, seated, params.view(-1, NUM_PARAM_WORDS))
        if copy_from.numel():
            self.kv_cache[:, :, copy_to] = self.kv_cache[:, :, copy_from]
        columns_7K = None
        if edits is not None:
            seats, profiles, known, columns = sent[6:10]
            if seats.numel():
                self._edits.seat(seats, profiles, known, edits.num_prompt)
            if columns.numel():
                columns_7K = columns.view(NUM_EDIT_COLUMNS, -1)
                self._edits.note(self.ops, columns_7K, self.rows.last_tokens_S)
        return columns_7K, None if scores is None else (sent[-2], sent[-1])

    @torch.inference_mode()
    def _sampled(self, words: StepWords, passed: Passed) -> Tensor:
        """Samples [L] int32 on the device, and words of logprobs behind them."""
        samples_L, logits_LV = passed.finished
        if passed.columns_7K is not None:
            assert words.edits is not None
            masks_MW = None
            if words.edits.masks is not None:
                masks_MW = to_device((words.edits.masks,), self.device)[0].view(words.edits.num_masks, -1)
            kind = (words.is_random, words.is_filtered)
            self._sample_edited(self._edits, passed.finished, passed.columns_7K, masks_MW, kind)
        if words.scores is None or passed.scored is None:
            return samples_L
        logits = partial(self._logits, passed.x_TD)
        return score_step(self.ops, words.scores, *passed.scored, logits, (logits_LV, samples_L))

    def _bounds(self, words: StepWords) -> StepWords | Bounds:
        if self.device.type != "cuda":
            return words
        # The bound on contexts is that of captured steps: a step of short rows alone would want kernels of its own.
        longest = self.rows.max_blocks * self.block_size
        return Bounds(words.num_tokens, words.num_decodes, words.has_drafts, words.max_query_len, longest)

    def _run_layers(self, bounds: StepWords | Bounds, columns_5R: Tensor, tokens_T: Tensor) -> Tensor:
        expanded = self.ops.expand_step_inputs(
            columns_5R,
            tokens_T,
            block_tables_SM=self.rows.block_tables_SM,
            last_tokens_S=self.rows.last_tokens_S,
            block_size=self.block_size,
            num_tokens=bounds.num_tokens,
        )
        batch = ForwardBatch(
            input_ids_T=expanded.input_ids_T,
            positions_T=expanded.positions_T,
            slots_T=expanded.slots_T,
            query_starts_R1=expanded.query_starts_R1,
            context_lens_R=expanded.context_lens_R,
            rows_R=columns_5R[0],
            block_tables_SM=self.rows.block_tables_SM,
            num_decodes=bounds.num_decodes,
            shares_tables=bounds.has_drafts,
            max_query_len=bounds.max_query_len,
            max_context_len=bounds.max_context_len,
        )
        return self.model.run_layers(batch, self.kv_cache)


class Bounds(NamedTuple):
    """What the host knows of a captured step: bounds that hold for any rows of its shape."""

    num_tokens: int
    num_decodes: int
    has_drafts: bool
    max_query_len: int
    max_context_len: int


def step_result(plan: StepPlan, words: StepWords, samples: Ints, seconds: float) -> StepResult:
    """Sort the samples of a batch back into the plan's rows, keep the drafts that hold, and name the failed rows."""
    counts = array("i", plan.num_samples)
    in_order, order = samples[: sum(counts)], words.order
    if order.tolist() != list(range(len(order))):
        num_R = np.frombuffer(plan.num_samples, np.int32)
        ends_R = np.empty_like(num_R)
        ends_R[order] = num_R[order].cumsum()
        in_order = samples[trailing(ends_R, num_R)]
    if max(counts, default=0) <= 1:
        tokens = array("i", in_order.astype(np.int32).tobytes())
    else:
        tokens, sampled, end, drafts_end = array("i"), in_order.tolist(), 0, 0
        for row, (num_samples, num_tokens) in enumerate(zip(plan.num_samples, plan.num_tokens, strict=True)):
            end += num_samples
            drafts_end += num_tokens
            if num_samples:
                drafts = plan.tokens[drafts_end - num_samples + 1 : drafts_end] if num_samples > 1 else []
                gained = verified(sampled[end - num_samples : end], drafts)
                counts[row] = len(gained)
                tokens.extend(gained)
    failed = array("i")
    if NOT_FINITE in tokens:
        owners = np.repeat(np.arange(len(counts), dtype=np.int32), np.frombuffer(counts, np.int32))
        is_bad = np.frombuffer(tokens, np.int32) == NOT_FINITE
        failed.extend(np.unique(owners[is_bad]).tolist())
    logprobs = None
    if words.scores is not None:
        logprobs = logprob_columns(plan, words.scores, samples[words.num_samples :], counts, tokens)
    return StepResult(plan.step, counts, tokens, failed, logprobs, seconds)
