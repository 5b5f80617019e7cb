"""How many examples Hypothesis draws for a test that wants another number than the rest."""

from __future__ import annotations

from hypothesis import settings


def examples(count: int) -> settings:
    """`count` examples with the profile "ci" of conftest.py, more with another in proportion."""
    return settings(max_examples=count * settings().max_examples // settings.get_profile("ci").max_examples)
