"""One conversation, one model: what it is given and what it has to write, as token ids."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from collm.data.tasks import TULU_CHAT_TEMPLATE
from collm.errors import ConfigurationError, DataFormatError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Piece = tuple[list[int], list[int]]  # context, targets


class Dropped(Exception):
    """A row that cannot be used; its message is the reason that the report gives."""


class HistoryRewritten(Exception):
    """Earlier turns read otherwise, as text or as tokens, than they did when they were written."""


@dataclass
class Chat:
    """How one model sees a conversation.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): tokenises; its chat template is the default.
        chat_template (`str`, *optional*): `"tulu"`, a Jinja file, or Jinja text.
        system_prompt (`str`, *optional*): takes the place of the conversation's system message, or comes first.

    Raises:
        [`ConfigurationError`]: a template file that is not there.
    """

    tokenizer: PreTrainedTokenizerBase
    chat_template: str | None = None
    system_prompt: str | None = None

    def __post_init__(self) -> None:
        self.template = _template(self.chat_template, self.tokenizer)
        added = self.tokenizer.added_tokens_decoder.items()
        special = {index for index, token in added if token.special} | set(self.tokenizer.all_special_ids)
        self._special = special - {self.tokenizer.unk_token_id}  # a word of the text that the vocabulary lacks
        self._endings = self.tokenizer.convert_ids_to_tokens(sorted(self._special))

    def pieces(self, messages: list[dict], turns: list[int]) -> list[Piece]:
        """Context and targets of the given turns (indices of messages); what follows the last one is left out."""
        if self.system_prompt is not None:
            rest = messages[messages[0]["role"] == "system" :]
            turns = [turn + 1 + len(rest) - len(messages) for turn in turns]
            messages = [message("system", self.system_prompt), *rest]
        whole = self.render(messages)
        cuts = [cut for turn in turns for cut in self._cuts(whole, messages, turn)]
        parts = encode_between(self.tokenizer, whole, cuts)
        marked = self._marked_by_template(messages, parts)
        pieces: list[Piece] = []
        between: list[int] = []  # what follows a turn's last target is context of the next turn
        for i, (context, said) in enumerate(zip(parts[::2], parts[1::2], strict=False)):
            start, end = marked[i] if marked else (0, self._end_of_turn(said))
            target = said[start:end]
            if i == len(turns) - 1 and end == len(said) and not (target and target[-1] in self._special):
                target = [*target, *_eos(self.tokenizer)]
            pieces.append((between + context + said[:start], target))
            between = said[end:]
        return pieces

    def _cuts(self, whole: str, messages: list[dict], turn: int) -> tuple[int, int]:
        """Characters of the whole text before which the turn begins and ends."""
        prompt = self.render(messages[:turn], add_generation_prompt=True)
        until = self.render(messages[: turn + 1])
        if not until.startswith(prompt):
            raise Dropped("the chat template's generation prompt is not a prefix of the conversation")
        # A turn may end otherwise at the end than in the middle, but only in special tokens and white space.
        ends = until
        while not whole.startswith(ends):
            shorter = next((ends.removesuffix(text) for text in self._endings if ends.endswith(text)), ends.rstrip())
            if shorter == ends or len(shorter) < len(prompt):
                raise HistoryRewritten
            ends = shorter
        return len(prompt), len(ends)

    def _end_of_turn(self, said: list[int]) -> int:
        """How many tokens of a turn are targets: up to the first special token after the last word; all if none is."""
        last = len(said)
        while last and (said[last - 1] in self._special or not self.tokenizer.decode(said[last - 1]).strip()):
            last -= 1
        return next((i + 1 for i in range(last, len(said)) if said[i] in self._special), len(said))

    def _marked_by_template(self, messages: list[dict], parts: list[list[int]]) -> list[tuple[int, int]] | None:
        """Each turn's first and last + 1 target, where the template marks them with `{% generation %}`."""
        if not self.tokenizer.is_fast or re.search(r"\{%-?\s*generation\b", self.template or "") is None:
            return None
        rendered = self.tokenizer.apply_chat_template(
            messages, chat_template=self.template, return_dict=True, return_assistant_tokens_mask=True
        )
        if rendered["input_ids"] != [token for part in parts for token in part]:
            return None  # tokenised part by part: the marks count other tokens
        mask, marks, position = rendered["assistant_masks"], [], 0
        for i, part in enumerate(parts):
            here = [t for t in range(len(part)) if mask[position + t]]
            if i % 2:
                marks.append((here[0], here[-1] + 1) if here else (0, 0))
            position += len(part)
        return marks

    def render(self, messages: list[dict], add_generation_prompt: bool = False) -> str:
        """The conversation as text.

        Raises:
            [`ConfigurationError`]: there is no chat template.
            [`DataFormatError`]: it cannot write a message's content.
        """
        from jinja2.exceptions import TemplateError

        if not self.template:
            raise ConfigurationError(
                "the tokenizer has no chat template, which messages need. Pass chat_template (a Jinja file, or "
                '"tulu"), or use prompt and completion.'
            )
        present = [{key: value for key, value in message.items() if value is not None} for message in messages]
        try:
            text = self.tokenizer.apply_chat_template(
                present, chat_template=self.template, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except TemplateError as error:
            raise Dropped(f"the chat template refuses the conversation ({error})") from error
        except TypeError as error:
            raise DataFormatError(f"the chat template cannot write a content that is no text ({error}).") from error
        parts = [said["content"] for said in present if isinstance(said.get("content"), list)]
        if any(str(content) in text for content in parts):
            raise DataFormatError("the chat template takes no content in parts: give each message's content as text.")
        return text


def _template(name: str | None, tokenizer: PreTrainedTokenizerBase) -> str | None:
    if name is None:
        try:
            return tokenizer.get_chat_template()
        except ValueError:  # transformers' way of saying that there is none
            return None
    if name == "tulu":
        return TULU_CHAT_TEMPLATE
    if "{" in name:
        return name
    if not Path(name).is_file():
        raise ConfigurationError(f'There is no chat template file "{name}"; it can also be "tulu" or Jinja text.')
    return Path(name).read_text(encoding="utf-8")


def message(role: str, content: str) -> dict[str, str]:
    """One turn of a conversation."""
    return {"role": role, "content": content}


def bos(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The token that this tokenizer begins a text with, if it does."""
    return [token for token in tokenizer("").input_ids if token == tokenizer.bos_token_id]


def _eos(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of the text alone."""
    return tokenizer(text, add_special_tokens=False).input_ids


def encode_between(tokenizer: PreTrainedTokenizerBase, text: str, cuts: list[int]) -> list[list[int]]:
    """Tokens of the text, in parts that end at the cuts (positions in characters) and the rest.

    Where a token of the whole would reach across a cut, prompt and answer are tokenised one by one, as generation has
    them. A row whose text that changes is dropped.

    Raises:
        `HistoryRewritten`: there are several turns, so that one turn's tokens depend on whether another follows.
    """
    whole = encode(tokenizer, text)
    ends = [0]
    for cut in cuts:
        prefix = encode(tokenizer, text[:cut])
        if whole[: len(prefix)] != prefix:
            break
        ends.append(len(prefix))
    else:
        return [whole[start:end] for start, end in zip(ends, [*ends[1:], None], strict=True)]
    if len(cuts) > 2:
        raise HistoryRewritten
    parts = [encode(tokenizer, text[start:end]) for start, end in zip([0, *cuts], [*cuts, None], strict=True)]
    if tokenizer.decode([token for part in parts for token in part]) != tokenizer.decode(whole):
        raise Dropped("the prompt's tokens are not a prefix of the whole's")
    return parts
