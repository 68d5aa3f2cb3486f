"""Text in the terminal, each token coloured by its writer."""

from __future__ import annotations

import os
import sys

from collm.reporting.view import TokenView

# Black on the light colours of Okabe and Ito's palette (jfly.uni-koeln.de/color), told apart with any colour vision;
# both foreground and background are set, so that they read on dark and on light terminals. The base keeps the
# terminal's own.
STYLES = [f"\x1b[30;48;5;{color}m" for color in (214, 117, 79, 227, 182)]
RESET = "\x1b[0m"


def wants_color(stream=None) -> bool:
    """Whether to colour what goes to `stream` (standard output by default): never under `NO_COLOR` (no-color.org),
    always under `FORCE_COLOR`, else when it is a terminal that is not "dumb"."""
    if os.environ.get("NO_COLOR"):
        return False
    if os.environ.get("FORCE_COLOR"):
        return True
    return (stream or sys.stdout).isatty() and os.environ.get("TERM") != "dumb"


def color_tokens(view: TokenView, color: bool | None = None, legend: bool = True) -> str:
    """
    The view as text for a terminal.

    Args:
        view ([`TokenView`]):
            What to show; its title and prompt are not.
        color (`bool`, *optional*):
            True for ANSI colours, False for brackets around what an assistant wrote (`«...»`, with its number where
            there are several). By default what [`wants_color`] says of standard output.
        legend (`bool`, *optional*, defaults to `True`):
            Append a line that names the writers with their shares.

    Returns:
        `str`: lines without a trailing newline. Control characters are replaced by their pictures (a model must not be
        able to send commands to a terminal); a newline written by an assistant is shown as `↵` before the line ends.
    """
    color = wants_color() if color is None else color
    several = len(view.names) > 2
    parts, writer = [], 0
    for token in view.tokens:
        if token.source != writer:
            parts += [_close(writer, color), _open(token.source, color, several)]
            writer = token.source
        text = visible(token.text)
        if token.source and color:
            # Styles must not run over the end of a line: terminals would paint the rest of it.
            text = text.replace("\n", f"↵{RESET}\n{_open(writer, color, several)}")
        parts.append(text)
    parts.append(_close(writer, color))
    lines = "".join(parts)
    return f"{lines}\n{legend_line(view, color)}" if legend else lines


def legend_line(view: TokenView, color: bool | None = None) -> str:
    """One line that names each writer in its colour, with the share of the tokens it wrote."""
    color = wants_color() if color is None else color
    total = max(len(view.tokens), 1)
    entries = []
    for source, name in enumerate(view.names):
        count = view.deferred(source)
        label = f"{_open(source, color, len(view.names) > 2)}{visible(name)}{_close(source, color)}"
        entries.append(f"{label} {count} ({count / total:.0%})")
    return f"[{len(view.tokens)} tokens: {', '.join(entries)}]"


def visible(text: str) -> str:
    """`text` with control characters other than newline and tab replaced by their pictures (U+2400 and following)."""
    return "".join(_picture(c) if (ord(c) < 32 and c not in "\n\t") or 127 <= ord(c) < 160 else c for c in text)


def _picture(character: str) -> str:
    code = ord(character)
    return chr(0x2400 + code) if code < 32 else "␡" if code == 127 else "�"


def _open(source: int, color: bool, several: bool) -> str:
    if source == 0:
        return ""
    if color:
        return STYLES[(source - 1) % len(STYLES)]
    return f"«{source}:" if several else "«"


def _close(source: int, color: bool) -> str:
    if source == 0:
        return ""
    return RESET if color else "»"
