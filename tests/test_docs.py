"""Every page of docs/ is in the site's menu, and the site knows no other."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
#: Pages that are made of others when the site is built (docs/site/hooks.py).
MADE = {"index.md", "reference.md", "CONTRIBUTING.md", "CHANGELOG.md"}


def test_the_menu_holds_every_page() -> None:
    menu = (ROOT / "mkdocs.yml").read_text().partition("\nnav:")[2]
    pages = {*re.findall(r"\S+\.md", menu)}
    written = {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")}
    results = {page for page in written if page.startswith(("ablations/", "benchmark/"))}  # linked from pages
    tutorials = {f"tutorials/{path.stem}.md" for path in (ROOT / "docs" / "tutorials").glob("*.py")}
    assert pages - tutorials == (written - results) | MADE
