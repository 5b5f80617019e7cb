"""The gallery that is searched while it is re-embedded: in memory, or in a folder for many processes."""

from .gallery import MixedGallery

__all__ = ["MixedGallery"]
