"""Every public function of search and evaluation with every kind of input that users pass in.

What is taken gives the result of plain tensors; what is refused is refused by name, and the advice, followed
to the letter, works.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pandas
import polars
import pyarrow
import pytest
import scipy.sparse
import torch

import fastcompat as fc

RNG = np.random.default_rng(0)
N, B, D = 24, 5, 6
OLD = RNG.integers(-8, 9, (N, D)).astype("f4") / 4  # exact in every dtype
NEW = RNG.integers(-8, 9, (N, D)).astype("f4") / 4
LABELS, MASK = np.arange(N) % 4, np.arange(N) % 3 == 0
ROWS = RNG.permutation(N)


class Case(NamedTuple):
    """A public function, its arguments, and what each of them is."""

    call: Callable[..., Any]
    arguments: dict[str, np.ndarray]
    roles: dict[str, str]


def search_mixed(query_old, old, query_new, new, backfilled, ids) -> Any:
    gallery = fc.MixedGallery(old, new, backfilled, ids=ids)
    return gallery.search(query_old, query_new, 4)


def update(ids, vectors) -> Any:
    gallery = fc.MixedGallery(OLD)
    gallery.update(ids, vectors)
    return gallery.search(OLD[:B], NEW[:B], 4)


def walk(order) -> Any:
    gallery = fc.MixedGallery(OLD)
    return list(gallery.backfill(order, lambda ids: NEW[np.asarray(ids)], batch=7))


def curve(baseline_query, baseline_gallery, **named) -> Any:
    found = fc.backfill_curve(**named, states=4, baseline=(baseline_query, baseline_gallery))
    return found.map, found.cmc[1], found.negative_flips


def metrics(**named) -> Any:
    found = fc.retrieval_metrics(**named)
    return found.per_query.map, found.per_query.recall[5]


def merged(scores, ids) -> Any:
    return fc.merge_topk([(scores, ids), (scores, ids)], 3)


VECTORS = {name: "vectors" for name in ("query", "keys", "gallery", "old", "new", "query_old", "query_new")}
VECTORS |= {
    name: "vectors" for name in ("baseline_query", "baseline_gallery", "vectors", "scores", "features")
}
ROLES = VECTORS | {"class_weight": "vectors", "backfilled": "mask", "ids": "ids", "exclude": "rows"}
ROLES |= {"targets": "rows", "order": "rows", "row_order": "rows"}
ROLES |= {name: "labels" for name in ("query_labels", "key_labels", "gallery_labels")}
SIDES = {"query_old": OLD[:B], "old": OLD, "query_new": NEW[:B], "new": NEW}
JUDGED = {"query_labels": LABELS[:B], "gallery_labels": LABELS, "exclude": np.arange(B)}
SCORES = -np.sort(-np.abs(OLD[:B]), 1)


def case(call: Callable[..., Any], **arguments: np.ndarray) -> Case:
    return Case(call, arguments, {name: ROLES[name] for name in arguments})


CASES = {
    "topk": case(lambda **a: fc.topk(**a, k=4), query=OLD[:B], keys=OLD, exclude=np.arange(B)),
    "topk by labels": case(
        lambda **a: fc.topk(**a, k=4), query=OLD[:B], keys=OLD, query_labels=LABELS[:B], key_labels=LABELS
    ),
    "ranks": case(fc.ranks, query=OLD[:B], keys=OLD, targets=ROWS[: 3 * B].reshape(B, 3), exclude=ROWS[:B]),
    "mixed_topk": case(lambda **a: fc.mixed_topk(**a, k=4), **SIDES, backfilled=MASK),
    "MixedGallery": case(search_mixed, **SIDES, backfilled=MASK, ids=ROWS + 100),
    "update": case(update, ids=ROWS[:B], vectors=NEW[:B]),
    "backfill": case(walk, order=ROWS),
    "merge_topk": case(
        merged,
        scores=SCORES,
        ids=ROWS[: B * D].reshape(-1, D) if B * D <= N else np.stack([ROWS[:D] + b for b in range(B)]),
    ),
    "retrieval_metrics": case(metrics, query=OLD[:B], gallery=OLD, **JUDGED),
    "backfill_curve": case(
        curve, **SIDES, **JUDGED, order=ROWS, baseline_query=NEW[:B], baseline_gallery=NEW
    ),
    "uncertainty": case(fc.uncertainty, features=OLD, class_weight=NEW[:7]),
}


class OnlyArrow:
    """A column of a library that is known by Arrow's protocol alone."""

    def __init__(self, column: Any) -> None:
        self.column = column

    def __arrow_c_array__(self, requested_schema: Any = None) -> Any:
        return self.column.__arrow_c_array__(requested_schema)


