from __future__ import annotations

import json

import torch
from conftest import save_plain, tiny_collm, tiny_model, tiny_tokenizer

from collm.cli import main
from collm.data.chat import Chat, encode

QUESTIONS = [
    {"question_id": 81, "category": "writing", "turns": ["w1 w2 ?", "w3 !"]},
    {"question_id": 101, "category": "math", "turns": ["1 + 2 =", "* 3 ="]},
    {"question_id": 102, "category": "math", "turns": ["7 ="]},
]


def test_later_turns_see_the_models_own_answers(tmp_path, capsys):
    model, assistant = tiny_collm(), tiny_model(seed=5)
    save_plain(model, tmp_path / "base")
    save_plain(assistant, tmp_path / "big")
    (tmp_path / "question.jsonl").write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    command = [
        "eval", str(tmp_path / "base"), "--assistant", str(tmp_path / "big"), "--task", "mt_bench",
        "--threshold", "0.5", "--data", str(tmp_path / "question.jsonl"), "--max-new-tokens", "8",
        "--instruction", "w4 w5", "--output", str(tmp_path / "o"),
    ]  # fmt: skip
    assert main(command) == 0
    path = json.loads(capsys.readouterr().out.strip().splitlines()[-1])["answers"]
    with open(path) as file:
        answers = {row["question_id"]: row for row in map(json.loads, file)}
    assert [len(answers[q["question_id"]]["choices"][0]["turns"]) for q in QUESTIONS] == [2, 2, 1]
    assert answers[81]["model_id"] == "base+big"

    # The second turn of a greedy question, by hand.
    tokenizer = tiny_tokenizer()
    first, second = answers[101]["choices"][0]["turns"]
    conversation = [
        {"role": "user", "content": "1 + 2 =\n\nw4 w5"},
        {"role": "assistant", "content": first},
        {"role": "user", "content": "* 3 =\n\nw4 w5"},
    ]
    ids = torch.tensor([encode(tokenizer, Chat(tokenizer).render(conversation, True))])
    out = model.generate(ids, assistant=assistant, threshold=0.5, max_new_tokens=8, do_sample=False)
    assert tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).strip() == second

    assert main(command) == 0
    with open(path) as file:
        again = {row["question_id"]: row for row in map(json.loads, file)}
    assert all(again[q]["choices"] == answers[q]["choices"] for q in answers)


def test_other_files_are_refused(tmp_path, capsys):
    save_plain(tiny_collm(), tmp_path / "base")
    save_plain(tiny_model(seed=5), tmp_path / "big")
    (tmp_path / "d.jsonl").write_text('{"turns": ["w1"]}\n')
    command = ["eval", str(tmp_path / "base"), "--assistant", str(tmp_path / "big"), "--task", "mt_bench"]
    assert main([*command, "--data", str(tmp_path / "d.jsonl"), "--output", str(tmp_path / "o")]) == 2
    assert "it has no category, question_id" in capsys.readouterr().err
    (tmp_path / "d.jsonl").write_text(json.dumps(QUESTIONS[0]) + "\n")
    (tmp_path / "refuses.jinja").write_text("{{ raise_exception('no system messages') }}")
    command += ["--data", str(tmp_path / "d.jsonl"), "--chat-template", str(tmp_path / "refuses.jinja")]
    assert main([*command, "--output", str(tmp_path / "o")]) == 2
    assert "the chat template refuses a question" in capsys.readouterr().err
