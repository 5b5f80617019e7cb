"""Images for the demonstration: scikit-learn's digits, or class sub-folders in a folder or a zip."""

from __future__ import annotations

import io
import os
import stat
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import takewhile
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_digits
from torch import Tensor
from tqdm import tqdm

from .. import _files
from ..commands.terminal import shown

SIZE = 28  # pixels; images from a folder or zip are resized to SIZE x SIZE
MANY_CLASSES = 30  # from here on the models are judged on classes never trained on
LARGEST = 2**26  # bytes of an image file
SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".pgm", ".ppm"}
DIGITS = "scikit-learn's digits"
PARTS = {"train", "training", "val", "valid", "validation", "test"}
HELP = "give `digits`, or a folder or a zip with one sub-folder of images per class"


@dataclass(frozen=True)
class ImageSet:
    """Labelled images: `images` [N, C, H, W] float32 in 0..1, `labels` [N] int64, names of the classes."""

    name: str
    images: Tensor
    labels: Tensor
    classes: list[str]


@dataclass(frozen=True)
class Split:
    """Who sees what. Index tensors into an ImageSet, and labels renumbered so that old classes come first.

    `train` and `old_train` feed the new and the old model; `query` and `gallery` are never trained on, and
    with `unseen=True` none of their classes is.
    """

    train: Tensor
    old_train: Tensor
    query: Tensor
    gallery: Tensor
    labels: Tensor
    num_classes: int
    old_classes: int
    unseen: bool


def load(source: str) -> ImageSet:
    """Load `digits`, a folder or a zip; ValueError, before any image is trained on, if it cannot serve."""
    if source == "digits":
        digits = load_digits()
        images = torch.from_numpy(digits.images / 16.0).float().unsqueeze(1)  # [1797, 1, 8, 8]
        labels = torch.from_numpy(digits.target).long()
        return ImageSet(DIGITS, images, labels, [str(c) for c in range(10)])
    path = Path(source)
    if path.exists() and not (path.is_dir() or path.is_file()):
        raise ValueError(f"`--data`: `{source}` is a pipe or a device; {HELP}")
    if not path.exists():
        raise ValueError(f"`--data`: there is no file or folder `{source}`; {HELP}")
    with ExitStack() as stack:
        read: Callable[[str], bytes]
        if path.is_dir():
            names = list(_walk(path))
            read = partial(_read_file, path)
        else:
            try:
                archive = stack.enter_context(zipfile.ZipFile(path))
            except zipfile.BadZipFile as error:
                raise ValueError(
                    f"`--data`: `{source}` is neither a folder nor a sound zip file ({error}); {HELP}"
                ) from error
            except OSError as error:
                raise _unreadable(source, error) from error
            names = [info.filename for info in archive.infolist() if not info.is_dir()]
            read = partial(_read_member, archive)
        return _read_all(shown(path.resolve().name), source, _by_class(names, source), read)


def _read_file(root: Path, name: str) -> bytes:
    status = (root / name).stat()
    if not stat.S_ISREG(status.st_mode):  # reading a device need not end
        raise ValueError("a pipe or a device")
    _refuse_large(status.st_size)
    return (root / name).read_bytes()


def _read_member(archive: zipfile.ZipFile, name: str) -> bytes:
    _refuse_large(archive.getinfo(name).file_size)
    return archive.read(name)


def _refuse_large(size: int) -> None:
    if size > LARGEST:
        raise ValueError(f"{size:,} bytes, and at most {LARGEST:,} are read")


def _unreadable(source: str, error: OSError) -> ValueError:
    return ValueError(f"`--data`: cannot read `{source}` ({_files.reason(error)})")


def _walk(root: Path) -> Iterator[str]:
    def refuse(error: OSError) -> None:
        raise _unreadable(error.filename, error) from error  # a class that is left out would go unnoticed

    for folder, _, files in os.walk(root, onerror=refuse):
        for file in files:
            yield (Path(folder) / file).relative_to(root).as_posix()


