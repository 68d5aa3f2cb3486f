from __future__ import annotations

import json

import datasets
import pytest
from conftest import tiny_tokenizer
from datasets import Dataset, DatasetDict
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from collm.data.chat import Chat, encode
from collm.data.formatting import format_rows
from collm.data.reading import read_rows
from collm.errors import ConfigurationError, DataFormatError

MARKERS = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|eot|>", "<turn|>", "<|user|>", "<|assistant|>", "<|end|>"]

# One template of each way in which chat models write turns.
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEMPLATES = {
    "chatml": (CHATML, "<|im_end|>"),
    "chatml_with_a_system_message_of_its_own": (
        "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}{% endif %}" + CHATML,
        "<|im_end|>",
    ),
    "header_and_two_line_breaks": (
        "{{ '<s>' }}{% for m in messages %}{{ '<turn|>' + m['role'] + '\n\n' + m['content'] | trim + '<|eot|>' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<turn|>assistant\n\n' }}{% endif %}",
        "<|eot|>",
    ),
    "brackets_and_eos_after_the_assistant_only": (
        "{{ '<s>' }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
        "{% else %}{{ ' ' + m['content'] + '</s>' }}{% endif %}{% endfor %}",
        "</s>",
    ),
    "end_of_conversation_after_the_last_turn": (
        "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ '</s>' }}{% endif %}",
        "<|end|>",
    ),
}
CONVERSATION = [
    {"role": "user", "content": "What is 12 + 30?"},
    {"role": "assistant", "content": "It is 42.\nSure."},
    {"role": "user", "content": "And half of it?\n"},
    {"role": "assistant", "content": "21"},
    {"role": "user", "content": "Thanks"},
]


