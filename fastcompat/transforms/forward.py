"""Old features to the new space: forward-compatible training and FastFill."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .. import _checks, _inputs, functional
from .base import Transform, as_features, check_width
from .fitting import Training

_ROWS = 4096  # that choose the scale of the class means' classifier


def block(wide: int, narrow: int) -> nn.Sequential:
    """Linear without bias, BatchNorm, ReLU."""
    return nn.Sequential(nn.Linear(wide, narrow, bias=False), nn.BatchNorm1d(narrow), nn.ReLU())


class ForwardTransform(Transform):
    """`r = h(o, s)`: an old feature, with side-information stored beside it, becomes a new one.

    ```
    block = Linear (no bias) + BatchNorm + ReLU
    p1(o): d_old -> 2 d_old -> 2 d_new          p2(s): d_side -> 2 d_side -> 2 d_new      (blocks)
    r = Linear(d_new)(block(block([p1 | p2])))   through `hidden` units, without side-information s = o
    v = Linear(1)(r)                             with `log_variance`: how wrong r is, as a log-variance
    ```
    Ramanujan et al., "Forward Compatible Training for Large-Scale Embedding Retrieval Systems", CVPR 2022,
    arXiv 2112.02805 (code); with `log_variance` FastFill, Jaeckle et al., ICLR 2023, arXiv 2303.04766 (code).
    Features are not normalised; the authors rank by L2. The gallery is transformed without any image, and
    new queries search it at once.

    FastFill backfills the items it is least sure of first: `order = v.argsort(descending=True, stable=True)`.

    Args:
        d_old: columns of the old features.
        d_new: columns of the new features.
        d_side: columns of the side-information; None: there is none.
        hidden: width of the mixer.
        log_variance: return the log-variance too.

    Attributes:
        history: training and held-out loss of every epoch of the last `fit`.
    """

    def __init__(
        self,
        d_old: int,
        d_new: int,
        d_side: int | None = None,
        *,
        hidden: int = 2048,
        log_variance: bool = False,
    ) -> None:
        for name, value in {"d_old": d_old, "d_new": d_new, "d_side": d_side, "hidden": hidden}.items():
            if value is not None:
                _checks.positive_int(name, value)
        options = {"d_old": d_old, "d_new": d_new, "d_side": d_side}
        super().__init__(
            {"old": d_old} | ({} if d_side is None else {"side": d_side}),
            ("new", "log_var") if log_variance else ("new",),
            options | {"hidden": hidden, "log_variance": log_variance},
        )
        beside = d_old if d_side is None else d_side
        self.from_old = nn.Sequential(block(d_old, 2 * d_old), block(2 * d_old, 2 * d_new))
        self.from_side = nn.Sequential(block(beside, 2 * beside), block(2 * beside, 2 * d_new))
        self.mixer = nn.Sequential(block(4 * d_new, hidden), block(hidden, hidden), nn.Linear(hidden, d_new))
        self.log_variance = nn.Linear(d_new, 1) if log_variance else None
        self.history: list[tuple[float, float]] = []

    def forward(self, old: Tensor, side: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """New features [B, d_new] of `old` [B, d_old] and `side` [B, d_side]; and log-variances [B]."""
        if (side is None) != (self.options["d_side"] is None):
            raise ValueError(_side_mismatch(self.options["d_side"]))
        self.check_inputs(*(x for x in (old, side) if x is not None))
        beside = old if side is None else side
        new: Tensor = self.mixer(torch.cat([self.from_old(old), self.from_side(beside)], 1))
        if self.log_variance is None:
            return new
        return new, self.log_variance(new)[:, 0]

    def fit(
        self,
        old: Any,
        new: Any,
        labels: Any = None,
        *,
        side: Any = None,
        new_weight: Any = None,
        new_bias: Any = None,
        label_smoothing: float = 0.1,
        epochs: int = 80,
        batch_size: int = 1024,
        lr: float = 5e-4,
        weight_decay: float = 2.0**-15,
        held_out: float = 0.1,
        patience: int = 10,
        seed: int = 0,
        progress: bool = True,
    ) -> ForwardTransform:
        """Learn from the features of both models of the same items; starts anew from `seed` at every call.

        The loss is `functional.fct_loss`, or `functional.fastfill_loss` with `log_variance`. Optimiser,
        batch, epochs, warm-up and BatchNorm's second half follow FCT's code.

        Args:
            old: [N, d_old], tensor or NumPy array.
            new: [N, d_new].
            labels: int64 [N], only for FastFill: classes of `new_weight`; a negative label leaves its row
                out of the loss.
            side: [N, d_side], if the transform has side-information.
            new_weight: [C, d_new], the new model's classifier, for FastFill. Without it: the
                nearest class mean, `a (<x, m_c> - |m_c|^2 / 2)`, with the power of two a whose smoothed
                cross-entropy on `new` is least (ours, not the paper's).
            new_bias: [C] beside `new_weight`.
            label_smoothing: of the classifier's cross-entropy.
            epochs: passes over the training rows, at most.
            batch_size: rows of a step; fewer for few rows, so that an epoch has 8 steps of at least 64 rows.
            lr: Adam's learning rate, after a warm-up over 1/16 of the steps and then falling like a cosine.
            weight_decay: Adam's.
            held_out: the share of the rows kept for early stopping, drawn at random; 0: none.
            patience: stop after so many epochs without a smaller held-out loss.
            seed: of the weights, the held-out rows and the order of the others.
            progress: show a tqdm bar (in a terminal).

        Returns:
            The transform itself, in eval mode, with the weights of the best epoch.

        Raises:
            ValueError, TypeError: arguments that do not fit; NaN or inf, naming the first bad row.
        """
        training = Training(epochs, batch_size, lr, weight_decay, held_out, patience, seed, progress)
        if (side is None) != (self.options["d_side"] is None):
            raise ValueError(_side_mismatch(self.options["d_side"]))
        given = {"old": old, "new": new} | ({} if side is None else {"side": side})
        o, n, *s = as_features(**given)
        self.check_inputs(o, *s)
        check_width("new", n, self.options["d_new"])

        def at(value: Tensor, rows: Tensor) -> Tensor:
            return self.like_weights(value[rows.to(value.device)])

        if self.log_variance is None:
            if new_weight is not None or new_bias is not None:
                name = "new_bias" if new_weight is None else "new_weight"
                raise ValueError(f"`{name}` is for FastFill: make the transform with log_variance=True")

            def loss(rows: Tensor) -> Tensor:
                return functional.fct_loss(self(*(at(x, rows) for x in (o, *s))), at(n, rows))

        else:
            if labels is None:
                raise ValueError(
                    "`labels` must be given with `log_variance`: got None; FastFill needs classes"
                )
            (y,) = _inputs.labels(("labels",), (labels,), (("new", n),))
            w: Tensor
            b: Tensor | None
            if new_weight is None:
                if new_bias is not None:
                    raise ValueError("`new_bias` must come with `new_weight`: got None for that")
                w, b, y = _mean_classifier(n, y, label_smoothing)
            else:
                w, b = _classifier(new_weight, new_bias, n, y)
            w = self.like_weights(w)
            b = None if b is None else self.like_weights(b)

            def loss(rows: Tensor) -> Tensor:
                pred, log_var = self(*(at(x, rows) for x in (o, *s)))
                target = at(n, rows)
                own = y[rows.to(y.device)].to(target.device)
                return functional.fastfill_loss(
                    pred, target, log_var, w, b, own, label_smoothing=label_smoothing
                )

        self.history = training.run([self], len(o), loss, "FCT" if self.log_variance is None else "FastFill")
        return self


def _side_mismatch(d_side: int | None) -> str:
    if d_side is None:
        return "`side` must be left out: this transform was made without `d_side`"
    return f"`side` must be given, {d_side} columns: got None; this transform was made with `d_side`"


def _classifier(weight: Any, bias: Any, new: Tensor, labels: Tensor) -> tuple[Tensor, Tensor | None]:
    w = _inputs.matrix("new_weight", weight)
    _checks.columns("new_weight", w, "new", new)
    _checks.in_range("labels", labels.clamp(min=-1), len(w))
    if bias is None:
        return w, None
    b = _inputs.vectors("new_bias", bias)
    if b.shape != (len(w),):
        raise ValueError(f"`new_bias` must have shape [{len(w)}], one per class: got shape {list(b.shape)}")
    return w, b


def _mean_classifier(new: Tensor, labels: Tensor, label_smoothing: float) -> tuple[Tensor, Tensor, Tensor]:
    """Weight [C, D] and bias [C] over the classes that occur, and the labels [N] as their row numbers."""
    known = labels >= 0
    classes, own = torch.unique(labels[known], return_inverse=True)
    if not len(classes):
        raise ValueError("`labels` must name a class: got only negative labels")
    x = new[known].float()
    means = x.new_zeros(len(classes), x.shape[1], dtype=torch.float64).index_add_(0, own, x.double())
    means = (means / own.bincount()[:, None]).float()
    bias = means.square().sum(1) / -2
    some = slice(None, None, -(-len(x) // _ROWS))  # evenly, for rows sorted by class
    sample, target = x[some], own[some]
    spread = float((sample - means[target]).square().mean().clamp(min=1e-12))

    def cost(scale: float) -> float:
        w, b, certain = scale * means, scale * bias, x.new_zeros(len(sample))
        loss = functional.fastfill_loss(
            sample, sample, certain, w, b, target, label_smoothing=label_smoothing
        )
        return float(loss)

    scale = min((2.0**power / spread for power in range(-16, 5)), key=cost)
    numbers = torch.full_like(labels, -1)
    numbers[known] = own
    return scale * means, scale * bias, numbers