class OnlyDlpack:
    """An array of a library that is known by DLPack alone."""

    def __init__(self, x: np.ndarray) -> None:
        self.x = torch.tensor(x)

    def __dlpack__(self, **named: Any) -> Any:
        return self.x.__dlpack__(**named)

    def __dlpack_device__(self) -> Any:
        return self.x.__dlpack_device__()


def rows_of_objects(x: np.ndarray) -> np.ndarray:
    column = np.empty(len(x), dtype=object)
    column[:] = list(x)
    return column


def read_only(x: np.ndarray) -> np.ndarray:
    x = x.copy()
    x.flags.writeable = False
    return x


def fixed_size(x: np.ndarray) -> pyarrow.Array:
    return pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(x.ravel()), x.shape[1])


LAYOUTS: dict[str, Callable[[np.ndarray], Any]] = {
    "array": lambda x: x,
    "list": lambda x: x.tolist(),
    "tuple": lambda x: tuple(map(tuple, x.tolist())) if x.ndim == 2 else tuple(x.tolist()),
    "list of rows": list,
    "list of tensors": lambda x: list(torch.tensor(x)),
    "big-endian": lambda x: x.astype(x.dtype.newbyteorder(">")),
    "backwards": lambda x: x[::-1].copy()[::-1],
    "every other": lambda x: np.repeat(x, 2, 0)[::2],
    "Fortran": np.asfortranarray,
    "read-only": read_only,
    "objects": lambda x: x.astype(object),
    "matrix masked nowhere": np.ma.masked_invalid,
    "DLPack": OnlyDlpack,
}
TABLES = {
    "rows of objects": rows_of_objects,
    "pandas frame": pandas.DataFrame,
    "pandas column": lambda x: pandas.Series(x.tolist(), index=range(7, 7 + len(x))),
    "pandas column of arrays": lambda x: pandas.Series(list(x)),
    "polars frame": polars.DataFrame,
    "polars lists": lambda x: polars.Series(x.tolist(), dtype=polars.List(polars.Float32)),
    "polars arrays": lambda x: polars.Series(x.tolist(), dtype=polars.Array(polars.Float32, x.shape[1])),
    "Arrow lists": lambda x: pyarrow.array(list(x)),
    "Arrow fixed-size lists": fixed_size,
    "Arrow table": lambda x: pyarrow.table({str(i): column for i, column in enumerate(x.T)}),
    "Arrow's protocol": lambda x: OnlyArrow(pyarrow.array(list(x))),
}
COLUMNS = {
    "pandas": lambda x: pandas.Series(x, index=range(7, 7 + len(x))),
    "pandas Int64": lambda x: pandas.Series(x, dtype="Int64"),
    "polars": polars.Series,
    "Arrow": pyarrow.array,
    "Arrow chunks": lambda x: pyarrow.chunked_array([x[:2], x[2:]]),
    "Arrow's protocol": lambda x: OnlyArrow(pyarrow.array(x)),
    "column [N, 1]": lambda x: x[:, None],
    "tensor [N, 1]": lambda x: torch.tensor(x)[:, None],
}
WHOLE = {dtype: lambda x, d=dtype: x.astype(d) for dtype in ("i4", "i2", "u1", "u4", "u8", "f8", "f2")}
WHOLE |= {
    f"torch {d}": lambda x, d=d: torch.tensor(x).to(d) for d in (torch.int32, torch.uint8, torch.float32)
}
NAMES = np.array(["ant", "bee", "cat", "höher"])
STRINGS = {
    "strings": lambda x: NAMES[x],
    "list of strings": lambda x: NAMES[x].tolist(),
    "bytes": lambda x: NAMES[x % 3].astype("S") if x.max() < 3 else np.char.encode(NAMES[x], "utf-8"),
    "objects of strings": lambda x: NAMES[x].astype(object),
    "pandas strings": lambda x: pandas.Series(NAMES[x]),
    "pandas categories": lambda x: pandas.Series(NAMES[x], dtype="category"),
    "polars strings": lambda x: polars.Series(NAMES[x].tolist()),
    "Arrow strings": lambda x: pyarrow.array(NAMES[x].tolist()),
    "Arrow dictionary": lambda x: pyarrow.array(NAMES[x].tolist()).dictionary_encode(),
    "strings [N, 1]": lambda x: NAMES[x][:, None],
}
KINDS = {
    "vectors": LAYOUTS | TABLES,
    "labels": LAYOUTS | COLUMNS | WHOLE | STRINGS,
    "rows": LAYOUTS | COLUMNS | WHOLE,
    "ids": LAYOUTS | COLUMNS | WHOLE,
    "mask": LAYOUTS | {k: COLUMNS[k] for k in ("pandas", "polars", "Arrow", "column [N, 1]")},
}


