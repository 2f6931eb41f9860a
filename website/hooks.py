"""Hooks of MkDocs: pages from outside docs/, links as the site needs them, and a check that nothing comes from another
host.
"""

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

_ROOT = Path(__file__).resolve().parent.parent
_DOCS = "docs/"
_PAGES = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "vulnerabilities.md",
} | {path: path for path in sorted(path.relative_to(_ROOT).as_posix() for path in _ROOT.glob("examples/**/README.md"))}
"""Pages from outside docs/, and their names on the site."""
_SOURCES = {name: path for path, name in _PAGES.items()}
_FENCE = re.compile(r"(^ *```.*?^ *```$)", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"(!?)\[([^\[\]]*)\]\(([^)\s]+)\)")
_PICTURE = re.compile(r"""(\bsrc(?:set)?=")([^":]+)(?=")""")
_LOADED = re.compile(r"<(?:script|link|img|iframe|source)\b[^>]*\b(?:src|href)=[\"']?((?:https?:)?//[^\"' >]+)")
_IN_STYLE = re.compile(r"(?:@import|url\()\s*[\"']?((?:https?:)?//[^\"')]+)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages from outside docs/."""
    for path, name in _PAGES.items():
        files.append(File.generated(config, name, content=(_ROOT / path).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:  # noqa: ARG001 - by name
    """Links between pages and to pictures lead to where these are on the site; a link to a file that the site does not
    have is its text alone."""
    here = page.file.src_uri
    folder = posixpath.dirname(_SOURCES.get(here, _DOCS + here))

    def placed(name: str) -> str:
        return posixpath.relpath(name, posixpath.dirname(here) or ".")

    def changed(match: re.Match[str]) -> str:
        sign, text, link = match.groups()
        path, mark, anchor = link.partition("#")
        if "://" in link or not path:
            return match[0]
        target = posixpath.normpath(posixpath.join(folder, path))
        found = _on_site(target)
        if found is None:
            return text if (_ROOT / target).exists() else match[0]  # MkDocs warns of what leads nowhere
        return f"{sign}[{text}]({placed(found)}{mark}{anchor})"

    def shown(match: re.Match[str]) -> str:
        """Of a picture in HTML."""
        found = _on_site(posixpath.normpath(posixpath.join(folder, match[2])))
        return match[0] if found is None else match[1] + placed(found)

    parts = _FENCE.split(markdown)
    return "".join(
        part if index % 2 else _PICTURE.sub(shown, _LINK.sub(changed, part)) for index, part in enumerate(parts)
    )


def _on_site(path: str) -> str | None:
    """The name on the site of a file, or of a folder's page."""
    for candidate in (path, f"{path}/README.md"):
        if candidate in _PAGES:
            return _PAGES[candidate]
        if candidate.startswith(_DOCS) and (_ROOT / candidate).is_file():
            return candidate.removeprefix(_DOCS)
    return None


def on_post_build(config: MkDocsConfig) -> None:
    """Raises PluginError when a page would load something from another host."""
    site = Path(config.site_dir)
    foreign = [*_foreign(site, "*.html", _LOADED), *_foreign(site, "*.css", _IN_STYLE)]
    if foreign:
        raise PluginError(f"pages load from other hosts: {', '.join(foreign[:10])}")


def _foreign(site: Path, pattern: str, address: re.Pattern[str]) -> list[str]:
    return [
        f"{path.relative_to(site)} {found}"
        for path in sorted(site.rglob(pattern))
        for found in address.findall(path.read_text(encoding="utf-8"))
    ]
