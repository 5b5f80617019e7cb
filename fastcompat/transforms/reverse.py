"""New features to the old space: the reverse query transform, and the head of metric-compatible learning."""

from __future__ import annotations

import itertools
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from .. import _checks, _inputs, functional
from ..losses import MetricCompatibleLoss
from .base import Transform, as_features, check_width
from .fitting import Training
from .forward import block


class ResidualHead(Transform):
    """`rho(n) = n^ + MLP(n^)`: a learned head on the new model whose output the gallery stores.

    The MLP is Linear-BatchNorm-ReLU-Linear and starts at zero, so that training begins at the new model
    itself. It is trained together with the `ReverseQueryTransform` that works on top of it. Seo et al.,
    "Online Backfilling with No Regret for Large-Scale Image Retrieval", arXiv 2301.03767 (reconstructed: the
    form of the head is ours).

    Args:
        d_new: columns of the new features.
        hidden: width of the MLP; default: 2 d_new.

    Attributes:
        history: training and held-out loss of every epoch of the last `fit`.
    """

    def __init__(self, d_new: int, *, hidden: int | None = None) -> None:
        _checks.positive_int("d_new", d_new)
        hidden = 2 * d_new if hidden is None else _checks.positive_int("hidden", hidden)
        super().__init__({"new": d_new}, ("stored",), {"d_new": d_new, "hidden": hidden})
        self.mlp = nn.Sequential(block(d_new, hidden), nn.Linear(hidden, d_new))
        self.history: list[tuple[float, float]] = []
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Begin at the new model itself."""
        for weight in self.mlp[-1].parameters():
            nn.init.zeros_(weight)

    def forward(self, new: Tensor) -> Tensor:
        """What to store [B, d_new] for new features `new` [B, d_new]."""
        self.check_inputs(new)
        unit = F.normalize(new)
        stored: Tensor = unit + self.mlp(unit)
        return stored

    def fit(
        self, old: Any, new: Any, labels: Any, *, psi: ReverseQueryTransform | None = None, **training: Any
    ) -> ResidualHead:
        """Learn the head and the transform on top of it: `psi.fit(..., head=self)`, weighted as suits a head.

        Args:
            old: [N, d_old], tensor or NumPy array.
            new: [N, d_new].
            labels: int64 [N].
            psi: the transform that is trained with it, and then makes old queries of the head's output;
                default: one that is dropped afterwards, which leaves a head only for the new gallery.
            training: keywords of `ReverseQueryTransform.fit`; `weight` is 1 here, and `compatible`
                `MetricCompatibleLoss(temperature=0.1)`.

        Returns:
            The head itself, in eval mode, with the weights of the best epoch.

        Raises:
            ValueError, TypeError: arguments that do not fit; NaN or inf, naming the first bad row.
        """
        if psi is None:
            psi = ReverseQueryTransform(self.options["d_new"], as_features(old=old)[0].shape[1])
        suited: dict[str, Any] = {"weight": 1.0, "compatible": MetricCompatibleLoss(temperature=0.1)}
        self.history = psi.fit(old, new, labels, head=self, **suited | training).history
        return self


class ReverseQueryTransform(Transform):
    """`psi(n)`: a new query feature becomes an old one, so that one extraction searches old and new items.

    `blocks` blocks Linear (no bias) - BatchNorm - ReLU, the last of them a Linear (with bias) alone: 1 is a
    linear map. Seo et al., "Online Backfilling with No Regret for Large-Scale Image Retrieval", arXiv
    2301.03767 (reconstructed: only the paper's text was available).

    Args:
        d_new: columns of the new features.
        d_old: columns of the old features.
        blocks: 1 to 5 in the paper.
        hidden: width between the blocks; default: 2 max(d_new, d_old).

    Attributes:
        history: training and held-out loss of every epoch of the last `fit`.
    """

    def __init__(self, d_new: int, d_old: int, *, blocks: int = 2, hidden: int | None = None) -> None:
        for name, value in {"d_new": d_new, "d_old": d_old, "blocks": blocks}.items():
            _checks.positive_int(name, value)
        hidden = 2 * max(d_new, d_old) if hidden is None else _checks.positive_int("hidden", hidden)
        options = {"d_new": d_new, "d_old": d_old, "blocks": blocks, "hidden": hidden}
        super().__init__({"new": d_new}, ("old",), options)
        widths = [d_new, *[hidden] * (blocks - 1)]
        inner = [block(*pair) for pair in itertools.pairwise(widths)]
        self.psi = nn.Sequential(*inner, nn.Linear(widths[-1], d_old))
        self.history: list[tuple[float, float]] = []

    def forward(self, new: Tensor) -> Tensor:
        """Old features [B, d_old] for new features `new` [B, d_new]."""
        self.check_inputs(new)
        old: Tensor = self.psi(new)
        return old

    def fit(
        self,
        old: Any,
        new: Any,
        labels: Any = None,
        *,
        distance: str = "cosine",
        compatible: MetricCompatibleLoss | None = None,
        weight: float = 0.3,
        head: ResidualHead | None = None,
        epochs: int = 40,
        batch_size: int = 256,
        lr: float = 1e-3,
        weight_decay: float = 0.0,
        held_out: float = 0.1,
        patience: int = 10,
        seed: int = 0,
        progress: bool = True,
    ) -> ReverseQueryTransform:
        """Learn from the features of both models of the same items; starts anew from `seed` at every call.

        ```
        L = mean of (1 - <psi(m)^, o^>)                        reverse query transform
          + weight * metric_compatible_loss(psi(m), m, o, y)   with labels: metric-compatible learning
        ```
        with `m = n`, or `m = head(n)` with a head, which is trained too: the gallery then stores
        `head.transform(new)`, and a query searches the old part as `psi.transform(head.transform(query))`.
        With a head, weight 1 and temperature 0.1 worked; without one, the defaults.

        Args:
            old: [N, d_old], tensor or NumPy array.
            new: [N, d_new].
            labels: int64 [N]; None: only the reverse query transform.
            distance: "cosine" as above, or "l2": `|psi(m) - o|^2`, the mean over the columns.
            compatible: the loss beside labels; default: `MetricCompatibleLoss(temperature=0.2)`.
            weight: of that loss.
            head: a `ResidualHead` to be trained with it.
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
        _checks.choice("distance", distance, ("cosine", "l2"))
        o, n = as_features(old=old, new=new)
        self.check_inputs(n)
        check_width("old", o, self.options["d_old"])
        y = None
        if labels is not None:
            (y,) = _inputs.labels(("labels",), (labels,), (("old", o),))
        elif compatible is not None or head is not None:
            name = "compatible" if head is None else "head"
            raise ValueError(f"`labels` must be given with `{name}`: got None")
        if head is not None:
            head.check_inputs(n)
        judge = MetricCompatibleLoss(temperature=0.2) if compatible is None else compatible

        def loss(rows: Tensor) -> Tensor:
            query, target = (self.like_weights(x[rows.to(x.device)]) for x in (n, o))
            if head is not None:
                query = head(query)
            reverse = self(query)
            if distance == "cosine":
                value = 1 - F.cosine_similarity(reverse, target).mean()
            else:
                value = functional.fct_loss(reverse, target)
            if y is not None:
                value = value + weight * judge(reverse, query, target, y[rows.to(y.device)].to(query.device))
            return value

        modules = [self] if head is None else [self, head]
        self.history = training.run(modules, len(o), loss, "RQT" if y is None else "RQT + MCL")
        return self
