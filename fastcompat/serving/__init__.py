"""The gallery that is searched while it is re-embedded, in memory or in a folder that many processes share."""

from .gallery import MixedGallery

__all__ = ["MixedGallery"]
