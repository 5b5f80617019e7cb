"""`torch.ops.fastcompat.*` given anything at all: an exception or a result, never a crash of the process."""

from __future__ import annotations

import re
import subprocess
import sys
import textwrap
from collections.abc import Callable

import pytest
import torch

from fastcompat import _native, _ops

ops = torch.ops.fastcompat
Q, K = torch.randn(5, 8), torch.randn(9, 8)
Y, W = torch.arange(5) % 3, torch.arange(9) % 3
ROW, KEY = torch.randn(5), torch.randn(9)
IDS = torch.arange(10).reshape(5, 2) % 9
BARS = torch.zeros(5, 2)
WALK, BOUNDS = torch.arange(9), torch.tensor([0, 4, 9])
ITEMS = torch.tensor([8, -1, 6, 5, 4, 3, 2, 1, 0], dtype=torch.int32)

SOFTMAX = dict(
    query=Q,
    keys=K,
    scale=0.5,
    scale_tensor=torch.tensor(2.0),
    bias=KEY,
    query_labels=Y,
    key_labels=W,
    positive=torch.tensor([0, -1, 8, 3, 3]),
    exclude=torch.tensor([-1, 0, 8, 4, 4]),
)
VALID = {
    "softmax_stats": SOFTMAX | dict(want_mean=True),
    "softmax_query_grad": SOFTMAX
    | dict(neg_lse=ROW, pos_lse=ROW, mean=torch.randn(5, 8), grad_neg=ROW, grad_pos=ROW, grad_sum=ROW),
    "softmax_key_grad": SOFTMAX
    | dict(
        neg_lse=ROW, pos_lse=ROW, grad_neg=ROW, grad_pos=ROW, grad_sum=ROW, want_keys=True, want_bias=True
    ),
    "softmax_loss": SOFTMAX | dict(mean=True, want_query=True, want_keys=True),
    "topk": dict(
        query=[Q, Q],
        keys=[K, K],
        rows=[WALK[:4], WALK[4:]],
        scale=[1.0, 2.0],
        offset=[0.0, 1.0],
        k=3,
        metric="ip",
        query_labels=Y,
        key_labels=W,
        exclude=torch.tensor([-1, 0, 8, 4, 4]),
        packed=[_native.pack(K, WALK[:4], "ip"), _native.pack(K, WALK[4:], "ip")],
        items=[ITEMS, ITEMS],
    ),
    "pair_scores": dict(query=Q, keys=K, ids=IDS, metric="cosine"),
    "count_beats": dict(
        query=Q,
        keys=K,
        rows=WALK,
        bounds=BOUNDS,
        thresholds=BARS,
        threshold_ids=IDS,
        metric="l2",
        exclude=torch.tensor([-1, 0, 8, 4, 4]),
    ),
}


def hostile(value: object) -> list[object]:
    """Values of the right kind for the schema and wrong for the kernel."""
    if isinstance(value, torch.Tensor):
        found: list[object] = [
            value.double() if value.is_floating_point() else value.int(),
            value.bool(),
            torch.zeros(10**5, dtype=value.dtype),
            value.unsqueeze(-1),
            value.to("meta"),
            torch.zeros((), dtype=value.dtype),
            value.to_sparse() if value.dim() else value[None],
        ]
        if value.numel() and value.dim():
            huge = value[:1].expand(10**5, *value.shape[1:])
            found += [value[:0], value[:-1], torch.cat([value, value]), huge]
        if value.numel() and value.dim() == 2:
            found += [value[:, :-1], value.T, value[:, :0], value.bfloat16()]
        if value.dtype == torch.int64:
            found += [value + 9, value - 99, value * 2**40, torch.full_like(value, -(2**63)), value.flip(0)]
        return found
    if isinstance(value, list):
        lists: list[object] = [[], value[:1], value * 2]
        if isinstance(value[0], torch.Tensor):
            lists += [[value[0], bad] for bad in hostile(value[1])]
            lists += [[bad, value[1]] for bad in hostile(value[0])]
        return lists
    if isinstance(value, str):
        return ["", "euclid"]
    if isinstance(value, bool):
        return []
    return [-1, -(2**63), 2**62] if isinstance(value, int) else [float("nan"), float("inf"), -1e38]


def sweep(name: str) -> tuple[int, int]:
    """Each argument of one operator in turn hostile: how many calls raised, how many ran."""
    valid, operator = VALID[name], getattr(ops, name)
    raised = ran = 0
    operator(**valid)
    for argument, value in valid.items():
        for bad in [*hostile(value), None]:
            try:
                operator(**(valid | {argument: bad}))
                ran += 1
            except (ValueError, TypeError, RuntimeError, NotImplementedError, MemoryError):
                raised += 1
    return raised, ran


