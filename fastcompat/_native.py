"""The only importer of the native module: tensors become pointers, sizes and strides here.

Every operator is written once: `_Call` knows what differs between the engine on the CPU and the one on a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypedDict

import torch
from torch import Tensor

from ._torch_hooks import constant_when_compiled
from ._types import SoftmaxOperands

try:
    from . import _C  # type: ignore[attr-defined,unused-ignore]
except ImportError as error:
    raise ImportError(
        "fastcompat's native module is not built here. Install the package with `pip install .` "
        f"and import it from outside the source folder. ({error})"
    ) from error

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
METRICS = ("cosine", "ip", "l2")

VERSION = str(_C.build()["version"])

_DTYPE_CODES = {dtype: code for code, dtype in enumerate(DTYPES)}
_PRECISIONS = ("highest", "high", "medium")


class NonFiniteError(ValueError):
    """A search met NaN or inf: `side` is "query" or "keys", `row` the row of that tensor in that segment."""

    def __init__(self, side: str, segment: int, row: int) -> None:
        super().__init__(f"NaN or inf in row {row} of the {side} of segment {segment}")
        self.side, self.segment, self.row = side, segment, row


class ScoreOverflowError(ValueError):
    """Scores of a query's best keys are beyond float32: `row` is the row of the query."""

    def __init__(self, row: int) -> None:
        super().__init__(f"scores of query {row} are beyond float32")
        self.row = row


def simd_levels() -> list[str]:
    """Instruction sets that are built in and usable on this machine, slowest first."""
    return list(_C.simd_levels())


def simd() -> str:
    """The instruction set in use."""
    return str(_C.simd())


def set_simd(name: str) -> None:
    """Use this instruction set from now on; ValueError where it cannot run."""
    _C.set_simd(name)


class BuildInfo(TypedDict):
    """What was built and what runs (`build_info`)."""

    version: str
    compiler: str
    cuda: str | None
    cuda_archs: list[str]
    cuda_tier: str | None
    simd_built: list[str]
    simd_usable: list[str]
    simd: str
    threads: int


def build_info() -> BuildInfo:
    """What was built and what runs.

    Keys: version, compiler, cuda (None or the version), cuda_archs, cuda_tier (the tier of CUDA kernels
    that the environment variable FASTCOMPAT_CUDA_TIER names, sm80 or sm90; None where the device decides),
    simd_built (instruction sets in the module), simd_usable (those this machine can run), simd (the one
    in use), threads.
    """
    build = dict(_C.build())
    return BuildInfo(
        version=build["version"],
        compiler=build["compiler"],
        cuda=build["cuda"],
        cuda_archs=build["cuda_archs"],
        cuda_tier=_C.cuda_tier(),
        simd_built=build["simd_built"],
        simd_usable=simd_levels(),
        simd=simd(),
        threads=torch.get_num_threads(),
    )


@constant_when_compiled
def not_covered(device: torch.device) -> str:
    """Why no native kernel runs on this device, and what to do about it; empty where they run."""
    if device.type == "cpu":
        return ""
    if device.type != "cuda":
        return "there are kernels for CPUs and NVIDIA GPUs"
    if not hasattr(_C, "cuda"):
        return (
            "this build has no CUDA kernels: install fastcompat again with nvcc on PATH, "
            "or with the environment variable FASTCOMPAT_NVCC=pypi"
        )
    return str(_C.cuda.unusable(device.index))


def lowest(x: Tensor) -> int:
    """The smallest entry of a dense int64 tensor on the CPU, at little more than the cost of reading it."""
    x = x.contiguous()
    return int(_C.lowest(x.data_ptr(), x.numel()))