def _by_class(names: list[str], source: str) -> dict[str, list[str]]:
    """Image names by class: the class is the path of the image's folder below what all images share."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for name in sorted(names):
        path = PurePosixPath(name)
        hidden = any(part.startswith(".") or part == "__MACOSX" for part in path.parts)
        if path.suffix.lower() in SUFFIXES and not hidden:
            groups.setdefault(path.parts[:-1], []).append(name)
    if len(groups) < 2:
        found = sum(map(len, groups.values()))
        raise ValueError(
            f"`--data`: `{source}` must hold at least 2 class sub-folders with images, "
            f"got {len(groups)} with {found} images; {HELP}"
        )
    shared = sum(1 for _ in takewhile(lambda level: len(set(level)) == 1, zip(*groups, strict=False)))
    classes = {"/".join(folder[shared:]): members for folder, members in sorted(groups.items())}
    if "" in classes:
        stray = classes[""]
        raise ValueError(
            f"`--data`: `{stray[0]}` lies beside the class sub-folders of `{source}` and not in one of them "
            f"({len(stray)} such images); move it into a class or away"
        )
    if {name.split("/")[0].lower() for name in classes} <= PARTS:
        raise ValueError(
            f"`--data`: `{source}` holds {', '.join(sorted(classes))}, which look like parts of a data set "
            f"and not like classes; name one of them, the demonstration makes its own split"
        )
    for name, members in classes.items():
        if len(members) < 3:
            raise ValueError(
                f"`--data`: class `{name}` of `{source}` has {len(members)} image(s); every class needs at "
                f"least 3 (one to train on, one query, one in the gallery): add images or remove the class"
            )
    return classes


def _read_all(
    name: str, source: str, classes: dict[str, list[str]], read: Callable[[str], bytes]
) -> ImageSet:
    members = [(label, member) for label, group in enumerate(classes.values()) for member in group]
    images = np.empty((len(members), SIZE, SIZE, 3), dtype=np.uint8)
    for i, (_, member) in enumerate(tqdm(members, desc="reading images", disable=None)):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error", Image.DecompressionBombWarning)
                image = Image.open(io.BytesIO(read(member)))
            with image:
                small = image.convert("RGB").resize((SIZE, SIZE), Image.Resampling.BILINEAR)
                images[i] = np.asarray(small)
        except Exception as error:  # Pillow and zipfile raise a dozen types for a damaged file
            raise ValueError(
                f"`--data`: cannot read the image `{member}` in `{source}` ({error}); repair or remove it"
            ) from error
    if (images == images[..., :1]).all():  # grey everywhere: one channel is enough
        images = images[..., :1]
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous().float() / 255  # [N, C, H, W]
    labels = torch.tensor([label for label, _ in members], dtype=torch.int64, device="cpu")
    return ImageSet(name, pixels, labels, list(classes))


def split(data: ImageSet, seed: int) -> Split:
    """Divide a data set.

    Few classes: half of each class trains; the rest is one third queries, two thirds gallery. The old model
    gets the first half of the classes and a third of their training images. Many classes: 30 % of the classes
    are kept for judging (same thirds), the others train, and the old model gets a third of those.
    """
    gen = torch.Generator().manual_seed(seed)
    count = len(data.classes)
    unseen = count >= MANY_CLASSES
    everyone = torch.arange(count, dtype=torch.int64, device="cpu")
    order = _shuffled(count, gen) if unseen else everyone
    labels = torch.empty_like(order).index_put_((order,), everyone)[data.labels]
    trained = count - round(0.3 * count) if unseen else count
    old_classes = max(2, trained // 3 if unseen else (count + 1) // 2)
    train, old_train, query, gallery = [], [], [], []
    for c in range(count):
        members = (labels == c).nonzero()[:, 0]
        members = members[_shuffled(len(members), gen)]
        used = len(members) // 2 if not unseen else len(members) * (c < trained)
        seen, judged = members[:used], members[used:]
        train.append(seen)
        if c < old_classes:
            old_train.append(seen if unseen else seen[: max(1, len(seen) // 3)])
        queries = max(1, round(len(judged) / 3)) if len(judged) else 0
        query.append(judged[:queries])
        gallery.append(judged[queries:])
    return Split(
        train=torch.cat(train),
        old_train=torch.cat(old_train),
        query=torch.cat(query),
        gallery=torch.cat(gallery),
        labels=labels,
        num_classes=trained,
        old_classes=old_classes,
        unseen=unseen,
    )


def describe(data: ImageSet, parts: Split) -> str:
    """One sentence on the split, for people."""
    share = "on classes never trained on" if parts.unseen else "on images never trained on"
    sizes = Counter(data.labels.tolist()).values()
    spread = str(min(sizes)) if min(sizes) == max(sizes) else f"{min(sizes)} to {max(sizes)}"
    return (
        f"{data.name}: {len(data.labels):,} images, {len(data.classes)} classes of {spread}; "
        f"old model: {len(parts.old_train):,} images of {parts.old_classes} classes; "
        f"new models: {len(parts.train):,} images of {parts.num_classes} classes; "
        f"judged {share}: {len(parts.query):,} queries against a gallery of {len(parts.gallery):,}"
    )


def _shuffled(count: int, generator: torch.Generator) -> Tensor:
    return torch.randperm(count, dtype=torch.int64, device="cpu", generator=generator)
