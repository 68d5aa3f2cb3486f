"""Ready-made formats: a row of a known data set becomes a prompt and its completion, or a conversation."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import Any

from collm.errors import ConfigurationError, DataFormatError, did_you_mean

Row = dict[str, Any]

# The format of Tulu (open-instruct), the paper's: for tokenizers without a chat template, or asked for by its name.
TULU_CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}"
    "{{ '<|assistant|>\\n' }}{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}{{ '\\n' }}"
    "{% else %}"
    "{{ '<|' + message['role'] + '|>\\n' + message['content'] + '\\n' }}"
    "{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)

_BIOASQ_INSTRUCTIONS = {
    "yesno": 'Answer "yes" or "no", then explain.',
    "factoid": "Give the answer in a few words, then explain.",
    "list": "List the answers, one per line, then explain.",
    "summary": "Answer in a short paragraph.",
}


def gsm8k(row: Row) -> Row:
    """GSM8K (Cobbe et al., 2021): `question`, `answer`, without the calculator's `<<48/2=24>>` in the solutions."""
    question, answer = _text(row, "question"), _text(row, "answer")
    return {"prompt": question, "completion": answer and re.sub(r"<<[^<>]*>>", "", answer).strip()}


def math(row: Row) -> Row:
    r"""MATH (Hendrycks et al., 2021): `problem`, `solution`, the final answer in `\boxed{}`."""
    return {"prompt": _text(row, "problem"), "completion": _text(row, "solution")}


def _text(row: Row, column: str) -> str | None:
    """What a column says, null included."""
    text = row[column]
    if text is not None and not isinstance(text, str):
        raise DataFormatError(f"{column} is {text!r}; it has to be text.")
    return text and text.strip()


def tulu(row: Row) -> Row:
    """Conversations in `messages`, as in the Tulu mixtures; other columns (`dataset`, `id`) are left alone."""
    return {"messages": row["messages"]}


def bioasq(row: Row, snippets: bool = False) -> Row:
    """One question of the BioASQ challenge (task B): the exact answer first, then the ideal answer in prose.

    Args:
        row: `type` ("yesno", "factoid", "list" or "summary"), `body`, `ideal_answer` (a string, or several of which the
            first is taken), `exact_answer` ("yes" or "no"; names or lists of synonyms, of which the first is taken).
        snippets (`bool`): put the question's text snippets before it; the paper asks without.

    Raises:
        [`DataFormatError`]: a type that the challenge does not have.
    """
    kind = row["type"]
    if kind not in _BIOASQ_INSTRUCTIONS:
        allowed = ", ".join(_BIOASQ_INSTRUCTIONS)
        hint = did_you_mean(str(kind), _BIOASQ_INSTRUCTIONS)
        raise DataFormatError(f'BioASQ has no type "{kind}"; it has {allowed}.{hint}')
    body = _text(row, "body")
    prompt = body and f"{body}\n{_BIOASQ_INSTRUCTIONS[kind]}"
    if prompt and snippets and row.get("snippets"):
        prompt = "\n".join(snippet["text"].strip() for snippet in row["snippets"]) + f"\n\n{prompt}"
    exact = row.get("exact_answer") or []
    names = [_first(name) for name in ([exact] if isinstance(exact, str) else exact)]
    head = {
        "yesno": "".join(names[:1]).lower(),
        "factoid": "".join(names[:1]),
        "list": "\n".join(f"- {name}" for name in names),
        "summary": "",
    }[kind]
    completion = "\n".join(part for part in (head, _first(row.get("ideal_answer") or "")) if part)
    return {"prompt": prompt, "completion": completion}


def _first(answer: str | list) -> str:
    """The first of several phrasings, however deeply a release of the challenge nests them."""
    while not isinstance(answer, str):
        answer = answer[0] if answer else ""
    return answer.strip()


# name -> (function, columns that it reads); a user's own task is any function of a row
TASKS: dict[str, tuple[Callable[[Row], Row], tuple[str, ...]]] = {
    "gsm8k": (gsm8k, ("question", "answer")),
    "math": (math, ("problem", "solution")),
    "tulu": (tulu, ("messages",)),
    "bioasq": (bioasq, ("type", "body", "ideal_answer")),
    "bioasq_snippets": (partial(bioasq, snippets=True), ("type", "body", "ideal_answer", "snippets")),
}


def get_task(task: str | Callable[[Row], Row]) -> Callable[[Row], Row]:
    """The function of a task's name (or the function itself); each turns a row into prompt and completion or messages.

    Raises:
        [`ConfigurationError`]: unknown name.
    """
    if callable(task):
        return task
    if task not in TASKS:
        raise ConfigurationError(f'There is no task "{task}"; there are {", ".join(TASKS)}.{did_you_mean(task, TASKS)}')
    return TASKS[task][0]


def tasks_for_columns(columns: list[str]) -> list[str]:
    """Names of the tasks whose columns are all there: what an error suggests."""
    return [name for name, (_, needed) in TASKS.items() if set(needed) <= set(columns)]