def _precision(dtype: torch.dtype) -> int:
    """How exact float32 products on a GPU are: torch's setting, by either of its two interfaces."""
    if dtype != torch.float32:
        return 0
    try:
        return _PRECISIONS.index(torch.get_float32_matmul_precision())
    except RuntimeError:  # set through torch.backends, which knows "ieee", "tf32" and "none" (the default)
        return int(torch.backends.cuda.matmul.fp32_precision == "tf32")  # type: ignore[attr-defined,unused-ignore]


class _Call:
    """One call of a kernel: turns tensors into pointers and keeps copies and scratch alive until it returns.

    On a GPU a call returns as soon as it is enqueued; torch's allocator gives memory freed then only to later
    work on the same stream.
    """

    def __init__(self, query: Tensor) -> None:
        self.device, self.dtype = query.device, query.dtype
        self.gpu = query.is_cuda
        self.alive: list[Tensor] = []  # copies and scratch
        self.scale_factor = 0  # address of a number on the GPU that multiplies the scale

    def run(self, kernel: str, *arguments: Any) -> None:
        if self.gpu:
            getattr(_C.cuda, kernel)(*arguments, self.launch())
            return
        try:
            getattr(_C, kernel)(*arguments, torch.get_num_threads())
        except _C.NonFinite as error:
            raise NonFiniteError(*error.args) from None
        except _C.Overflow as error:
            raise ScoreOverflowError(*error.args) from None

    def launch(self) -> Any:
        stream = torch.cuda.current_stream(self.device).cuda_stream
        precision = _precision(self.dtype)
        return _C.cuda.Run(self.device.index, stream, precision, self.scale_factor, self.scratch)

    def scratch(self, size: int) -> int:
        self.memory = torch.empty(size, dtype=torch.uint8, device=self.device)
        return self.memory.data_ptr()

    def refuse_nonfinite(self) -> None:
        """Report NaN or inf that a search on a GPU met; waits for it, so not while a graph is captured."""
        if self.gpu and not torch.cuda.is_current_stream_capturing():
            code = int(self.memory[:8].view(torch.int64)) % 2**64
            if code != 2**64 - 1:
                raise NonFiniteError(*_C.cuda.nonfinite(code))

    def refuse_overflow(self, scores: Tensor) -> None:
        """Report infinite scores among the best that a search on a GPU found (the CPU's engine does so)."""
        if self.gpu and not torch.cuda.is_current_stream_capturing():
            beyond = (scores == torch.inf).any(1).nonzero()
            if len(beyond):
                raise ScoreOverflowError(int(beyond[0]))

    def flat(self, x: Tensor | None) -> int:
        if x is None:
            return 0
        self.here(x)
        if x.is_neg() or not x.is_contiguous():
            x = x.resolve_neg().contiguous()
            self.alive.append(x)
        return x.data_ptr() or self.no_memory(x)

    def no_memory(self, x: Tensor) -> int:
        """The address of a tensor whose pointer is null: 0 if it is empty."""
        if not x.numel():
            return 0
        if not x._is_zerotensor():
            raise ValueError(
                f"a kernel must read tensors with memory of their own: got {type(x).__name__} of shape "
                f"{list(x.shape)} on {x.device} without any (a fake, functional or meta tensor?); call the "
                'function with backend="reference"'
            )
        self.alive.append(zeros := x.clone())
        return zeros.data_ptr()

    def here(self, x: Tensor) -> None:
        if x.device != self.device:
            raise ValueError(f"all tensors must be on one device: got {self.device} and {x.device}")

    def rows(self, x: Tensor) -> Tensor:
        self.here(x)
        # The kernels take any row stride, but neighbours within a row must be neighbours in memory.
        if x.is_neg() or (x.stride(1) != 1 and x.shape[1] > 1):
            x = x.resolve_neg().contiguous()  # torch negates a view when it is read, a kernel does not
            self.alive.append(x)
        return x

    def problem(self, given: SoftmaxOperands) -> tuple[Any, ...]:
        """A softmax problem as the native module reads it."""
        query, keys = self.rows(given.query), self.rows(given.keys)
        scale, scale_tensor = given.scale, given.scale_tensor
        if scale_tensor is not None and self.gpu and scale_tensor.device == self.device:
            self.scale_factor = self.flat(scale_tensor)  # read on the GPU: no synchronisation
        elif scale_tensor is not None:
            scale *= scale_tensor.item()
        rows, dim = query.shape
        return (
            query.data_ptr() or self.no_memory(query),
            keys.data_ptr() or self.no_memory(keys),
            _DTYPE_CODES[self.dtype],
            rows,
            keys.shape[0],
            dim,
            query.stride(0),
            keys.stride(0),
            scale,
            self.flat(given.bias),
            self.flat(given.query_labels),
            self.flat(given.key_labels),
            self.flat(given.positive),
            self.flat(given.exclude),
        )

    def segment(
        self,
        query: Tensor,
        keys: Tensor,
        rows: Tensor | None,
        scale: float = 1.0,
        offset: float = 0.0,
        packed: Tensor | None = None,
        items: Tensor | None = None,
    ) -> tuple[Any, ...]:
        if query.shape[1] == 0:  # a column of zeros scores the same
            query, keys = (x.new_zeros(len(x), 1) for x in (query, keys))
            self.alive += [query, keys]
        query, keys = self.rows(query), self.rows(keys)
        return (
            query.data_ptr() or self.no_memory(query),
            keys.data_ptr() or self.no_memory(keys),
            _DTYPE_CODES[query.dtype],
            query.shape[1],
            query.stride(0),
            keys.stride(0),
            keys.shape[0],
            self.flat(rows),
            keys.shape[0] if rows is None else rows.shape[0],
            scale,
            offset,
            self.flat(packed),
            0 if packed is None else packed.numel(),
            self.flat(items),
        )


