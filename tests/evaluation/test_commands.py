from __future__ import annotations

import itertools
import json

import pytest
import torch
from conftest import save_plain, tiny_collm, tiny_model, tiny_tokenizer

from collm import CoLLMForCausalLM
from collm.cli import main


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A deferral checkpoint, its assistant and problems, as a user has them on disk."""
    folder = tmp_path_factory.mktemp("models")
    model = tiny_collm()
    # Features of a random model are large: scale the head so that d spreads over (0, 1).
    model.deferral_head.weight.data.mul_(0.3)
    save_plain(model, folder / "base")
    save_plain(tiny_model(seed=5), folder / "big")
    with open(folder / "data.jsonl", "w") as file:
        for i in range(24):
            row = {"question": f"w{i} w{i % 5} {i % 10} + {i % 7} =", "answer": f"w{i % 6} w3 = #### {i % 10}"}
            file.write(json.dumps(row) + "\n")
    return folder


def run(folder, command: str, *options: str) -> int:
    return main(
        [command, str(folder / "base"), "--assistant", str(folder / "big"), "--data", str(folder / "data.jsonl"),
         "--task", "gsm8k", "--max-new-tokens", "16", *options]
    )  # fmt: skip


def last_json(capsys) -> dict:
    return json.loads(capsys.readouterr().out.strip().splitlines()[-1])


def test_calibrate_then_evaluate_at_a_rate(folder, tmp_path, capsys):
    rates = ["--rates", "0.2", "0.4"]
    assert run(folder, "calibrate", *rates, "--target-rate", "0.3", "--output", str(tmp_path / "c")) == 0
    printed = capsys.readouterr().out
    said = json.loads(printed.strip().splitlines()[-1])
    assert "are gone" not in printed
    deferral = CoLLMForCausalLM.from_pretrained(folder / "base").config.deferral
    assert [row["rate"] for row in deferral.calibration] == pytest.approx([0.2, 0.3, 0.4], abs=0.05)
    assert deferral.threshold == pytest.approx(said["threshold"])
    assert deferral.assistants == [str(folder / "big")]
    saved = json.loads((tmp_path / "c" / "calibration.json").read_text())
    assert saved["calibration"] == deferral.calibration
    assert "Thresholds for deferral rates" in (tmp_path / "c" / "calibration.html").read_text()

    # On the prompts it was calibrated on, the rate is the measured one: greedy texts are the same.
    rate = deferral.calibration[1]["rate"]
    assert run(folder, "eval", "--deferral-rate", str(rate), "--output", str(tmp_path / "e")) == 0
    result = last_json(capsys)
    assert result["deferral_rate"] == pytest.approx(rate, abs=0.03)
    assert result["problems"] == 24
    report = (tmp_path / "e" / "report.html").read_text()
    assert "Which tokens are deferred" in report
    lines = (tmp_path / "e" / "generations.jsonl").read_text().splitlines()
    assert len(lines) == 25

    # Again: nothing is generated, the same result; another threshold is refused.
    assert run(folder, "eval", "--deferral-rate", str(rate), "--output", str(tmp_path / "e")) == 0
    assert last_json(capsys) == result
    assert (tmp_path / "e" / "generations.jsonl").read_text().splitlines() == lines
    assert run(folder, "eval", "--threshold", "0.9", "--output", str(tmp_path / "e")) == 2
    assert "other settings" in capsys.readouterr().err

    # One rate alone would be a table of one row.
    assert run(folder, "calibrate", "--rates", "0.2", "--output", str(tmp_path / "c")) == 0
    assert f"{deferral.calibration[-1]['rate']:.1%} are gone" in capsys.readouterr().out


def test_calibrated_texts_are_kept_and_used_again(folder, tmp_path, capsys, monkeypatch):
    options = ["--rates", "0.3", "--limit", "8", "--output", str(tmp_path), "--dry-run"]
    before = (folder / "base" / "config.json").read_text()
    assert run(folder, "calibrate", *options) == 0
    first = last_json(capsys)
    assert list((tmp_path / "texts").glob("learned-*.jsonl"))
    monkeypatch.setattr(CoLLMForCausalLM, "generate", lambda *_, **__: pytest.fail("generated again"))
    assert run(folder, "calibrate", *options) == 0
    assert last_json(capsys) == first
    assert (folder / "base" / "config.json").read_text() == before


def test_runs_of_a_calibration_serve_other_rates_too(folder, tmp_path, capsys, monkeypatch):
    def calibrate(*rates: str) -> dict:
        options = ["--limit", "8", "--output", str(tmp_path), "--dry-run", "--tolerance", "0.05"]
        assert run(folder, "calibrate", "--rates", *rates, *options) == 0
        return json.loads((tmp_path / "calibration.json").read_text())

    both = calibrate("0.2", "0.4")
    monkeypatch.setattr(CoLLMForCausalLM, "generate", lambda *_, **__: pytest.fail("generated again"))
    assert calibrate("0.4")["calibration"] == both["calibration"][1:]
    assert len(capsys.readouterr().out.split("known already")) == len(both["runs"])


def test_calibrate_by_metric_and_by_roc(folder, tmp_path, capsys):
    few = ["--rates", "0.3", "--limit", "12", "--dry-run", "--output"]
    assert run(folder, "calibrate", *few, str(tmp_path / "m"), "--metric", "gsm8k") == 0
    saved = json.loads((tmp_path / "m" / "calibration.json").read_text())
    assert saved["threshold"] in [point["threshold"] for point in saved["by_metric"]["points"]]
    assert run(folder, "calibrate", *few, str(tmp_path / "r"), "--roc") == 0
    saved = json.loads((tmp_path / "r" / "calibration.json").read_text())
    assert saved["threshold"] == saved["roc"]["youden"]["threshold"]
    assert 0 <= saved["roc"]["auc"] <= 1
    assert "<svg" in (tmp_path / "r" / "calibration.html").read_text()
    assert run(folder, "calibrate", *few, str(tmp_path / "x"), "--roc", "--metric", "gsm8k") == 2
    assert "metric and roc" in capsys.readouterr().err


def test_calibrate_says_early_that_it_cannot_save_or_measure(folder, capsys, monkeypatch):
    assert main(["calibrate", "org/name", "--data", str(folder / "data.jsonl")]) == 2
    assert "hf download" in capsys.readouterr().err
    monkeypatch.setattr("collm.evaluation.options.load_team", lambda *_: pytest.fail("loaded"))
    assert run(folder, "calibrate", "--metric", "gsm8") == 2
    assert 'Did you mean "gsm8k"' in capsys.readouterr().err


def test_a_rate_that_no_run_comes_near_leaves_the_nearest_as_the_default(folder, capsys):
    goal = ["--rates", "0.3", "--target-rate", "0.301", "--tolerance", "0", "--limit", "6", "--dry-run"]
    assert run(folder, "calibrate", *goal) == 0
    printed = capsys.readouterr().out
    said = json.loads(printed.strip().splitlines()[-1])
    assert "no run came within the tolerance of 30.1%" in printed
    rates = {float(rate): threshold for rate, threshold in said["rates"].items()}
    assert said["threshold"] == rates[min(rates, key=lambda rate: abs(rate - 0.301))]


def test_a_table_is_saved_before_the_goal_is_worked_out(folder, tmp_path, capsys):
    base = save_plain(CoLLMForCausalLM.from_pretrained(folder / "base"), tmp_path / "base")
    save_plain(tiny_model(), tmp_path / "twin")  # never differs from the base: there is no ROC
    options = ["--assistant", str(tmp_path / "twin"), "--data", str(folder / "data.jsonl"), "--task", "gsm8k"]
    few = ["--max-new-tokens", "8", "--limit", "6", "--rates", "0.3", "--tolerance", "0.05"]
    before = CoLLMForCausalLM.from_pretrained(base).config.deferral
    assert main(["calibrate", base, *options, *few, "--roc"]) == 2
    assert "needs both kinds of tokens" in capsys.readouterr().err
    deferral = CoLLMForCausalLM.from_pretrained(base).config.deferral
    assert [row["texts"] for row in deferral.calibration] == [6]
    assert deferral.threshold == before.threshold


def test_roc_on_engines_is_that_of_the_assistant_that_wrote(folder, tmp_path, capsys):
    model = CoLLMForCausalLM.from_pretrained(folder / "base")
    model.config.deferral.assistants = ["org/another"]
    base = save_plain(model, tmp_path / "base")
    options = ["--assistant", str(folder / "big"), "--data", str(folder / "data.jsonl"), "--task", "gsm8k"]
    few = ["--max-new-tokens", "8", "--limit", "6", "--rates", "0.3", "--dry-run", "--roc", "--engine", "sessions"]
    assert main(["calibrate", base, *options, *few]) == 0
    assert "ROC: AUC" in capsys.readouterr().out


def test_each_model_alone(folder, tmp_path, capsys):
    for alone, name in (("base", "base"), ("assistant", "big")):
        assert run(folder, "eval", "--alone", alone, "--limit", "3", "--output", str(tmp_path / alone)) == 0
        assert last_json(capsys)["deferral_rate"] == 0
        assert name in (tmp_path / alone / "report.html").read_text()
        settings = json.loads((tmp_path / alone / "results.json").read_text())["settings"]
        assert settings["names"] == [name]


def test_perplexity_of_the_mixture(folder, tmp_path, capsys):
    assert run(folder, "eval", "--perplexity", "--output", str(tmp_path)) == 0
    result = last_json(capsys)
    assert result["texts"] == 24
    assert result["mixture"]["perplexity"] > 1
    # With d = 1/2 everywhere the mixture is the even one.
    model = CoLLMForCausalLM.from_pretrained(folder / "base")
    model.deferral_head.weight.data.zero_()
    save_plain(model, folder / "even")
    options = ["--assistant", str(folder / "big"), "--data", str(folder / "data.jsonl"), "--task", "gsm8k"]
    assert main(["eval", str(folder / "even"), *options, "--perplexity", "--output", str(tmp_path / "2")]) == 0
    even = last_json(capsys)
    assert even["mean_deferral_probability"] == 0.5
    assert even["base"] == result["base"]
    assert even["mixture"]["nats_per_token"] < max(
        even["base"]["nats_per_token"], even["assistant_1"]["nats_per_token"]
    )


@pytest.mark.parametrize(("template", "system_prompt"), [(True, "w3"), (False, None)])
def test_perplexity_is_of_the_answers_to_what_eval_asks(folder, tmp_path, template, system_prompt):
    from collm.commands.eval import _references
    from collm.evaluation.options import DataOptions

    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = tokenizer.chat_template if template else None
    files = {str(folder / "data.jsonl"): "gsm8k"}
    if template:
        turns = [{"role": role, "content": content} for role, content in (("user", "w1"), ("assistant", "w2"))]
        (tmp_path / "d.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
        (tmp_path / "e.jsonl").write_text('{"prompt": "w1 w2", "completion": " w3"}\n')
        files |= {str(tmp_path / name): None for name in ("d.jsonl", "e.jsonl")}
    for path, task in files.items():
        for instruction, raw in itertools.product((None, "w4 w5"), {False, path.endswith("e.jsonl")}):
            system = None if raw else system_prompt
            data = DataOptions(data=path, task=task, instruction=instruction, system_prompt=system, raw=raw)
            references = _references(data, tokenizer)
            for problem, (ids, labels) in zip(data.problems(tokenizer), references, strict=True):
                assert ids[: len(problem.prompt_ids)] == problem.prompt_ids
                assert [label == -100 for label in labels] == [t < len(problem.prompt_ids) for t in range(len(ids))]


def test_a_metric_is_needed(folder, tmp_path, capsys, monkeypatch):
    (tmp_path / "d.jsonl").write_text('{"prompt": "w1", "answer": "w2"}\n')
    common = ["eval", str(folder / "base"), "--assistant", str(folder / "big"), "--data", str(tmp_path / "d.jsonl")]
    assert main([*common, "--output", str(tmp_path / "o")]) == 2
    assert "no metric" in capsys.readouterr().err
    few = ["--metric", "exact_match", "--max-new-tokens", "4"]
    assert main([*common, "--output", str(tmp_path / "o"), *few]) == 0
    monkeypatch.setattr(CoLLMForCausalLM, "generate", lambda *_, **__: pytest.fail("generated"))
    few[1] = "bioasq"
    assert main([*common, "--output", str(tmp_path / "p"), *few]) == 2
    assert "Row 0: BioASQ has no question type" in capsys.readouterr().err


def test_the_number_of_assistants_is_checked(folder, tmp_path, capsys):
    two = ["--assistant", str(folder / "big"), "--output", str(tmp_path)]
    assert run(folder, "eval", *two) == 2
    assert "a head for 1 assistant; 2 given" in capsys.readouterr().err


def test_sampling_reproduces_with_its_seed(folder, tmp_path, capsys):
    texts = []
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        options = ["--temperature", "1.0", "--seed", seed, "--limit", "6", "--output", str(tmp_path / name)]
        assert run(folder, "eval", *options) == 0
        lines = (tmp_path / name / "generations.jsonl").read_text().splitlines()[1:]
        texts.append([json.loads(line)["token_ids"] for line in lines])
    assert texts[0] == texts[1] != texts[2]


def test_head_only_checkpoints_take_the_tokenizer_of_their_base(folder, tmp_path):
    from collm.checkpoints import save_head_only
    from collm.evaluation.loading import load_models

    model = CoLLMForCausalLM.from_pretrained(folder / "base")
    model.config.deferral.base_model = str(save_plain(tiny_model(), tmp_path / "plain"))
    save_head_only(model, tmp_path / "head")
    loaded = load_models(str(tmp_path / "head"), [str(folder / "big")])
    assert loaded.tokenizer.get_vocab() == tiny_tokenizer().get_vocab()
    assert torch.equal(loaded.model.deferral_head.weight, model.deferral_head.weight)


def texts_of(folder) -> list[tuple]:
    lines = (folder / "generations.jsonl").read_text().splitlines()[1:]
    rows = sorted(map(json.loads, lines), key=lambda row: row["id"])
    return [(row["token_ids"], row["source"], row["truncated"]) for row in rows]


@pytest.mark.parametrize(
    "options", [["--threshold", "0.5"], ["--router", "entropy:cut=1.0"], ["--alone", "base"], ["--alone", "assistant"]]
)
def test_engines_write_what_generate_writes(folder, tmp_path, capsys, options):
    for engine in ("transformers", "sessions"):
        where = ["--engine", engine, "--limit", "6", "--output", str(tmp_path / engine)]
        assert run(folder, "eval", *options, *where, "--dtype", "float32") == 0
    assert texts_of(tmp_path / "transformers") == texts_of(tmp_path / "sessions")


def test_engines_have_room_for_a_batch_and_start_for_a_text_alone(folder, tmp_path, monkeypatch):
    from collm.commands import serve

    started, start_engine = [], serve.start_engine
    monkeypatch.setattr(
        serve, "start_engine", lambda kind, arguments, *rest: started.append(arguments.max_running)
        or start_engine(kind, arguments, *rest),
    )  # fmt: skip
    for size in ("4", "300"):
        options = ["--batch-size", size, "--engine", "sessions", "--limit", "1", "--output", str(tmp_path / size)]
        assert run(folder, "eval", "--threshold", "0.5", *options) == 0
    assert started == [serve.Arguments.max_running] * 2 + [300] * 2

    assert run(folder, "eval", "--threshold", "0.5", *options) == 0  # every text is there
    assert len(started) == 4


@pytest.mark.parametrize("engine", ["transformers", "sessions"])
def test_the_assistant_alone_gets_the_bases_prompts_and_ends_as_it_learned_to(folder, tmp_path, capsys, engine):
    base, assistant, tokenizer = tiny_tokenizer(), tiny_model(seed=5), tiny_tokenizer()
    row = json.loads((folder / "data.jsonl").read_text().splitlines()[0])
    inputs = base.apply_chat_template(
        [{"role": "user", "content": row["question"]}], add_generation_prompt=True, return_tensors="pt"
    )
    ids = inputs["input_ids"] if not torch.is_tensor(inputs) else inputs
    free = assistant.generate(ids, max_new_tokens=16, do_sample=False)[0, ids.shape[1] :].tolist()
    assistant.generation_config.eos_token_id = free[5]
    save_plain(assistant, tmp_path / "big")
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path / "big")
    where = ["--engine", engine, "--limit", "1", "--output", str(tmp_path / "o"), "--dtype", "float32"]
    options = ["--assistant", str(tmp_path / "big"), "--alone", "assistant"]
    assert main(["eval", str(folder / "base"), "--data", str(folder / "data.jsonl"), "--task", "gsm8k",
                 "--max-new-tokens", "16", *options, *where]) == 0  # fmt: skip
    [(written, _, truncated)] = texts_of(tmp_path / "o")
    assert written == free[: free.index(free[5]) + 1]
    assert not truncated


@pytest.mark.parametrize("engine", ["transformers", "sessions"])
def test_an_answer_ends_where_a_model_reads_no_further(folder, tmp_path, capsys, engine):
    save_plain(tiny_model(seed=5, max_position_embeddings=40), tmp_path / "big")
    rows = [{"prompt": " ".join(f"w{i + 3}" for i in range(n)), "answer": "1"} for n in (8, 25, 28)]

    def evaluate(*options):
        (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        command = ["eval", str(folder / "base"), "--assistant", str(tmp_path / "big"), "--engine", engine]
        data = ["--data", str(tmp_path / "data.jsonl"), "--metric", "exact_match", "--max-new-tokens", "16"]
        return main([*command, *data, "--threshold", "0.5", "--raw", "--output", str(tmp_path / "o"), *options])

    assert evaluate() == 0
    assert [len(ids) for ids, *_ in texts_of(tmp_path / "o")] == [16, 15, 12]
    rows.append({"prompt": "w1 " * 40, "answer": "1"})
    assert evaluate("--first", "3", "--output", str(tmp_path / "p")) == 2
    assert "its prompt has 40 tokens, and the models read 40 at most" in capsys.readouterr().err


def test_calibration_through_engines(folder, tmp_path, capsys):
    results = []
    for engine in ("transformers", "sessions"):
        assert run(folder, "calibrate", "--rates", "0.3", "--limit", "6", "--dry-run", "--engine", engine) == 0
        results.append(last_json(capsys))
    assert results[0]["threshold"] == results[1]["threshold"]
    assert list(results[0]["rates"].values()) == pytest.approx(list(results[1]["rates"].values()), abs=1e-3)


def test_engines_refuse_combiners(folder, tmp_path, capsys):
    options = ["--combiner", "mixture", "--engine", "sessions", "--output", str(tmp_path)]
    assert run(folder, "eval", *options) == 2
    assert "whole distributions" in capsys.readouterr().err


@pytest.mark.parametrize("engine", ["transformers", "sessions"])
def test_a_threshold_and_a_rate_are_two_things(folder, tmp_path, capsys, engine):
    both = ["--threshold", "0.5", "--deferral-rate", "0.2", "--engine", engine, "--output", str(tmp_path)]
    assert run(folder, "eval", *both) == 2
    assert "say two things" in capsys.readouterr().err


def test_texts_of_an_engine_are_those_of_its_arguments(folder, tmp_path, capsys):
    def evaluate(arguments: str) -> int:
        common = ["--engine", "sessions", "--limit", "2", "--threshold", "0.5", "--output", str(tmp_path)]
        return run(folder, "eval", *common, "--assistant-engine-args", arguments)

    assert evaluate('{"dtype": "float32", "max_length": 60}') == 0
    assert evaluate('{"max_length":60,"dtype":"float32","name":"elsewhere","device":"cpu"}') == 0
    assert evaluate('{"dtype": "bfloat16", "max_length": 60}') == 2
    assert "assistant_engine_args" in capsys.readouterr().err
