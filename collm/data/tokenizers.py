"""Same tokenizer, or an error that says so: what one model writes, the other must be able to read as token ids."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING

from collm.errors import TokenizerMismatchError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_tokenizer(tokenizer: str | PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """The tokenizer itself, or the one of a Hub name or local folder; that of its base where a folder with a deferral
    head, and no more, has none.

    Raises:
        [`TokenizerMismatchError`]: there is no tokenizer under that name.
    """
    if not isinstance(tokenizer, str):
        return tokenizer
    from transformers import AutoTokenizer

    try:
        loaded = AutoTokenizer.from_pretrained(_base_without_tokenizer(Path(tokenizer)) or tokenizer)
    except (OSError, ValueError, KeyError) as error:
        raise TokenizerMismatchError(f'No tokenizer can be loaded from "{tokenizer}": {error}') from error
    if loaded.get_vocab().keys() <= set(loaded.all_special_tokens):  # what comes of a folder with a config.json alone
        raise TokenizerMismatchError(
            f'No tokenizer can be loaded from "{tokenizer}": it has none. Save the model\'s beside it.'
        )
    return loaded


def _base_without_tokenizer(folder: Path) -> str | None:
    if any((folder / file).exists() for file in ("tokenizer.json", "tokenizer_config.json")):
        return None
    config = folder / "config.json"
    deferral = json.loads(config.read_text(encoding="utf-8")).get("deferral") if config.is_file() else None
    return (deferral or {}).get("base_model")


def tokens_by_id(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    """The vocabulary as `{id: token}`, added tokens included, in the order of the ids."""
    return dict(sorted((index, token) for token, index in tokenizer.get_vocab().items()))


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 (hex) of the vocabulary in the order of its ids. Class, chat template and padding do not enter."""
    return hashlib.sha256(json.dumps(list(tokens_by_id(tokenizer).items())).encode()).hexdigest()


def check_same_tokenizer(
    base: str | PreTrainedTokenizerBase,
    assistant: str | PreTrainedTokenizerBase,
    base_name: str = "the base",
    assistant_name: str = "the assistant",
) -> None:
    """Check that every id means the same token in both vocabularies.

    Vocabularies are compared, not class names: a slow and a fast tokenizer of one model pass, two BPE tokenizers
    trained on different text do not. Chat templates may differ. One side may know *added* tokens (padding, tool
    markers) beyond the last id of the other: shared ids keep their meaning. The size of a model's embedding, which is
    often padded to a round number, plays no part.

    Args:
        base (`str` or `PreTrainedTokenizerBase`): the base's tokenizer, or where to load it from.
        assistant (`str` or `PreTrainedTokenizerBase`): the assistant's, likewise.
        base_name, assistant_name (`str`): how the error calls them; by default the names they were loaded from.

    Raises:
        [`TokenizerMismatchError`]: the first id (lowest) whose tokens differ, with both tokens.
    """
    base_name = base if isinstance(base, str) else base_name
    assistant_name = assistant if isinstance(assistant, str) else assistant_name
    base, assistant = load_tokenizer(base), load_tokenizer(assistant)
    ours, theirs = tokens_by_id(base), tokens_by_id(assistant)
    shared_end = min(max(ours, default=-1), max(theirs, default=-1))  # past it, one side has nothing to disagree with
    added = set(base.get_added_vocab()) | set(assistant.get_added_vocab())
    for index in sorted(ours.keys() | theirs.keys()):
        mine, other = ours.get(index), theirs.get(index)
        if mine == other or (index > shared_end and (mine or other) in added):
            continue
        raise TokenizerMismatchError(
            f"{base_name} and {assistant_name} have different vocabularies. The first difference is token id {index}: "
            f"{_show(mine)} in {base_name}, {_show(other)} in {assistant_name} "
            f"({len(ours)} and {len(theirs)} tokens). Deferral exchanges token ids, so both models need one tokenizer; "
            "choose an assistant of the base's family."
        )


def _show(token: str | None) -> str:
    return "nothing" if token is None else repr(token)
