"""From text to token ids and labels: conversations, prompts with completions, and ready-made tasks.

A row becomes *pieces*, one per turn: context tokens that a model is given, then target tokens that it has to write.

1. Render the conversation; cut the text where the assistant is asked (the chat template's generation prompt ends there)
   and where its turn ends.
2. Tokenise. The prompt's tokens must be exactly a prefix of the whole's, for that is what generation starts from.
3. End each turn with the token that ends it for the model; append the end-of-sequence token where the format has none.
4. Put the pieces together as `input_ids` and `labels` (-100 = context), cut at `max_length`, count what was lost.

An assistant that reads a prompt of its own gets the same targets between contexts of its own.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import TYPE_CHECKING

import numpy as np

from collm.data.chat import Chat, Dropped, HistoryRewritten, Piece, bos, encode, encode_between, message
from collm.data.tasks import Row, get_task, tasks_for_columns
from collm.errors import ConfigurationError, DataFormatError, did_you_mean

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

FORMATS = {"messages": ("messages",), "completion": ("prompt", "completion"), "tokens": ("input_ids", "labels")}
_ALLOWED = ", or ".join(" and ".join(needed) for needed in FORMATS.values())
# column -> what it stands beside
OWN_CONTEXTS = {"assistant_messages": "messages", "assistant_prompts": "a prompt that is text"}

View = list[Piece] | None  # what one model sees of a sequence; None for an assistant that sees what the base sees


@dataclass
class FormatReport:
    """What became of the rows.

    Attributes:
        rows (`int`): rows read.
        sequences (`int`): sequences kept; a conversation whose template rewrites its history gives one per turn.
        truncated (`int`): sequences among them that lost targets to `max_length`.
        dropped (`dict[str, int]`): reason -> how many were left out.
        tokens, target_tokens (`int`): over the sequences kept.
    """

    rows: int = 0
    sequences: int = 0
    truncated: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    tokens: int = 0
    target_tokens: int = 0

    def __str__(self) -> str:
        lost = "".join(f"; {count} dropped: {reason}" for reason, count in sorted(self.dropped.items()))
        return (
            f"{self.rows} rows: {self.sequences} sequences of {self.tokens} tokens, {self.target_tokens} of them "
            f"targets; {self.truncated} truncated{lost}"
        )


def format_rows(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    task: str | Callable[[Row], Row] | None = None,
    max_length: int | None = None,
    chat_template: str | None = None,
    assistant_chats: Sequence[Chat | None] = (),
) -> tuple[Dataset, FormatReport]:
    """Token ids and labels for every row.

    A row has one of

    - `messages`: a list of `{"role", "content"}`; every turn of the role "assistant" is a target;
    - `prompt` and `completion`: strings (taken as they are, no chat template; the end-of-sequence token is the last
      target), or lists of messages (the assistant's turns of `completion` are the targets);
    - `input_ids` and `labels`: formatted already;
    - the columns of `task`. A task's prompt and completion become a conversation where there is a chat template;
      elsewhere a line break separates them.

    A row may carry contexts of its own for the assistants, one entry per assistant, null for the shared one:
    `assistant_messages` (beside `messages`) or `assistant_prompts` (beside a `prompt` string).

    Args:
        dataset (`datasets.Dataset`): from [`~data.reading.read_rows`].
        tokenizer (`PreTrainedTokenizerBase`): the base's.
        task (`str` or callable, *optional*): a name of `TASKS`, or a function from a row to a row of the kinds above.
        max_length (`int`, *optional*): sequences are cut to this many tokens.
        chat_template (`str`, *optional*): instead of the tokenizer's own: `"tulu"`, a Jinja file, or Jinja text.
        assistant_chats (sequence of [`Chat`], *optional*):
            One entry per assistant: how it sees conversations, `None` for as the base does. Without any, contexts that
            rows carry for assistants are not read.

    Returns:
        A data set with `input_ids` (int32) and `labels` (int64), and the [`FormatReport`]. Where an assistant reads
        something of its own, also `assistant_input_ids` and `assistant_labels`: K sequences per row, empty = shared.

    Raises:
        [`DataFormatError`]: columns that fit no format, a broken row (with its number), nothing left.
        [`ConfigurationError`]: unknown task, no chat template for `messages`, a `max_length` below 1.
    """
    from datasets import Dataset, Features, List, Value
    from tqdm.auto import tqdm

    if max_length is not None and max_length < 1:
        raise ConfigurationError(f"max_length is {max_length}; it is a number of tokens, at least 1.")
    make_row = get_task(task) if task is not None else None
    if make_row is None:
        _check_columns(dataset.column_names)
    base = Chat(tokenizer, chat_template)
    report, dropped = FormatReport(rows=len(dataset)), Counter[str]()
    ids: list[np.ndarray] = []  # arrays: a list of Python integers takes nine times the memory
    labels: list[np.ndarray] = []
    own_ids: list[list[list[int]]] = []
    own_labels: list[list[list[int]]] = []
    for number, row in enumerate(tqdm(dataset, desc="formatting", unit="row", disable=None)):
        try:
            row = _task_row(make_row, row, base) if make_row else row
            views = list(_row_pieces(row, base, assistant_chats))
        except Dropped as reason:
            dropped[str(reason)] += 1
            continue
        except (DataFormatError, ConfigurationError) as error:
            raise type(error)(f"Row {number}: {error}") from error
        for shared, *own in views:
            assert shared is not None
            whole = sum(len(target) for _, target in shared)
            kept = sum(label != -100 for label in _assemble(shared)[1][:max_length])
            if kept == 0:
                dropped["no target token" + (f" within max_length={max_length}" if whole else "")] += 1
                continue
            report.truncated += kept < whole
            sequences = [_assemble(pieces, kept) if pieces else ([], []) for pieces in (shared, *own)]
            ids.append(np.array(sequences[0][0], np.int32))
            labels.append(np.array(sequences[0][1], np.int64))
            own_ids.append([sequence[0] for sequence in sequences[1:]])
            own_labels.append([sequence[1] for sequence in sequences[1:]])
            report.tokens += len(ids[-1])
            report.target_tokens += kept
    report.sequences, report.dropped = len(ids), dict(dropped)
    if not ids:
        raise DataFormatError(f"No row is left to train on. {report}.")

    columns: dict[str, list] = {"input_ids": ids, "labels": labels}
    features = {"input_ids": List(Value("int32")), "labels": List(Value("int64"))}
    if any(any(row) for row in own_ids):
        columns |= {"assistant_input_ids": own_ids, "assistant_labels": own_labels}
        features |= {"assistant_input_ids": List(features["input_ids"]), "assistant_labels": List(features["labels"])}
    return Dataset.from_dict(columns, Features(features)), report


def _check_columns(columns: list[str]) -> None:
    if any(set(needed) <= set(columns) for needed in FORMATS.values()):
        return
    if columns == ["bioasq"]:
        raise DataFormatError('This is a file of the BioASQ challenge: ask for the task "bioasq".')
    tasks = tasks_for_columns(columns)
    known = [name for needed in FORMATS.values() for name in needed]
    missing = [name for name in known if name not in columns]
    hint = next((hint for column in columns if column not in known and (hint := did_you_mean(column, missing))), "")
    hint = f" These are the columns of the task {' or '.join(tasks)}." if tasks else hint
    raise DataFormatError(f"Rows have the columns {', '.join(columns)}; they need {_ALLOWED}, or a task.{hint}")


def _task_row(task: Callable[[Row], Row], row: Row, chat: Chat) -> Row:
    row = json.loads(row["bioasq"]) if "bioasq" in row else row
    own = {name: row[name] for name in OWN_CONTEXTS if row.get(name)}
    try:
        made = task(row)
    except KeyError as error:
        raise DataFormatError(f"the task needs the column {error}; there are {', '.join(row)}.") from error
    except (AttributeError, IndexError, TypeError) as error:
        raise DataFormatError(f"the task fails ({type(error).__name__}: {error}).") from error
    if not isinstance(made, dict) or not any(set(needed) <= made.keys() for needed in FORMATS.values()):
        returned = ", ".join(made) if isinstance(made, dict) else repr(made)
        raise DataFormatError(f"the task returned {returned}; it has to return {_ALLOWED}.")
    if isinstance(made.get("prompt"), str) and isinstance(made.get("completion"), str):
        if not made["completion"]:
            raise Dropped("empty completion")
        if chat.template:
            made = {"messages": [message("user", made["prompt"]), message("assistant", made["completion"])]}
        else:
            made = {**made, "prompt": made["prompt"] + "\n"}
    return {**own, **made}


# ---- Pieces ---------------------------------------------------------------------------------------------------------


def _row_pieces(row: Row, base: Chat, chats: Sequence[Chat | None]) -> Iterator[list[View]]:
    """For each sequence of a row: the base's view, then each assistant's."""
    count = len(chats)
    prompt, completion = row.get("prompt"), row.get("completion")
    if row.get("messages") is not None:
        own_messages = _own(row, "assistant_messages", count)
        yield from _conversation(row["messages"], 0, own_messages, base, chats)
    elif prompt is not None and completion is not None:
        if isinstance(prompt, list) and isinstance(completion, list):
            yield from _conversation(prompt + completion, len(prompt), _own(row, None, count), base, chats)
        elif isinstance(prompt, str) and isinstance(completion, str):
            prompts = _own(row, "assistant_prompts", count)
            own: list[View] = [None if text is None else [(_prompt(base.tokenizer, text), [])] for text in prompts]
            yield _with_shared_targets(_completion(base.tokenizer, prompt, completion), own)
        else:
            raise DataFormatError(
                f"prompt has the type {type(prompt).__name__} and completion {type(completion).__name__}; both have to "
                "be text, or both lists of messages."
            )
    elif row.get("input_ids") is not None and row.get("labels") is not None:
        own_ids, own_labels = (_own(row, name, count) for name in ("assistant_input_ids", "assistant_labels"))
        own = [_token_pieces(ids, marks) if ids else None for ids, marks in zip(own_ids, own_labels, strict=True)]
        yield _with_shared_targets(_token_pieces(row["input_ids"], row["labels"]), own)
    else:
        raise Dropped("empty (null) row")


def _own(row: Row, name: str | None, count: int) -> list:
    """What a column has for each assistant; contexts in another column, which nobody would read, are refused."""
    for other, beside in OWN_CONTEXTS.items():
        if count and other != name and any(row.get(other) or []):
            raise DataFormatError(
                f"{other} is read beside {beside} alone (a chat template makes messages of a task's prompt)."
            )
    values = (count and name and row.get(name)) or [None] * count
    if len(values) != count:
        raise DataFormatError(f"{name} has {len(values)} entries; it needs one for each of the {count} assistants.")
    return values


def _conversation(
    messages: list[dict], first: int, own_messages: list, base: Chat, chats: Sequence[Chat | None]
) -> Iterator[list[View]]:
    """One sequence, or one per turn where a template rewrites history; turns from message `first` on are targets."""
    seen = [(base, messages)]
    for chat, own in zip(chats, own_messages, strict=True):
        seen.append((chat or base, own or messages) if chat or own else (base, []))
    turns = [_assistant_turns(said, first if said is messages else 0) for _, said in seen]
    if not turns[0]:
        raise Dropped("no assistant turn")
    if any(found and len(found) != len(turns[0]) for found in turns):
        raise DataFormatError(f"an assistant's own messages must have the {len(turns[0])} assistant turns of the row.")
    try:
        views = [chat.pieces(said, found) if said else None for (chat, said), found in zip(seen, turns, strict=True)]
        yield _with_shared_targets(views[0], views[1:])
    except HistoryRewritten:
        for turn in range(len(turns[0])):
            views = [
                chat.pieces(said[: found[turn] + 1], [found[turn]]) if said else None
                for (chat, said), found in zip(seen, turns, strict=True)
            ]
            yield _with_shared_targets(views[0], views[1:])


def _assistant_turns(messages: list[dict], first: int) -> list[int]:
    """Messages that are targets; one that opens the conversation is not, since nobody asked for it."""
    for said in messages if isinstance(messages, list) else [messages]:
        if not isinstance(said, dict) or not isinstance(said.get("role"), str) or "content" not in said:
            raise DataFormatError(f'a message is {said!r}; it has to be {{"role": ..., "content": ...}}.')
    return [i for i, said in enumerate(messages) if said["role"] == "assistant" and i >= max(first, 1)]


def _with_shared_targets(base: View, own: Sequence[View]) -> list[View]:
    """The base's targets between each assistant's own contexts."""
    assert base is not None
    if base and not base[0][0]:  # nothing predicts the first token of a sequence: it is context
        context, targets = base[0][1][:1], base[0][1][1:]
        base = [(context, targets), *base[1:]]
        own = [pieces and [(pieces[0][0] + context, []), *pieces[1:]] for pieces in own]
    views: list[View] = [base]
    for pieces in own:
        if pieces is not None and not pieces[0][0]:
            raise DataFormatError("an assistant's own prompt is empty; it needs at least one token to predict from.")
        if pieces is not None and len(pieces) != len(base):
            raise DataFormatError(
                f"an assistant's own sequence has {len(pieces)} runs of targets; the row {len(base)}."
            )
        views.append(pieces and [(context, targets) for (context, _), (_, targets) in zip(pieces, base, strict=True)])
    return views


def _assemble(pieces: list[Piece], targets: int | None = None) -> tuple[list[int], list[int]]:
    """Token ids and labels, up to and including the target number `targets` (all of them by default)."""
    input_ids: list[int] = []
    labels: list[int] = []
    for context, target in pieces:
        if targets == 0:
            break
        target = target[:targets]
        targets = None if targets is None else targets - len(target)
        input_ids += context + target
        labels += [-100] * len(context) + target
    return input_ids, labels


def _token_pieces(input_ids: list[int], labels: list[int]) -> list[Piece]:
    if len(input_ids) != len(labels):
        raise DataFormatError(f"{len(input_ids)} input_ids but {len(labels)} labels.")
    wrong = next((t for t, (i, l) in enumerate(zip(input_ids, labels, strict=True)) if l not in (-100, i)), None)
    if wrong is not None:
        raise DataFormatError(
            f"labels[{wrong}] is {labels[wrong]} and input_ids[{wrong}] is {input_ids[wrong]}: a label is the token at "
            "its own position (the model shifts them), or -100."
        )
    runs = [list(run) for _, run in groupby(zip(input_ids, labels, strict=True), key=lambda pair: pair[1] != -100)]
    tokens = [[token for token, _ in run] for run in runs]
    if runs and runs[0][0][1] != -100:
        tokens = [[], *tokens]
    return list(zip(tokens[::2], tokens[1::2], strict=False))


def _completion(tokenizer: PreTrainedTokenizerBase, prompt: str, completion: str) -> list[Piece]:
    if not completion:
        raise Dropped("empty completion")
    first, target = encode_between(tokenizer, prompt + completion, [len(prompt)])
    eos = tokenizer.eos_token_id
    return [(bos(tokenizer) + first, target if eos is None or target[-1] == eos else [*target, eos])]


def _prompt(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return bos(tokenizer) + encode(tokenizer, text)
