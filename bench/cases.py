"""What is measured: the cases with their target ratios, their inputs, and our side of each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from types import SimpleNamespace

import torch
import torch.nn.functional as F

import fastcompat as fc

BACKEND = "native"  # never the silent fallback: a build without the native module must fail here
TEMPERATURE = 0.07
DIMS = (128, 256, 512)
TOP = 100
STATES = 22

Result = tuple[torch.Tensor, ...]
Inputs = SimpleNamespace


@dataclass(frozen=True)
class Case:
    """`kind` says what is computed: a key of `INPUTS` and `OURS` here and of the tables in `baselines`."""

    kind: str
    queries: int
    keys: int
    dim: int
    dtype: torch.dtype = torch.float32
    against: dict[str, float | None] = field(
        default_factory=dict
    )  # baseline -> target ratio, None: no target
    products: int = 0  # B x N x D matrix products in our schedule, 0: not a whole number of them
    tolerance: float = 1e-4  # relative difference allowed between two sides' results
    extra_limit: int | None = None  # bytes beyond inputs and outputs that our side may touch

    @property
    def id(self) -> str:
        """Name of the case in reports and for `pytest -k`."""
        dtype = {torch.float32: "fp32", torch.bfloat16: "bf16"}[self.dtype]
        return f"{self.kind}-{dtype}-{self.queries}x{self.keys}x{self.dim}"

    @property
    def operations(self) -> int:
        """Floating-point operations of the matrix products in our schedule."""
        return 2 * self.queries * self.keys * self.dim * self.products

    def tiny(self) -> Case:
        """Return the same computation at a size that only loads code and starts threads."""
        return replace(self, queries=min(self.queries, 8), keys=min(self.keys, 256))


# --- the table -------------------------------------------------------------------------------------------

BF16, FP32 = torch.bfloat16, torch.float32
NONE = (None, None, None)
LOSS_TARGETS: dict[
    tuple[str, torch.dtype], dict[str, tuple[float | None, ...]]
] = {  # targets at D = 128, 256, 512
    ("statistics", FP32): {"eager": (2.5, 1.9, 1.5)},
    ("frozen", FP32): {"eager": (3.0, 2.3, 1.8), "compile": (1.7, 1.4, 1.15), "chunked": (15.0, 15.0, 10.0)},
    ("both", FP32): {"eager": (2.0, 1.6, 1.3), "compile": (1.2, 1.1, 1.0), "chunked": (15.0, 15.0, 10.0)},
    ("statistics", BF16): {"eager": NONE},
    ("frozen", BF16): {"eager": (4.5, 3.3, 2.2), "compile": (2.0, 1.5, 1.2), "chunked": (15.0, 15.0, 10.0)},
    ("both", BF16): {"eager": NONE},
}
PRODUCTS = {"statistics": 1, "frozen": 2, "both": 4}
KEPT = 65_536  # keys up to which float32 exponentials are kept: one product less with both sides
EAGER_LIMIT = 8 << 30  # bytes
EAGER_BYTES_PER_SCORE = 24  # three float copies and a sort's int64 indices
SWEEP = (  # queries, keys, D: other shapes of the fp32 losses, the small ones included
    (64, 1_024, 128),
    (64, 65_536, 128),
    (64, 1_048_576, 128),
    (512, 1_024, 128),
    (8_192, 8_192, 128),
    (8_192, 32_768, 128),
    (8_192, 1_048_576, 128),
    (1_024, 16_384, 64),
    (1_024, 16_384, 1_024),
)
SCALING: dict[str, dict[str, float | None]] = {  # our side with one thread beside more of them
    kind: {"one thread": 1.8} for kind in ("frozen", "both", "topk_ip")
}
TOPK_TARGETS: dict[str, tuple[float | None, ...]] = {"ip": (1.6, 1.35, 1.25), "cosine": NONE}
FEW_QUERIES_TARGETS: dict[int, float | None] = {1: 1.0, 8: 1.5, 31: None, 32: 5.0, 100: 5.0, 499: 5.0}


def products(kind: str, keys: int, dtype: torch.dtype) -> int:
    """Return the matrix products in our schedule of a loss."""
    return PRODUCTS[kind] - (kind == "both" and dtype is FP32 and keys <= KEPT)


def eager_fits(queries: int, keys: int) -> bool:
    """Return whether a side that holds matrices of all scores has the memory for it."""
    return queries * keys * EAGER_BYTES_PER_SCORE < EAGER_LIMIT


def table(quick: bool) -> list[Case]:
    """Return every case; `quick` keeps the shapes of the work and shrinks the sizes to a smoke test."""
    dims = DIMS[:1] if quick else DIMS
    keys, items = (8_192, 10_000) if quick else (65_536, 100_000)
    loss = [
        Case(
            kind,
            1024,
            keys,
            dim,
            dtype,
            {name: targets[DIMS.index(dim)] for name, targets in against.items()},
            products(kind, keys, dtype),
            # The eager side rounds its logits to bf16 (half a unit is 0.03 at a logit of 1/0.07).
            1e-4 if dtype is FP32 else 5e-2,
        )
        for (kind, dtype), against in LOSS_TARGETS.items()
        for dim in dims
    ]
    sweep = (
        []
        if quick
        else [
            Case(
                kind,
                *shape,
                against={"eager": None} if eager_fits(*shape[:2]) else {},
                products=products(kind, shape[1], FP32),
            )
            for kind in ("frozen", "both")
            for shape in SWEEP
        ]
    )
    search = [
        Case(f"topk_{metric}", 1024, items, dim, against={"faiss": targets[DIMS.index(dim)]}, products=1)
        for metric, targets in TOPK_TARGETS.items()
        for dim in dims
    ]
    few = [
        Case("topk_ip", queries, items, 256, against={"faiss": target}, products=1)
        for queries, target in FEW_QUERIES_TARGETS.items()
    ]
    rest = [
        Case("overhead", 64, 64, 128, against={"eager": 1.0}, products=3),
        Case("mixed_topk", 1024, items, 256, against={"plain topk": 1 / 1.05}, products=1),
        Case("ranks", 1024, items, 256, against={"topk": None}, products=1, tolerance=0.0),
        *(
            # Two of the worst hundred that tie exactly may stand in either order in what is expected.
            Case("ranks_100", 1024, items, dim, against={"topk": 1 / 1.5}, products=1, tolerance=1e-5)
            for dim in (256, 512)
        ),
        Case(
            "backfill_curve",
            *((200, 2_000) if quick else (1_000, 20_000)),
            256,
            against={f"{STATES} sorts": 15.0},
            tolerance=2e-3,  # flips are counted in queries: one in a thousand may differ by rounding
        ),
        Case("memory", 1024, 4 * keys, 128, products=4, extra_limit=64 << 20),
    ]
    return loss + sweep + search + few + rest


# --- inputs ----------------------------------------------------------------------------------------------


def _features(rows: int, dim: int) -> torch.Tensor:
    return F.normalize(torch.randn(rows, dim), dim=1)  # [rows, D]


def loss_inputs(case: Case) -> Inputs:
    """Normalised features, one positive per query at a cosine of about 0.7."""
    keys = _features(case.keys, case.dim)
    positive = torch.randperm(case.keys)[: case.queries]
    query = F.normalize(keys[positive] + _features(case.queries, case.dim), dim=1)
    query, keys = query.to(case.dtype).requires_grad_(), keys.to(case.dtype)
    keys.requires_grad_(case.kind in ("both", "overhead", "memory"))
    wanted = (query, keys) if keys.requires_grad else (query,)
    return Inputs(query=query, keys=keys, positive=positive, wanted=wanted)


def search_inputs(case: Case) -> Inputs:
    """Normalised queries and keys."""
    query, keys = (_features(rows, case.dim).to(case.dtype) for rows in (case.queries, case.keys))
    return Inputs(query=query, keys=keys)


def mixed_inputs(case: Case) -> Inputs:
    """A half-upgraded gallery, and the same items as one plain array: one query scores both sides."""
    old, new = _features(case.keys, case.dim), _features(case.keys, case.dim)
    backfilled = torch.rand(case.keys) < 0.5
    keys = torch.where(backfilled[:, None], new, old)
    return Inputs(query=_features(case.queries, case.dim), old=old, new=new, backfilled=backfilled, keys=keys)


def ranks_inputs(case: Case) -> Inputs:
    """Targets are every tenth of each query's best hundred in our own search: their ranks must be these."""
    x = search_inputs(case)
    x.expected = torch.arange(0, TOP, 10).expand(case.queries, -1)  # [B, P]
    x.targets = topk("ip")(x)[1].gather(1, x.expected)  # [B, P]
    return x


