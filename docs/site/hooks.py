"""Pages of the site that are written elsewhere: README, CONTRIBUTING, CHANGELOG, reference of settings, tutorials."""

import re
from pathlib import Path
from typing import Any

import jupytext
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]


def on_files(files: Files, config: Any) -> Files:
    """Add the pages, with links as they are within the site."""
    for source, page in (("README", "index"), ("CONTRIBUTING", "CONTRIBUTING"), ("CHANGELOG", "CHANGELOG")):
        text = (ROOT / f"{source}.md").read_text(encoding="utf-8")
        text = re.sub(r"\]\(docs/", "](", text).replace("](reference.yaml)", "](reference.md)")
        text = text.replace("[Apache-2.0](LICENSE)", "Apache-2.0")
        files.append(File.generated(config, f"{page}.md", content=text))
    settings = (ROOT / "docs" / "reference.yaml").read_text(encoding="utf-8")
    files.append(File.generated(config, "reference.md", content=f"# Every setting\n\n```yaml\n{settings}```\n"))
    for path in sorted((ROOT / "docs" / "tutorials").glob("*.py")):
        cells = jupytext.read(path).cells
        text = [each.source if each.cell_type == "markdown" else f"```python\n{each.source}\n```" for each in cells]
        text.insert(1, f"[This page as a notebook]({path.stem}.ipynb)")
        linked = re.sub(r"\]\((\w+)\.py\)", r"](\1.md)", "\n\n".join(text))
        files.append(File.generated(config, f"tutorials/{path.stem}.md", content=linked))
    return files
