"""One self-contained HTML page of pictures and numbers, readable on a phone."""

from __future__ import annotations

import base64
import html
import json
import re
from pathlib import Path

from scorelab.writing import whole

__all__ = ["Section", "write_page"]

Section = tuple[str, str, list["Path | bytes"], object]
"""Heading, explanation, pictures (files, or PNGs in memory) and numbers."""

_STYLE = """body{font:16px/1.5 system-ui,sans-serif;max-width:66rem;margin:0 auto;padding:1rem;color:#222}
figure{display:inline-block;margin:.3rem}figure img{min-width:14rem;image-rendering:pixelated}
figcaption{font-size:.75rem;color:#666}
img{max-width:100%;height:auto;display:block;margin:.5rem 0}
h2{margin-top:2.5rem;border-top:1px solid #ddd;padding-top:1rem}
pre{background:#f5f5f5;padding:.7rem;overflow-x:auto;font-size:.8rem}.t{overflow-x:auto}
table{border-collapse:collapse;font-size:.85rem}td,th{padding:.2rem .7rem;text-align:right;border-bottom:1px solid #eee}
td:first-child,th:first-child{text-align:left}"""


def _picture(source: Path | bytes, captioned: bool, what: str) -> str:
    """A picture of ``what``, with the name of its file under it if ``captioned``."""
    if isinstance(source, bytes):
        return f'<img alt="{html.escape(what)}" src="data:image/png;base64,{base64.b64encode(source).decode()}">'
    kind, name = "gif" if source.suffix == ".gif" else "png", html.escape(source.stem)
    data = base64.b64encode(source.read_bytes()).decode()
    shown = f'<img alt="{name}" src="data:image/{kind};base64,{data}">'
    return f"<figure>{shown}<figcaption>{name}</figcaption></figure>" if captioned else shown


def _number(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else html.escape(str(value))


def _is_row(value: object) -> bool:
    return isinstance(value, dict) and bool(value) and all(not isinstance(v, (dict, list)) for v in value.values())


def _table(rows: dict[str, dict[str, object]]) -> str:
    columns = list(next(iter(rows.values())))
    head = "".join(f"<th>{html.escape(c)}</th>" for c in ["", *columns])
    body = "".join(
        f"<tr><td>{html.escape(name)}</td>" + "".join(f"<td>{_number(row.get(c, ''))}</td>" for c in columns) + "</tr>"
        for name, row in rows.items()
    )
    return f'<div class="t"><table><tr>{head}</tr>{body}</table></div>'


def _numbers(value: object) -> str:
    """Dictionaries of alike rows as tables, all else as indented JSON."""
    if isinstance(value, list) and value and all(_is_row(v) for v in value):
        return _table({str(i + 1): row for i, row in enumerate(value)})
    if isinstance(value, dict) and value and all(_is_row(v) for v in value.values()):
        return _table(value)
    if isinstance(value, dict):
        simple = {k: v for k, v in value.items() if not isinstance(v, (dict, list))}
        rest = "".join(f"<h4>{html.escape(k)}</h4>{_numbers(v)}" for k, v in value.items() if k not in simple)
        return (_table({"": simple}) if simple else "") + rest
    return f"<pre>{html.escape(json.dumps(value, indent=1))}</pre>"


def write_page(path: Path, title: str, sections: list[Section]) -> Path:
    """Write sections to ``path``; what stands in double backticks in an explanation is shown as code."""
    parts = []
    for heading, text, pictures, numbers in sections:
        shown = "".join(_picture(p, len(pictures) > 1 and isinstance(p, Path), heading) for p in pictures)
        table = f"<details><summary>numbers</summary>{_numbers(numbers)}</details>" if numbers is not None else ""
        said = re.sub(r"``(.+?)``", r"<code>\1</code>", html.escape(text))
        parts.append(f"<h2>{html.escape(heading)}</h2><p>{said}</p>{shown}{table}")
    page = (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style><body><h1>{html.escape(title)}</h1>{''.join(parts)}</body></html>\n"
    )
    with whole(path) as aside:
        aside.write_text(page, encoding="utf-8")
    return path