@pytest.fixture(scope="module")
def bpe() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer whose tokens reach across spaces, line breaks and punctuation, as real ones do."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=MARKERS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    text = [m["content"] for m in CONVERSATION] + ["\n\n\n\n \n", "Question: what\nAnswer: the answer is 42."] * 4
    tokenizer.train_from_iterator(text, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def format_one(row: dict, tokenizer, **options):
    data, report = format_rows(Dataset.from_list([row]), tokenizer, **options)
    assert len(data) == report.sequences == 1
    return data[0]


def runs(row: dict) -> list[tuple[list[int], list[int]]]:
    """The obvious way back: (everything before, targets) for each run of targets."""
    found, t = [], 0
    while t < len(row["labels"]):
        start = t
        while t < len(row["labels"]) and row["labels"][t] != -100:
            t += 1
        if t > start:
            found.append((row["input_ids"][:start], row["input_ids"][start:t]))
        t += 1
    return found


# ---- Conversations


@pytest.mark.parametrize("name", TEMPLATES)
def test_prompts_are_what_generation_starts_from_and_targets_what_it_should_write(bpe, name):
    template, end = TEMPLATES[name]
    data, _ = format_rows(Dataset.from_list([{"messages": CONVERSATION}]), bpe, chat_template=template)
    found = [run for row in data for run in runs(row)]
    # This tokenizer joins the two line breaks at the end of a prompt, but not before a word: one sequence per turn.
    assert [len(data), len(found)] == [2 if name == "header_and_two_line_breaks" else 1, 2]
    for turn, (before, target) in zip((1, 3), found, strict=True):
        prompt = bpe.apply_chat_template(
            CONVERSATION[:turn], chat_template=template, add_generation_prompt=True, tokenize=False
        )
        assert before == encode(bpe, prompt)
        assert bpe.decode(target).strip() == CONVERSATION[turn]["content"] + end
    for row in data:
        assert row["input_ids"][-1] == row["labels"][-1]  # nothing follows the last target
        assert all(label in (-100, token) for token, label in zip(row["input_ids"], row["labels"], strict=True))


def test_generation_marks_of_a_template_are_used(bpe):
    marked = (
        "{% for m in messages %}{% if m['role'] == 'assistant' %}{{ '<|assistant|>\n' }}"
        "{% generation %}{{ m['content'] }}{% endgeneration %}{{ '</s>\n' }}"
        "{% else %}{{ '<|user|>\n' + m['content'] + '\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
    )
    unmarked = marked.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    with_marks = runs(format_one({"messages": CONVERSATION}, bpe, chat_template=marked))
    without = runs(format_one({"messages": CONVERSATION}, bpe, chat_template=unmarked))
    assert [bpe.decode(target) for _, target in with_marks] == ["It is 42.\nSure.", "21"]  # the mark ends before </s>
    assert [bpe.decode(target) for _, target in without] == ["It is 42.\nSure.</s>", "21</s>"]
    assert [before for before, _ in with_marks] == [before for before, _ in without]


def test_the_tulu_template_serves_tokenizers_without_one(bpe):
    row = format_one({"messages": CONVERSATION}, bpe, chat_template="tulu")
    assert [bpe.decode(target) for _, target in runs(row)] == ["It is 42.\nSure.</s>", "21</s>"]
    with pytest.raises(ConfigurationError, match=r'Row 0: the tokenizer has no chat template.*"tulu"'):
        format_one({"messages": CONVERSATION}, bpe)


def test_a_template_without_an_end_of_turn_gets_eos_after_the_last_turn_only(bpe):
    template = (
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
    )
    row = format_one({"messages": CONVERSATION}, bpe, chat_template=template)
    assert [bpe.decode(target) for _, target in runs(row)] == [" It is 42.\nSure.\n", " 21\n</s>"]


def test_a_template_that_rewrites_history_gives_one_sequence_per_turn(bpe):
    template = (
        "{% for m in messages %}{{ '<|' + m['role'] + '|>' }}"
        "{{ m['content'] if loop.last else m['content'].split('=>')[-1] }}{{ '<|end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
    )
    talk = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "thinking=>b"},
        {"role": "user", "content": "c"},
        {"role": "assistant", "content": "more=>d"},
    ]
    data, report = format_rows(Dataset.from_list([{"messages": talk}]), bpe, chat_template=template)
    assert (report.rows, report.sequences) == (1, 2)
    assert [bpe.decode(row["input_ids"]) for row in data] == [
        "<|user|>a<|end|><|assistant|>thinking=>b<|end|>",
        "<|user|>a<|end|><|assistant|>b<|end|><|user|>c<|end|><|assistant|>more=>d<|end|>",
    ]
    assert [bpe.decode(runs(row)[0][1]) for row in data] == ["thinking=>b<|end|>", "more=>d<|end|>"]
    assert all(len(runs(row)) == 1 for row in data)


def test_a_template_whose_generation_prompt_is_no_prefix_is_refused(bpe):
    template = (
        "{% for m in messages %}{{ m['content'] + '<|end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<think>' }}{% endif %}"
    )
    with pytest.raises(DataFormatError, match="1 dropped: the chat template's generation prompt is not a prefix"):
        format_one({"messages": CONVERSATION}, bpe, chat_template=template)


def test_rows_that_a_template_refuses_are_counted(bpe):
    template = "{% if messages[0]['role'] != 'user' %}{{ raise_exception('user first') }}{% endif %}" + CHATML
    rows = [{"messages": CONVERSATION}, {"messages": [{"role": "system", "content": "x"}, *CONVERSATION]}]
    data, report = format_rows(Dataset.from_list(rows), bpe, chat_template=template)
    assert len(data) == 1
    assert report.dropped == {"the chat template refuses the conversation (user first)": 1}


def test_an_opening_by_the_assistant_is_no_target(bpe):
    talk = [{"role": "assistant", "content": "Hello, how can I help?"}, *CONVERSATION]
    row = format_one({"messages": talk}, bpe, chat_template=CHATML)
    assert len(runs(row)) == 2
    with pytest.raises(DataFormatError, match="1 dropped: no assistant turn"):
        format_one({"messages": talk[:2]}, bpe, chat_template=CHATML)


