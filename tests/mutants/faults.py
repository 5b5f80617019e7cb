"""Faults to plant in the engine, one line each, and which checks of `fastcompat info` must find them.

A kernel that is rewritten may lose a fault's line; then the test says so, and the fault gets a new line.
"""

from __future__ import annotations

from typing import NamedTuple


class Fault(NamedTuple):
    """`line` of a file in csrc/cpu becomes `wrong`; each of these kernels must fail its check."""

    file: str
    line: str
    wrong: str
    found_by: tuple[str, ...]


FAULTS = {
    "the positive's gradient has the wrong sign": Fault(
        "softmax_loss.cpp", "g_pos[i] = -g_neg[i];", "g_pos[i] = g_neg[i];", ("softmax_loss",)
    ),
    "a mean counts rows without positives": Fault(
        "softmax_loss.cpp",
        "std::max<int64_t>(1, rows_with_positives(p, rows))",
        "std::max<int64_t>(1, p.query.rows)",
        ("softmax_loss",),
    ),
    "cached exponentials are read with the shift of the first block": Fault(
        "cached_probs.inl",
        "item.cached.shifts + block * item.cached.queries + q",
        "item.cached.shifts + 0 * block + q",
        ("softmax_loss",),
    ),
    "the first part of the key gradient alone": Fault(
        "softmax_stats.cpp",
        "for (int64_t s = 1; s < plan.splits; ++s)\n        for",
        "for (int64_t s = 1; s < 1; ++s)\n        for",
        ("softmax_key_grad",),
    ),
    "the last part of the keys is not in the negatives": Fault(
        "softmax_stats.cpp",
        "top = std::max(top, part.max[s * B + i]);",
        "top = std::max(top, part.max[s * B + i]);\n      if (plan.splits > 1) part.sum_exp[B + i] = 0;",
        ("softmax_stats",),
    ),
    "the scale's gradient is a tenth too small": Fault(
        "softmax_stats.cpp", "dscale[i] = ", "dscale[i] = 0.9f * ", ("softmax_query_grad",)
    ),
    "the key gradient knows no bias": Fault(
        "softmax.inl",
        "if (item.bias && key >= 0) bias[lane] = item.bias[key];",
        "",
        ("softmax_key_grad",),
    ),
    "one label has no positives": Fault(
        "softmax_stats.cpp",
        "if (groups.key_start[g] == groups.key_start[g + 1]) continue;",
        "if (g == 0 || groups.key_start[g] == groups.key_start[g + 1]) continue;",
        ("softmax_stats", "softmax_query_grad", "softmax_loss"),
    ),
    "rounding is said to hide nothing": Fault(
        "screen.inl",
        "error_bound = [&](float key_norm, float key_residual, int v) {",
        "error_bound = [&](float key_norm, float key_residual, int v) {\n    key_norm = key_residual = 0;",
        ("topk",),
    ),
    "every seventh key is never a candidate": Fault(
        "candidates.inl",
        "if (t * L + lane < state.item.n_queries &&",
        "if ((first + row) % 7 != 3 && t * L + lane < state.item.n_queries &&",
        ("topk",),
    ),
    "a search does not exclude": Fault(
        "candidates.inl",
        "if (f.exclude && f.exclude[query] == id) return false;",
        "",
        ("topk",),
    ),
    "a search takes label 0 for no label": Fault(
        "candidates.inl", "f.query_labels[query] >= 0", "f.query_labels[query] > 0", ("topk",)
    ),
    "of two equal keys the larger id is kept": Fault(
        "select.inl", "score == cut.value && id <= tie", "score == cut.value && id > tie", ("topk",)
    ),
    "exact scores leave out a number of the tail": Fault(
        "simd_avx2.h", "const int left = width - 4 * g;", "const int left = width - 1 - 4 * g;", ("topk",)
    ),
    "packed blocks hold the rows of the first of four": Fault(
        "topk.inl", "first, n, item.bad, ws)", "item.begin, n, item.bad, ws)", ("pack",)
    ),
    "a rank goes to the larger id": Fault(
        "histogram.inl",
        "score == score ? rank_code(score, id) : INT64_MIN;",
        "score == score ? rank_code(score, -id) : INT64_MIN;",
        ("count_beats",),
    ),
    "more targets than a table numbers": Fault(
        "histogram.inl",
        "(most < kMaxThresholds ? most : targets) - least",
        "most - least",
        ("count_beats",),
    ),
    "a rank does not exclude": Fault(
        "ranks.inl", "if (excluded(t, lane, ids[i]))", "if (false)", ("count_beats",)
    ),
    "a place without a key has a score": Fault(
        "ranks.inl", "< 0 ? -kInf :", "< -1 ? -kInf :", ("pair_scores",)
    ),
}
