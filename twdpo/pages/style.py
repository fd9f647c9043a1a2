"""What all pages share: their frame and their style. They need no network and no script."""

import html

STYLE = """
:root { color-scheme: light dark; --ink: #1b1b1f; --paper: #fdfdfb; --line: #d9d8d2; --soft: #6b6a66;
        --panel: #f5f4ef; --link: #1a5fb4; }
@media (prefers-color-scheme: dark) { :root { --ink: #e9e7e2; --paper: #17171a; --line: #3a3a40; --soft: #a09e98;
        --panel: #202024; --link: #8ab8ff; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 24px; max-width: 1240px; font: 16px/1.6 system-ui, sans-serif; color: var(--ink);
       background: var(--paper); overflow-wrap: break-word; }
a { color: var(--link); } h1, p, li, summary { overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; margin: 0 0 .3rem; } h2 { font-size: 1.1rem; margin: 2.2rem 0 .6rem; }
p.note { color: var(--soft); margin: .2rem 0 1rem; max-width: 76ch; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .9rem .25rem 0; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:first-child, td:first-child { text-align: left; white-space: normal; } th { color: var(--soft); font-weight: 500; }
.tables { display: flex; flex-wrap: wrap; gap: 0 3rem; } .tables > * { max-width: 100%; }
article { border: 1px solid var(--line); border-radius: 8px; margin: 1rem 0; padding: 1rem 1.2rem; }
.prompt { white-space: pre-wrap; overflow-wrap: anywhere; color: var(--soft); max-height: 12rem; overflow: auto;
          margin: 0 0 .8rem; }
.sides { display: grid; grid-template-columns: 1fr 1fr; gap: 1.2rem; }
.sides > div { min-width: 0; }
dl { display: grid; grid-template-columns: minmax(6rem, max-content) minmax(0, 1fr); gap: .1rem 1rem;
     margin: .4rem 0 1rem; font-size: .9rem; max-width: 96ch; }
dt { color: var(--soft); } dd { margin: 0; min-width: 0; overflow-wrap: anywhere; }
@media (max-width: 720px) { body { padding: 14px; } .sides { grid-template-columns: 1fr; } }
@media (max-width: 520px) { dl { grid-template-columns: 1fr; } dd { margin: 0 0 .4rem .8rem; } }
"""


def render_document(title: str, style: str, body: str) -> str:
    """A whole page. title: text; style: CSS beside STYLE; body: HTML below the title."""
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(title)}</title><style>{STYLE}{style}</style></head><body>
<h1>{html.escape(title)}</h1>
{body}
</body></html>
"""
