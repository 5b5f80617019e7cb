from __future__ import annotations

import json
import zipfile
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import pytest
import torch
from example_counts import examples
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from fastcompat import demo
from fastcompat.commands import report
from fastcompat.demo import data, train
from fastcompat.demo.data import ImageSet, split

SMALL = {"steps": (4, 4)}  # enough to run every line


def shapes(folder: Path, count: int, size: int, colour: bool = False) -> Path:
    """`count` classes of `size` images: a bar at the class's height, with noise."""
    gen = torch.Generator().manual_seed(0)
    for c in range(count):
        (folder / f"kind{c % 2}" / f"class{c:02}").mkdir(parents=True)
        for i in range(size):
            pixels = torch.randint(60, (20, 20, 3), generator=gen).byte()
            pixels[c % 20, :] = 255
            if not colour:
                pixels = pixels[..., :1].expand(20, 20, 3)
            path = folder / f"kind{c % 2}" / f"class{c:02}" / f"{i}.PNG"
            Image.fromarray(pixels.contiguous().numpy()).save(path)
    return folder


@pytest.mark.parametrize("colour", [False, True])
def test_folder_and_zip_give_the_same_images(tmp_path: Path, colour: bool):
    folder = shapes(tmp_path / "top", 4, 3, colour)
    (folder / ".DS_Store").write_bytes(b"x")
    (folder / "notes.txt").write_text("no image")
    with zipfile.ZipFile(tmp_path / "z.zip", "w") as archive:
        for path in sorted(folder.rglob("*"), reverse=True):
            archive.write(path, path.relative_to(tmp_path))
        archive.writestr("__MACOSX/top/kind0/class00/._0.png", b"x")
    plain, zipped = demo.load(str(folder)), demo.load(str(tmp_path / "z.zip"))
    assert plain.classes == ["kind0/class00", "kind0/class02", "kind1/class01", "kind1/class03"]
    assert zipped.classes == plain.classes
    assert plain.images.shape == (12, 3 if colour else 1, data.SIZE, data.SIZE)
    assert plain.images.min() >= 0 and plain.images.max() <= 1
    assert torch.equal(zipped.images, plain.images) and torch.equal(zipped.labels, plain.labels)
    rows = plain.images[plain.labels == 2].mean((0, 1, 3))  # class01: a bar at line 1 of 20
    assert rows.argmax().item() in (1, 2)


@given(
    sizes=st.lists(st.integers(3, 12), min_size=2, max_size=45),
    seed=st.integers(0, 1000),
)
@examples(60)
def test_nothing_judged_was_ever_trained_on(sizes: list[int], seed: int):
    labels = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    images = ImageSet("x", torch.zeros(len(labels), 1, 1, 1), labels, [str(c) for c in range(len(sizes))])
    parts = split(images, seed)
    seen, old = set(parts.train.tolist()), set(parts.old_train.tolist())
    query, gallery = set(parts.query.tolist()), set(parts.gallery.tolist())
    assert not seen & query and not seen & gallery and not query & gallery
    assert seen | query | gallery == set(range(len(labels)))
    assert old and old <= seen
    relabelled = parts.labels
    assert (relabelled[parts.train].unique() == torch.arange(parts.num_classes)).all()
    assert (relabelled[parts.old_train].unique() == torch.arange(parts.old_classes)).all()
    assert parts.old_classes >= 2
    judged = set(relabelled[parts.query].tolist())
    assert judged == set(relabelled[parts.gallery].tolist())
    if len(sizes) >= data.MANY_CLASSES:
        assert parts.unseen and min(judged) >= parts.num_classes
    # The new numbers are the old ones, renamed.
    assert len(set(zip(labels.tolist(), relabelled.tolist(), strict=True))) == len(sizes)


def test_digits_are_divided_as_documented():
    parts = split(demo.load("digits"), 0)
    assert [len(x) for x in (parts.train, parts.old_train, parts.query, parts.gallery)] == [
        896,
        148,
        300,
        601,
    ]
    assert not parts.unseen and parts.old_classes == 5


