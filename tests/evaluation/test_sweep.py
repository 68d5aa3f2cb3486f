from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from conftest import save_plain, tiny_collm, tiny_model, tiny_tokenizer

from collm.cli import main
from collm.commands.sweep import SweepOptions
from collm.errors import ConfigurationError
from collm.evaluation.loading import Team, num_parameters
from collm.evaluation.metrics import Score
from collm.evaluation.runner import ModelWriter, make_problems
from collm.evaluation.sweep import Sweep, add_comparisons


def parity_of_the_text(row, text, truncated=False) -> Score:
    """A metric that depends on every token, for models that know nothing."""
    return Score({"even": float(sum(map(ord, text)) % 2)}, text)


@pytest.fixture
def sweep(tmp_path):
    model = tiny_collm()
    model.deferral_head.weight.data.mul_(0.3)
    tokenizer = tiny_tokenizer()
    problems = make_problems([{"prompt": f"w{i} {i % 10} ="} for i in range(40)], tokenizer)
    assistant = tiny_model(seed=5)
    alone = [ModelWriter(one, tokenizer, max_new_tokens=24) for one in (model, assistant)]
    together = ModelWriter(model, tokenizer, [assistant], max_new_tokens=24)
    parameters = [num_parameters(model), num_parameters(assistant)]
    team = Team(model, tokenizer, ["small", "big"], together, alone, parameters)
    return Sweep(team, problems[20:], problems[:20], parity_of_the_text, tmp_path, {}, batch_size=20)


def test_points_have_the_rate_that_was_asked_and_every_control_its_own(sweep):
    methods = SweepOptions(output="").methods
    points = [point for method in methods for point in sweep.points(method, [0.3])]
    add_comparisons(points)
    by_method = {point["method"]: point for point in points}
    assert list(by_method) == methods
    for method in ("learned", "random", "entropy", "top_probability"):
        assert by_method[method]["rate"] == pytest.approx(0.3, abs=0.12)  # 20 short texts calibrate, 20 others report
        assert "over_random" in by_method[method] or method == "random"
    assert by_method["base"]["rate"] == 0
    assert by_method["assistant"]["rate"] == 1
    assert by_method["mixture"]["rate"] == by_method["contrastive"]["rate"] == 1
    base, assistant = by_method["base"]["active_parameters"], by_method["assistant"]["active_parameters"]
    assert by_method["learned"]["active_parameters"] == pytest.approx(
        base + by_method["learned"]["rate"] * assistant, rel=1e-6
    )
    json.dumps(points)


def test_the_oracle_writes_the_assistants_text_asking_only_where_they_differ(sweep):
    [assistant] = sweep.points("assistant", [])
    [oracle] = sweep.points("oracle", [])
    assert oracle["scores"] == assistant["scores"]
    base, big = sweep.team.model, sweep.team.writer.assistants[0]
    differ = total = 0
    for problem, generation in zip(sweep.problems, sweep.texts["assistant"], strict=True):
        ids = problem.prompt_ids + generation.token_ids
        with torch.no_grad():
            first = base(torch.tensor([ids])).logits[0].argmax(-1).tolist()
        for t in range(len(problem.prompt_ids), len(ids)):
            differ += first[t - 1] != ids[t]
            total += 1
    assert oracle["rate"] == pytest.approx(differ / total)

    # A router that knows the assistant's choice writes the same text at the same rate.
    def knows(context):
        prefix = torch.tensor([ids[: start + int(context.step[0])]])
        with torch.no_grad():
            wanted = int(big(prefix).logits[0, -1].argmax())
        return context.ask_where(context.base_logits.argmax(-1) != wanted)

    problem, generation = sweep.problems[0], sweep.texts["assistant"][0]
    ids, start = problem.prompt_ids + generation.token_ids, len(problem.prompt_ids)
    out = base.generate(
        torch.tensor([problem.prompt_ids]), assistant=big, router=knows, speculate=False, do_sample=False,
        max_new_tokens=24, return_dict_in_generate=True,
    )  # fmt: skip
    assert out.sequences[0, start:].tolist() == generation.token_ids