def plain(result: Any) -> list[np.ndarray]:
    parts = result if isinstance(result, (tuple, list)) else [result]
    return [np.asarray(part) for part in parts]


@pytest.mark.parametrize("name", CASES)
def test_what_is_taken_gives_the_result_of_tensors(name: str) -> None:
    call, arguments, roles = CASES[name]
    tensors = {argument: torch.tensor(value) for argument, value in arguments.items()}
    expected = plain(call(**tensors))
    for role in sorted(set(roles.values())):
        of_role = [argument for argument in arguments if roles[argument] == role]
        for kind, convert in KINDS[role].items():
            if kind in COLUMNS and any(arguments[argument].ndim > 1 for argument in of_role):
                continue  # tables of row numbers
            # Strings name classes on both sides; anything else may stand beside tensors.
            groups = [of_role] if kind in STRINGS else [of_role, *([argument] for argument in of_role)]
            for group in groups:
                given = tensors | {argument: convert(arguments[argument]) for argument in group}
                try:
                    found = plain(call(**given))
                except Exception as error:
                    raise AssertionError(f"{group} as {kind}: {error}") from error
                for a, b in zip(found, expected, strict=True):
                    np.testing.assert_array_equal(a, b, err_msg=f"{group} as {kind}")


@pytest.mark.parametrize("name", CASES)
def test_no_tensor_gives_arrays(name: str) -> None:
    call, arguments, _ = CASES[name]
    found = call(**{argument: value.tolist() for argument, value in arguments.items()})
    for part in found if isinstance(found, tuple) else (found,):
        assert isinstance(part, (np.ndarray, list))


