"""A model upgrade on real images from end to end: what `fastcompat demo` runs."""

from fastcompat.demo.data import ImageSet, load
from fastcompat.demo.notes import notes, picture, table
from fastcompat.demo.upgrade import Upgrade, run

__all__ = ["ImageSet", "Upgrade", "load", "notes", "picture", "run", "table"]
