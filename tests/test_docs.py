"""The pages name files that exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
LINK = re.compile(r"\]\((?!\w+:)([^)#]+)")
PATH = re.compile(r"(?<![\w/.-])(?:examples|tools|configs|tests|mindspeed_mm|checkpoint|constraints|docs)/[\w./-]*\w")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_paths_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    missing = {target for target in LINK.findall(text) if not (page.parent / target).exists()}
    missing |= {path for path in PATH.findall(text) if not (ROOT / path).exists()}
    assert not missing
