"""Maps between the old and the new embedding space, learned from stored features alone."""

from .forward import ForwardTransform
from .procrustes import Procrustes
from .reverse import ResidualHead, ReverseQueryTransform
from .side import SideInformation

__all__ = ["ForwardTransform", "Procrustes", "ResidualHead", "ReverseQueryTransform", "SideInformation"]
