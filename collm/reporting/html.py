"""
Self-contained HTML reports: token views, tables and figures on one page that needs no network and no other file.

`page(title, *fragments)` joins fragments written by [`token_view`], [`table`], [`figure`], [`heading`] and
[`paragraph`]. Every fragment escapes the text it is given.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from collm.reporting.terminal import visible
from collm.reporting.view import Token, TokenView


def write_page(path: str | Path, title: str, *fragments: str) -> Path:
    """Writes [`page`] to `path` (UTF-8; its folder is created) and returns the path."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page(title, *fragments), encoding="utf-8")
    return path


def page(title: str, *fragments: str) -> str:
    """
    A whole HTML document: `title` as its heading, then the fragments.

    Light or dark follows the reader's system (`prefers-color-scheme`). Details of a token appear on hover; with the
    keyboard, tab into a text and move with the arrow keys; a switch writes the probabilities into the text, and
    printing always writes those of deferred tokens.
    """
    has_tokens = any('class="tokens"' in fragment for fragment in fragments)
    switch = (
        '<label class="switch"><input type="checkbox" id="numbers"> write deferral probabilities into the text</label>'
        if has_tokens
        else ""
    )
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<link rel="icon" href="data:,">\n<title>{_text(title)}</title>\n'
        f"<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        f"<h1>{_text(title)}</h1>\n{switch}\n" + "\n".join(fragments) + "\n</main>\n"
        '<div id="tip" role="tooltip" hidden></div>\n<div id="live" class="unseen" aria-live="polite"></div>\n'
        f"<script>{SCRIPT if has_tokens else ''}</script>\n</body>\n</html>\n"
    )


def heading(text: str) -> str:
    """A section heading."""
    return f"<h2>{_text(text)}</h2>"


def paragraph(text: str) -> str:
    """A paragraph of plain text."""
    return f"<p>{_text(text)}</p>"


def table(rows: Sequence[Mapping[str, Any]], caption: str = "") -> str:
    """
    A table with one column per key of the first row. Numbers are right-aligned, floats shown with three significant
    digits, None as a dash; a string is shown as it is, so format what needs a format (`"45.0%"`) before.
    """
    if not rows:
        return ""
    numeric = {key for key in rows[0] if all('class="number"' in _cell(row.get(key)) for row in rows)}
    head = "".join(
        f'<th scope="col"{" class=number" if key in numeric else ""}>{_text(str(key))}</th>' for key in rows[0]
    )
    body = "".join("<tr>" + "".join(_cell(row.get(key)) for key in rows[0]) + "</tr>\n" for row in rows)
    title = f"<caption>{_text(caption)}</caption>" if caption else ""
    return f'<div class="wide"><table>{title}<thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table></div>'


def figure(svg: str, caption: str = "") -> str:
    """An inline SVG drawing (from [`~collm.reporting.plots`]), which follows light and dark through `currentColor`."""
    svg = svg[svg.index("<svg") :]
    return f"<figure>{svg}<figcaption>{_text(caption)}</figcaption></figure>"


def token_view(view: TokenView) -> str:
    """The view as an HTML fragment: heading, prompt, tokens coloured by writer, legend and note."""
    names = [_text(name) for name in view.names]
    tokens = "".join(_token(token, names) for token in view.tokens)
    total = max(len(view.tokens), 1)
    legend = "".join(
        f'<li><span class="t s{_color(source)}">{name}</span> {view.deferred(source)} tokens '
        f"({view.deferred(source) / total:.0%})</li>"
        for source, name in enumerate(names)
    )
    if any(token.alternative is not None for token in view.tokens):
        legend += "<li><b>bold</b> the other model would have written something else</li>"
    title = f"<h3>{_text(view.title)}</h3>" if view.title else ""
    prompt = f'<div class="prompt">{_text(view.prompt)}</div>' if view.prompt else ""
    note = f'<p class="note">{_text(view.note)}</p>' if view.note else ""
    return (
        f'<section class="view">{title}{prompt}<div class="tokens" role="group" tabindex="0" '
        f'aria-label="Generated text; arrow keys move from token to token">{tokens}</div>'
        f'<ul class="legend">{legend}</ul>{note}</section>'
    )


