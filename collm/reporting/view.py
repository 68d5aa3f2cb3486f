"""The one data structure behind every report: a text as tokens, with who wrote each and how close the decision was."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Token:
    """
    One generated token.

    Args:
        text (`str`):
            What the token adds to the text; the texts of a view join to exactly the generated text.
        source (`int`):
            Who wrote it: 0 the base, k assistant k.
        deferral (`float`, *optional*):
            The deferral probability d_t of the decision, between 0 and 1.
        alternative (`str`, *optional*):
            What the model that did not write would have written here.
    """

    text: str
    source: int
    deferral: float | None = None
    alternative: str | None = None


@dataclass
class TokenView:
    """
    A generated text with its writers.

    Args:
        tokens (`list[Token]`):
            The generated tokens, without padding.
        names (`list[str]`, *optional*, defaults to `["base", "assistant"]`):
            `names[0]` is the base, `names[k]` assistant k.
        title (`str`, *optional*):
            A heading, such as the question asked.
        prompt (`str`, *optional*):
            The text before the tokens, shown without colour.
        note (`str`, *optional*):
            One line under the text, such as "correct answer: 42".
    """

    tokens: list[Token]
    names: list[str] = field(default_factory=lambda: ["base", "assistant"])
    title: str = ""
    prompt: str = ""
    note: str = ""

    @classmethod
    def from_ids(
        cls,
        tokenizer: Any,
        ids: Sequence[int],
        source: Sequence[int],
        deferral_probs: Sequence[float] | None = None,
        alternatives: Sequence[int | None] | None = None,
        **details: Any,
    ) -> TokenView:
        """
        Builds a view from one row of a `CollaborativeOutput`: its new token ids, `source` and `deferral_probs`
        (tensors or lists of equal length). Positions whose source is -1 (padding) are left out; `alternatives` are
        token ids, None where unknown. `details` are the fields of [`TokenView`].
        """
        keep = [t for t, writer in enumerate(source) if int(writer) >= 0]
        written = [int(ids[t]) for t in keep]
        tokens = []
        for n, (text, t) in enumerate(zip(token_texts(tokenizer, written), keep, strict=True)):
            deferral = None if deferral_probs is None else float(deferral_probs[t])
            other = None if alternatives is None else alternatives[t]
            alternative = None if other is None else text
            if other is not None and int(other) != written[n]:  # as it would read behind the same tokens
                alternative = token_texts(tokenizer, [*written[max(0, n - 8) : n], int(other)])[-1]
            tokens.append(Token(text, int(source[t]), deferral, alternative))
        return cls(tokens, **details)

    @property
    def text(self) -> str:
        """`str`: the generated text."""
        return "".join(token.text for token in self.tokens)

    def deferred(self, assistant: int | None = None) -> int:
        """Number of tokens written by `assistant` (by any assistant when None)."""
        return sum(t.source > 0 if assistant is None else t.source == assistant for t in self.tokens)


def token_texts(tokenizer: Any, ids: Sequence[int], window: int = 8) -> list[str]:
    """
    What each token adds to the text, so that the pieces join to the decoded whole.

    A token's own decoding is not enough: byte-level tokens can end in the middle of a character (the piece is then
    empty and the token that completes the character carries it), and SentencePiece drops a leading space at the start
    of a text. Each token is therefore decoded behind up to `window` tokens before it, and the common beginning is cut
    off.
    """
    pieces: list[str] = []
    start = done = 0  # tokens from `start` are context, those before `done` have been written out
    for t in range(len(ids)):
        before = tokenizer.decode(ids[start:done], clean_up_tokenization_spaces=False)
        after = tokenizer.decode(ids[start : t + 1], clean_up_tokenization_spaces=False)
        if after.endswith("�") and t + 1 < len(ids) and t - done < 4:  # an incomplete character: wait for its rest
            pieces.append("")
            continue
        pieces.append(after[len(before) :])
        done = t + 1
        if done - start > window:
            start = done - window // 2
            # never cut the context inside a character
            while start < done and tokenizer.decode(ids[start:done]).startswith("�"):
                start += 1
    return pieces
