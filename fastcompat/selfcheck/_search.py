"""The search kernels against the reference, on keys whose scores are exact: ids and counts must be equal.

Small whole numbers make every score exact in float32, however it is added up: a tie is a tie everywhere.
"""

from __future__ import annotations

import functools
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from .. import _native, _ops, reference
from .._types import Segment
from ._compare import far, on

QUERIES, KEYS = 70, 3300  # more queries than two strips have lanes, keys enough for a sample of them
FEW, MANY = 3, 200  # k: with so few a search screens its keys, with so many it scores each of them
COUNTS = (1, 8, 70)  # queries: one, as many as are screened where the keys lie, a batch


@functools.cache
def vectors(kind: str, metric: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Queries and keys with many ties ("ties"), or with near ties that rounding would mix up ("near")."""
    gen = torch.Generator("cpu").manual_seed(1)
    if kind == "near":
        # 9 bits a number, sums below 2^24; bfloat16 has 8 bits.
        most = 250 if dtype == torch.bfloat16 else 500
        dim = 15 if metric == "l2" else 45
        query = torch.randint(-most, most + 1, (QUERIES, dim), generator=gen, dtype=torch.int64, device="cpu")
        centre = torch.randint(20 - most, most - 19, (dim,), generator=gen, dtype=torch.int64, device="cpu")
        keys = centre + torch.randint(-4, 5, (KEYS, dim), generator=gen, dtype=torch.int64, device="cpu")
    elif metric == "cosine":  # signs in 4^n columns: norms are powers of two; a few zero vectors
        query, keys = (
            torch.randint(2, (n, 64), generator=gen, dtype=torch.int64, device="cpu") * 2 - 1
            for n in (QUERIES, KEYS)
        )
        query[::11], keys[::13] = 0, 0
    else:
        query, keys = (
            torch.randint(-3, 4, (n, 45), generator=gen, dtype=torch.int64, device="cpu")
            for n in (QUERIES, KEYS)
        )
    return query.to(dtype), keys.to(dtype)


@functools.cache
def sets() -> tuple[Tensor, Tensor, Tensor]:
    """Labels of queries and keys, and one excluded key for most queries."""
    gen = torch.Generator("cpu").manual_seed(2)
    query_labels, key_labels = (
        torch.randint(-1, 3, (n,), generator=gen, dtype=torch.int64, device="cpu") for n in (QUERIES, KEYS)
    )
    return (
        query_labels,
        key_labels,
        torch.randint(-1, KEYS, (QUERIES,), generator=gen, dtype=torch.int64, device="cpu"),
    )


PARTS: dict[
    str, list[tuple[slice | None, float, float]]
] = {  # the rows of each segment, its scale and its offset
    "one segment": [(None, 1.0, 0.0)],
    "two segments": [(slice(0, None, 2), 1.0, 0.0), (slice(1, None, 2), 0.5, 0.25)],
}
PROBLEMS = [("ties", "ip"), ("ties", "l2"), ("ties", "cosine"), ("near", "ip"), ("near", "l2")]


def _segments(query: Tensor, keys: Tensor, parts: str) -> list[Segment]:
    rows = torch.arange(KEYS, dtype=torch.int64, device="cpu")
    return [
        Segment(query, keys, None if part is None else rows[part], scale, offset)
        for part, scale, offset in PARTS[parts]
    ]


@functools.cache
def _best(kind: str, metric: str, dtype: torch.dtype, parts: str, filtered: bool) -> tuple[Tensor, Tensor]:
    segments = _segments(*vectors(kind, metric, dtype), parts)
    return reference.topk(segments, MANY, metric, *(sets() if filtered else ()))


def _search(
    segments: list[Segment], k: int, metric: str, chosen: tuple[Tensor, ...], packed: list[Tensor]
) -> tuple[Tensor, Tensor]:
    query, keys, rows, scale, offset = map(list, zip(*segments, strict=True))
    labels_and_exclude = chosen or (None, None, None)
    rows = [part for part in rows if part is not None]
    found: tuple[Tensor, Tensor] = _ops.topk(
        query, keys, rows, scale, offset, k, metric, *labels_and_exclude, packed
    )
    return found


def _same(found: tuple[Tensor, Tensor], truth: tuple[Tensor, Tensor]) -> bool:
    return torch.equal(found[0], truth[0]) and torch.equal(found[1], truth[1])


def topk(dtype: torch.dtype, device: torch.device) -> str:
    """`topk`: for 1, 8 and many queries, screened and not, filtered and not, in one segment and in two."""
    for kind, metric in PROBLEMS:
        query, keys = vectors(kind, metric, dtype)
        for parts in PARTS:
            for filtered in (True, False):
                truth = _best(kind, metric, dtype, parts, filtered)
                for count, k in ((1, FEW), (8, FEW), (QUERIES, FEW), (QUERIES, MANY)):
                    segments = _segments(query[:count], keys, parts)
                    y, w, hole = sets()
                    chosen = (y[:count], w, hole[:count]) if filtered else ()
                    found = on(device, _search, segments, k, metric, chosen, [])
                    if not _same(found, (truth[0][:count, :k], truth[1][:count, :k])):
                        return f"wrong results: {metric}, {kind}, {count} queries, k = {k}, {parts}"
    return _cosine_topk(dtype, device) or _refuses_nan(dtype, device)


def _cosine_topk(dtype: torch.dtype, device: torch.device) -> str:
    """No score is exact here, so a key may replace another whose score is as good up to rounding."""
    query, keys = vectors("near", "ip", dtype)
    truth = torch.nn.functional.normalize(query.double()) @ torch.nn.functional.normalize(keys.double()).T
    best = truth.topk(FEW).values
    rounding = (2 * keys.shape[1] + 32) * 2.0**-24  # csrc/cpu/screen.inl: of a product of two unit vectors
    for count in COUNTS:
        segments = _segments(query[:count], keys, "one segment")
        score, ids = on(device, _search, segments, FEW, "cosine", (), [])
        own = truth[:count].gather(1, ids.clamp(min=0))
        if ids.min() < 0 or not ((score - own).abs() <= rounding).all():
            return f"wrong scores: cosine, near, {count} queries"
        if not ((score - best[:count]).abs() <= rounding).all():
            return f"better keys were lost: cosine, near, {count} queries"
    return ""


def _refuses_nan(dtype: torch.dtype, device: torch.device) -> str:
    query, keys = vectors("ties", "ip", dtype)
    keys = keys.clone()
    keys[KEYS - 1, -1] = torch.nan
    for count in COUNTS:
        try:
            on(device, _search, _segments(query[:count], keys, "one segment"), FEW, "ip", (), [])
        except _native.NonFiniteError as error:
            if (error.side, error.row) == ("keys", KEYS - 1):
                continue
        return f"NaN in the last key goes unnoticed: {count} queries"
    return ""


def pair_scores(dtype: torch.dtype, device: torch.device) -> str:
    """`pair_scores`: every metric, places without a key included."""
    ids = torch.randint(
        -1,
        KEYS,
        (QUERIES, 50),
        generator=torch.Generator("cpu").manual_seed(3),
        dtype=torch.int64,
        device="cpu",
    )
    for kind, metric in [*PROBLEMS, ("near", "cosine")]:
        query, keys = vectors(kind, "ip" if kind == "near" and metric == "cosine" else metric, dtype)
        found = on(device, _ops.pair_scores, query, keys, ids, metric)
        exact = (kind, metric) != ("near", "cosine")
        rounding = 0 if exact else (2 * keys.shape[1] + 32) * 2.0**-24
        if problem := far(found, reference.pair_scores(query, keys, ids, metric), rounding):
            return f"{problem}: {metric}, {kind}"
    return ""


def _walk(kind: str, metric: str, dtype: torch.dtype, rows: int, targets: int) -> tuple[Any, ...]:
    gen = torch.Generator("cpu").manual_seed(4)
    query, keys = (x[:n] for x, n in zip(vectors(kind, metric, dtype), (rows, 700), strict=True))
    order = torch.randperm(700, generator=gen, dtype=torch.int64, device="cpu")
    bounds = torch.tensor([10, 64, 64, 329, 690], dtype=torch.int64, device="cpu")
    wanted = torch.randint(-1, 700, (rows, targets), generator=gen, dtype=torch.int64, device="cpu")
    bars = reference.pair_scores(query, keys, wanted, metric)
    hole = torch.randint(-1, 700, (rows,), generator=gen, dtype=torch.int64, device="cpu")
    return query, keys, order, bounds, bars, wanted, metric, hole


@functools.cache
def _counts(kind: str, metric: str, dtype: torch.dtype, rows: int, targets: int) -> Tensor:
    query, keys, order, bounds, bars, own, _, hole = _walk(kind, metric, dtype, rows, targets)
    score = reference.scores(query, keys, metric)[:, order][:, None]  # [B, 1, M]
    beats = (score > bars[..., None]) | ((score == bars[..., None]) & (order < own[..., None]))
    beats &= (order != hole[:, None])[:, None] & (own >= 0)[..., None]
    return torch.stack([beats[..., a:b].sum(2) for a, b in pairwise(bounds.tolist())], 2)


def count_beats(dtype: torch.dtype, device: torch.device) -> str:
    """`count_beats`: few targets and more than a table of them can number, few queries and a batch."""
    for kind, metric in PROBLEMS:
        for rows, targets in ((9, 5), (QUERIES, 5), (QUERIES, 100), (2, 2100)):
            found = on(device, _ops.count_beats, *_walk(kind, metric, dtype, rows, targets))
            if not torch.equal(found, _counts(kind, metric, dtype, rows, targets)):
                return f"wrong counts: {metric}, {kind}, {rows} queries, {targets} targets"
    return ""


def pack(dtype: torch.dtype, device: torch.device) -> str:
    """`pack`: a search of packed keys finds what it finds without, bit for bit."""
    for kind, metric in [*PROBLEMS, ("near", "cosine")]:
        query, keys = vectors(kind, "ip" if kind == "near" and metric == "cosine" else metric, dtype)
        for parts in PARTS:
            whole = _segments(query, keys, parts)
            packed = [_native.pack(part.keys, part.rows, metric) for part in whole]
            for count in COUNTS:
                segments = _segments(query[:count], keys, parts)
                found, plain = (on(device, _search, segments, FEW, metric, (), x) for x in (packed, []))
                if not _same(found, plain):
                    return f"wrong results: {metric}, {kind}, {count} queries, {parts}"
    return ""
