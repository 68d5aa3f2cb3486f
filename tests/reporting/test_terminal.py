from __future__ import annotations

import io
import re

from collm.reporting import Token, TokenView, color_tokens
from collm.reporting.terminal import wants_color


def view(names=("base", "big")) -> TokenView:
    return TokenView([Token("a ", 0), Token("b", 1), Token("\nc", 1), Token(" d\x1b[2J", 0)], names=list(names))


def test_without_color_brackets_mark_what_the_assistant_wrote():
    text = color_tokens(view(), color=False)
    assert text == "a «b\nc» d␛[2J\n[4 tokens: base 2 (50%), «big» 2 (50%)]"


def test_several_assistants_are_numbered():
    several = TokenView([Token("a", 1), Token("b", 2)], names=["base", "math", "law"])
    assert color_tokens(several, color=False, legend=False) == "«1:a»«2:b»"


def test_colored_text_is_the_text_and_styles_end_before_the_line():
    text = color_tokens(view(), color=True, legend=False)
    assert re.sub(r"\x1b\[[\d;]*m", "", text).replace("↵\n", "\n") == "a b\nc d␛[2J"
    for line in text.split("\n"):
        styles = re.findall(r"\x1b\[([\d;]*)m", line)
        assert not styles or styles[-1] == "0"


def test_a_text_that_ends_with_the_assistant_closes_its_style():
    assert color_tokens(TokenView([Token("a", 1)]), color=True, legend=False).endswith("\x1b[0m")


def test_no_color_wins_over_everything(monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert wants_color(io.StringIO())
    monkeypatch.setenv("NO_COLOR", "1")
    assert not wants_color(io.StringIO())
    monkeypatch.delenv("NO_COLOR")
    monkeypatch.delenv("FORCE_COLOR")
    assert not wants_color(io.StringIO())


def test_empty_text():
    assert color_tokens(TokenView([]), color=False) == "\n[0 tokens: base 0 (0%), «assistant» 0 (0%)]"
