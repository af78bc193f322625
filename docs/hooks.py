"""Adds to the docs site what lies outside the pages: CONTRIBUTING.md, and the pages of results if they were made."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
CODE = re.compile(r"<pre.*?</pre>|<code>.*?</code>", re.DOTALL)
OPTION = re.compile(r"(?<![\w-])--\w[\w-]*")
TO_RESULTS = re.compile(r"\[([^\]]+)\]\((?:\.\./)*(results/[^)#]*)(#[^)]*)?\)")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Adds the section Results where `make results` has made its pages."""
    folder = Path(config.docs_dir) / "results"
    studies = sorted(path.name for path in folder.glob("*.md") if path.name != "index.md")
    if (folder / "index.md").is_file() and config.nav is not None:
        pages = ["results/index.md", *(f"results/{name}" for name in studies)]
        before = next(i for i, entry in enumerate(config.nav) if "API" in entry)
        config.nav.insert(before, {"Results": pages})
    return config


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Adds CONTRIBUTING.md, whose links are relative to the root of the repository, and the notebooks."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").replace("](docs/", "](")
    files.append(File.generated(config, "contributing.md", content=text))
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        files.append(File.generated(config, f"notebooks/{path.name}", content=path.read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, *, page: Page, files: Files, **_: Any) -> str:
    """Leaves the words of a link to a page of results that was not made."""

    def kept(link: re.Match[str]) -> str:
        found = files.get_file_from_path(link[2])
        return link[0] if found is not None and found.inclusion.is_included() else link[1]

    return TO_RESULTS.sub(kept, markdown.replace("](../notebooks/", "](notebooks/"))


def on_page_content(html: str, **_: Any) -> str:
    """Keeps options such as --out on one line, which browsers break behind a hyphen; code blocks do not break."""

    def kept(code: re.Match[str]) -> str:
        return code[0] if code[0].startswith("<pre") else OPTION.sub(r'<span class="option">\g<0></span>', code[0])

    return CODE.sub(kept, html)
