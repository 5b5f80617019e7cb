"""House rules of the tests themselves."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]


@pytest.mark.parametrize("path", sorted(TESTS.rglob("*.py")), ids=lambda path: str(path.relative_to(TESTS)))
def test_no_test_imports_from_another_test(path: Path) -> None:
    """Pytest would collect its tests twice, and nobody could move them: helpers have their own modules."""
    imports = re.findall(r"^(?:from|import) ([\w.]+)", path.read_text(), re.MULTILINE)
    assert not [name for name in imports if re.search(r"\b(test_\w+|conftest)$", name)]
