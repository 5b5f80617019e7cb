"""What we are measured against: for each baseline and kind of case, a builder that turns inputs into a call.

A builder's own work (a faiss index, a compiled function) is not timed. The eager loss is the line that
people write.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from cases import OURS, STATES, TEMPERATURE, TOP, Inputs, Result, topk

Call = Callable[[], Result]


def _logits(query: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    return (query @ keys.T).float() / TEMPERATURE  # [B, N]


def _statistics(query: torch.Tensor, keys: torch.Tensor, positive: torch.Tensor) -> Result:
    logits, column = _logits(query, keys), positive[:, None]
    pos_lse = logits.gather(1, column).squeeze(1)  # [B]
    return logits.scatter_(1, column, -torch.inf).logsumexp(1), pos_lse


def _loss(query: torch.Tensor, keys: torch.Tensor, positive: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(_logits(query, keys), positive)


def _chunked_loss(query: torch.Tensor, keys: torch.Tensor, positive: torch.Tensor) -> torch.Tensor:
    options = torch.nn.LinearCrossEntropyOptions()
    return F.linear_cross_entropy(query / TEMPERATURE, keys, positive, options=options)


def _trained(loss_function: Callable[..., torch.Tensor], x: Inputs) -> Result:
    loss = loss_function(x.query, x.keys, x.positive)
    return loss.detach(), *torch.autograd.grad(loss, x.wanted)


def eager_statistics(x: Inputs) -> Call:
    """Materialised logits, no gradient."""
    return torch.no_grad()(lambda: _statistics(x.query, x.keys, x.positive))


def eager_loss(x: Inputs) -> Call:
    """Materialised logits, forward and backward."""
    return lambda: _trained(_loss, x)


def compiled_loss(x: Inputs) -> Call:
    """`torch.compile` of the eager loss, static shapes; `fullgraph` forbids a silent graph break."""
    compiled = torch.compile(_loss, fullgraph=True, dynamic=False)
    return lambda: _trained(compiled, x)


def chunked_loss(x: Inputs) -> Call:
    """Torch's chunked `linear_cross_entropy` (2.13 and newer) with the keys as weight."""
    return lambda: _trained(_chunked_loss, x)


def faiss_search(x: Inputs) -> Call:
    """Exact inner-product search of a flat index that is already built."""
    import faiss  # a machine with a GPU may be without it

    faiss.omp_set_num_threads(torch.get_num_threads())
    index = faiss.IndexFlatIP(x.keys.shape[1])
    index.add(x.keys.numpy())
    query = x.query.numpy()
    return lambda: tuple(torch.from_numpy(a) for a in index.search(query, TOP))


def plain_search(x: Inputs) -> Call:
    """Our search of one plain array."""
    return lambda: topk("ip")(x)


def search_for_ranks(x: Inputs) -> Call:
    """Our search again: what ranks cost beside it."""
    return lambda: (x.expected,) if topk("ip")(x) else ()


def sorted_states(x: Inputs) -> Call:
    """One full evaluation per state: both score matrices once, then a sort of every merged gallery."""

    def evaluate() -> Result:
        scores = x.query_old @ x.gallery_old.T  # [B, N], becomes new column by column
        new = x.query_new @ x.gallery_new.T  # [B, N]
        items, done = len(x.order), 0
        mean_ap, first_hit, flips = [], [], []
        before = torch.empty(0)
        for state in range(STATES):
            upto = state * items // (STATES - 1)
            columns, done = x.order[done:upto], upto
            scores[:, columns] = new[:, columns]
            ids = scores.sort(dim=1, descending=True, stable=True).indices
            hit = (x.gallery_labels[ids] == x.query_labels[:, None]).float()  # [B, N]
            precision = hit.cumsum(1) / torch.arange(1, items + 1)
            mean_ap.append(((precision * hit).sum(1) / hit.sum(1)).mean())
            right = hit[:, 0] > 0  # [B]
            before = right if state == 0 else before
            first_hit.append(right.float().mean())
            flips.append((before & ~right).float().mean())
        return torch.stack(mean_ap), torch.stack(first_hit), torch.stack(flips)

    return evaluate


BASELINES: dict[str, dict[str, Callable[[Inputs], Call]]] = {
    "eager": {
        "statistics": eager_statistics,
        **dict.fromkeys(("frozen", "both", "overhead"), eager_loss),
    },
    "compile": dict.fromkeys(("frozen", "both"), compiled_loss),
    "chunked": dict.fromkeys(("frozen", "both"), chunked_loss),
    "faiss": dict.fromkeys(("topk_ip", "topk_cosine"), faiss_search),
    "plain topk": {"mixed_topk": plain_search},
    "topk": dict.fromkeys(("ranks", "ranks_100"), search_for_ranks),
    f"{STATES} sorts": {"backfill_curve": sorted_states},
}


def build(side: str, kind: str, x: Inputs) -> Call:
    """Return the timed call of one side."""
    if side in ("ours", "one thread"):
        return lambda: OURS[kind](x)
    return BASELINES[side][kind](x)