@pytest.fixture(scope="module")
def few() -> demo.Upgrade:
    return demo.run(demo.load("digits"), 3, replace(train.DIGITS, **SMALL))


def test_curves_begin_and_end_where_the_tests_say(few: demo.Upgrade):
    alone, *compatible = few.candidates
    for new in few.candidates:
        assert float(new.curve.map[-1]) == new.self_test.map
        assert float(new.curve.cmc[1][-1]) == new.self_test.top1
        assert len(new.curve.map) == len(new.curve.fraction) == 22
    for new in compatible:  # one query for both halves
        assert not new.both
        assert float(new.curve.map[0]) == new.cross_test.map
        lost, won = float(new.curve.negative_flips[0]), float(new.curve.positive_flips[0])
        assert new.cross_test.top1 == pytest.approx(few.old.top1 - lost + won)
    assert alone.both  # the old query for the old half
    assert float(alone.curve.map[0]) == few.old.map
    assert float(alone.curve.negative_flips[0]) == 0


def test_same_seed_same_figures_and_torch_is_left_alone(few: demo.Upgrade):
    images, recipe = demo.load("digits"), replace(train.DIGITS, **SMALL)
    before = torch.get_rng_state()
    again, other = demo.run(images, 3, recipe), demo.run(images, 4, recipe)
    assert torch.equal(torch.get_rng_state(), before)
    assert again.to_dict() == few.to_dict()
    assert other.to_dict() != few.to_dict()


def test_table_and_notes_agree_with_the_figures(few: demo.Upgrade):
    header, old, alone, bct, ract = demo.table(few)
    assert {len(row) for row in (header, old, alone, bct, ract)} == {len(header)}
    assert old[1] == f"{few.old.map:.3f}"
    assert alone[3].startswith("(") and alone[5] == "-" and alone[-1] == "2 models"
    assert bct[3] == f"{few.candidates[1].cross_test.map:.3f}" and ract[-1] == "1 model"
    text = dict(demo.notes(few))
    assert "RACT's new-to-new term" in text["What this data cannot show"]
    verdict = "yes" if few.candidates[1].cross_test.map > few.old.map else "no"
    assert f"BCT {verdict}" in text["Compatible?"]


@pytest.mark.parametrize(("count", "size", "unseen"), [(2, 3, False), (3, 9, False), (32, 3, True)])
def test_a_folder_runs_from_end_to_end(tmp_path: Path, count: int, size: int, unseen: bool):
    images = demo.load(str(shapes(tmp_path / "<b>digits", count, size)))
    found = demo.run(images, 0, replace(train.MANY if unseen else train.FEW, **SMALL))
    assert found.unseen is unseen
    assert ("What this data shows" in dict(demo.notes(found))) is unseen
    assert len(json.dumps(found.to_dict(), allow_nan=False)) > 1000
    rows, notes, title = demo.table(found), demo.notes(found), f"on {found.data}"
    files = report.pages(
        demo.picture(found), found.to_dict(), title, found.description, rows, notes, seed=0, seconds=1.0
    )
    with Image.open(BytesIO(files["curves.png"])) as opened:
        assert opened.format == "PNG"
    page = files["report.html"].decode()
    assert "<b>" not in page and "&lt;b&gt;digits" in page


def test_old_features_are_made_once(monkeypatch: pytest.MonkeyPatch):
    from fastcompat.demo import upgrade

    calls: list[int] = []

    def counted(model: torch.nn.Module, images: torch.Tensor) -> torch.Tensor:
        calls.append(len(images))
        return train.embed(model, images)

    monkeypatch.setattr(upgrade, "embed", counted)
    demo.run(demo.load("digits"), 0, replace(train.DIGITS, **SMALL))
    assert calls == [300, 601, 896] + [300, 601] * 3
