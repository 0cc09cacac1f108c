"""Pages of the site that stand elsewhere in the repository, and links to them: a hook of mkdocs.

RESULTS.md becomes a page for each of its headings, under findings/; the notebooks of demos/ stand under notebooks/. A
link that leaves docs/ goes to the page that its target became, or to the file on GitHub. Pages that would load
something from another site are refused.
"""

import os
import posixpath
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
GITHUB = "https://github.com/lens-positions/lens-positions/blob/main/"
SPLIT_FURTHER = "How RoPE itself is used"
"""The section of RESULTS.md whose subsections are pages of their own."""

LOADS_MERMAID = re.compile(r'<script type="module">(?:(?!</script>).)*mermaid(?:(?!</script>).)*</script>', re.DOTALL)
"""What nbconvert puts into every notebook to draw diagrams, of which there are none, with code from another site."""

LOADS = re.compile(
    r"""<(?:script|img|iframe|link rel="stylesheet")[^>]*? (?:src|href)="?https?://|import\(["']https?://"""
)
"""What a page fetches from elsewhere as soon as it is opened."""

LINK = re.compile(r"(!?\[[^\]]*\]\()(?!https?:|#|mailto:)([^)\s#]+)(#[^)\s]*)?\)")


@dataclass(frozen=True)
class Finding:
    """One heading of RESULTS.md and the text below it."""

    title: str
    text: str

    @property
    def page(self) -> str:
        """Its page, by the name that GitHub gives its anchor."""
        return f"findings/{anchor(self.title)}.md"


def anchor(title: str) -> str:
    """What GitHub calls a heading in links."""
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


def findings() -> tuple[str, list[Finding]]:
    """What stands above the first heading of RESULTS.md, and each heading with its text."""
    text = (ROOT / "RESULTS.md").read_text("utf-8")
    introduction, *sections = re.split(r"^## ", text, flags=re.MULTILINE)

    found = []
    for section in sections:
        title, body = section.split("\n", 1)
        if title != SPLIT_FURTHER:
            found.append(Finding(title, body))
            continue
        own, *parts = re.split(r"^### ", body, flags=re.MULTILINE)
        found.append(Finding(title, own))
        found += [Finding(*part.split("\n", 1)) for part in parts]
    return introduction, found


def with_links(markdown: str, titles: list[str]) -> str:
    """The tables of verdicts, with each finding a link to its page."""
    for title in titles:
        markdown = markdown.replace(f"\n| {title} | **", f"\n| [{title}](RESULTS.md#{anchor(title)}) | **")
    return markdown


def relinked(markdown: str, folder: str, page: str) -> str:
    """Text that stood in this folder of the repository, with its links as the page of the site needs them."""

    def target(match: re.Match[str]) -> str:
        opening, path, fragment = match[1], match[2], match[3] or ""
        path = posixpath.normpath(posixpath.join(folder, path))
        place = PurePosixPath(path)
        if path == "RESULTS.md":
            inside, fragment = f"findings/{fragment[1:] or 'index'}.md", ""
        elif place.parent.name == "demos" and place.suffix == ".ipynb":
            inside = f"notebooks/{place.name}"
        elif place.parts[0] == "docs":
            inside = str(place.relative_to("docs"))
        else:
            return f"{opening}{GITHUB}{path}{fragment})"
        return f"{opening}{posixpath.relpath(inside, posixpath.dirname(page) or '.')}{fragment})"

    return LINK.sub(target, markdown)


def on_config(config: MkDocsConfig) -> None:
    """Put the findings into the navigation."""
    pages: list[Any] = ["findings/index.md", *({one.title: one.page} for one in findings()[1])]
    for section in config.nav or []:
        if "Findings" in section:
            section["Findings"] = pages


@event_priority(100)  # before mkdocs-jupyter, which looks for notebooks among the files
def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the findings and the notebooks."""
    introduction, found = findings()
    titles = [one.title for one in found]
    contents = {"findings/index.md": with_links(introduction, titles).replace("# Results", "# Findings", 1)}
    contents |= {one.page: f"# {one.title}\n{with_links(one.text, titles)}" for one in found}
    for name, text in contents.items():
        files.append(File.generated(config, name, content=relinked(text, "", name)))

    # mkdocs-jupyter reads a path, and the notebooks' links are those of the repository.
    folder = Path(tempfile.mkdtemp(prefix="lens-positions-docs-"))
    (folder / "notebooks").mkdir()
    for notebook in sorted((ROOT / "demos").glob("*.ipynb")):
        name = f"notebooks/{notebook.name}"
        (folder / name).write_text(relinked(notebook.read_text("utf-8"), "demos", name), "utf-8")
        files.append(File(name, os.fspath(folder), config.site_dir, config.use_directory_urls))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Links of the pages of docs/ that leave it."""
    name = page.file.src_uri
    if name.startswith(("findings/", "notebooks/")):
        return markdown
    return relinked(markdown, posixpath.join("docs", posixpath.dirname(name)), name)


def on_page_content(html: str, **_: Any) -> str:
    """Pages load nothing from other sites."""
    return LOADS_MERMAID.sub("", html)


def on_post_page(output: str, page: Page, **_: Any) -> None:
    """Refuse a page that needs a network."""
    found = LOADS.search(output)
    if found:
        raise PluginError(f"{page.file.src_uri} loads something from another site: {output[found.start() :][:120]!r}")
