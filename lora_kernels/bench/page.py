"""The report as one HTML page that needs nothing else: the Markdown's tables, and the plots within, in light and dark."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from html import escape

_STYLE = """
:root { color-scheme: light dark; --page: #ffffff; --ink: #1f2328; --soft: #59636e; --edge: #d1d9e0; --stripe: #f6f8fa; }
@media (prefers-color-scheme: dark) {
  :root { --page: #0d1117; --ink: #f0f6fc; --soft: #9198a1; --edge: #3d444d; --stripe: #151b23; }
}
body { margin: 2rem auto; max-width: 76rem; padding: 0 1rem; background: var(--page); color: var(--ink);
       font: 15px/1.5 -apple-system, "Segoe UI", "Noto Sans", Helvetica, Arial, sans-serif; }
h2 { margin-top: 3rem; border-bottom: 1px solid var(--edge); padding-bottom: .3rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; margin: .5rem 0 1rem; font-variant-numeric: tabular-nums; }
th, td { border: 1px solid var(--edge); padding: .2rem .6rem; white-space: nowrap; }
tbody tr:nth-child(even) { background: var(--stripe); }
.right { text-align: right; }
code { font: 13px ui-monospace, Menlo, Consolas, monospace; }
summary { cursor: pointer; color: var(--soft); }
figure { margin: 1rem 0; } figure svg { max-width: 100%; height: auto; } figure svg text { fill: var(--ink); }
"""


def html(markdown: str, drawings: Mapping[str, str]) -> str:
    """The page of a report; `drawings` has the SVG of each picture that the Markdown names."""
    title = re.search(r"^# (.*)$", markdown, re.M)
    body = "\n".join(_blocks(markdown, drawings))
    head = (
        '<meta charset="utf-8">\n<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title[1]) if title else ''}</title>\n<style>{_STYLE}</style>"
    )
    return f'<!doctype html>\n<html lang="en">\n<head>\n{head}\n</head>\n<body>\n{body}\n</body>\n</html>\n'


def themed(svg: str) -> str:
    """A drawing of Matplotlib whose black, dark and white parts take the page's colours."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.S)
    svg = re.sub(r"#(000000|202124)\b", "var(--ink)", svg)
    return re.sub(r"#ffffff\b", "var(--page)", svg)


def _blocks(markdown: str, drawings: Mapping[str, str]) -> Iterator[str]:
    """The HTML of each block that the report writes: headings, paragraphs, lists, tables, pictures, folded tables."""
    for block in re.split(r"\n\n+", markdown.strip()):
        heading = re.fullmatch(r"(#+) (.*)", block)
        picture = re.fullmatch(r"!\[(.*)\]\((.*)\)", block)
        folded = re.fullmatch(r"<details><summary>(.*)</summary>", block)
        if heading:
            level = len(heading[1])
            yield f"<h{level}>{_text(heading[2])}</h{level}>"
        elif picture:
            name, drawing = escape(picture[1]), drawings.get(picture[2])
            if drawing is not None:
                yield f'<figure role="img" aria-label="{name}">{themed(drawing)}</figure>'
        elif folded:
            yield f"<details><summary>{_text(folded[1])}</summary>"
        elif block == "</details>":
            yield block
        elif block.startswith("| "):
            yield _table(block)
        elif block.startswith("* "):
            items = "".join(f"<li>{_text(line[2:])}</li>" for line in block.splitlines())
            yield f"<ul>{items}</ul>"
        else:
            yield f"<p>{_text(block)}</p>"


def _table(block: str) -> str:
    head, marks, *lines = (
        [cell.strip() for cell in line[1:-1].split("|")] for line in block.splitlines()
    )
    right = [' class="right"' if mark.endswith(":") else "" for mark in marks]

    def row(cells: list[str], tag: str) -> str:
        inner = "".join(
            f"<{tag}{side}>{_text(cell)}</{tag}>" for cell, side in zip(cells, right, strict=True)
        )
        return f"<tr>{inner}</tr>"

    body = "".join(row(cells, "td") for cells in lines)
    return f'<div class="wide"><table><thead>{row(head, "th")}</thead><tbody>{body}</tbody></table></div>'


def _text(text: str) -> str:
    """Escaped text with `code`."""
    return re.sub(r"`([^`]*)`", r"<code>\1</code>", escape(text, quote=False))
