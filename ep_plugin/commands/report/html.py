"""One self-contained HTML page: numbers first, then pictures."""

import base64
import html
from collections.abc import Mapping, Sequence
from pathlib import Path

STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 52rem; margin: 2rem auto; padding: 0 1rem;
       color: #1f2937; background: #fff; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
table { border-collapse: collapse; } td, th { padding: .2rem 1rem .2rem 0; text-align: left; }
td:last-child { font-variant-numeric: tabular-nums; }
img { width: 100%; height: auto; background: #fff; border-radius: 6px; }
p { color: #6b7280; }
@media (prefers-color-scheme: dark) { body { color: #e5e7eb; background: #111827; }
  p { color: #9ca3af; } }
"""


def make_page(
    title: str,
    facts: Mapping[str, object],
    pictures: list[tuple[str, str, Path]],
    missing: Sequence[str] = (),
) -> str:
    """Return the page: `facts` as a table, then each (heading, caption, PNG file) embedded, then
    what is missing."""
    rows = "\n".join(
        f"<tr><td>{html.escape(name)}</td><td>{html.escape(str(value))}</td></tr>"
        for name, value in facts.items()
    )
    sections = "\n".join(_section(*picture) for picture in pictures)
    if missing:
        lines = "\n".join(f"<li>{html.escape(line)}</li>" for line in missing)
        sections += f"\n<h2>What is missing</h2>\n<ul>\n{lines}\n</ul>"
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(title)}</title>
<style>{STYLE}</style>
</head>
<body>
<h1>{html.escape(title)}</h1>
<table>
{rows}
</table>
{sections}
</body>
</html>
"""


def _section(heading: str, caption: str, picture: Path) -> str:
    data = base64.b64encode(picture.read_bytes()).decode()
    name = html.escape(heading)
    return (
        f"<h2>{name}</h2>\n<p>{html.escape(caption)}</p>\n"
        f'<img alt="{name}" src="data:image/png;base64,{data}">'
    )
