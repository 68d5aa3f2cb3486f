"""Which tokens get deferred: by kind, by position, and the tokens deferred most."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from collm.reporting.view import TokenView

KINDS = (
    "digit",
    "operator",
    "punctuation",
    "name",
    "connective",
    "function word",
    "word",
    "word part",
    "space",
    "special",
)

CONNECTIVES = set(
    "so then therefore thus hence because since but however although though while if unless when after before "
    "first second third next finally also moreover now let given and or instead otherwise until once still yet".split()
)
FUNCTION_WORDS = set(
    "a an the this that these those i you he she it we they me him her us them his hers its their our your my who "
    "whom which what there here is are was were be been being am do does did has have had will would can could shall "
    "should may might must not no of in on at by for with from to into per as than about each every all both any some "
    "more less how many much".split()
)


def token_kinds(texts: Sequence[str]) -> list[str]:
    """
    The kind (one of `KINDS`) of each token of a text, in order; `texts` join to the text.

    A name is a capitalised word that does not begin a sentence; a word part continues the word before it. Rules for
    English text: on other languages most tokens are "word" and "word part".
    """
    kinds = []
    before = "\n"  # the text so far, as much of it as the rules look at
    for text in texts:
        kinds.append(_kind(text, before))
        before = (before + text)[-40:]
    return kinds


def _kind(text: str, before: str) -> str:
    core = text.strip()
    if not core:
        return "space"
    if re.fullmatch(r"<[|\w/]+>|\[[A-Z]+\]", core):
        return "special"
    if re.fullmatch(r"[\d.,]*\d[\d.,]*", core):
        return "digit"
    if re.fullmatch(r"[-+*/=×÷<>^%−≈≤≥]+|\\(times|div|cdot|frac|sqrt|le|ge|pm)", core):
        return "operator"
    if not any(c.isalnum() for c in core):
        return "punctuation"
    if before[-1:].isalpha() and text[:1].isalpha():
        return "word part"
    word = core.lower().strip(".,:;!?'\"()")
    if word in CONNECTIVES:
        return "connective"
    if word in FUNCTION_WORDS:
        return "function word"
    starts_sentence = not before.strip() or before.rstrip(" ").endswith(("\n", ".", "!", "?", ":"))
    return "name" if core[:1].isupper() and not starts_sentence else "word"


@dataclass
class DeferralStatistics:
    """
    Counts over views: of all tokens and of the deferred ones.

    Attributes:
        kinds (`dict[str, tuple[int, int]]`): kind to (deferred, all), in the order of `KINDS`.
        positions (`list[tuple[int, int]]`): tenths of a text to (deferred, all).
        tokens (`dict[str, tuple[int, int]]`): token text to (deferred, all).
    """

    kinds: dict[str, tuple[int, int]]
    positions: list[tuple[int, int]]
    tokens: dict[str, tuple[int, int]] = field(repr=False)

    @classmethod
    def of(cls, views: Iterable[TokenView]) -> DeferralStatistics:
        """Counts the tokens of `views`."""
        kinds: Counter[str] = Counter()
        deferred_kinds: Counter[str] = Counter()
        tokens: Counter[str] = Counter()
        deferred_tokens: Counter[str] = Counter()
        positions, deferred_positions = [0] * 10, [0] * 10
        for view in views:
            texts = [token.text for token in view.tokens]
            for t, (token, kind) in enumerate(zip(view.tokens, token_kinds(texts), strict=True)):
                tenth = 10 * t // len(texts)
                asked = int(token.source > 0)
                kinds[kind] += 1
                tokens[token.text] += 1
                positions[tenth] += 1
                deferred_kinds[kind] += asked
                deferred_tokens[token.text] += asked
                deferred_positions[tenth] += asked
        return cls(
            kinds={kind: (deferred_kinds[kind], kinds[kind]) for kind in KINDS if kinds[kind]},
            positions=list(zip(deferred_positions, positions, strict=True)),
            tokens={text: (deferred_tokens[text], count) for text, count in tokens.most_common()},
        )

    def kind_rows(self) -> list[dict[str, Any]]:
        """Table rows by kind: its share of all tokens, of the deferred ones, and the share of it that is deferred."""
        everything = sum(count for _, count in self.kinds.values()) or 1
        asked = sum(deferred for deferred, _ in self.kinds.values()) or 1
        return [
            {
                "kind": kind,
                "tokens": count,
                "of all tokens": f"{count / everything:.1%}",
                "of deferred tokens": f"{deferred / asked:.1%}",
                "deferred": f"{deferred / count:.1%}",
            }
            for kind, (deferred, count) in self.kinds.items()
        ]

    def position_rows(self) -> list[dict[str, Any]]:
        """Table rows by tenth of the text."""
        return [
            {
                "position": f"{10 * i}–{10 * i + 10}%",
                "tokens": count,
                "deferred": f"{deferred / count:.1%}" if count else None,
            }
            for i, (deferred, count) in enumerate(self.positions)
        ]

    def token_rows(self, most: int = 15) -> list[dict[str, Any]]:
        """Table rows of the tokens deferred most often."""
        ranked = sorted(self.tokens.items(), key=lambda item: (-item[1][0], item[0]))
        return [
            {
                "token": "“" + text.replace("\n", "↵").replace(" ", "␣") + "”",
                "tokens": count,
                "times deferred": deferred,
                "deferred": f"{deferred / count:.1%}",
            }
            for text, (deferred, count) in ranked[:most]
            if deferred
        ]