def pack(keys: Tensor, rows: Tensor | None, metric: str) -> Tensor:
    """The keys (these rows) in the form that `topk` reads on this instruction set; empty if it has none."""
    call = _Call(keys)
    segment = call.segment(keys[:0], keys, rows)
    size = 0 if call.gpu else _C.packed_size(segment, METRICS.index(metric))
    packed = keys.new_empty(size, dtype=torch.float32)
    if packed.numel():
        call.run("pack", segment, METRICS.index(metric), packed.data_ptr())
    return packed


def softmax_stats(problem: SoftmaxOperands, want_mean: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The op `fastcompat::softmax_stats`."""
    query = problem.query
    call = _Call(query)
    rows, dim = query.shape
    neg_lse, pos_lse, pos_sum = (query.new_empty(rows, dtype=torch.float32) for _ in range(3))
    pos_count = query.new_empty(rows, dtype=torch.int64)
    mean = query.new_empty((rows if want_mean else 0, dim), dtype=torch.float32)
    call.run(
        "softmax_stats",
        call.problem(problem),
        want_mean,
        neg_lse.data_ptr(),
        pos_lse.data_ptr(),
        pos_sum.data_ptr(),
        pos_count.data_ptr(),
        mean.data_ptr(),
    )
    return neg_lse, pos_lse, pos_sum, pos_count, mean


def softmax_query_grad(problem: SoftmaxOperands, *vectors: Tensor | None) -> tuple[Tensor, Tensor]:
    """The op `fastcompat::softmax_query_grad`; `vectors`: neg_lse, pos_lse, mean, three gradients."""
    query = problem.query
    call = _Call(query)
    dquery = query.new_empty(query.shape)
    dscale = query.new_empty(query.shape[0], dtype=torch.float32)
    call.run(
        "softmax_query_grad",
        call.problem(problem),
        *map(call.flat, vectors),
        dquery.data_ptr(),
        dscale.data_ptr(),
    )
    return dquery, dscale


def softmax_key_grad(problem: SoftmaxOperands, *rest: Any) -> tuple[Tensor, Tensor]:
    """The op `fastcompat::softmax_key_grad`."""
    *vectors, want_keys, want_bias = rest
    keys = problem.keys
    call = _Call(keys)
    rows, dim = keys.shape
    dkeys = keys.new_empty((rows if want_keys else 0, dim))
    dbias = keys.new_empty(rows if want_bias else 0, dtype=torch.float32)
    call.run(
        "softmax_key_grad",
        call.problem(problem),
        *map(call.flat, vectors),  # neg_lse, pos_lse, three gradients
        dkeys.data_ptr() if want_keys else 0,
        dbias.data_ptr() if want_bias else 0,
    )
    return dkeys, dbias


def softmax_loss(
    problem: SoftmaxOperands, mean: bool, want_query: bool, want_keys: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The op `fastcompat::softmax_loss`."""
    query, keys = problem.query, problem.keys
    call = _Call(query)
    loss = query.new_empty((), dtype=torch.float32)
    dquery, dkeys = (
        x.new_empty((x.shape[0] if want else 0, x.shape[1]))
        for x, want in ((query, want_query), (keys, want_keys))
    )
    call.run(
        "softmax_loss",
        call.problem(problem),
        mean,
        loss.data_ptr(),
        dquery.data_ptr() if want_query else 0,
        dkeys.data_ptr() if want_keys else 0,
    )
    return loss, dquery, dkeys


def topk(
    query: Sequence[Tensor],
    keys: Sequence[Tensor],
    rows: Sequence[Tensor | None],
    scale: Sequence[float],
    offset: Sequence[float],
    k: int,
    metric: str,
    query_labels: Tensor | None,
    key_labels: Tensor | None,
    exclude: Tensor | None,
    packed: Sequence[Tensor],
    report: bool = True,
    items: Sequence[Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """The op `fastcompat::topk`."""
    call = _Call(query[0])
    every: list[None] = [None] * len(keys)
    parts = zip(query, keys, rows or every, scale, offset, packed or every, items or every, strict=True)
    segments = [call.segment(*part) for part in parts]
    count = query[0].shape[0]
    scores = query[0].new_empty((count, k), dtype=torch.float32)
    ids = query[0].new_empty((count, k), dtype=torch.int64)
    call.run(
        "topk",
        segments,
        k,
        METRICS.index(metric),
        count,
        call.flat(query_labels),
        call.flat(key_labels),
        call.flat(exclude),
        scores.data_ptr(),
        ids.data_ptr(),
    )
    if report:
        call.refuse_nonfinite()
        call.refuse_overflow(scores)
    return scores, ids


def pair_scores(query: Tensor, keys: Tensor, ids: Tensor, metric: str) -> Tensor:
    """The op `fastcompat::pair_scores`."""
    call = _Call(query)
    out = query.new_empty(ids.shape, dtype=torch.float32)
    call.run(
        "pair_scores",
        call.segment(query, keys, None),
        METRICS.index(metric),
        query.shape[0],
        call.flat(ids),
        ids.shape[1],
        out.data_ptr(),
    )
    call.refuse_nonfinite()
    return out


def count_beats(
    query: Tensor,
    keys: Tensor,
    rows: Tensor | None,
    bounds: Tensor,
    thresholds: Tensor,
    threshold_ids: Tensor,
    metric: str,
    exclude: Tensor | None,
) -> Tensor:
    """The op `fastcompat::count_beats`."""
    call = _Call(query)
    count, targets = threshold_ids.shape
    blocks = bounds.shape[0] - 1
    out = query.new_empty((count, targets, blocks), dtype=torch.int64)
    call.run(
        "count_beats",
        call.segment(query, keys, rows),
        METRICS.index(metric),
        count,
        call.flat(bounds),
        blocks,
        call.flat(thresholds),
        call.flat(threshold_ids),
        targets,
        call.flat(exclude),
        out.data_ptr(),
    )
    call.refuse_nonfinite()
    return out
