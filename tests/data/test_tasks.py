from __future__ import annotations

import json

import pytest
from conftest import tiny_tokenizer
from datasets import Dataset

from collm.data.formatting import format_rows
from collm.data.reading import read_rows
from collm.data.tasks import TASKS, get_task, tasks_for_columns
from collm.errors import ConfigurationError, DataFormatError

GSM8K = {"question": " How many ? ", "answer": "Natalia sold 48/2 = <<48/2=24>>24 clips.\n#### 24"}
MATH = {"problem": "What is $1+1$?", "solution": r"It is $\boxed{2}$."}
TURNS = [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}]
TULU = {"id": "1", "dataset": "x", "messages": TURNS}
IDEAL = {"ideal_answer": ["It does so because.", "Other."], "snippets": [{"text": "A study."}, {"text": "Two."}]}
BIOASQ = {
    "yesno": {"type": "yesno", "body": "Does it?", "exact_answer": "Yes", **IDEAL},
    "factoid": {"type": "factoid", "body": "Which gene?", "exact_answer": ["BRCA1", "breast cancer 1"], **IDEAL},
    "list": {"type": "list", "body": "Which genes?", "exact_answer": [["A", "alpha"], ["B"]], **IDEAL},
    "summary": {"type": "summary", "body": "What is it?", "ideal_answer": "A thing."},
}


def test_gsm8k_leaves_the_calculator_out_and_keeps_the_answer():
    assert get_task("gsm8k")(GSM8K) == {
        "prompt": "How many ?",
        "completion": "Natalia sold 48/2 = 24 clips.\n#### 24",
    }


def test_math_keeps_the_box():
    assert get_task("math")(MATH) == {"prompt": "What is $1+1$?", "completion": r"It is $\boxed{2}$."}


@pytest.mark.parametrize(
    ("kind", "completion"),
    [
        ("yesno", "yes\nIt does so because."),
        ("factoid", "BRCA1\nIt does so because."),
        ("list", "- A\n- B\nIt does so because."),
        ("summary", "A thing."),
    ],
)
def test_bioasq_answers_exactly_then_in_prose(kind, completion):
    made = get_task("bioasq")(BIOASQ[kind])
    assert made["completion"] == completion
    assert made["prompt"].startswith(BIOASQ[kind]["body"] + "\n")


def test_bioasq_nested_synonyms_and_missing_answers():
    bioasq = get_task("bioasq")
    assert bioasq({**BIOASQ["factoid"], "exact_answer": [["BRCA1", "x"]]})["completion"].startswith("BRCA1\n")
    assert bioasq({**BIOASQ["yesno"], "exact_answer": None})["completion"] == "It does so because."
    assert bioasq({**BIOASQ["list"], "exact_answer": [], "ideal_answer": []})["completion"] == ""


def test_bioasq_snippets_come_before_the_question():
    prompt = get_task("bioasq_snippets")(BIOASQ["yesno"])["prompt"]
    assert prompt.startswith("A study.\nTwo.\n\nDoes it?")
    assert get_task("bioasq_snippets")(BIOASQ["summary"])["prompt"].startswith("What is it?")


def test_unknown_names_get_a_suggestion():
    with pytest.raises(ConfigurationError, match=r'no task "gsm8".*Did you mean "gsm8k"'):
        get_task("gsm8")
    with pytest.raises(DataFormatError, match=r'no type "yes-no".*Did you mean "yesno"'):
        get_task("bioasq")({**BIOASQ["yesno"], "type": "yes-no"})


def test_columns_suggest_their_task():
    assert tasks_for_columns(["question", "answer", "id"]) == ["gsm8k"]
    assert tasks_for_columns(["problem", "solution"]) == ["math"]


@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.parametrize(("task", "row"), [("gsm8k", GSM8K), ("math", MATH), ("tulu", TULU)])
def test_every_task_becomes_tokens_with_and_without_a_chat_template(task, row, chat):
    tokenizer = tiny_tokenizer()
    if not chat:
        tokenizer.chat_template = None
    template = "tulu" if task == "tulu" and not chat else None
    data, report = format_rows(Dataset.from_list([row]), tokenizer, task=task, chat_template=template)
    assert report.sequences == len(data) == 1
    assert data[0]["labels"][-1] == tokenizer.eos_token_id
    assert data[0]["labels"][0] == -100


def test_the_challenges_file_is_read_and_formatted(tmp_path):
    path = tmp_path / "training11b.json"
    path.write_text(json.dumps({"questions": list(BIOASQ.values())}))
    data, report = format_rows(read_rows(path), tiny_tokenizer(), task="bioasq")
    assert (report.rows, len(data)) == (4, 4)
    assert len(read_rows(path, "train[:2]")) == 2
    with pytest.raises(DataFormatError, match='ask for the task "bioasq"'):
        format_rows(read_rows(path), tiny_tokenizer())


def test_a_task_on_the_wrong_columns_names_the_missing_one():
    with pytest.raises(DataFormatError, match="Row 0: the task needs the column 'question'; there are problem"):
        format_rows(Dataset.from_list([MATH]), tiny_tokenizer(), task="gsm8k")


def test_rows_that_a_task_cannot_read_are_dropped_or_named():
    rows = Dataset.from_list([GSM8K, {**GSM8K, "answer": None}, {**GSM8K, "question": None}])
    data, report = format_rows(rows, tiny_tokenizer(), task="gsm8k")
    assert (len(data), report.dropped) == (1, {"empty (null) row": 2})
    assert get_task("bioasq_snippets")({**BIOASQ["yesno"], "body": None})["prompt"] is None
    for row, task, message in (
        ({**GSM8K, "answer": 24}, "gsm8k", "answer is 24; it has to be text"),
        ({**MATH, "problem": ["x"]}, "math", r"problem is \['x'\]"),
        ({**BIOASQ["yesno"], "type": None}, "bioasq", 'no type "None"'),
        ({"x": None}, lambda row: {"prompt": row["x"].strip(), "completion": "w1"}, "the task fails .AttributeError"),
        (GSM8K, lambda row: {"prompt": row["question"]}, "the task returned prompt; it has to return messages, or"),
        (GSM8K, lambda row: None, "the task returned None"),
        (GSM8K, lambda row: {"prompt": "x", "completion": 24}, "completion int"),
    ):
        with pytest.raises(DataFormatError, match=f"Row 0: .*{message}"):
            format_rows(Dataset.from_list([row]), tiny_tokenizer(), task=task)


def test_a_task_can_be_any_function():
    def task(row):
        return {"prompt": row["x"], "completion": row["y"]}

    data, _ = format_rows(Dataset.from_list([{"x": "w1 w2", "y": "w3"}]), tiny_tokenizer(), task=task)
    assert len(data) == 1
    assert set(TASKS) >= {"gsm8k", "math", "tulu", "bioasq"}
