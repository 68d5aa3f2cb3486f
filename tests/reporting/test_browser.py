"""The page in a real browser: what hover and keyboard show. Needs Chromium in the path."""

from __future__ import annotations

import re
import shutil
import subprocess

import pytest

from collm.reporting import Token, TokenView, token_view, write_page

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")]


def dom_after(tmp_path, script: str) -> str:
    """The page's document after `script` ran in it."""
    view = TokenView([Token("She ", 0, 0.1, "He"), Token("has", 1, 0.75, "had"), Token(" 4", 1, 0.9, " 4")])
    path = write_page(tmp_path / "page.html", "title", token_view(view))
    html = path.read_text(encoding="utf-8")
    path.write_text(html.replace("</body>", f"<script>{script}</script></body>"), encoding="utf-8")
    command = [
        CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
        f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", path.as_uri(),
    ]  # fmt: skip
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


def tip(dom: str) -> str:
    found = re.search(r'<div id="tip"([^>]*)>([^<]*)</div>', dom)
    assert found is not None
    return "" if "hidden" in found.group(1) else found.group(2)


def test_hover_shows_writer_probability_and_the_other_models_token(tmp_path):
    over = 'new MouseEvent("mouseover", {bubbles: true})'
    dom = dom_after(tmp_path, f'document.querySelectorAll(".tokens .t")[1].dispatchEvent({over})')
    assert tip(dom) == "written by assistant · deferral probability 0.750 · base would write “had”"


def test_arrow_keys_move_from_token_to_token_and_are_announced(tmp_path):
    press = (
        'const text = document.querySelector(".tokens"); text.focus(); const press = key => document.activeElement'
        '.dispatchEvent(new KeyboardEvent("keydown", {key, bubbles: true}));'
    )
    dom = dom_after(tmp_path, press + 'press("ArrowRight"); press("End"); press("ArrowLeft");')
    assert tip(dom).startswith("written by assistant · deferral probability 0.750")
    assert re.search(r'id="live"[^>]*>has\S*: written by assistant', dom)
    dom = dom_after(tmp_path, press + 'press("Home"); press("Escape");')
    assert tip(dom) == ""


def test_the_switch_writes_probabilities_into_the_text(tmp_path):
    shown = 'document.title = getComputedStyle(document.querySelector(".n")).display'
    assert "<title>none</title>" in dom_after(tmp_path, shown)
    on = 'document.getElementById("numbers").checked = true;'
    assert "<title>inline</title>" in dom_after(tmp_path, on + shown)