def many_ranks_inputs(case: Case) -> Inputs:
    """Targets are each query's best fifty and its worst fifty: a bar that few keys pass, one that most do."""
    x = search_inputs(case)
    half = TOP // 2
    best, worst = (
        fc.topk(side, x.keys, half, metric="ip", backend=BACKEND)[1] for side in (x.query, -x.query)
    )
    x.targets = torch.cat([best, worst], 1)  # [B, P]
    place = torch.arange(half)
    x.expected = torch.cat([place, case.keys - 1 - place]).expand(case.queries, -1)  # [B, P]
    return x


def curve_inputs(case: Case) -> Inputs:
    """About twenty items per class, hard enough for flips; the new space is tighter than the old one."""
    classes = max(case.keys // 20, 2)
    gallery_labels = torch.arange(case.keys) % classes
    query_labels = torch.randint(classes, (case.queries,))
    x = Inputs(query_labels=query_labels, gallery_labels=gallery_labels, order=torch.randperm(case.keys))
    for side, noise in (("old", 2.2), ("new", 1.8)):
        centres = _features(classes, case.dim)
        for name, labels in (("query", query_labels), ("gallery", gallery_labels)):
            rows = F.normalize(centres[labels] + noise * _features(len(labels), case.dim), dim=1)
            setattr(x, f"{name}_{side}", rows)
    return x


INPUTS: dict[str, Callable[[Case], Inputs]] = {
    **dict.fromkeys(("statistics", "frozen", "both", "overhead", "memory"), loss_inputs),
    **dict.fromkeys(("topk_ip", "topk_cosine"), search_inputs),
    "mixed_topk": mixed_inputs,
    "ranks": ranks_inputs,
    "ranks_100": many_ranks_inputs,
    "backfill_curve": curve_inputs,
}


def inputs(case: Case) -> Inputs:
    """Build the inputs of a case; every side builds the same ones."""
    torch.manual_seed(0)
    return INPUTS[case.kind](case)


# --- our side --------------------------------------------------------------------------------------------


def statistics(x: Inputs) -> Result:
    """Log-sum-exp of the negatives and the positive's logit."""
    with torch.no_grad():
        stats = fc.softmax_stats(x.query, x.keys, scale=1 / TEMPERATURE, positive=x.positive, backend=BACKEND)
    return stats.neg_lse, stats.pos_lse


def contrastive(x: Inputs) -> Result:
    """InfoNCE, forward and backward."""
    loss = fc.functional.contrastive_loss(
        x.query, x.keys, positive=x.positive, temperature=TEMPERATURE, normalize=False, backend=BACKEND
    )
    return loss.detach(), *torch.autograd.grad(loss, x.wanted)


def bare_statistics(x: Inputs) -> Result:
    """Forward and backward of `softmax_stats` alone."""
    stats = fc.softmax_stats(x.query, x.keys, scale=1 / TEMPERATURE, positive=x.positive, backend=BACKEND)
    return torch.autograd.grad((stats.neg_lse - stats.pos_lse).mean(), x.wanted)


def mixed_topk(x: Inputs) -> Result:
    """Search of the half-upgraded gallery."""
    return fc.mixed_topk(x.query, x.old, x.query, x.new, x.backfilled, TOP, metric="ip", backend=BACKEND)


def ranks(x: Inputs) -> Result:
    """Ranks of known targets."""
    return (fc.ranks(x.query, x.keys, x.targets, metric="ip", backend=BACKEND),)


def backfill_curve(x: Inputs) -> Result:
    """Exact mAP, CMC and negative flips over all states in one pass."""
    curve = fc.backfill_curve(
        x.query_old,
        x.gallery_old,
        x.query_new,
        x.gallery_new,
        x.query_labels,
        x.gallery_labels,
        order=x.order,
        states=STATES,
        metric="ip",
        backend=BACKEND,
    )
    return tuple(torch.as_tensor(v) for v in (curve.map, curve.cmc[1], curve.negative_flips))


def topk(metric: str) -> Callable[[Inputs], Result]:
    """Exact search."""
    return lambda x: fc.topk(x.query, x.keys, TOP, metric=metric, backend=BACKEND)


OURS: dict[str, Callable[[Inputs], Result]] = {
    "statistics": statistics,
    **dict.fromkeys(("frozen", "both", "overhead"), contrastive),
    "memory": bare_statistics,
    "topk_ip": topk("ip"),
    "topk_cosine": topk("cosine"),
    "mixed_topk": mixed_topk,
    **dict.fromkeys(("ranks", "ranks_100"), ranks),
    "backfill_curve": backfill_curve,
}
