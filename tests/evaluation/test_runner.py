from __future__ import annotations

import pytest
import torch
from conftest import tiny_collm, tiny_model

from collm.errors import ConfigurationError, DataFormatError
from collm.evaluation.generations import Generation, GenerationStore
from collm.evaluation.metrics import Score, get_metric
from collm.evaluation.options import DataOptions
from collm.evaluation.runner import (
    ModelWriter,
    check_references,
    generate_all,
    headline_scores,
    left_padded,
    make_problems,
    summarise,
)

ROWS = [{"prompt": f"w{i} " * (1 + i % 3) + "=", "answer": str(i % 10)} for i in range(7)]


@pytest.mark.parametrize("template", [True, False])
def test_prompts_are_those_of_training(tokenizer, template):
    from datasets import Dataset

    from collm.data.formatting import format_rows

    tokenizer.chat_template = tokenizer.chat_template if template else None
    rows = [{"question": "1 + 2 =", "answer": "3 # 3"}, {"question": "w1 w2 ?", "answer": "w3"}]
    formatted, _ = format_rows(Dataset.from_list(rows), tokenizer, "gsm8k")
    for problem, row in zip(make_problems(rows, tokenizer, "gsm8k"), formatted, strict=True):
        assert problem.prompt_ids == _context(row)
    rows = [{"prompt": "1 + 2", "completion": " = 3"}]  # strings as they are only where asked for
    [row] = format_rows(Dataset.from_list(rows), tokenizer)[0]
    [problem] = make_problems(rows, tokenizer, raw=True)
    assert problem.prompt_ids == _context(row)
    assert (problem.prompt_ids == make_problems(rows, tokenizer)[0].prompt_ids) != template
    with pytest.raises(ConfigurationError, match="--raw is for rows of prompt strings"):
        DataOptions("data.jsonl", task="gsm8k", raw=True).rows()


def _context(row):
    return row["input_ids"][: next(t for t, label in enumerate(row["labels"]) if label != -100)]


def test_prompts_without_a_chat_template(tokenizer):
    tokenizer.chat_template = None
    [problem] = make_problems([{"prompt": "1 + 2"}], tokenizer)
    assert problem.prompt_ids == tokenizer("1 + 2", add_special_tokens=False).input_ids


