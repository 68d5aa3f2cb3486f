"""Tokens to text, piece by piece, and where a stop string ends it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CONTEXT = 6  # tokens of the prompt
INCOMPLETE = "\N{REPLACEMENT CHARACTER}"  # what decoding half a character ends in


class Detokenizer:
    """
    Text of a growing list of tokens; never half a character, and no token is decoded more than a few times.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): the base's.
        skip_special_tokens (`bool`, *optional*, defaults to `True`): as in `decode`.
        prompt_ids (`list[int]`, *optional*): what the tokens continue. SentencePiece drops the space in front of a
            text's first token.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, skip_special_tokens: bool = True, prompt_ids: Sequence[int] = ()
    ):
        self.tokenizer, self.skip = tokenizer, skip_special_tokens
        self.ids: list[int] = list(prompt_ids[-CONTEXT:])
        while self.ids and self._decode(self.ids).startswith(INCOMPLETE):  # cut within a character
            del self.ids[0]
        # Text of [start, read) was returned before, or is the prompt's: the context of what follows.
        self.start, self.read = 0, len(self.ids)

    def add(self, token_ids: Sequence[int], final: bool = False) -> str:
        """The text that these tokens add; with `final`, half characters too."""
        self.ids.extend(token_ids)
        if self.read == len(self.ids):
            return ""
        before = self._decode(self.ids[self.start : self.read])
        text = self._decode(self.ids[self.start :])
        if text.endswith(INCOMPLETE) and not final:
            return ""
        self.start, self.read = self.read, len(self.ids)
        return text[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=self.skip, clean_up_tokenization_spaces=False)


class StopStrings:
    """Cuts text before the first stop string, holding back what may be the beginning of one."""

    def __init__(self, stops: Sequence[str]):
        self.stops = [s for s in stops if s]
        self.held = ""
        self.stopped: str | None = None

    def add(self, text: str, final: bool = False) -> str:
        """The text that may be shown now. After a stop string, `stopped` names it and nothing more is shown."""
        if self.stopped is not None:
            return ""
        text = self.held + text
        found = [(at, stop) for stop in self.stops if (at := text.find(stop)) >= 0]
        if found:
            at, self.stopped = min(found)
            self.held = ""
            return text[:at]
        keep = 0 if final else max((self._overlap(text, stop) for stop in self.stops), default=0)
        self.held = text[len(text) - keep :]
        return text[: len(text) - keep]

    @staticmethod
    def _overlap(text: str, stop: str) -> int:
        """Length of the longest end of `text` that is a beginning of `stop`."""
        return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if stop.startswith(text[-n:])), 0)