@pytest.mark.parametrize("name", [name for name in CASES if name not in ("update", "backfill", "merge_topk")])
@pytest.mark.parametrize("dtypes", [("f2", "f4"), ("f4", "f2"), ("f2", "f8"), ("f8", "f4")])
def test_of_two_dtypes_the_wider_is_computed_in(name: str, dtypes: tuple[str, str]) -> None:
    """The values are exact in each: the figures are those of one dtype."""
    call, arguments, roles = CASES[name]
    vectors = [argument for argument in arguments if roles[argument] == "vectors"]
    given = arguments | {
        argument: arguments[argument].astype(dtypes[i % 2]) for i, argument in enumerate(vectors)
    }
    wide = arguments | {argument: arguments[argument].astype(max(dtypes)) for argument in vectors}
    for a, b in zip(plain(call(**given)), plain(call(**wide)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("metric", ("cosine", "ip", "l2"))
def test_a_store_of_float16_is_searched_in_blocks(metric: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ties, labels, excluded keys and lists shorter than k over the edges of blocks."""
    query, keys = torch.tensor(OLD[:B]), torch.tensor(OLD).half()
    labels = {"query_labels": LABELS[:B], "key_labels": LABELS}
    monkeypatch.setattr("fastcompat._promoted.BLOCK", 5 * D)
    for named in ({"exclude": np.arange(B)}, labels):
        for k in (1, 4, N + 2):
            found = fc.topk(query, keys, k, metric=metric, **named)
            expected = fc.topk(query, keys.float(), k, metric=metric, **named)
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    found = fc.mixed_topk(query, keys, query, torch.tensor(NEW).half(), MASK, 9, metric=metric)
    expected = fc.mixed_topk(query, keys.float(), query, NEW, MASK, 9, metric=metric)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    keys[17, 2] = torch.inf
    with pytest.raises(ValueError, match="`keys` must be finite: row 17 holds"):
        fc.topk(query, keys, 3, metric=metric)


@pytest.mark.parametrize("kind", ("tensor", "array", "list"))
def test_a_single_query(kind: str) -> None:
    one = {"tensor": lambda x: torch.tensor(x), "array": lambda x: x, "list": lambda x: x.tolist()}[kind]
    q_old, q_new = one(OLD[0]), one(NEW[0])
    gallery = fc.MixedGallery(OLD, NEW, MASK)
    single = [
        fc.topk(q_old, OLD, 4, exclude=3, query_labels=1, key_labels=LABELS),
        (fc.ranks(q_old, OLD, [5, 1, -1], exclude=[2]),),
        fc.mixed_topk(q_old, OLD, q_new, NEW, MASK, 4),
        gallery.search(q_old, q_new, 4),
    ]
    several = [
        fc.topk(OLD[:1], OLD, 4, exclude=[3], query_labels=[1], key_labels=LABELS),
        (fc.ranks(OLD[:1], OLD, [[5, 1, -1]], exclude=[2]),),
        fc.mixed_topk(OLD[:1], OLD, NEW[:1], NEW, MASK, 4),
        gallery.search(OLD[:1], NEW[:1], 4),
    ]
    for a, b in zip(single, several, strict=True):
        for one_row, rows in zip(a, b, strict=True):
            assert one_row.ndim == 1 and isinstance(one_row, torch.Tensor) == (kind == "tensor")
            np.testing.assert_array_equal(np.asarray(one_row), rows[0])


def swapped(x: Any, bad: Any) -> Any:
    """The entries `x` with another last one."""
    return [*x.tolist()[:-1], bad]


INTEGERS = "float32, bfloat16, float16 or float64: got"
MISSING = "must have no missing entries: row"
FOLLOWED = {  # role: kind: (conversion, message; the advice is the code in it)
    "vectors": {
        "int8": (lambda x: x.astype("i1"), INTEGERS),
        "bool": (lambda x: x > 0, INTEGERS),
        "int tensor": (lambda x: torch.tensor(x).int(), INTEGERS),
        "int frame": (lambda x: pandas.DataFrame(x.astype("i4")), INTEGERS),
        "int polars": (lambda x: polars.DataFrame(x.astype("i4")), INTEGERS),
        "int Arrow": (lambda x: pyarrow.table({str(i): c for i, c in enumerate(x.astype("i4").T)}), INTEGERS),
        "longdouble": (lambda x: x.astype("g"), "must be float64 or less"),
        "masked": (lambda x: np.ma.masked_equal(x, x[0, 0]), "must have no masked entries"),
        "sparse": (scipy.sparse.csr_matrix, "it is sparse"),
        "generator": (lambda x: (row for row in x), "must be a tensor, an array, a list or a column"),
    },
    "mask": {
        "numbers": (lambda x: x.astype(int), "must be bool: got int64"),
        "list": (lambda x: x.astype(int).tolist(), "must be bool: got int64"),
        "tensor": (lambda x: torch.tensor(x).int(), "must be bool: got torch.int32"),
        "pandas": (lambda x: pandas.Series(x.astype(int)), "must be bool: got int64"),
        "polars": (lambda x: polars.Series(x.astype(int)), "must be bool: got int64"),
        "Arrow": (lambda x: pyarrow.array(x.astype(int)), "must be bool: got int64"),
    },
}
WRONG = {
    "vectors": {
        "None": (
            lambda x: None,
            "must be a tensor, an array, a list or a column of a data frame: got NoneType",
        ),
        "dict": (lambda x: {"a": x}, "got dict"),
        "strings": (lambda x: x.astype(str), "must hold numbers: got strings"),
        "text": (lambda x: "vectors.npy", "must hold numbers: got strings"),
        "ragged": (lambda x: swapped(x, [1.0]), "must have rows of one length: row "),
        "a missing row": (lambda x: swapped(x, None), MISSING),
        "complex": (lambda x: x.astype("c8"), INTEGERS),
        "dates": (lambda x: x.astype("M8[s]"), "must hold numbers: got datetime64[s]"),
        "cube": (lambda x: x[None], "must have "),
        "empty": (lambda x: [], "must have "),
    },
    "labels": {
        "None here": (lambda x: swapped(x, None), MISSING),
        "NaN": (lambda x: swapped(x, np.nan), "must hold whole numbers: got nan"),
        "missing string": (lambda x: [*NAMES[x].tolist()[:-1], None], MISSING),
        "missing pandas": (lambda x: pandas.Series([*NAMES[x].tolist()[:-1], None]), MISSING),
        "missing polars": (lambda x: polars.Series([*NAMES[x].tolist()[:-1], None]), MISSING),
        "missing Arrow": (
            lambda x: pyarrow.array([*x.tolist()[:-1], None]),
            "must hold whole numbers: got nan",
        ),
        "strings and numbers": (
            lambda x: swapped(NAMES[x], 3),
            "must hold strings or numbers, not both: row",
        ),
        "strings on one side": (lambda x: NAMES[x], "must hold strings as"),
        "halves": (lambda x: x / 2, "must hold whole numbers: got 0.5"),
        "float16 beyond 2048": (
            lambda x: (x + 4001).astype("f2"),
            "of at most 2048, beyond which float16 has not all of them: got 400",
        ),
        "hashes": (lambda x: x.astype("u8") + 2**63, "must be below 2^63: got 9223372036854775808"),
        "large list": (lambda x: swapped(x, 2**64), "must fit int64: got 18446744073709551616"),
        "one-hot": (lambda x: np.eye(4)[x], "must have 1 dimension: got shape"),
        "complex": (lambda x: x.astype("c8"), "must hold whole numbers: got complex64"),
    },
    "rows": {
        "halves": (lambda x: x + 0.5, "must hold whole numbers: got "),
        "mask": (lambda x: x > 3, "must hold whole numbers: got bool"),
        "strings": (lambda x: x.astype(str), "must hold whole numbers: got strings"),
        "hashes": (lambda x: x.astype("u8") + 2**63, "must be below 2^63: got 9223372036854775"),
    },
    "mask": {"strings": (lambda x: x.astype(str), "must be bool: got strings; compare them")},
}
WRONG["ids"] = WRONG["rows"]
CALLED = {"baseline_query": "baseline[0]", "baseline_gallery": "baseline[1]"}
IN_LISTS = {"scores": "results[0][0]", "ids": "results[0][1]"}


def called(name: str, argument: str) -> str:
    return (CALLED | (IN_LISTS if name == "merge_topk" else {})).get(argument, argument)


def refused(name: str, argument: str, value: Any, message: str) -> str:
    call, arguments, _ = CASES[name]
    with pytest.raises((TypeError, ValueError)) as caught:
        call(**arguments | {argument: value})
    said = str(caught.value)
    assert f"`{called(name, argument)}`" in said and message in said, said
    if not isinstance(value, torch.Tensor):
        assert "torch" not in said and ".long()" not in said and ".float()" not in said, said
    return said


@pytest.mark.parametrize("name", CASES)
def test_what_is_refused_is_named(name: str) -> None:
    _, arguments, roles = CASES[name]
    for argument, role in roles.items():
        for kind, (convert, message) in WRONG[role].items():
            if name == "MixedGallery" and kind == "None":
                continue  # what is not there yet
            refused(name, argument, convert(arguments[argument]), message)


@pytest.mark.parametrize("name", CASES)
def test_advice_followed_to_the_letter_works(name: str) -> None:
    call, arguments, roles = CASES[name]
    for argument, role in roles.items():
        for kind, (convert, message) in FOLLOWED.get(role, {}).items():
            if name == "merge_topk" and kind in ("masked", "int8", "bool", "sparse") and argument == "scores":
                continue  # other scores are another order
            value = convert(arguments[argument])
            said = refused(name, argument, value, message)
            variable = called(name, argument)
            (code,) = (code for code in re.findall("`(.*?)`", said) if variable in code and code != variable)
            local = {"numpy": np, "torch": torch, "polars": polars, "value": convert(arguments[argument])}
            call(**arguments | {argument: eval(code.replace(variable, "value"), local)}), kind


def test_new_vectors_are_rounded_to_the_dtype_of_the_gallery() -> None:
    gallery = fc.MixedGallery(OLD.astype("f2"), NEW.astype("f2"), MASK)
    gallery.update([1, 2], NEW[1:3] + np.float32(1e-5))
    assert "float16; 41.7% backfilled" in repr(gallery)
    for _ in range(3):  # the second search of one state keeps the keys in another form
        found = gallery.search(OLD[:B], NEW[:B], 4)
        same = gallery.search(OLD[:B].astype("f2"), NEW[:B].astype("f2"), 4)
        assert all(np.array_equal(a, b) for a, b in zip(found, same, strict=True))
    with pytest.raises(ValueError, match=r"`vectors` must fit torch.float16, .* row 1 does not"):
        gallery.update([3, 4], [[1.0] * D, [1e6] * D])


def test_hashes_stay_apart_as_the_advice_says() -> None:
    ids = np.array([[2**63 + 5, 3]], np.uint64)
    scores = np.array([[2.0, 1.0]], np.float32)
    for given in (ids, torch.tensor(ids), ids.tolist(), polars.DataFrame(ids)):
        said = refused_ids(scores, given)
        (code,) = (code for code in re.findall("`(.*?)`", said) if "view" in code)
        local = {"numpy": np, "torch": torch, "value": given}
        kept = eval(code.replace("results[0][1]", "value"), local)
        found = fc.merge_topk([(torch.tensor(scores), kept)], 2)[1]
        assert np.array_equal(np.asarray(found).view("u8"), ids)


def refused_ids(scores: Any, ids: Any) -> str:
    with pytest.raises(ValueError, match="below 2\\^63") as caught:
        fc.merge_topk([(scores, ids)], 2)
    return str(caught.value)


def test_negative_labels_warn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastcompat._checks._warned", set(), raising=False)  # of once in a process
    hashes = np.array([-(2**40), 7, -3, 9])[LABELS]
    with pytest.warns(UserWarning, match="`query_labels` holds negative labels other than -1"):
        fc.retrieval_metrics(OLD[:B], OLD, hashes[:B], LABELS)
    with pytest.warns(UserWarning, match="`gallery_labels` holds negative"):
        fc.backfill_curve(OLD, OLD, NEW, NEW, LABELS, hashes)
    with pytest.warns(UserWarning, match="`key_labels` holds negative"):
        fc.topk(OLD[:B], OLD, 2, query_labels=LABELS[:B], key_labels=hashes)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fc.retrieval_metrics(OLD[:B], OLD, LABELS[:B] - 1, LABELS - 1)


def test_arrays_follow_the_device_of_a_tensor() -> None:
    from fastcompat import _inputs

    there = torch.zeros(N, D, device="meta")
    for query, keys in ((OLD[:B], there), (there[:B], OLD.tolist())):
        q, k, _ = _inputs.pair(("query", "keys"), query, keys)
        assert q.is_meta and k.is_meta
    with pytest.raises(ValueError, match="`keys` must be on the device of `query`: got meta and cpu"):
        fc.topk(torch.tensor(OLD), there, 2)


def test_objects_say_what_they_hold() -> None:
    found = repr(fc.retrieval_metrics(OLD[:B], OLD, LABELS[:B], LABELS, ks=(1, 5)))
    assert found.startswith("RetrievalMetrics(5 queries, 0 of them skipped: mAP ") and "recall@5 " in found
    found = repr(fc.backfill_curve(OLD, OLD, NEW, NEW, LABELS, LABELS, states=7))
    assert re.fullmatch(
        r"BackfillCurve\(7 states: mAP \d\.\d+ to \d\.\d+ \(mean \d\.\d+\), at most [\d.]+% negative flips, "
        r"0 queries skipped\)",
        found,
    )
    assert repr(fc.MixedGallery(OLD, NEW.astype("f2"), MASK, metric="l2")) == (
        "MixedGallery(24 items: old 6 dimensions of float32, new 6 dimensions of float16; 33.3% backfilled; "
        "metric l2)"
    )
    assert "new" not in repr(fc.MixedGallery(OLD))


def test_states_are_bounded() -> None:
    with pytest.raises(ValueError, match="`states` must be at most 10,000: got 100,000; "):
        fc.backfill_curve(OLD, OLD, NEW, NEW, LABELS, LABELS, states=100_000)
