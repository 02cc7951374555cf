"""A page of HTML that stands alone: its style and its pictures are inside; no script, no external address."""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable, Sequence

STYLE = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { font: 15px/1.5 system-ui, sans-serif; color: #222; background: #f6f7f8; margin: 0; }
main { max-width: 1100px; margin: 0 auto; padding: 28px 20px 60px; overflow-wrap: anywhere; }
h1 { font-size: 26px; line-height: 1.25; margin: 0 0 2px; } h2 { font-size: 17px; margin: 0 0 10px; }
h3 { font-size: 14px; margin: 14px 0 6px; color: #445; }
.about { color: #667; margin: 0 0 18px; }
section, .answer { background: #fff; border: 1px solid #e3e6e8; border-radius: 10px; padding: 18px 20px; margin: 0 0 18px; }
.answer { border-left: 5px solid #009E73; font-size: 16.5px; }
.scroll { overflow-x: auto; }
.many { display: grid; gap: 22px; grid-template-columns: repeat(auto-fit, minmax(min(100%, 330px), 1fr)); }
.steps { display: grid; gap: 14px; grid-template-columns: repeat(auto-fill, minmax(130px, 1fr)); }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th { text-align: left; color: #667; font-weight: 600; border-bottom: 2px solid #e3e6e8; padding: 5px 12px 5px 0; white-space: nowrap; }
td { border-bottom: 1px solid #eef0f1; padding: 5px 12px 5px 0; white-space: nowrap; }
tr.best td { background: #e9f6f1; font-weight: 600; } tr.noise td { background: #eef7fc; }
img { max-width: 100%; height: auto; display: block; margin: 0 auto; } figure { margin: 0; min-width: 0; }
.steps img { width: 100%; image-rendering: pixelated; }
figcaption { color: #667; font-size: 13.5px; margin-top: 8px; }
svg { display: block; width: 100%; height: auto; } svg text { font: 12.5px system-ui, sans-serif; fill: #556; }
pre { background: #f6f7f8; border-radius: 6px; padding: 10px 12px; font-size: 13px; margin: 6px 0; white-space: pre-wrap; }
details { margin-top: 8px; } summary { cursor: pointer; color: #0072B2; } li { margin: 3px 0; }
@media (max-width: 500px) { main { padding: 16px 8px 40px; } section, .answer { padding: 12px; } h1 { font-size: 21px; } }
"""


def page(title: str, about: str, parts: Iterable[str]) -> bytes:
    """Return the file: a title, a line about it, and parts made by the functions below."""
    head = f"<h1>{text(title)}</h1><p class=about>{text(about)}</p>"
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
        f"<title>{text(title)}</title><style>{STYLE}</style><main>{head}{''.join(parts)}</main></html>\n"
    ).encode()


def section(title: str, *parts: str) -> str:
    """Return parts under a title; "" if there is nothing in them."""
    return f"<section><h2>{text(title)}</h2>{''.join(parts)}</section>" if any(parts) else ""


def table(rows: Sequence[Sequence[object]], kinds: Sequence[str] = ()) -> str:
    """Return a table, the first row its head; "" if there are no others. `kinds` are classes of the other rows: best, noise."""
    if len(rows) < 2:
        return ""
    head, *others = rows
    classes = [f" class={kind}" if kind else "" for kind in kinds or [""] * len(others)]
    body = "".join(f"<tr{kind}>{_cells('td', row)}</tr>" for kind, row in zip(classes, others, strict=True))
    return f"<div class=scroll><table><thead><tr>{_cells('th', head)}</tr></thead><tbody>{body}</tbody></table></div>"


def _cells(tag: str, row: Sequence[object]) -> str:
    return "".join(f"<{tag}>{text(cell)}</{tag}>" for cell in row)


def picture(png: bytes, words: str, caption: str = "") -> str:
    """Return a PNG with words for those who do not see it, and a caption below."""
    data = base64.b64encode(png).decode()
    below = f"<figcaption>{text(caption)}</figcaption>" if caption else ""
    return f"<figure><img alt='{text(words)}' src='data:image/png;base64,{data}'>{below}</figure>"


def lines(content: Iterable[object]) -> str:
    """Return lines in a fixed width."""
    return f"<pre>{text(chr(10).join(map(str, content)))}</pre>"


def details(summary: str, *parts: str) -> str:
    """Return parts that the reader opens."""
    return f"<details><summary>{text(summary)}</summary>{''.join(parts)}</details>"


def text(value: object) -> str:
    """Return a value as text that is safe anywhere in the page."""
    return html.escape(str(value))