def test_broken_messages_name_their_row(bpe):
    rows = [{"messages": CONVERSATION}, {"messages": [{"from": "human", "value": "x"}]}]
    with pytest.raises(DataFormatError, match="Row 1: a message is"):
        format_rows(Dataset.from_list(rows), bpe, chat_template=CHATML)


# ---- Prompt and completion


def test_eos_is_the_last_target_once(bpe):
    for completion in (" 42.", " 42.</s>"):
        row = format_one({"prompt": "Question: what\nAnswer:", "completion": completion}, bpe)
        ((before, target),) = runs(row)
        assert before == encode(bpe, "Question: what\nAnswer:")
        assert bpe.decode(target) == " 42.</s>"


def test_a_token_across_the_boundary_is_not_allowed(bpe):
    assert encode(bpe, "what\n\n")[:-1] == encode(bpe, "what")  # the two line breaks are one token
    row = format_one({"prompt": "what\n", "completion": "\n42"}, bpe)
    ((before, target),) = runs(row)
    assert before == encode(bpe, "what\n")
    assert bpe.decode(target) == "\n42</s>"


def test_a_tokenizer_that_cannot_be_cut_there_drops_the_row(tokenizer):
    with pytest.raises(DataFormatError, match="1 dropped: the prompt's tokens are not a prefix of the whole's"):
        format_one({"prompt": "w1", "completion": "w2"}, tokenizer)  # the words "w1w2" are one unknown word


def test_bos_begins_the_prompt_where_the_tokenizer_writes_it(bpe):
    from tokenizers.processors import TemplateProcessing

    bos = PreTrainedTokenizerFast(tokenizer_object=bpe.backend_tokenizer, bos_token="<s>", eos_token="</s>")
    bos.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    assert format_one({"prompt": "what", "completion": " 42"}, bos)["input_ids"][0] == bos.bos_token_id
    assert format_one({"messages": CONVERSATION}, bos, chat_template=CHATML)["input_ids"][0] != bos.bos_token_id
    row = format_one({"prompt": "", "completion": "42"}, bos)
    assert row["labels"][0] == -100
    assert bos.decode(runs(row)[0][1]) == "42</s>"
    bos.backend_tokenizer.post_processor = TemplateProcessing(single="$A", special_tokens=[])


def test_the_first_token_of_a_sequence_is_never_a_target(bpe):
    row = format_one({"prompt": "", "completion": "42 is"}, bpe)
    assert row["input_ids"] == [*encode(bpe, "42 is"), bpe.eos_token_id]
    assert row["labels"] == [-100, *row["input_ids"][1:]]


def test_conversational_prompt_and_completion(bpe):
    row = format_one({"prompt": CONVERSATION[:3], "completion": CONVERSATION[3:4]}, bpe, chat_template=CHATML)
    ((before, target),) = runs(row)
    assert bpe.decode(target) == "21<|im_end|>"
    assert before == encode(
        bpe, bpe.apply_chat_template(CONVERSATION[:3], chat_template=CHATML, add_generation_prompt=True, tokenize=False)
    )


# ---- Tokens, truncation, reports


def test_formatted_rows_pass_and_wrong_labels_do_not(bpe):
    row = {"input_ids": [5, 6, 7, 8], "labels": [-100, 6, -100, 8], "text": "more"}
    assert format_one(row, bpe) == {"input_ids": [5, 6, 7, 8], "labels": [-100, 6, -100, 8]}
    with pytest.raises(DataFormatError, match=r"Row 0: labels\[1\] is 7 and input_ids\[1\] is 6"):
        format_one({**row, "labels": [-100, 7, 8, -100]}, bpe)
    with pytest.raises(DataFormatError, match="Row 0: 4 input_ids but 2 labels"):
        format_one({**row, "labels": [-100, 6]}, bpe)


