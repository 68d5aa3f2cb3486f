"""
MT-Bench answers: several turns, each given the model's own earlier answers, in the format that FastChat's judge reads.

Reads `question.jsonl` (`question_id`, `category`, `turns`), writes `model_answer/NAME.jsonl`. Sampling temperatures by
category are FastChat's (Zheng et al., 2023).
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from collm.data.chat import Chat, Dropped, encode, message
from collm.errors import DataFormatError
from collm.evaluation.generations import GenerationStore
from collm.evaluation.options import DataOptions
from collm.evaluation.runner import Problem, generate_all

TEMPERATURES = {"writing": 0.7, "roleplay": 0.7, "stem": 0.1, "humanities": 0.1}  # all others are greedy


def answer_questions(
    data: DataOptions,
    writer: Any,
    tokenizer: Any,
    folder: Path,
    settings: Mapping[str, Any],
) -> Path:
    """
    Answers every turn of every question; a killed run goes on where it was.

    Args:
        data ([`DataOptions`]): `data` names the questions; its instruction follows every turn.
        writer (a writer with `options`): sampling is set by category.
        tokenizer (`PreTrainedTokenizerBase`): the base's.
        folder (`Path`): for the texts of each turn and for `model_answer`.
        settings (mapping): what the texts depend on.

    Returns:
        `Path`: the file of answers.

    Raises:
        [`DataFormatError`]: a row without `question_id`, `category` or `turns`; one that the chat template refuses.
    """
    questions = data.rows()
    for number, row in enumerate(questions):
        missing = {"question_id", "category", "turns"} - row.keys()
        if missing:
            raise DataFormatError(f"Row {number} is no question of MT-Bench: it has no {', '.join(sorted(missing))}")
    chat = Chat(tokenizer, data.chat_template)
    opening = [message("system", data.system_prompt)] if data.system_prompt is not None else []
    instruction = f"\n\n{data.instruction}" if data.instruction else ""
    conversations = [list(opening) for _ in questions]
    for turn in range(max(len(row["turns"]) for row in questions)):
        open_rows = [i for i, row in enumerate(questions) if turn < len(row["turns"])]
        for i in open_rows:
            conversations[i].append(message("user", questions[i]["turns"][turn] + instruction))
        try:
            prompts = {i: encode(tokenizer, chat.render(conversations[i], True)) for i in open_rows}
        except Dropped as error:
            raise DataFormatError(f"the chat template refuses a question: {error}") from error
        problems = [Problem(i, questions[i], questions[i]["turns"][turn], prompts[i]) for i in open_rows]
        answers: dict[int, str] = {}
        for temperature in sorted({_temperature(p.row) for p in problems}):
            sampling = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
            turn_writer = replace(writer, options={**writer.options, **sampling}, seed=data.seed + 1000 * turn)
            group = [p for p in problems if _temperature(p.row) == temperature]
            told = {**settings, **data.settings(group), "turn": turn, "temperature": temperature}
            store = GenerationStore(folder / f"turn{turn + 1}-temperature{temperature:g}.jsonl", told)
            generated = generate_all(turn_writer, group, store, data.batch_size, f"turn {turn + 1} at {temperature:g}")
            answers |= {generation.id: generation.text.strip() for generation in generated}
        for i in open_rows:
            conversations[i].append(message("assistant", answers[i]))
    return _write(folder, "+".join(settings["names"]), questions, conversations)


def _temperature(row: Mapping[str, Any]) -> float:
    return TEMPERATURES.get(row["category"], 0.0)


def _write(folder: Path, name: str, questions: list[dict], conversations: list[list[dict]]) -> Path:
    path = folder / "model_answer" / f"{name}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8") as file:
        for row, conversation in zip(questions, conversations, strict=True):
            turns = [m["content"] for m in conversation if m["role"] == "assistant"]
            answer = {
                "question_id": row["question_id"],
                "answer_id": uuid.uuid4().hex,
                "model_id": name,
                "choices": [{"index": 0, "turns": turns}],
                "tstamp": time.time(),
            }
            file.write(json.dumps(answer, ensure_ascii=False) + "\n")
    return path
