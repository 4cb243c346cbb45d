"""Reports as one HTML file without external resources."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title} · FedFMSL Edge</title>
<style>
body {{ margin: 0 auto; max-width: 1200px; padding: 1.5rem 1rem 3rem; color: #222; background: #fff;
  font: 16px/1.5 system-ui, sans-serif }}
h1 {{ margin: 0; font-size: 1.6rem }}
h2 {{ margin: 2.5rem 0 .5rem; font-size: 1.15rem }}
p {{ margin: .25rem 0; color: #555 }}
a {{ color: #0072b2; overflow-wrap: anywhere }}
.charts {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 480px), 1fr)); gap: 2rem;
  margin-top: 1.5rem }}
img {{ width: 100%; height: auto }}
.wide {{ overflow-x: auto }}
table {{ border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums }}
th, td {{ padding: .35rem .8rem; text-align: right; white-space: nowrap; border-bottom: 1px solid #e8e8e8 }}
th {{ color: #555; font-weight: 600 }}
th:first-child, td:first-child {{ padding-left: 0; text-align: left }}
</style>
</head>
<body>
<h1>{title}</h1>
{body}
</body>
</html>
"""


def page(title: str, body: str) -> str:
    """`title` is a text, `body` is HTML."""
    return _PAGE.format(title=html.escape(title), body=body)


def table(rows: Sequence[Sequence[str]]) -> str:
    """A table of texts. The first row is its head."""
    lines = []
    for tag, row in zip(["th", *["td"] * (len(rows) - 1)], rows, strict=True):
        lines.append("<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row) + "</tr>")
    return f'<div class="wide"><table>{"".join(lines)}</table></div>'


def charts(svgs: Sequence[tuple[str, bytes]]) -> str:
    """SVG images, each after its title."""
    images = [
        f'<img alt="{html.escape(title)}" src="data:image/svg+xml;base64,{base64.b64encode(svg).decode()}">'
        for title, svg in svgs
    ]
    return f'<div class="charts">{chr(10).join(images)}</div>'