def test_truncation_and_dropped_rows_are_counted(bpe):
    prompt = encode(bpe, "Question: what\nAnswer:")
    rows = [
        {"prompt": "Question: what\nAnswer:", "completion": " the answer is 42. the answer is 42."},
        {"prompt": "Question: what\nAnswer:", "completion": " 42"},
        {"prompt": "Question: what\nAnswer: the answer is", "completion": " 42"},
        {"prompt": "Question: what", "completion": ""},
        {"prompt": None, "completion": None},
    ]
    limit = len(prompt) + 3
    data, report = format_rows(Dataset.from_list(rows), bpe, max_length=limit)
    assert (report.rows, report.sequences, report.truncated) == (5, 2, 1)
    assert report.dropped == {
        f"no target token within max_length={limit}": 1,
        "empty completion": 1,
        "empty (null) row": 1,
    }
    assert len(data[0]["input_ids"]) == limit
    assert report.tokens == sum(len(ids) for ids in data["input_ids"])
    assert report.target_tokens == sum(label != -100 for labels in data["labels"] for label in labels)
    assert str(report).startswith(f"5 rows: 2 sequences of {report.tokens} tokens")
    assert "1 truncated; 1 dropped: empty (null) row; 1 dropped: empty completion" in str(report)


GOOD = {"prompt": "what", "completion": " 42"}
PARTS = [{"role": "user", "content": [{"type": "text", "text": "what"}]}, {"role": "assistant", "content": " 42"}]


@pytest.mark.parametrize(
    ("good", "bad", "message"),
    [
        (GOOD, {**GOOD, "prompt": CONVERSATION[:1]}, "prompt has the type list and completion str"),
        (GOOD, {**GOOD, "completion": CONVERSATION[1:2]}, "prompt has the type str and completion list"),
        (GOOD, {**GOOD, "completion": 42}, "completion int; both have to be text"),
        ({"messages": CONVERSATION}, {"messages": "what"}, "a message is 'what'"),
        ({"messages": CONVERSATION}, {"messages": PARTS}, "cannot write a content that is no text"),
    ],
)
def test_rows_of_the_wrong_types_are_named(bpe, good, bad, message):
    rows = {0: good, 1: bad}  # no data set would hold both: its columns have one type
    with pytest.raises(DataFormatError, match=f"Row 1: .*{message}"):
        format_rows(Rows(rows), bpe, chat_template=CHATML)


class Rows(dict):
    """What `format_rows` needs of a data set, without its types."""

    column_names = property(lambda self: list(self[0]))

    def __iter__(self):
        return iter(self.values())


def test_contents_in_parts_are_for_templates_that_take_them(bpe):
    rows = Dataset.from_list([{"messages": [PARTS[0], {**PARTS[1], "content": [{"type": "text", "text": " 42"}]}]}])
    trims = CHATML.replace("m['content']", "m['content'] | trim")  # which writes a list as Python does
    with pytest.raises(DataFormatError, match="Row 0: the chat template takes no content in parts"):
        format_rows(rows, bpe, chat_template=trims)
    joins = CHATML.replace("m['content']", "m['content'][0]['text']")
    ((_, target),) = runs(format_rows(rows, bpe, chat_template=joins)[0][0])
    assert bpe.decode(target) == " 42<|im_end|>"


def test_a_length_below_one_is_refused(bpe):
    for length in (0, -3):
        with pytest.raises(ConfigurationError, match=f"max_length is {length}"):
            format_one(GOOD, bpe, max_length=length)


def test_nothing_left_is_an_error_with_the_reasons(bpe):
    with pytest.raises(DataFormatError, match=r"No row is left.*2 dropped: no target token within max_length=2"):
        format_rows(Dataset.from_list([{"prompt": "Question: what", "completion": " 42"}] * 2), bpe, max_length=2)