def topk_of_items(items: list[torch.Tensor], *labels: torch.Tensor) -> object:
    sets = labels or (None, None)
    return ops.topk([Q], [K], [None], [1.0], [0.0], 1, "ip", *sets, None, [], items=items)


@pytest.mark.parametrize("name", VALID)
def test_hostile_arguments_raise(name: str) -> None:
    """In a process of its own on every instruction set: a crash is its exit code."""
    code = textwrap.dedent(
        f"""
        import sys
        sys.path[:0] = {sys.path!r}
        import importlib.util
        spec = importlib.util.spec_from_file_location("operators", {__file__!r})
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        for level in module._native.simd_levels():
            module._native.set_simd(level)
            if {name!r} == "topk":
                parts = module.WALK[:4], module.WALK[4:]
                packed = [module._native.pack(module.K, rows, "ip") for rows in parts]
                module.VALID["topk"]["packed"] = packed
            print(*module.sweep({name!r}), flush=True)
        """
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, (done.returncode, done.stderr[-2000:])
    for line in done.stdout.splitlines():
        raised, ran = map(int, line.split())
        # Most are refused. What runs: no optional argument, a scale of any size, numbers in another order.
        assert raised > 3 * ran, (raised, ran)


@pytest.mark.parametrize(
    ("call", "message"),
    (
        (lambda: ops.topk([Q], [K], [], [1.0], [], 1, "ip", None, None, None, []), "one entry per segment"),
        (lambda: ops.topk([Q], [K], [], [1.0], [0.0], -1, "ip", None, None, None, []), "`k` must be"),
        (lambda: ops.topk([Q], [K], [], [1.0], [0.0], 1, "dot", None, None, None, []), "`metric` must be"),
        (lambda: ops.topk([Q], [K], [], [1.0], [0.0], 1, "ip", Y, None, None, []), "given together"),
        (
            lambda: ops.topk([Q], [K], [], [1.0], [0.0], 1, "ip", Y, W[:8], None, []),
            re.escape("`key_labels` must be torch.int64 [9]: got torch.int64 [8]"),
        ),
        (
            lambda: ops.topk([Q], [K], [WALK + 1], [1.0], [0.0], 1, "ip", None, None, None, []),
            "`rows` must hold row numbers of the keys",
        ),
        (
            lambda: ops.topk([Q], [K], [], [1.0], [0.0], 1, "ip", None, None, None, [torch.zeros(7)]),
            r"`packed` must be what pack\(\) made",
        ),
        (lambda: topk_of_items([ITEMS, ITEMS]), "the lists must have one entry per segment"),
        (lambda: topk_of_items([ITEMS[1:]]), r"`items` must be torch.int32 \[9\]"),
        (lambda: topk_of_items([ITEMS.long()]), r"`items` must be torch.int32 \[9\]"),
        (
            lambda: topk_of_items([ITEMS + 1], Y, W),
            "`items` must be below 9, the length of `key_labels`: got 9",
        ),
        (lambda: _native.pack(K, WALK - 1, "ip"), "`rows` must hold row numbers of the keys"),
        (lambda: ops.pair_scores(Q, K, IDS + 9, "ip"), "must hold key numbers from 0 to 8"),
        (lambda: ops.pair_scores(Q, K, IDS[:4], "ip"), "`ids` must be torch.int64"),
        (lambda: ops.pair_scores(Q, K[:, :4], IDS, "ip"), "`keys` must be torch.float32"),
        (lambda: ops.pair_scores(Q, K.half(), IDS, "ip"), "`keys` must be torch.float32"),
        (lambda: ops.pair_scores(Q.double(), K.double(), IDS, "ip"), "float32, bfloat16 or float16"),
        (
            lambda: ops.count_beats(Q, K, None, torch.tensor([0, 7, 3]), BARS, IDS, "ip", None),
            "`bounds` must ascend",
        ),
        (
            lambda: ops.count_beats(Q, K, WALK[:4], BOUNDS, BARS, IDS, "ip", None),
            "`bounds` must ascend from 0 or more to the number of keys, 4",
        ),
        (lambda: ops.count_beats(Q, K, WALK, BOUNDS[:0], BARS, IDS, "ip", None), "`bounds` must be"),
        (
            lambda: ops.softmax_stats(Q, K, 1.0, None, None, Y, W[:4], None, None, True),
            "`key_labels` must be",
        ),
        (lambda: ops.softmax_stats(Q, K, 1.0, None, KEY[:3], None, None, None, None, 1), "`bias` must be"),
        (lambda: ops.softmax_stats(Q, K, 1.0, None, None, None, None, Y + 9, None, 1), "`positive` must"),
    ),
)
def test_what_the_errors_say(call: Callable[[], object], message: str) -> None:
    with pytest.raises((ValueError, RuntimeError), match=message):
        call()


def test_every_operator_is_here() -> None:
    named = {schema.partition("(")[0] for schema in _ops._SCHEMAS}
    assert named == set(VALID)
