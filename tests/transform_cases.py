"""Features of an old and a new model, and every transform fitted to them for a moment."""

from __future__ import annotations

import functools

import torch

import fastcompat as fc

QUIET = {"progress": False}


@functools.cache
def spaces(rows=1000, held_back=300, seed=0):
    """Old and new features of ten clusters, a hidden cause that only the new model and `side` see, labels."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    count = rows + held_back
    labels = torch.arange(count) % 10
    latent = 2 * draw(10, 8)[labels] + 0.7 * draw(count, 8)
    hidden = draw(count, 3)
    new = torch.tanh(latent @ draw(8, 24) / 4) + hidden @ draw(3, 24) / 3 + 0.05 * draw(count, 24)
    old = torch.tanh(latent @ draw(8, 16) / 3) + 0.2 * draw(count, 16)
    side = torch.tanh(hidden @ draw(3, 5)) + 0.05 * draw(count, 5)
    parts = {"old": old, "new": new, "side": side, "labels": labels}
    return [{name: x[part] for name, x in parts.items()} for part in (slice(rows), slice(rows, None))]


def forward(side=False, log_variance=False, **options):
    seen, _ = spaces()
    h = fc.ForwardTransform(16, 24, 5 if side else None, hidden=64, log_variance=log_variance)
    given = {"side": seen["side"]} if side else {}
    return h.fit(seen["old"], seen["new"], seen["labels"], **given, **QUIET, **options)


@functools.cache
def reverse(with_labels=False, **options):
    seen, _ = spaces()
    psi = fc.ReverseQueryTransform(24, 16)
    return psi.fit(seen["old"], seen["new"], seen["labels"] if with_labels else None, **QUIET, **options)


@functools.cache
def fitted(name):
    seen, _ = spaces()
    if name == "rho":
        rho = fc.ResidualHead(24)
        psi = fc.ReverseQueryTransform(24, 16)
        psi.fit(seen["old"], seen["new"], seen["labels"], head=rho, epochs=3, **QUIET)
        return rho
    return {
        "FCT": lambda: forward(epochs=3),
        "FCT with side-information": lambda: forward(side=True, epochs=3),
        "FastFill": lambda: forward(log_variance=True, epochs=3),
        "RQT": lambda: reverse(epochs=3),
        "Procrustes": lambda: fc.Procrustes().fit(seen["old"], seen["new"]),
    }[name]()


NAMES = ("FCT", "FCT with side-information", "FastFill", "RQT", "rho", "Procrustes")


def inputs(name, rows=7):
    _, unseen = spaces()
    wanted = {"RQT": ["new"], "rho": ["new"], "FCT with side-information": ["old", "side"]}.get(name, ["old"])
    return [unseen[part][:rows] for part in wanted]


def as_tuple(found):
    return found if isinstance(found, tuple) else (found,)