# ---- An assistant's own prompt


def test_an_assistant_with_its_own_chat_reads_the_same_targets(bpe):
    own = Chat(bpe, TEMPLATES["end_of_conversation_after_the_last_turn"][0], system_prompt="You are an expert.")
    row = format_one({"messages": CONVERSATION}, bpe, chat_template=CHATML, assistant_chats=[None, own])
    shared, mine = runs(row), runs({name: row[f"assistant_{name}"][1] for name in ("input_ids", "labels")})
    assert row["assistant_input_ids"][0] == []
    assert [target for _, target in shared] == [target for _, target in mine]
    assert bpe.decode(mine[0][0]).startswith("<|system|>\nYou are an expert.<|end|>\n<|user|>\nWhat is")
    assert bpe.decode(mine[1][0]).endswith("<|user|>\nAnd half of it?\n<|end|>\n<|assistant|>\n")


def test_rows_carry_contexts_for_the_assistants(bpe):
    row = {"prompt": "what", "completion": " 42", "assistant_prompts": [None, "Question: what\nAnswer:"]}
    made = format_one(row, bpe, assistant_chats=[None, None])
    ((before, target),) = runs({name: made[f"assistant_{name}"][1] for name in ("input_ids", "labels")})
    assert (bpe.decode(before), bpe.decode(target)) == ("Question: what\nAnswer:", " 42</s>")
    assert made["assistant_input_ids"][0] == []

    own = [{"role": "system", "content": "Documents: 12"}, *CONVERSATION[:2]]
    row = {"messages": CONVERSATION[:2], "assistant_messages": [own]}
    made = format_one(row, bpe, chat_template=CHATML, assistant_chats=[None])
    assert bpe.decode(made["assistant_input_ids"][0]).startswith("<|im_start|>system\nDocuments: 12<|im_end|>")
    again = format_one(made, bpe, assistant_chats=[None])
    assert again == made


def test_contexts_that_do_not_fit_are_refused(bpe):
    row = {"prompt": "what", "completion": " 42", "assistant_prompts": ["a", "b"]}
    with pytest.raises(DataFormatError, match="Row 0: assistant_prompts has 2 entries; it needs one for each of the 1"):
        format_one(row, bpe, assistant_chats=[None])
    with pytest.raises(DataFormatError, match="Row 0: an assistant's own prompt is empty"):
        format_one({**row, "assistant_prompts": [""]}, bpe, assistant_chats=[None])
    row = {"messages": CONVERSATION, "assistant_messages": [CONVERSATION[:2]]}
    with pytest.raises(DataFormatError, match="Row 0: an assistant's own messages must have the 2 assistant turns"):
        format_one(row, bpe, chat_template=CHATML, assistant_chats=[None])
    row = {"question": "what", "answer": "42", "assistant_prompts": ["Question: what"]}
    with pytest.raises(DataFormatError, match="Row 0: assistant_prompts is read beside a prompt that is text alone"):
        format_one(row, bpe, task="gsm8k", chat_template=CHATML, assistant_chats=[None])
    assert "assistant_input_ids" in format_one(row, bpe, task="gsm8k", assistant_chats=[None]).keys()
    row = {"prompt": CONVERSATION[:1], "completion": CONVERSATION[1:2], "assistant_messages": [CONVERSATION[:2]]}
    with pytest.raises(DataFormatError, match="Row 0: assistant_messages is read beside messages alone"):
        format_one(row, bpe, chat_template=CHATML, assistant_chats=[None])