def test_proxy_tuning_needs_its_third_model(sweep):
    with pytest.raises(ConfigurationError, match="--untuned"):
        sweep.points("proxy_tuning", [])
    sweep.untuned = tiny_model(seed=9)
    [point] = sweep.points("proxy_tuning", [])
    assert point["rate"] == 1
    assert point["active_parameters"] == sum(sweep.team.parameters) + num_parameters(sweep.untuned)
    with pytest.raises(ConfigurationError, match='Did you mean "entropy"'):
        sweep.points("entropi", [])


def test_other_problems_calibrate(sweep):
    sweep.calibration = []
    with pytest.raises(ConfigurationError, match="not reported"):
        sweep.points("entropy", [0.2])
    sweep.team.model.config.deferral.calibration = [
        {"rate": 0.1, "threshold": 0.9},
        {"rate": 0.5, "threshold": 0.4},
    ]
    [point] = sweep.points("learned", [0.5])
    assert point["asked_rate"] == 0.5


def test_a_table_is_used_for_the_rates_that_it_has(sweep):
    sweep.team.model.config.deferral.calibration = [{"rate": 0.5, "threshold": 0.4}, {"rate": 0.6, "threshold": 0.3}]
    chosen = sweep.thresholds(sweep.trajectory("learned"), [0.2, 0.5])
    assert chosen[0.5] == 0.4
    assert chosen[0.2] > 0.4


@pytest.mark.parametrize("tolerance", [0.01, 0.0])  # without any, no rate is held, and a second try would try on
def test_texts_are_used_again_when_rates_are_added(sweep, tolerance, monkeypatch):
    sweep.tolerance = tolerance
    [before] = sweep.points("entropy", [0.3])
    again = replace(sweep)
    added, same = again.points("entropy", [0.1, 0.3])
    assert same == before
    assert added["rate"] < same["rate"]
    monkeypatch.setattr(ModelWriter, "write", lambda *_: (none for none in ()))
    assert replace(sweep).points("entropy", [0.1, 0.3]) == [added, same]


def test_a_rate_that_cannot_be_had_is_that_of_the_nearest_run(sweep, monkeypatch):
    rows = [{"rate": 0.0, "threshold": math.inf}, {"rate": 0.3, "threshold": 0.4}]  # where many scores are tied
    (sweep.folder / "calibration").mkdir()
    monkeypatch.setattr("collm.evaluation.sweep.calibrate_rates", lambda *_, **__: (rows, []))
    never, nearest = sweep.points("entropy", [0.1, 0.25])
    assert never["rate"] == 0
    assert sweep.thresholds(sweep.trajectory("entropy"), [0.1, 0.25]) == {0.1: math.inf, 0.25: 0.4}
    assert nearest["rate"] > 0


def test_comparison_is_by_the_asked_rate():
    def point(method, asked, scores):
        return {"method": method, "asked_rate": asked, "quality": sum(scores) / len(scores), "scores": scores}

    points = [
        point("base", None, [0.0] * 4),
        point("assistant", None, [1.0] * 4),
        point("random", 0.2, [0, 0, 0, 1]),
        point("random", 0.5, [1, 1, 1, 1]),
        point("learned", 0.2, [1, 1, 0, 1]),
    ]
    add_comparisons(points)
    assert points[-1]["recovered"] == 0.75
    assert points[-1]["over_random"]["difference"] == 0.5
    assert "over_random" not in points[0]
    assert "over_random" not in points[2]
    for p in points:
        p["scores"] += [None, None]  # questions of another kind
    add_comparisons(points)
    assert points[-1]["over_random"]["difference"] == 0.5


