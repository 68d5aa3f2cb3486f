from __future__ import annotations

import re
from html.parser import HTMLParser

from collm.reporting import Token, TokenView, page, table, token_view, write_page

TEXT = 'a <b>&amp;</b> "q"\n\tx  y\x1b[31m'


def view(**details) -> TokenView:
    tokens = [Token('a <b>&amp;</b> "q"', 0, 0.1, "a"), Token("\n\tx", 1, 0.9, "\n"), Token("  y\x1b[31m", 1, 0.9962)]
    return TokenView(tokens, **details)


class Text(HTMLParser):
    """Collects the visible text inside the element of class "tokens" and checks that tags are balanced."""

    def __init__(self) -> None:
        super().__init__()
        self.stack: list[str] = []
        self.text = ""
        self.depth: int | None = None
        self.hidden: int | None = None

    def handle_starttag(self, tag, attrs):
        if tag in ("meta", "link", "input"):
            return
        self.stack.append(tag)
        classes = dict(attrs).get("class", "")
        if classes == "tokens":
            self.depth = len(self.stack)
        if classes == "n":
            self.hidden = len(self.stack)

    def handle_endtag(self, tag):
        assert self.stack[-1] == tag
        if self.depth == len(self.stack):
            self.depth = None
        if self.hidden == len(self.stack):
            self.hidden = None
        self.stack.pop()

    def handle_data(self, data):
        if self.depth is not None and self.hidden is None:
            self.text += data


def test_text_is_faithful_escaped_and_the_page_well_formed():
    parser = Text()
    parser.feed(page("A <title>", token_view(view(title="t<", prompt="p<", note="n<"))))
    assert parser.stack == []
    assert parser.text == TEXT.replace("\x1b", "␛")


def test_page_needs_no_other_resource():
    text = page("x", token_view(view()), table([{"a": 1}]))
    assert re.findall(r"""(?:src|href)\s*=\s*["']?([^"'>]*)""", text) == ["data:,"]
    assert "@import" not in text
    assert "url(" not in text


def test_facts_say_writer_probability_and_alternative():
    facts = re.findall(r'data-facts="([^"]*)"', token_view(view(names=["small", "big"])))
    assert facts[0] == "written by small · deferral probability 0.100 · big would write “a”"
    assert facts[1] == "written by big · deferral probability 0.900 · small would write “↵”"
    assert facts[2] == "written by big · deferral probability 0.996"


def test_alternative_equal_to_the_token_is_called_the_same():
    text = token_view(TokenView([Token("4", 1, 0.7, "4")]))
    assert "base would write the same" in text
    assert "differs" not in text


def test_quotes_in_an_alternative_do_not_end_the_attribute():
    text = token_view(TokenView([Token("4", 1, 0.7, '" onmouseover="alert(1)')]))
    assert 'onmouseover="alert' not in text


def test_table_shows_missing_values_and_escapes():
    text = table([{"a": "<i>", "b": 0.12345}, {"a": "50.0%", "b": None}], caption="c & d")
    assert "&lt;i&gt;" in text
    assert "0.123" in text
    assert "–" in text
    assert "c &amp; d" in text
    assert table([]) == ""


def test_write_page_creates_the_folder(tmp_path):
    path = write_page(tmp_path / "new" / "page.html", "t", token_view(TokenView([Token("\ud800", 0)])))
    assert path.read_text(encoding="utf-8").startswith("<!doctype html>")