def test_truncation_cuts_an_assistants_own_sequence_at_the_same_target(bpe):
    own = Chat(bpe, CHATML, system_prompt="A much longer prompt than the base's. " * 3)
    options = {"chat_template": CHATML, "assistant_chats": [own]}
    limit = len(runs(format_one({"messages": CONVERSATION}, bpe, **options))[0][0]) + 3  # the first turn's third target
    row = format_one({"messages": CONVERSATION}, bpe, max_length=limit, **options)
    shared, mine = runs(row), runs({name: row[f"assistant_{name}"][0] for name in ("input_ids", "labels")})
    assert len(row["input_ids"]) == limit < len(row["assistant_input_ids"][0])
    assert len(mine) == len(shared) == 1
    assert len(mine[0][1]) == 3
    assert mine[0][1] == shared[0][1]


# ---- Reading


@pytest.fixture(autouse=True)
def _cache_in_the_test_folder(monkeypatch, tmp_path):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


ROWS = [{"prompt": f"w{i}", "completion": "w1"} for i in range(5)]


def test_files_and_folders_of_every_kind(tmp_path):
    lines = tmp_path / "rows.jsonl"
    lines.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (tmp_path / "rows.json").write_text(json.dumps(ROWS))
    Dataset.from_list(ROWS).to_parquet(tmp_path / "rows.parquet")
    Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    DatasetDict(test=Dataset.from_list(ROWS)).save_to_disk(tmp_path / "splits")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "train.jsonl").write_text(lines.read_text())
    for name in ("rows.jsonl", "rows.json", "rows.parquet", "saved", "folder"):
        assert read_rows(tmp_path / name).to_list() == ROWS, name
    assert read_rows(str(tmp_path / "splits"), split="test").to_list() == ROWS
    assert read_rows(lines, split="train[:2]").to_list() == ROWS[:2]
    assert read_rows(tmp_path / "saved", split="train[:2]").to_list() == ROWS[:2]
    assert read_rows(tmp_path / "splits", split="test[60%:]").to_list() == ROWS[3:]
    assert read_rows(Dataset.from_list(ROWS)).to_list() == ROWS


def test_what_cannot_be_read_says_why(tmp_path):
    (tmp_path / "rows.jsonl").write_text("")
    (tmp_path / "broken.jsonl").write_text('{"prompt": "a"\n')
    (tmp_path / "broken.json").write_text('{"questions": [')
    (tmp_path / "rows.csv").write_text("a,b\n")
    DatasetDict(train=Dataset.from_list(ROWS)).save_to_disk(tmp_path / "splits")
    Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    for name, split, message in (
        ("rows.jsonl", "train", "is empty"),
        ("broken.jsonl", "train", "Cannot read .*broken.jsonl"),
        ("broken.json", "train", "is not JSON"),
        ("rows.csv", "train", r"ends in '.csv'; files can be .jsonl, .json, .parquet"),
        ("row.jsonl", "train", r'There is no file or folder .*row.jsonl. Did you mean ".*rows.jsonl"'),
        ("splits", "trian", r'has no split "trian"; it has train. Did you mean "train"'),
        ("saved", "test", r'has no split "test"; it has train'),
        ("saved", "train[:x]", r"Cannot read .*saved"),
    ):
        with pytest.raises(DataFormatError, match=message):
            read_rows(tmp_path / name, split)
    with pytest.raises(DataFormatError, match="the data set has no rows"):
        read_rows(Dataset.from_list([]))


def test_wrong_columns_get_a_suggestion(bpe):
    for columns, message in (
        ({"mesages": "x"}, 'they need messages, or prompt and completion.*Did you mean "messages"'),
        ({"prompt": "x", "completions": "y"}, 'Did you mean "completion"'),
        ({"question": "x", "answer": "y"}, "These are the columns of the task gsm8k"),
    ):
        with pytest.raises(DataFormatError, match=message):
            format_rows(Dataset.from_list([columns]), bpe)


def test_formatting_is_deterministic():
    rows = Dataset.from_list([{"prompt": f"w{i} ", "completion": "w3 w4"} for i in range(20)])
    first, second = (format_rows(rows, tiny_tokenizer())[0] for _ in range(2))
    assert first.to_list() == second.to_list()