def _token(token: Token, names: list[str]) -> str:
    writer = names[token.source] if token.source < len(names) else f"assistant {token.source}"
    facts = [f"written by {writer}"]
    number, opacity = "", ""
    if token.deferral is not None:
        facts.append(f"deferral probability {token.deferral:.3f}")
        number = f'<span class="n" aria-hidden="true">{_short(token.deferral)}</span>'
        # A base token's underline grows with d: how close it came to being deferred.
        opacity = f' style="--d:{token.deferral:.2f}"'
    if token.alternative is not None:
        same = token.alternative == token.text
        # With one assistant the other model has a name.
        other = names[1 - token.source] if len(names) == 2 else "the other model"
        facts.append(f"{other} would write {'the same' if same else _quoted(token.alternative)}")
        differs = "" if same else " differs"
    else:
        differs = ""
    line, newline, after = _text(token.text).partition("\n")  # the number stands at the end of the token's first line
    facts_text = " · ".join(facts).replace('"', "&quot;")
    return (
        f'<span class="t s{_color(token.source)}{differs}"{opacity} data-facts="{facts_text}">'
        f"{_whitespace(line)}{number}{_whitespace(newline + after)}</span>"
    )


def _color(source: int) -> int:
    return 0 if source == 0 else (source - 1) % 5 + 1


def _short(probability: float) -> str:
    return f"{probability:.2f}".lstrip("0") if probability < 0.995 else "1"


def _text(text: str) -> str:
    return escape(visible(text).encode("utf-8", "replace").decode("utf-8"), quote=True)


def _quoted(text: str) -> str:
    return "“" + _text(text).replace("\n", "↵").replace("\t", "→").replace(" ", "␣") + "”"


def _whitespace(html: str) -> str:
    """Marks white space with elements that only draw: what is selected and copied stays the text itself."""
    marks = {" ": '<i class="sp"> </i>', "\t": '<i class="tab">\t</i>', "\n": '<i class="nl"></i>\n'}
    return re.sub(r"[ \t\n]", lambda match: marks[match.group()], html)


def _cell(value: Any) -> str:
    if value is None:
        return '<td class="number">–</td>'
    if isinstance(value, float):
        return f'<td class="number">{value:.3g}</td>'
    kind = ' class="number"' if isinstance(value, int) or re.match(r"^[-+–±\d.,%\s\[\]]+$", str(value)) else ""
    return f"<td{kind}>{_text(str(value))}</td>"


# Colours: tints (light) and shades (dark) of Okabe and Ito's palette; the underline's style tells writers apart
# without colour.
STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --quiet: #59636e; --paper: #ffffff; --card: #f6f8fa;
  --line: #d1d9e0;
  --focus: #0969da; --s1: #ffd999; --s2: #b5dcf5; --s3: #a5e0cd; --s4: #f5ec9b; --s5: #ecc9de;
  --e1: #b35900; --e2: #0067a3; --e3: #00694d; --e4: #7a6a00; --e5: #9c3c78; --base: #59636e; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf3; --quiet: #9198a1; --paper: #0d1117; --card: #161b22;
  --line: #3d444d; --focus: #58a6ff; --s1: #6b4200; --s2: #0f4a70; --s3: #0b5340; --s4: #575000; --s5: #662c50;
  --e1: #ffb454; --e2: #7cc7f5; --e3: #5ad1ad; --e4: #f0e442; --e5: #e9a3ca; --base: #9198a1; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.5 system-ui, -apple-system, "Segoe UI",
  "Noto Sans", "DejaVu Sans", sans-serif; }
main { max-width: 68rem; margin: 0 auto; padding: 1.5rem 1rem 5rem; }
h1 { font-size: 1.6rem; line-height: 1.25; } h2 { font-size: 1.25rem; margin-top: 2.2rem; }
h3 { font-size: 1rem; margin: 0 0 .4rem; } h2, h3, caption { break-after: avoid; }
.switch { display: inline-block; padding: .3rem 0; color: var(--quiet); cursor: pointer; }
.view { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: .9rem 1rem;
  margin: 1rem 0; }
.prompt { white-space: pre-wrap; overflow-wrap: anywhere; color: var(--quiet); margin-bottom: .6rem; }
.tokens { white-space: pre-wrap; overflow-wrap: anywhere; tab-size: 4; line-height: 2;
  font-family: ui-monospace, "SF Mono", "Cascadia Mono", "DejaVu Sans Mono", Consolas, monospace; font-size: .95rem; }