def test_instruction_and_system_prompt_and_messages(tokenizer):
    [problem] = make_problems([{"prompt": "w1"}], tokenizer, instruction="w2", system_prompt="w3")
    assert tokenizer.decode(problem.prompt_ids).replace(" ", "").startswith("system:w3")
    assert problem.prompt == "w1\n\nw2"
    turns = [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w9"}]
    [spoken] = make_problems([{"messages": turns}], tokenizer)
    [asked] = make_problems([{"prompt": "w1"}], tokenizer)
    assert spoken.prompt_ids == asked.prompt_ids
    [asked] = make_problems([{"prompt": "w1"}], tokenizer, instruction="w2")
    for row in ({"messages": turns}, {"prompt": turns[:1]}):
        [spoken] = make_problems([row], tokenizer, instruction="w2")
        assert spoken.prompt_ids == asked.prompt_ids
    tokenizer.chat_template = None
    with pytest.raises(ConfigurationError, match="system prompt needs a conversation"):
        make_problems([{"prompt": "w1"}], tokenizer, system_prompt="w3")


@pytest.mark.parametrize(
    "row", [{"text": "w1"}, {"prompt": None}, {"prompt": []}, {"messages": [{"role": "user", "content": "w1"}]}]
)
def test_a_row_that_asks_nothing_is_named(tokenizer, row):
    for system_prompt in (None, "w2"):
        with pytest.raises(DataFormatError, match="Row 1: it asks nothing"):
            make_problems([{"prompt": "w1"}, row], tokenizer, system_prompt=system_prompt)


def test_bioasq_rows_are_unpacked(tokenizer):
    import json

    question = {"type": "yesno", "body": "w1 ?", "exact_answer": "yes", "ideal_answer": "w2"}
    [problem] = make_problems([{"bioasq": json.dumps(question)}], tokenizer, "bioasq")
    assert problem.row["exact_answer"] == "yes"


@pytest.mark.parametrize("batch_size", [1, 3])
def test_the_writer_writes_what_generate_writes(tokenizer, batch_size):
    model, assistant = tiny_collm(), tiny_model(seed=5)
    problems = make_problems(ROWS, tokenizer)
    options = {"threshold": 0.5}
    writer = ModelWriter(model, tokenizer, [assistant], options, max_new_tokens=12)
    for problem, generation in zip(problems, generate_all(writer, problems, batch_size=batch_size), strict=True):
        ids = torch.tensor([problem.prompt_ids])
        expected = model.generate(
            ids, assistant=assistant, max_new_tokens=12, do_sample=False, return_dict_in_generate=True, **options
        )
        new = expected.sequences[0, ids.shape[1] :].tolist()
        assert generation.id == problem.id
        assert generation.token_ids == new
        assert generation.source == expected.source[0].tolist()
        assert generation.deferral_probs == pytest.approx(expected.deferral_probs[0].tolist(), abs=1e-5)
        assert generation.truncated == (2 not in new)
        assert generation.seconds > 0


def test_the_writer_alone_is_the_models_own_generate(tokenizer):
    model = tiny_model(seed=5)
    problems = make_problems(ROWS, tokenizer)
    for problem, generation in zip(
        problems, generate_all(ModelWriter(model, tokenizer, max_new_tokens=8), problems), strict=True
    ):
        ids = torch.tensor([problem.prompt_ids])
        expected = model.generate(ids, max_new_tokens=8, do_sample=False)[0, ids.shape[1] :].tolist()
        assert generation.token_ids == expected
        assert set(generation.source) == {0}
        assert generation.deferral_probs == []


@pytest.mark.filterwarnings("ignore:.*generation flags:UserWarning")
def test_settings_that_a_checkpoint_brings_for_chatting_do_not_change_an_evaluation(tokenizer):
    problems = make_problems(ROWS, tokenizer)
    plain, chatty = tiny_collm(), tiny_collm()
    chatty.generation_config.update(repetition_penalty=1.5, do_sample=True, top_k=3, temperature=0.7)
    for assistants in ((), [tiny_model(seed=5)]):
        texts = [
            [g.token_ids for g in generate_all(ModelWriter(m, tokenizer, assistants, {}, 10), problems)]
            for m in (plain, chatty)
        ]
        assert texts[0] == texts[1]


def test_what_the_store_holds_is_not_written_again(tokenizer, tmp_path):
    problems = make_problems(ROWS, tokenizer)
    asked: list[int] = []

    class Recorder:
        def __init__(self, stops_behind):
            self.stops_behind = stops_behind

        def write(self, problems, at_once):
            for start in range(0, len(problems), at_once):
                batch = problems[start : start + at_once]
                asked.extend(p.id for p in batch)
                if len(asked) > self.stops_behind:
                    raise KeyboardInterrupt
                yield [Generation(p.id, "1", [5, 2], [0, 0]) for p in batch]

    path = tmp_path / "g.jsonl"
    with pytest.raises(KeyboardInterrupt):
        generate_all(Recorder(4), problems, GenerationStore(path, {}), batch_size=2)
    first = set(asked[:4])
    asked.clear()
    generations = generate_all(Recorder(7), problems, GenerationStore(path, {}), batch_size=2)
    assert [g.id for g in generations] == list(range(7))
    assert sorted(asked) == sorted(set(range(7)) - first)


def test_summary_counts_truncated_and_unparsable_apart(tokenizer):
    rows = [{"prompt": "w1", "answer": f"#### {i}"} for i in range(4)]
    problems = make_problems(rows, tokenizer)
    texts = [("#### 0", False), ("so 1", True), ("nothing", False), ("so 3.", False)]
    generations = [
        Generation(i, text, [5] * 4, [0, 1, 1, 0] if i else [0] * 4, [], cut, 2.0)
        for i, (text, cut) in enumerate(texts)
    ]
    result = summarise(problems, generations, get_metric("gsm8k"), parameters=[100, 1000])
    assert result["headline"] == "accuracy"
    assert result["metrics"]["accuracy"]["mean"] == 0.5
    assert result["metrics"]["accuracy"]["n"] == 4
    assert result["truncated"] == 1
    assert result["unparsable"] == 2  # cut off before an answer, and no number at all
    assert result["deferral_rate"] == 6 / 16
    assert result["active_parameters"] == 100 + 1000 * 6 / 16
    assert result["seconds_per_token"] == 8 / 16
    assert headline_scores(result) == [1.0, 0.0, 0.0, 1.0]


def test_graded_scores_get_a_bootstrap_interval_and_kinds_their_own_count(tokenizer):
    problems = make_problems(ROWS[:3], tokenizer)
    generations = [Generation(i, "x", [5], [0]) for i in range(3)]
    scores = iter([Score({"f1": 0.2}, "x"), Score({"f1": 0.8}, "x"), Score({"other": 1.0}, "x")])
    result = summarise(problems, generations, lambda row, text, truncated: next(scores))
    assert result["metrics"]["f1"]["mean"] == 0.5
    assert result["metrics"]["f1"]["n"] == 2
    assert 0.2 <= result["metrics"]["f1"]["low"] < 0.5 < result["metrics"]["f1"]["high"] <= 0.8
    assert result["metrics"]["other"]["n"] == 1
    assert headline_scores(result) == [0.2, 0.8, None]
    assert result["active_parameters"] is None


def test_a_text_without_an_answer_counts_as_zero_under_every_name(tokenizer):
    problems = make_problems(ROWS[:3], tokenizer)

    def summary(*scores):
        left = iter(scores)

        def mine(row, text, truncated):
            return next(left)

        return summarise(problems, [Generation(i, "x", [5], [0]) for i in range(3)], mine)

    none, read = Score({}, None), Score({"right": 1.0, "brief": 1.0}, "x")
    result = summary(none, read, read)
    assert result["headline"] == "right"
    assert {name: value["mean"] for name, value in result["metrics"].items()} == pytest.approx(
        {"right": 2 / 3, "brief": 2 / 3}
    )
    assert headline_scores(result) == [0.0, 1.0, 1.0]
    assert result["unparsable"] == 1
    result = summary(none, none, none)
    assert (result["headline"], result["metrics"]["mine"]["mean"]) == ("mine", 0.0)


def test_rows_that_a_metric_cannot_score_are_named(tokenizer):
    problems = make_problems([ROWS[0], {"prompt": "w1"}], tokenizer)
    for look in (
        lambda metric: check_references(problems, metric),
        lambda metric: summarise(problems, [Generation(i, "1", [5], [0]) for i in range(2)], metric),
    ):
        with pytest.raises(DataFormatError, match="Row 1: GSM8K needs a number"):
            look(get_metric("gsm8k"))
    check_references(problems, lambda row, text, truncated: row["no such column"])


def test_left_padding():
    batch = left_padded([[4], [5, 6]], pad=0)
    assert batch["input_ids"].tolist() == [[0, 4], [5, 6]]
    assert batch["attention_mask"].tolist() == [[0, 1], [1, 1]]