def test_methods_that_cannot_be_had_are_said_before_anything_is_loaded(tmp_path, capsys, monkeypatch):
    loaded = []

    def load_team(*arguments):
        loaded.append(arguments)
        raise ConfigurationError("loaded")

    monkeypatch.setattr("collm.evaluation.options.load_team", load_team)

    def sweep(*options):
        assert (
            main(["sweep", "base", "--data", "d.jsonl", "--metric", "gsm8k", "--output", str(tmp_path), *options]) == 2
        )
        return capsys.readouterr().err

    for engine, method, needed in (
        ("sessions", "mixture", "--engine transformers"),
        ("vllm", "margin", "--engine transformers"),
        ("transformers", "proxy_tuning", "--untuned"),
        ("transformers", "entropi", 'Did you mean "entropy"'),
    ):
        assert needed in sweep("--engine", engine, "--methods", "base", method)
    assert "--calibration-problems" in sweep("--methods", "entropy", "--calibration-problems", "0")
    assert not loaded
    assert "left out" not in sweep()
    [line] = [line for line in sweep("--engine", "sessions").splitlines() if "left out" in line]
    assert "mixture" in line
    assert "contrastive" in line
    assert "proxy_tuning" not in line
    assert len(loaded) == 2


def test_a_sweep_over_questions_of_several_kinds(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    model = tiny_collm()
    model.deferral_head.weight.data.mul_(0.3)
    save_plain(model, tmp_path / "base")
    save_plain(tiny_model(seed=5), tmp_path / "big")
    kinds = ({"type": "yesno", "exact_answer": "yes"}, {"type": "factoid", "exact_answer": [["w1"]]})
    questions = [{"body": f"w{i} ?", "ideal_answer": "w2", **kinds[i % 2]} for i in range(8)]
    (tmp_path / "d.json").write_text(json.dumps({"questions": questions}))
    command = [
        "sweep", str(tmp_path / "base"), "--assistant", str(tmp_path / "big"), "--data", str(tmp_path / "d.json"),
        "--task", "bioasq", "--max-new-tokens", "8", "--calibration-problems", "4", "--rates", "0.3",
        "--methods", "random", "learned", "--output", str(tmp_path / "o"),
    ]  # fmt: skip
    assert main(command) == 0
    points = json.loads((tmp_path / "o" / "sweep.json").read_text())["points"]
    assert [score is None for score in points[1]["scores"]] == [False, True, False, True]
    assert "over_random" in points[1]
    assert (tmp_path / "o" / "sweep.html").exists()


def test_the_command_writes_json_png_and_html_and_goes_on_where_it_was(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    model = tiny_collm()
    model.deferral_head.weight.data.mul_(0.3)
    save_plain(model, tmp_path / "base")
    save_plain(tiny_model(seed=5), tmp_path / "big")
    rows = [{"question": f"w{i} =", "answer": f"#### {i % 10}"} for i in range(16)]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = [
        "sweep", str(tmp_path / "base"), "--assistant", str(tmp_path / "big"), "--data", str(tmp_path / "d.jsonl"),
        "--task", "gsm8k", "--max-new-tokens", "12", "--calibration-problems", "8", "--rates", "0.3",
        "--methods", "base", "assistant", "learned", "random", "--output", str(tmp_path / "o"),
        "--weak-supervision", str(tmp_path / "base"), "--fine-tuned", str(tmp_path / "big"),
    ]  # fmt: skip
    assert main(command) == 0
    said = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    methods = [point["method"] for point in said["points"]]
    assert methods == ["base", "assistant", "learned", "random", "fine-tuned base", "weak supervision"]
    by_method = {point["method"]: point for point in said["points"]}
    assert by_method["weak supervision"]["quality"] == by_method["learned"]["quality"]
    assert by_method["fine-tuned base"]["quality"] == by_method["assistant"]["quality"]
    for name in ("sweep.json", "sweep.html", "sweep-rate.png", "sweep-parameters.png", "sweep-seconds.png"):
        assert (tmp_path / "o" / name).stat().st_size > 1000
    before = {path: path.read_bytes() for path in (tmp_path / "o" / "texts").rglob("*.jsonl")}
    assert main(command) == 0
    assert json.loads(capsys.readouterr().out.strip().splitlines()[-1]) == said
    assert {path: path.read_bytes() for path in (tmp_path / "o" / "texts").rglob("*.jsonl")} == before


def test_problems_of_another_file_set_thresholds(tmp_path, capsys):
    model = tiny_collm()
    model.deferral_head.weight.data.mul_(0.3)
    save_plain(model, tmp_path / "base")
    save_plain(tiny_model(seed=5), tmp_path / "big")
    rows = [json.dumps({"question": f"w{i} =", "answer": f"#### {i % 10}"}) + "\n" for i in range(16)]
    (tmp_path / "all.jsonl").write_text("".join(rows))
    (tmp_path / "second.jsonl").write_text("".join(rows[8:]))

    def points(data, *options):
        command = [
            "sweep", str(tmp_path / "base"), "--assistant", str(tmp_path / "big"), "--data", str(tmp_path / data),
            "--task", "gsm8k", "--max-new-tokens", "12", "--calibration-problems", "8", "--rates", "0.3",
            "--methods", "learned", "--output", str(tmp_path / f"of {data}"), *options,
        ]  # fmt: skip
        assert main(command) == 0
        return json.loads(capsys.readouterr().out.strip().splitlines()[-1])["points"]

    together = points("all.jsonl")
    apart = points("second.jsonl", "--calibration-data", str(tmp_path / "all.jsonl"))
    assert [point["rate"] for point in together] == [point["rate"] for point in apart]
    assert together[0]["quality"] == apart[0]["quality"]


def test_other_checkpoints_write_on_the_engine_of_the_sweep(tmp_path, capsys):
    save_plain(tiny_collm(), tmp_path / "base")
    save_plain(tiny_model(seed=5), tmp_path / "big")
    save_plain(tiny_model(seed=6), tmp_path / "tuned")
    rows = [{"question": f"w{i} =", "answer": f"#### {i % 10}"} for i in range(6)]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def texts(engine, tuned, output):
        command = [
            "sweep", str(tmp_path / "base"), "--assistant", str(tmp_path / "big"), "--data", str(tmp_path / "d.jsonl"),
            "--task", "gsm8k", "--max-new-tokens", "12", "--calibration-problems", "1", "--rates", "0.5",
            "--methods", "base", "--output", str(tmp_path / output), "--engine", engine, "--fine-tuned", tuned,
        ]  # fmt: skip
        status = main(command)
        lines = (tmp_path / output / "texts" / "fine-tuned-base.jsonl").read_text().splitlines()[1:]
        return status, {row["id"]: row["token_ids"] for row in map(json.loads, lines)}

    status, expected = texts("transformers", str(tmp_path / "tuned"), "a")
    assert status == 0
    assert len(expected) == 5
    assert texts("sessions", str(tmp_path / "tuned"), "b") == (0, expected)
    capsys.readouterr()
    # Texts of another fine-tuned base are not taken for this one's.
    assert texts("sessions", str(tmp_path / "big"), "b")[0] != 0
    assert "other settings (weights" in capsys.readouterr().err
    # Nor is a head without thresholds noticed after the other rows only.
    command = ["sweep", str(tmp_path / "base"), "--assistant", str(tmp_path / "big"), "--task", "gsm8k", "--data"]
    command += [str(tmp_path / "d.jsonl"), "--methods", "base", "learned", "--calibration-problems", "0", "--output"]
    assert main([*command, str(tmp_path / "c")]) == 2
    assert "collm calibrate" in capsys.readouterr().err
    assert not (tmp_path / "c" / "texts").exists()
