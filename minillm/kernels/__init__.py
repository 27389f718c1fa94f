"""Kernels behind one seam: a *kernel set* is a module with the functions below, taking tensors and never a batch.

    reference  plain torch, float64-able: the oracle, never tuned
    cpu        torch on a CPU, tuned; no compiler needed
    gpu        Triton (attention, hopper_attention, dealing, decode_attention, edits, expand_kernel, fused, sampling,
               scores behind it; for steps of a few rows skinny and fused_decode, for some more hopper_linear, for many
               hopper_gated)

A model is built with one set and calls nothing else. The package imports torch and triton, nothing of MiniLLM's;
`gpu` is how the engine reaches triton, and only when a GPU (or Triton's interpreter) is used; `compiling` readies what
it launches before the first step.

Shapes: T tokens, D hidden size, F intermediate size, N query heads, K key/value heads, H head size, C = (N + 2K) * H,
R rows, S seats, M blocks a seat can hold, B blocks, P block size (slots of a block), L rows of logits, V vocabulary,
O output features, E entries of a rotary table = positions, and of edits K edited rows,
N positions, P words of a profile, M masks, W = V / 32 words of one; of scores M scored tokens, X words of one.

    expand_step_inputs(columns_5R, tokens, *, block_tables_SM, last_tokens_S, block_size, num_tokens) -> StepInputs
        a step's columns, one value a row, as what the model reads, one value a token.
    linear(x_TD, weight_OD, bias_O | None) -> y_TO
    rms_norm(x_TD, weight_D, eps) -> y_TD
    add_rms_norm(x_TD, residual_TD, weight_D, eps) -> y_TD        residual += x in place, y = rms_norm(residual)
    rotary_and_store(qkv_TC, *, cos_sin_EH, positions_T, slots_T, kv_2BKPH, q_norm_H, k_norm_H, eps,
                     num_heads, num_kv_heads) -> q_TNH
        per-head RMSNorm of q and k where q_norm_H is given (Qwen3), rotate both (halves, the Hugging Face layout),
        write k and v to `kv_2BKPH` at `slots_T`. cos_sin_EH is fp32: H/2 cosines, then H/2 sines.
    silu_mul(x_T2F) -> y_TF                                        silu(first half) * second half
    gated_linear(x_TD, weight_2FD, bias_2F | None) -> y_TF         silu_mul(linear(x)), perhaps rounded less often
    linear_into(residual_TO, x_TD, weight_OD, bias_O | None) -> None, y_TO or parts_STO in float32, whose sum y is
        only where a set has it: residual += linear(x) in place and None, or what is still to be added, which
        `add_rms_norm` does.
    attention(q_TNH, *, kv_2BKPH, block_tables_SM, rows_R, query_starts_R1, context_lens_R, scale, num_decodes,
              max_query_len, max_context_len, block_tokens=None, one_launch=False) -> o_TNH
        causal, bottom-right aligned: query i of a row with n queries and context c sees keys 0 .. c - n + i.
        Rows of one token are all among the first `num_decodes`, of which those with none or several are no decodes;
        `max_query_len` and `max_context_len` are bounds.
        `block_tokens` sets the tile of Flash Attention, in keys on a GPU and in queries on a CPU.
        `kv_2BKPH` is one layer of the cache: [keys or values, block, kv head, slot, head size].
    prepare_step(*, cos_sin_EH, positions_T, slots_T, kv_2BKPH, block_tables_SM, rows_R, query_starts_R1,
                 context_lens_R, num_decodes, max_context_len) -> prepared
        only where a set has it: what all layers of a step share. Its `rotary_and_store` and `attention` then take
        `prepared`, which must come from the same arguments; layers of one step, in their order, on one stream. On a GPU
        a kernel that waits for all before it must come between (programmatic dependent launch): attention reads
        `prepared` before the kernels before it have ended.
    note_inputs(columns_7K, *, last_tokens_S, history_SN, counts_SV) -> None
        keep and count the input tokens of rows whose logits are edited; before `keep_tokens` replaces the last ones.
    edit_logits(logits_LV, columns_7K, *, profiles_SP, profile, counts_SV, history_SN, masks_MW) -> scores_KV (fp32)
        biases, bans, penalties and masks; `edits_reference` has the layout of columns and profiles.
    keep_edited(tokens_K, is_finite_K, columns_7K, *, samples_L, last_tokens_S) -> None
        what was sampled from them, in place of the rows' samples and of their seats' last tokens.
    max_fused_rows(*, hidden_size, inner_sizes, head_size, dtype, device) -> int
        only where a set has it: most rows of a step that the four below take, 0 for none. Each row has one token, row r
        token r. They give what the functions above give one after the other, rounded less often.
    norm_linear(x_TD, norm_D, eps, weight_OD, bias_O | None) -> y_TO           linear(rms_norm(x))
    norm_gated_linear(x_TD, norm_D, eps, weight_2FD, bias_2F | None) -> y_TF   silu_mul(linear(rms_norm(x)))
    add_linear(residual_TO, x_TD, weight_OD, bias_O | None) -> None            residual += linear(x) in place
    fused_decode(qkv_TC, *, cos_sin_EH, slots_T, kv_2BKPH, q_norm_H, k_norm_H, eps, num_heads, block_tables_SM, rows_R,
                 context_lens_R, scale, max_context_len) -> o_TNH
        rotary_and_store, then attention.
    sample(logits_LV, *, temperature_L, top_k_L, top_p_L, min_p_L, seeds_L, positions_L, is_random, is_filtered)
        -> tokens_L (int32), is_finite_L (bool)
        greedy where temperature is 0; else Gumbel-max with noise keyed by (seed, position, token id).
        `is_random`: some row samples. `is_filtered`: some row has top_k, top_p or min_p. Both known on the host.
    keep_tokens(tokens_L, is_finite_L, *, seats_L, last_tokens_S) -> samples_L
        last_tokens_S[seats] = tokens, of several for a seat any; samples are the tokens, -1 where a row failed.
    score_tokens(logits_LV, tokens_L, rows_M, num_top) -> words_MX (int32)
        logprobs of the tokens of some rows, how many others are likelier, and the `num_top` likeliest;
        `scores_reference` has the layout of the words.
"""