.tokens:focus-visible, .tokens .t:focus { outline: 2px solid var(--focus); outline-offset: 1px; }
.t { padding: .12em 0; border-radius: 3px; -webkit-box-decoration-break: clone; box-decoration-break: clone; }
.t.s0 { border-bottom: 2px solid color-mix(in srgb, var(--base) calc(var(--d, 0) * 100%), transparent); }
.t.s1 { background: var(--s1); border-bottom: 2px solid var(--e1); }
.t.s2 { background: var(--s2); border-bottom: 2px dashed var(--e2); }
.t.s3 { background: var(--s3); border-bottom: 2px dotted var(--e3); }
.t.s4 { background: var(--s4); border-bottom: 4px double var(--e4); }
.t.s5 { background: var(--s5); border-bottom: 2px groove var(--e5); }
.tokens .t:hover { outline: 1px solid var(--ink); }
.tokens .differs:not(.s0) { font-weight: 700; }
.sp { background: radial-gradient(circle at center 60%, var(--quiet) .06em, transparent .09em); opacity: .55; }
.tab { position: relative; } .tab::before { content: "→"; position: absolute; left: .1em; opacity: .6; }
.nl::before { content: "↵"; opacity: .6; } .sp, .tab, .nl { font-style: normal; }
.n { display: none; font-size: .65em; vertical-align: super; padding: 0 .15em; color: var(--ink); opacity: .8;
  font-weight: 400; user-select: none; }
body:has(#numbers:checked) .n { display: inline; }
.legend { list-style: none; display: flex; flex-wrap: wrap; gap: .3rem 1.4rem; padding: 0; margin: .7rem 0 0;
  color: var(--quiet); font-size: .9rem; } .legend .t { color: var(--ink); padding: .1em .35em; }
.legend .s0 { border-bottom: 2px solid var(--line); }
.note { color: var(--quiet); font-size: .9rem; margin: .4rem 0 0; }
.wide { overflow-x: auto; } table { border-collapse: collapse; margin: 1rem 0; font-size: .92rem; }
caption { text-align: left; color: var(--quiet); padding-bottom: .4rem; }
th, td { padding: .3rem .55rem; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
th.number { text-align: right; }
td.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
thead th { border-bottom: 2px solid var(--line); }
figure { margin: 1rem 0; } figure svg { max-width: 100%; height: auto; color: var(--ink); }
figcaption { color: var(--quiet); font-size: .9rem; }
#tip { position: absolute; z-index: 2; max-width: min(26rem, 92vw); background: var(--ink); color: var(--paper);
  padding: .35rem .6rem; border-radius: 6px; font-size: .85rem; line-height: 1.4; pointer-events: none; }
.unseen { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); }
@media print { .switch, #tip { display: none; } .view { break-inside: avoid; }
  .t { -webkit-print-color-adjust: exact; print-color-adjust: exact; } .t:not(.s0) .n { display: inline; } }
"""

# One tooltip for hover and keyboard: tab into a text, then the arrow keys, Home and End move between tokens.
SCRIPT = """
const tip = document.getElementById("tip"), live = document.getElementById("live");
function show(token) {
  tip.textContent = token.dataset.facts; tip.hidden = false;
  const box = token.getClientRects()[0], size = tip.getBoundingClientRect();
  const left = Math.min(Math.max(8, box.left), document.documentElement.clientWidth - size.width - 8);
  const above = box.top - size.height - 6;
  tip.style.left = left + scrollX + "px";
  tip.style.top = (above > 0 ? above : box.bottom + 6) + scrollY + "px";
}
function hide() { tip.hidden = true; }
for (const text of document.querySelectorAll(".tokens")) {
  text.addEventListener("mouseover", e => { const t = e.target.closest(".tokens .t"); t ? show(t) : hide(); });
  text.addEventListener("mouseleave", hide);
  text.addEventListener("focusout", hide);
  text.addEventListener("keydown", e => {
    const all = [...text.querySelectorAll(".t")], at = all.indexOf(document.activeElement);
    const next = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: all.length - 1 }[e.key];
    if (e.key === "Escape") hide();
    if (next === undefined || next < 0 || next >= all.length) return;
    e.preventDefault();
    const token = all[next];
    token.tabIndex = -1; token.focus(); show(token);
    live.textContent = token.textContent.trim() + ": " + token.dataset.facts;
  });
}
"""
