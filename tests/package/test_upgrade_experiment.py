"""The experiment of examples/upgrade: who sees what, resuming, and its tables."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from upgrade import effects, mapped, models, render, settings
from upgrade.cache import Cache
from upgrade.data import divide
from upgrade.losses import TRAINED
from upgrade.run import run

from fastcompat import demo
from fastcompat.demo.data import ImageSet

SMALL = replace(
    settings.DIGITS,
    recipe=replace(settings.DIGITS.recipe, old_epochs=2, new_epochs=1),
    compatible=replace(settings.DIGITS.compatible, odpp_steps=1),
    mapped=replace(settings.DIGITS.mapped, copies=1, epochs=1, side_epochs=1),
    orders=2,
)


@pytest.mark.parametrize(("classes", "size"), [(10, 24), (40, 5)])
def test_nothing_held_out_trains_in_any_seed_or_in_validation(classes: int, size: int):
    many = classes >= 30
    labels = torch.arange(classes).repeat(size)
    images = torch.arange(len(labels)).float().view(-1, 1, 1, 1)  # an image is its own number
    data = ImageSet("scikit-learn's digits", images, labels, [str(c) for c in range(classes)])
    judged, learnt = set(), set()
    for seed in range(4):
        parts = divide(data, seed, rotations=many, validation=False)
        inner = divide(data, seed, rotations=many, validation=True)
        held = [set(p.query.flatten().tolist()) | set(p.gallery.flatten().tolist()) for p in (parts, inner)]
        seen = [set(p.learnt.flatten().tolist()) for p in (parts, inner)]
        assert held[0] | seen[0] == set(range(len(labels))) and held[1] | seen[1] == seen[0]
        assert not held[1] & seen[1] and seen[1] and len(held[1]) > 0
        judged |= held[0]
        learnt |= seen[0]
        if many:
            assert not set(parts.gallery_labels.tolist()) & set(labels[sorted(map(int, seen[0]))].tolist())
            assert len(parts.labels.unique()) == 4 * 28
        assert set(parts.query_labels.tolist()) == set(parts.gallery_labels.tolist())
        known = parts.labels[parts.old_rows].unique()
        assert known.tolist() == list(range(len(known))) and len(known) == (14 if many else 5)
    assert not judged & learnt


def test_a_stage_is_recalled_until_something_it_depends_on_changes(tmp_path: Path):
    made: list[str] = []

    def once(inputs: object, first: object, second: object) -> float:
        cache = Cache(tmp_path, inputs)

        def make(name: str, value: torch.Tensor) -> dict[str, torch.Tensor]:
            made.append(name)
            return {"x": value}

        one = cache.stage("one", lambda: make("one", torch.tensor(2.0)), settings=first)
        two = cache.stage("two", lambda: make("two", one.value["x"] + 1), settings=second, after=(one,))
        return float(two.value["x"])

    for inputs, first, second, expected in (
        ("data", {"a": 1}, {"b": 1}, ["one", "two"]),
        ("data", {"a": 1}, {"b": 1}, []),
        ("data", {"a": 1}, {"b": 2}, ["two"]),
        ("data", {"a": 3}, {"b": 2}, ["one", "two"]),  # what follows from a changed stage changes
        ("other data", {"a": 3}, {"b": 2}, ["one", "two"]),
    ):
        made.clear()
        assert once(inputs, first, second) == 3.0
        assert made == expected


def test_an_interrupted_stage_leaves_nothing_that_is_recalled(tmp_path: Path):
    cache = Cache(tmp_path, 0)

    def interrupted() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cache.stage("one", interrupted, settings=0)
    (tmp_path / "one.part").write_bytes(b"half a file")  # as if it had been cut off while it was written
    assert cache.stage("one", lambda: 5, settings=0).value == 5
    assert [path.name for path in tmp_path.iterdir()] == ["one.pt"]


def test_an_interrupted_run_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    digits, titles = demo.load("digits"), []
    data = replace(digits, images=digits.images[::3], labels=digits.labels[::3])
    train, reverse = models.train, mapped.reverse

    def watched(*arguments: object, title: str, **options: object) -> torch.Tensor:
        if title == stop:
            raise KeyboardInterrupt
        titles.append(title)
        return train(*arguments, title=title, **options)

    monkeypatch.setattr(models, "train", watched)
    stop = "RACT"
    with pytest.raises(KeyboardInterrupt):
        run(data, SMALL, 1, tmp_path)
    assert titles == ["old", "independent", "BCT", "contra"]
    titles.clear()
    stop = ""
    found = run(data, SMALL, 1, tmp_path)
    assert titles == list(TRAINED[2:])

    titles.clear()
    monkeypatch.setattr(mapped, "reverse", lambda *_: pytest.fail("a stage was made twice"))
    again = run(data, SMALL, 1, tmp_path)
    assert not titles and again == found

    monkeypatch.setattr(mapped, "reverse", reverse)
    other = replace(SMALL, mapped=replace(SMALL.mapped, mcl_weight=3.0))
    assert run(data, other, 1, tmp_path)["seeds"] != found["seeds"] and not titles

    systems = found["seeds"][0]["systems"]
    assert set(systems) == {name for names in render.FAMILIES.values() for name in names}
    assert systems["DRM"]["cross"] == pytest.approx(found["seeds"][0]["old"], abs=1e-4)
    assert all(s["self"] == systems["DRM"]["self"] for s in (systems["RQT"], systems["Procrustes"]))
    for system in systems.values():
        for walk in system["orders"].values():
            curve = walk["curve"]
            assert sum(curve["map"]) / len(curve["map"]) == pytest.approx(walk["area_map"], abs=1e-4)
            assert (curve["map"][0], curve["map"][-1]) == (system["cross"]["map"], system["self"]["map"])
            assert max(curve["lost"]) <= walk["lost"] + 1e-4
    results = tmp_path / "some.json"
    results.write_text(json.dumps(found, allow_nan=False))
    assert [path.name for path in render.write(results)] == ["some.md", "some.png"]
    assert all(path.stat().st_size > 1000 for path in tmp_path.glob("some.*"))


def made_up(gain: float) -> dict:
    def walk(area: float) -> dict:
        curve = {"map": [0.4, 0.8], "cmc1": [0.5, 0.9], "lost": [0.03, 0.01]}
        return {
            "area_map": area,
            "area_cmc1": 0.7,
            "lost": 0.03,
            "fall_map": 0.0,
            "fall_cmc1": 0.0,
            "curve": curve,
        }

    systems = {
        name: {
            "self": {"map": 0.8, "cmc1": 0.9},
            "cross": {"map": 0.4, "cmc1": 0.5},
            "gain": gain,
            "extractions": 1,
            "orders": {"random": walk(0.6), "uncertainty": walk(0.65)},
        }
        for names in render.FAMILIES.values()
        for name in names
    }
    systems["FastFill"]["orders"]["own"] = walk(0.6 + gain)
    return {"old": {"map": 0.3, "cmc1": 0.45}, "systems": systems}


def test_tables_show_mean_and_deviation():
    found = {"data": "x", "queries": 5, "gallery": 9, "seeds": [made_up(0.1), made_up(0.3)]}
    head, old, *rows = render.quality(found)
    assert old[1] == "0.300 ± 0.000" and len({len(row) for row in (head, old, *rows)}) == 1
    assert rows[0][5] == "20 ± 14 %"
    head, *rows = render.backfill(found)
    assert {len(row) for row in rows} == {len(head)}
    own = next(row for row in rows if row[0] == "FastFill, its own order")
    assert own[1:3] == ["-", "0.800 ± 0.141"]
    claims = {row[0]: row[2:] for row in render.effects(found)}
    assert claims["FastFill's own order above random order (area, mAP)"] == ["+0.200 ± 0.141", "2 of 2"]
    assert claims["RQT + MCL above RQT (area, mAP)"] == ["+0.000 ± 0.000", "0 of 2"]
    assert len(claims) == len(effects.EFFECTS) + 1
    assert render.pm([0.25]) == "0.250"
    assert render.markdown([["a", "b"], ["1", "2"]]) == "| a | b |\n|---|---|\n| 1 | 2 |\n"


@pytest.mark.parametrize("name", ["omniglot", "digits"])
def test_the_page_shows_the_tables_of_its_results(name: str):
    docs = Path(__file__).parents[2] / "docs"
    page = (docs / "upgrade-experiment.md").read_text()
    for table in render.tables(json.loads((docs / f"experiment-{name}.json").read_text())).values():
        assert table in page
    assert f"experiment-{name}.png" in page and (docs / f"experiment-{name}.png").exists()
