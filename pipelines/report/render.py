"""Markdown to one self-contained HTML page: figures as data in it, its style in it, nothing fetched from anywhere.

markdown-it renders (CommonMark and tables; raw HTML in the Markdown stays text), Jinja fills the page's frame
(`page.html.jinja`). A table is wrapped so that it scrolls by itself on a narrow screen, and cells that end in a verdict
are marked for the style.
"""

from __future__ import annotations

import base64
import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from markdown_it import MarkdownIt
from markdown_it.token import Token
from markupsafe import Markup

from mft_core.statistics.markdown import table, text

_CSS_DPI, _FIGURE_DPI = 96, 160
_VERDICT = re.compile(r"\b(better|worse|equivalent|undecided)\)?$")


@dataclass(frozen=True)
class Section:
    """A part of a report."""

    name: str
    """its anchor in the page"""
    title: str
    body: str
    """Markdown without the title; images by paths relative to the report"""


def markdown(title: str, sections: Sequence[Section]) -> str:
    """Return the report as one Markdown text."""
    parts = [f"# {text(title)}"] + [f"## {text(section.title)}\n\n{section.body.strip()}" for section in sections]
    return "\n\n".join(parts) + "\n"


def html(title: str, subtitle: str, sections: Sequence[Section], folder: Path) -> str:
    """Return the report as one HTML page.

    Args:
        folder: what the images' paths are relative to.
    """
    rendered = [
        {"name": section.name, "title": section.title, "body": Markup(_html_of(section.body, folder))}
        for section in sections
    ]
    return _frame().render(title=title, subtitle=subtitle, sections=rendered)


@functools.cache
def _frame() -> jinja2.Template:
    here = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(loader=here, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return environment.get_template("page.html.jinja")


def _html_of(body: str, folder: Path) -> str:
    parser = MarkdownIt("commonmark", {"html": False}).enable("table")
    parser.add_render_rule("table_open", _table_open)
    parser.add_render_rule("table_close", _table_close)
    tokens = parser.parse(body)
    for index, token in enumerate(tokens):
        if token.type == "td_open" and (found := _VERDICT.search(tokens[index + 1].content)):
            token.attrSet("class", found[1])
        for child in token.children or ():
            if child.type == "image" and not _inline(child, folder):
                child.type, child.tag, child.content = "text", "", f"({child.content}: no such figure)"
    rendered: str = parser.renderer.render(tokens, parser.options, {})
    return rendered


def _table_open(renderer: Any, tokens: Sequence[Token], index: int, options: Any, env: Any) -> str:
    return '<div class="table"><table>\n'


def _table_close(renderer: Any, tokens: Sequence[Token], index: int, options: Any, env: Any) -> str:
    return "</table></div>\n"


def _inline(image: Token, folder: Path) -> bool:
    """Put the bytes of one of the report's own PNGs in the place of its path, to be shown in its true size.

    Returns:
        whether it is one: a page embeds no other file.
    """
    path = folder / str(image.attrs["src"])
    own = folder.resolve() in path.resolve().parents and path.suffix == ".png" and path.is_file()
    if not own:
        return False
    data = path.read_bytes()
    image.attrs["src"] = f"data:image/png;base64,{base64.b64encode(data).decode()}"
    pixels = int.from_bytes(data[16:20], "big")  # its header says how many it is wide
    image.attrs["width"] = round(pixels * _CSS_DPI / _FIGURE_DPI)
    return True


def grid(header: Sequence[str], lines: Sequence[Sequence[Any]], optional: str | None = None) -> str:
    """Return a Markdown table of any values; None is a dash.

    Args:
        optional: the column that is left out unless it has several values.
    """
    if optional and len({line[header.index(optional)] for line in lines}) < 2:
        at = header.index(optional)
        header, *lines = ([*line[:at], *line[at + 1 :]] for line in (header, *lines))
    return table(header, [[_cell(value) for value in line] for line in lines])


def _cell(value: Any) -> str:
    return "-" if value is None else value if isinstance(value, str) else str(value)
