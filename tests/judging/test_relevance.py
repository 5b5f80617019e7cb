"""Figures of judged pairs against pytrec_eval, ir-measures and scikit-learn, and what qrels may hold."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from retrieval_oracle import exact_vectors, ranking, scores
from sklearn.metrics import average_precision_score, ndcg_score

import fastcompat as fc

ir_measures = pytest.importorskip("ir_measures")
pytrec_eval = pytest.importorskip("pytrec_eval")

Q, N, KS = 23, 140, (1, 3, 10, 200)


def judged(seed: int, pairs: int = 400) -> fc.Relevance:
    """Random pairs with grades from -1 to 3; some queries have none."""
    random = np.random.default_rng(seed)
    chosen = random.choice((Q - 2) * N, size=pairs, replace=False)
    return fc.Relevance(chosen // N, chosen % N, random.integers(-1, 4, size=pairs))


def names(found: np.ndarray, relevance: fc.Relevance) -> tuple[dict, dict]:
    """The same ranking and judgements as the tools take them: scores that fall by 1 a rank."""
    run = {
        str(q): {f"d{j:04}": float(-place) for place, j in enumerate(ranking(row))}
        for q, row in enumerate(found)
    }
    qrels: dict = {}
    for q, j, grade in zip(
        *(x.tolist() for x in (relevance.query, relevance.item, relevance.grade)), strict=True
    ):
        qrels.setdefault(str(q), {})[f"d{j:04}"] = grade
    return run, qrels


def vectors(tied: bool, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    if tied:
        return exact_vectors(seed, Q, 4, "ip"), exact_vectors(seed + 1, N, 4, "ip")
    random = torch.Generator().manual_seed(seed)
    return torch.randn(Q, 8, generator=random), torch.randn(N, 8, generator=random)


@pytest.mark.parametrize("tied", (False, True))
@pytest.mark.parametrize("backend", ("auto", "reference"))
def test_equals_pytrec_eval(tied: bool, backend: str) -> None:
    query, gallery = vectors(tied, 1)
    relevance = judged(2)
    found = fc.retrieval_metrics(query, gallery, relevance=relevance, ks=KS, metric="ip", backend=backend)
    run, qrels = names(scores(query, gallery, "ip"), relevance)
    measures = {
        "map",
        "recip_rank",
        *(f"{kind}.{k}" for kind in ("ndcg_cut", "recall", "success") for k in KS),
    }
    with_relevant = {q: pairs for q, pairs in qrels.items() if max(pairs.values()) > 0}
    each = pytrec_eval.RelevanceEvaluator(with_relevant, measures).evaluate(run)
    assert found.skipped == Q - len(each) > 0
    assert found.per_query.mrr[Q - 1].isnan()
    for q, truth in each.items():
        ours, i = found.per_query, int(q)
        assert float(ours.map[i]) == pytest.approx(truth["map"], abs=1e-12)
        assert float(ours.mrr[i]) == pytest.approx(truth["recip_rank"], abs=1e-12)
        for k in KS:
            assert float(ours.ndcg[k][i]) == pytest.approx(truth[f"ndcg_cut_{k}"], abs=1e-12)
            assert float(ours.recall[k][i]) == pytest.approx(truth[f"recall_{k}"], abs=1e-12)
            assert float(ours.cmc[k][i]) == truth[f"success_{k}"]
    assert found.mrr == pytest.approx(np.mean([one["recip_rank"] for one in each.values()]), abs=1e-12)


def test_equals_ir_measures_with_both_gains() -> None:
    query, gallery = vectors(False, 3)
    relevance = judged(4)
    run, qrels = names(scores(query, gallery, "ip"), relevance)
    counted = {q for q, pairs in qrels.items() if max(pairs.values()) > 0}
    for gain, worth in (("linear", {1: 1, 2: 2, 3: 3}), ("exp", {1: 1, 2: 3, 3: 7})):
        found = fc.retrieval_metrics(query, gallery, relevance=relevance, ks=(5,), metric="ip", gain=gain)
        measure = ir_measures.nDCG(gains={-1: 0, 0: 0} | worth) @ 5
        wanted = [measure, ir_measures.RR, ir_measures.AP, ir_measures.R @ 5]
        values: dict = {one: {} for one in wanted}
        for metric in ir_measures.iter_calc(wanted, qrels, run):
            values[metric.measure][metric.query_id] = metric.value
        means = [np.mean([each[q] for q in counted]) for each in values.values()]
        ours = [found.ndcg[5], found.mrr, found.map, found.recall[5]]
        assert ours == pytest.approx(means, abs=1e-12)


def test_equals_scikit_learn_where_nothing_ties() -> None:
    query, gallery = vectors(False, 5)
    relevance = judged(6)
    found = fc.retrieval_metrics(query, gallery, relevance=relevance, ks=(7,), metric="ip")
    table, grades = scores(query, gallery, "ip"), np.zeros((Q, N))
    grades[relevance.query, relevance.item] = relevance.grade.clamp(min=0)
    counted = grades.max(1) > 0
    assert found.ndcg[7] == pytest.approx(ndcg_score(grades[counted], table[counted], k=7), abs=1e-12)
    aps = [average_precision_score(grades[q] > 0, table[q]) for q in np.flatnonzero(counted)]
    assert found.map == pytest.approx(np.mean(aps), abs=1e-12)


@pytest.mark.parametrize("backend", ("auto", "reference"))
def test_pairs_of_equal_labels_give_the_labels_figures(backend: str) -> None:
    random = torch.Generator().manual_seed(7)
    old, new = (torch.randn(N, 6, generator=random) for _ in range(2))
    labels = torch.randint(0, 9, (N,), generator=random)
    own = torch.arange(Q)
    pairs = (labels[:Q, None] == labels).nonzero()
    relevance = fc.Relevance(pairs[:, 0], pairs[:, 1])
    options: dict[str, Any] = {"states": 5, "exclude": own, "backend": backend}
    sides = old[:Q], old, new[:Q], new
    by_label = fc.backfill_curve(*sides, labels[:Q], labels, **options)
    by_pair = fc.backfill_curve(*sides, relevance=relevance, **options)
    assert by_label.to_dict() == by_pair.to_dict()
    names = [f"class {label}" for label in labels.tolist()]
    assert fc.backfill_curve(*sides, names[:Q], names, **options).to_dict() == by_label.to_dict()
    found = [
        fc.retrieval_metrics(*sides[:2], exclude=own, backend=backend, **judgement)
        for judgement in ({"relevance": relevance}, {"query_labels": labels[:Q], "gallery_labels": labels})
    ]
    assert found[0].per_query.ndcg[5].tolist() == found[1].per_query.ndcg[5].tolist()


def visible_only(exclude: torch.Tensor, relevance: fc.Relevance, q: int) -> tuple[list[int], fc.Relevance]:
    """The items that query q may find, and its judgements among them under their new numbers."""
    seen = [j for j in range(N) if j not in set(exclude[q].tolist())]
    pairs = {
        int(j): int(g)
        for i, j, g in zip(relevance.query, relevance.item, relevance.grade, strict=True)
        if int(i) == q and int(j) in seen
    }
    return seen, fc.Relevance([0] * len(pairs), [seen.index(j) for j in pairs], list(pairs.values()))


@pytest.mark.parametrize("backend", ("auto", "reference"))
@pytest.mark.parametrize("way", ("ids", "groups", "both", "labels"))
def test_excluded_items_are_as_if_they_did_not_exist(way: str, backend: str) -> None:
    old_query, old = vectors(True, 8)
    new_query, new = vectors(True, 10)
    random = torch.Generator().manual_seed(12)
    query_groups, groups = (torch.randint(-1, 5, (n,), generator=random) for n in (Q, N))
    ids = torch.randint(-1, N, (Q, 6), generator=random)
    labels = torch.randint(0, 4, (N,), generator=random)
    if way == "labels":
        pairs = (labels[:Q, None] == labels).nonzero()
        relevance, judgement = fc.Relevance(*pairs.T), {"query_labels": labels[:Q], "gallery_labels": labels}
    else:
        relevance = judged(9, 1500)
        judgement = {"relevance": relevance}
    options: dict[str, Any] = {"metric": "ip", "ks": (1, 5), "backend": backend}
    by_group = torch.where(
        (query_groups[:, None] == groups) & (query_groups >= 0)[:, None], torch.arange(N), -1
    )
    hidden = {"ids": ids, "groups": by_group}.get(way, torch.cat([ids, by_group], 1))
    limits: dict[str, Any] = {} if way == "groups" else {"exclude": ids}
    limits |= {} if way == "ids" else {"exclude_groups": (query_groups, groups)}
    found = fc.retrieval_metrics(old_query, old, **judgement, **options, **limits)
    order = torch.randperm(N, generator=random)
    curve = fc.backfill_curve(
        old_query, old, new_query, new, **judgement, **options, **limits, order=order, states=4
    )
    assert found.per_query.map.isnan().tolist() == curve.per_query.ap[0].isnan().tolist()
    for q in range(Q):
        seen, pairs = visible_only(hidden, relevance, q)
        alone = fc.retrieval_metrics(old_query[q : q + 1], old[seen], relevance=pairs, **options)
        for name in ("map", "mrr", "map_at_r"):
            np.testing.assert_array_equal(
                getattr(found.per_query, name)[q], getattr(alone.per_query, name)[0]
            )
        np.testing.assert_array_equal(found.per_query.ndcg[5][q], alone.per_query.ndcg[5][0])
        cut = N // 3
        mixed = torch.isin(torch.arange(N), order[:cut])[None]
        table = np.where(mixed, scores(new_query, new, "ip"), scores(old_query, old, "ip"))[q]
        ranked = ranking(table[seen])
        grades = dict(zip(pairs.item.tolist(), pairs.grade.tolist(), strict=True))
        hits = [place for place, j in enumerate(ranked) if grades.get(j, 0) > 0]
        if hits:
            truth = np.mean([(m + 1) / (place + 1) for m, place in enumerate(hits)])
            assert float(curve.per_query.ap[1, q]) == pytest.approx(truth, abs=1e-12)


def test_many_relevant_items_are_ranked_as_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastcompat import backfill

    (old_query, old), (new_query, new) = vectors(True, 20), vectors(True, 22)
    exclude = torch.randint(-1, N, (Q, 3), generator=torch.Generator().manual_seed(1))
    curves = []
    for share in (0.0, 9.0):  # by one sort always, never
        monkeypatch.setattr(backfill, "MANY", share)
        curves.append(
            fc.backfill_curve(
                old_query, old, new_query, new, relevance=judged(21), exclude=exclude, metric="ip", states=9
            )
        )
    assert curves[0].to_dict() == curves[1].to_dict()
    assert np.array_equal(curves[0].per_query.ap, curves[1].per_query.ap, equal_nan=True)


def test_a_trec_file_is_read_by_ids(tmp_path: Path) -> None:
    path = tmp_path / "qrels.txt"
    path.write_text("q1 0 d2 1\nq1 0 d1 0\n\nq2\t0\td3 2\nq9 0 d1 1\nq1 0 d7 1\n")
    with pytest.warns(
        UserWarning, match=r"2 lines of .* 1 unknown query ids \(such as 'q9'\) and 1 unknown item"
    ):
        found = fc.Relevance.from_trec(path, ["q1", "q2"], np.array(["d1", "d2", "d3"]))
    assert (found.query.tolist(), found.item.tolist(), found.grade.tolist()) == (
        [0, 0, 1],
        [1, 0, 2],
        [1, 0, 2],
    )
    assert (found.unknown_queries, found.unknown_items, found.left_out) == (["q9"], ["d7"], 2)
    assert repr(found) == "Relevance(3 pairs of 2 queries, 2 of them relevant, 2 lines left out)"
    with pytest.raises(ValueError, match=r"must name ids of `query_ids` and `item_ids`: .* 2 of 5 lines"):
        fc.Relevance.from_trec(path, ["q1", "q2"], ["d1", "d2", "d3"], strict=True)
    path.write_text("1 0 12 1\n")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert fc.Relevance.from_trec(path, torch.tensor([1]), [11, 12]).item.tolist() == [1]
    path.write_text("1 0 12 1\n1 12 1\n")
    with pytest.raises(ValueError, match=r"line 2 of .* is '1 12 1'"):
        fc.Relevance.from_trec(path, [1], [12])
    with pytest.raises(ValueError, match="`item_ids` must name each row once: '3' is row 0 and 1"):
        fc.Relevance.from_trec(path, [1], [3, "3"])


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        (
            ([0, 1, 0], [5, 5, 5]),
            ValueError,
            "must name each pair once: query 0 and item 5 are listed 2 times",
        ),
        (([0, -1], [5, 5]), ValueError, "`query` must hold row numbers from 0: got -1"),
        (([0], [5, 6]), ValueError, "`item` must have one entry per entry of `query`: got 2 and 1"),
        (([0], [5], [0.5]), TypeError, "`grade` must hold whole numbers: got 0.5"),
        ((["a"], [5]), TypeError, "`query` must hold whole numbers: got strings"),
    ],
)
def test_refuses_bad_pairs(arguments: tuple, kind: type, message: str) -> None:
    with pytest.raises(kind, match=re.escape(message)):
        fc.Relevance(*arguments)


@pytest.mark.parametrize(
    ("changed", "kind", "message"),
    [
        (
            {"relevance": fc.Relevance([0, 99], [1, 1])},
            ValueError,
            "`relevance` must name queries below 23: 1 of",
        ),
        ({"relevance": fc.Relevance([0], [N])}, ValueError, "`relevance` must name items below 140"),
        ({"relevance": ([0], [1])}, TypeError, "`relevance` must be a fastcompat.Relevance: got tuple"),
        ({"query_labels": [0] * Q, "gallery_labels": [0] * N}, ValueError, "must be given without labels"),
        ({"gain": "log"}, ValueError, "`gain` must be one of"),
        ({"exclude_groups": torch.zeros(N)}, TypeError, "must be a pair (query_groups, gallery_groups)"),
        (
            {"exclude_groups": ([0] * Q, [0] * 3)},
            ValueError,
            "`exclude_groups[1]` must have one entry per row",
        ),
    ],
)
def test_refuses_what_does_not_fit(changed: dict, kind: type, message: str) -> None:
    query, gallery = vectors(False, 1)
    with pytest.raises(kind, match=re.escape(message)):
        fc.retrieval_metrics(query, gallery, **({"relevance": judged(2)} | changed))
