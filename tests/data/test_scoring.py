from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ARCHITECTURES, VOCAB_SIZE, save_plain, tiny_config, tiny_model, tiny_tokenizer
from datasets import Dataset
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, BertConfig, BertLMHeadModel

from collm import cli
from collm.data import scoring
from collm.data.chat import Chat
from collm.data.formatting import format_rows
from collm.data.scoring import AssistantSettings, load_scored, plan_batches, score_batch, score_dataset
from collm.errors import (
    AssistantError,
    ConfigurationError,
    DataFormatError,
    ScoreMismatchError,
    TokenizerMismatchError,
    UnsupportedModelError,
)
from collm.evaluation.likelihood import base_uncertainty


def conversations(rows: int) -> list[dict]:
    """Ragged rows: prompts of 1 to 11 words, answers of 1 to 7."""
    return [
        {
            "messages": [
                {"role": "user", "content": " ".join(f"w{i * j % 30}" for j in range(i % 11 + 1))},
                {"role": "assistant", "content": " ".join(f"w{i * j * 3 % 30}" for j in range(i % 7 + 1))},
            ]
        }
        for i in range(rows)
    ]


def formatted(rows: int = 12, **options) -> Dataset:
    return format_rows(Dataset.from_list(conversations(rows)), tiny_tokenizer(), **options)[0]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("assistants")
    return [save_plain(tiny_model("qwen2", 1), folder / "one"), save_plain(tiny_model("gemma2", 2), folder / "two")]


@torch.no_grad()
def oracle(model, input_ids: list[int], labels: list[int]) -> tuple[list[float], list[bool]]:
    """One target at a time, no batch, no cache, all logits: what scoring has to equal."""
    logprobs, correct = [], []
    for t, label in enumerate(labels):
        if t > 0 and label != -100:
            logits = model(torch.tensor([input_ids[:t]])).logits[0, -1].double()
            logprobs.append((logits[label] - logits.exp().sum().log()).item())
            correct.append(logits.argmax().item() == label)
    return logprobs, correct


def assert_scores_equal_oracle(scored: Dataset, assistant: int, model, inputs: Dataset | None = None) -> None:
    for row, seen in zip(scored, inputs or scored, strict=True):
        logprobs, correct = oracle(model, seen["input_ids"], seen["labels"])
        targets = [t for t, label in enumerate(row["labels"]) if label != -100]
        torch.testing.assert_close(
            torch.tensor([row["assistant_logprobs"][t][assistant] for t in targets]),
            torch.tensor(logprobs),
            atol=2e-5,
            rtol=1e-5,
        )
        assert [row["assistant_correct"][t][assistant] for t in targets] == correct
        for t in set(range(len(row["labels"]))) - set(targets):
            assert row["assistant_logprobs"][t][assistant] == 0.0
            assert row["assistant_correct"][t][assistant] is False


# ---- Numbers


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_padded_batch_equals_the_oracle_for_every_architecture(architecture, monkeypatch):
    monkeypatch.setattr(scoring, "LOGITS_PER_CHUNK", 5 * VOCAB_SIZE)
    model = tiny_model(architecture, seed=3)
    rows = [formatted(9)[i] for i in (2, 5, 8)]
    logprobs, correct = scoring.TransformersScorer(model)([r["input_ids"] for r in rows], [r["labels"] for r in rows])
    expected = [oracle(model, row["input_ids"], row["labels"]) for row in rows]
    torch.testing.assert_close(logprobs, torch.tensor([x for o in expected for x in o[0]]), atol=2e-5, rtol=1e-5)
    assert correct.tolist() == [x for o in expected for x in o[1]]


@pytest.mark.parametrize("architecture", ["llama4_text", "mllama"])
def test_a_text_model_without_a_base_model_prefix_of_its_own(architecture):
    """Its `base_model` is the model itself: the decoder is found as in a deferral model."""
    small = {name: value for name, value in tiny_config().to_diff_dict().items() if name != "model_type"}
    config = {
        "llama4_text": {**small, "intermediate_size_mlp": 48, "num_local_experts": 2},
        "mllama": {"text_config": {**small, "cross_attention_layers": [1]}},
    }[architecture]
    config = AutoConfig.for_model(architecture, **config)
    model = AutoModelForCausalLM.from_config(config).eval()
    rows = [formatted(9)[i] for i in (2, 5)]
    texts = [(row["input_ids"], row["labels"]) for row in rows]
    logprobs, _ = scoring.TransformersScorer(model)(*map(list, zip(*texts, strict=True)))
    expected = [x for ids, labels in texts for x in oracle(model, ids, labels)[0]]
    torch.testing.assert_close(logprobs, torch.tensor(expected), atol=2e-5, rtol=1e-5)
    assert len(base_uncertainty(model, texts)) == 2


def test_two_assistants_are_scored_side_by_side(checkpoints, tmp_path):
    scored = score_dataset(formatted(), tiny_tokenizer(), checkpoints, tmp_path / "out", batch_tokens=40)
    assert len(scored) == 12
    for k, checkpoint in enumerate(checkpoints):
        assert_scores_equal_oracle(scored, k, AutoModelForCausalLM.from_pretrained(checkpoint))
    assert torch.tensor(scored[3]["assistant_logprobs"]).shape == (len(scored[3]["input_ids"]), 2)


def test_correct_is_the_argmax_even_where_two_tokens_nearly_tie():
    model, ids = tiny_model("llama", seed=4), torch.randint(3, VOCAB_SIZE, (1, 100))
    favourite = model(ids).logits[0, :-1].argmax(-1).mode().values.item()
    twin = (favourite + 1) % VOCAB_SIZE
    model.lm_head.weight.data[twin] = model.lm_head.weight.data[favourite] * (1 + 1e-6)
    best = model(ids).logits[0, :-1].argmax(-1)
    both = {favourite, twin}
    assert both & set(best.tolist())
    for token in both:  # "log-probability is close to the maximum" would call both the first choice
        labels = torch.cat([torch.tensor([[-100]]), torch.full((1, 99), token)], dim=1)
        assert torch.equal(score_batch(model, ids, labels)[1], best == token)


def test_lm_head_runs_once_per_target_and_a_chunk_at_a_time(monkeypatch):
    monkeypatch.setattr(scoring, "LOGITS_PER_CHUNK", 2 * VOCAB_SIZE)
    model, seen = tiny_model("llama"), []
    model.lm_head.register_forward_hook(lambda _, args, __: seen.append(args[0].shape[:-1].numel()))
    rows = [formatted(9)[i] for i in (2, 5, 8)]
    logprobs, _ = scoring.TransformersScorer(model)([r["input_ids"] for r in rows], [r["labels"] for r in rows])
    assert sum(seen) == len(logprobs)
    assert max(seen) <= 4


def test_bfloat16_is_close_and_returns_float32():
    rows = [formatted(9)[i] for i in (2, 5)]
    inputs = [r["input_ids"] for r in rows], [r["labels"] for r in rows]
    exact, _ = scoring.TransformersScorer(tiny_model("llama", initializer_range=0.05))(*inputs)
    rough, _ = scoring.TransformersScorer(tiny_model("llama", initializer_range=0.05, dtype=torch.bfloat16))(*inputs)
    assert rough.dtype == torch.float32
    torch.testing.assert_close(rough, exact, atol=0.1, rtol=0.02)


def test_dtype_is_what_the_assistant_is_loaded_in(checkpoints):
    for dtype in ("float32", "bfloat16"):
        scorer = scoring.load_scorer(AssistantSettings(checkpoints[0], dtype=dtype), torch.device("cpu"))
        assert scorer.model.dtype == getattr(torch, dtype)


def test_fully_masked_rows_and_first_tokens_have_no_scores(checkpoints, tmp_path):
    data = Dataset.from_list(
        [
            {"input_ids": [5, 6, 7], "labels": [-100, -100, -100]},
            {"input_ids": [5, 6, 7], "labels": [5, 6, 7]},  # nothing predicts the 5
            {"input_ids": [5], "labels": [-100]},
        ]
    )
    scored = score_dataset(data, tiny_tokenizer(), checkpoints[:1], tmp_path / "out", batch_tokens=3)
    assert scored[0]["assistant_logprobs"] == [[0.0]] * 3
    assert [x[0] < 0 for x in scored[1]["assistant_logprobs"]] == [False, True, True]
    assert scored[2]["assistant_correct"] == [[False]]
    assert json.loads((tmp_path / "out" / scoring.SCORES_FILE).read_text())["targets"] == 2


def test_an_assistants_own_prompt_is_what_it_reads(checkpoints, tmp_path):
    own = Chat(tiny_tokenizer(), system_prompt="w7 w8 w9")
    data = formatted(6, assistant_chats=[None, own])
    scored = score_dataset(data, tiny_tokenizer(), checkpoints, tmp_path / "out", batch_tokens=64)
    models = [AutoModelForCausalLM.from_pretrained(checkpoint) for checkpoint in checkpoints]
    assert_scores_equal_oracle(scored, 0, models[0])
    inputs = Dataset.from_list(
        [{name: row[f"assistant_{name}"][1] for name in ("input_ids", "labels")} for row in data]
    )
    assert all(len(mine) > len(shared) for mine, shared in zip(inputs["input_ids"], data["input_ids"], strict=True))
    assert_scores_equal_oracle(scored, 1, models[1], inputs)
    assert scored.column_names == ["input_ids", "labels", "assistant_logprobs", "assistant_correct"]


def test_a_padded_vocabulary_of_another_size_is_fine(tmp_path):
    padded = save_plain(tiny_model("llama", vocab_size=VOCAB_SIZE + 32), tmp_path / "padded")
    scored = score_dataset(formatted(4), tiny_tokenizer(), [padded], tmp_path / "out")
    assert_scores_equal_oracle(scored, 0, AutoModelForCausalLM.from_pretrained(padded))


def test_other_columns_and_a_trailing_slash_change_nothing(checkpoints, tmp_path):
    data = formatted(4)
    plain = score_dataset(data, tiny_tokenizer(), checkpoints[:1], tmp_path / "plain")
    more = data.add_column("id", ["a", "b", "c", "d"]).select([0, 1, 2, 3])
    scored = score_dataset(more, tiny_tokenizer(), checkpoints[:1], f"{tmp_path}/new/folder/")
    assert scored.to_list() == plain.to_list()
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["folder"]


# ---- Plan


def test_batches_keep_similar_lengths_together_within_the_budget():
    lengths = [3, 9, 4, 9, 1, 30, 3]
    plan = plan_batches(lengths, batch_tokens=18)
    assert plan == [[5], [1, 3], [2, 0, 6, 4]]
    assert sorted(row for batch in plan for row in batch) == list(range(7))


# ---- Refusals


def test_another_vocabulary_is_refused_before_anything_is_loaded(checkpoints, tmp_path, monkeypatch):
    other = shutil.copytree(checkpoints[0], tmp_path / "other")
    text = (other / "tokenizer.json").read_text()
    (other / "tokenizer.json").write_text(text.replace('"w3"', '"v3"'))
    monkeypatch.setattr(scoring, "load_scorer", lambda *_: pytest.fail("an assistant was loaded"))
    with pytest.raises(TokenizerMismatchError, match=r"token id \d+: 'w3' in the base, 'v3' in .*other"):
        score_dataset(formatted(4), tiny_tokenizer(), [checkpoints[0], str(other)], tmp_path / "out")
    assert not (tmp_path / "out.partial").exists()


def test_rows_that_an_assistant_cannot_read_are_refused_before_it_is_loaded(tmp_path, monkeypatch):
    short = save_plain(tiny_model("llama", max_position_embeddings=16), tmp_path / "short")
    small = save_plain(tiny_model("llama", vocab_size=40), tmp_path / "small")
    monkeypatch.setattr(scoring, "load_scorer", lambda *_: pytest.fail("an assistant was loaded"))
    with pytest.raises(AssistantError, match=r"\d+ rows are longer than the 16 tokens.*max_length=16 or less"):
        score_dataset(formatted(11), tiny_tokenizer(), [short], tmp_path / "out")
    with pytest.raises(AssistantError, match=r"has the token id \d+; the assistant .*small\" knows ids below 40"):
        score_dataset(formatted(11), tiny_tokenizer(), [small], tmp_path / "out")


def test_models_that_cannot_be_assistants(tmp_path):
    config = BertConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=VOCAB_SIZE
    )
    encoder = save_plain(BertLMHeadModel(config), tmp_path / "encoder")
    with pytest.raises(UnsupportedModelError, match="encoder"):
        score_dataset(formatted(2), tiny_tokenizer(), [encoder], tmp_path / "out")
    tiny_tokenizer().save_pretrained(tmp_path / "only_tokenizer")
    with pytest.raises(AssistantError, match=r'There is no assistant ".*only_tokenizer"'):
        score_dataset(formatted(2), tiny_tokenizer(), [str(tmp_path / "only_tokenizer")], tmp_path / "out")


def test_damaged_weights_are_an_error_and_what_is_done_stays(checkpoints, tmp_path):
    damaged = shutil.copytree(checkpoints[0], tmp_path / "damaged")
    weights = damaged / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(AssistantError, match=r'The assistant ".*damaged" cannot be loaded'):
        score_dataset(formatted(4), tiny_tokenizer(), [checkpoints[0], str(damaged)], tmp_path / "out")
    assert list((tmp_path / "out.partial" / "assistant-0").glob("*.safetensors"))


def test_quantisation_that_cannot_run_says_what_to_install(checkpoints, tmp_path):
    with pytest.raises(ConfigurationError, match=r'quantization is "4-bit"; it can be 4bit, 8bit. Did you mean "4bit"'):
        AssistantSettings(checkpoints[0], quantization="4-bit")
    if importlib.util.find_spec("bitsandbytes"):
        pytest.skip("bitsandbytes is installed")
    with pytest.raises(AssistantError, match="pip install bitsandbytes"):
        score_dataset(
            formatted(2), tiny_tokenizer(), [AssistantSettings(checkpoints[0], quantization="4bit")], tmp_path / "out"
        )


def test_nan_is_an_error(checkpoints, tmp_path):
    broken = shutil.copytree(checkpoints[0], tmp_path / "broken")
    tensors = load_file(broken / "model.safetensors")
    tensors["model.norm.weight"][0] = float("nan")
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(AssistantError, match='broken" gave a log-probability that is not a finite number'):
        score_dataset(formatted(4), tiny_tokenizer(), [str(broken)], tmp_path / "out")


def test_unformatted_data_and_foreign_folders(checkpoints, tmp_path):
    with pytest.raises(DataFormatError, match="has no input_ids and no labels; format it"):
        score_dataset(Dataset.from_list([{"text": "x"}]), tiny_tokenizer(), checkpoints, tmp_path / "out")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    with pytest.raises(ConfigurationError, match="exists and is not a scored data set"):
        score_dataset(formatted(2), tiny_tokenizer(), checkpoints, tmp_path / "mine")
    with pytest.raises(DataFormatError, match="has no rows"):
        score_dataset(formatted(2).select([]), tiny_tokenizer(), checkpoints, tmp_path / "out")
    with pytest.raises(ConfigurationError, match="at least one assistant"):
        score_dataset(formatted(2), tiny_tokenizer(), [], tmp_path / "out")


# ---- Results of different things are not mixed


def retrained(checkpoint: str, folder: Path) -> str:
    """The same names and sizes, other weights."""
    shutil.copytree(checkpoint, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][3] += 0.5
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)


@pytest.mark.parametrize("finished", [True, False], ids=["finished", "unfinished"])
def test_scores_of_something_else_are_not_mixed(checkpoints, tmp_path, finished):
    assistant = shutil.copytree(checkpoints[0], tmp_path / "assistant")
    out, data, tokenizer = tmp_path / "out", formatted(4), tiny_tokenizer()
    score_dataset(data, tokenizer, [str(assistant)], out)
    if not finished:
        manifest = json.loads((out / scoring.SCORES_FILE).read_text())
        shutil.rmtree(out)
        (tmp_path / "out.partial").mkdir()
        (tmp_path / "out.partial" / "manifest.json").write_text(json.dumps(manifest))

    def refused(match: str, data=data, assistants=(str(assistant),), **options):
        with pytest.raises(ScoreMismatchError, match=match):
            score_dataset(data, tokenizer, assistants, out, **options)

    refused("different: data ", data=formatted(5).select(range(4)).select([1, 0, 2, 3]))
    refused("different: number of assistants", assistants=[str(assistant), checkpoints[1]])
    refused("assistant 1's dtype", assistants=[AssistantSettings(str(assistant), dtype="bfloat16")])
    refused("different: batch_tokens", batch_tokens=64)
    refused(r"assistant 1's name .* assistant 1's weights", assistants=[checkpoints[1]])
    shutil.rmtree(assistant)
    retrained(checkpoints[0], assistant)
    refused("different: assistant 1's weights")
    shutil.rmtree(assistant)
    shutil.copytree(checkpoints[0], assistant)
    tokenizer.add_special_tokens({"pad_token": "<padding>"})
    refused("different: tokenizer")


def test_a_finished_folder_is_returned_without_work(checkpoints, tmp_path, monkeypatch):
    arguments = (formatted(4), tiny_tokenizer(), checkpoints, tmp_path / "out")
    first = score_dataset(*arguments).to_list()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    (tmp_path / "out.partial").mkdir()  # killed between the last two steps
    monkeypatch.setattr(scoring, "load_scorer", lambda *_: pytest.fail("an assistant was loaded"))
    assert score_dataset(*arguments).to_list() == first
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == before
    assert not (tmp_path / "out.partial").exists()


def test_load_scored_checks_the_tokenizer(checkpoints, tmp_path):
    out = tmp_path / "out"
    score_dataset(formatted(4), tiny_tokenizer(), checkpoints, out)
    data, scores = load_scored(out, tiny_tokenizer())
    assert (len(data), scores["rows"], len(scores["assistants"])) == (4, 4, 2)
    targets = [(row, t) for row in data for t, label in enumerate(row["labels"]) if label != -100]
    assert scores["targets"] == len(targets)
    mean = sum(row["assistant_logprobs"][t][1] for row, t in targets) / len(targets)
    assert scores["mean_logprob"][1] == pytest.approx(mean)
    other = tiny_tokenizer()
    other.add_special_tokens({"pad_token": "<padding>"})
    with pytest.raises(ScoreMismatchError, match="scored with another tokenizer"):
        load_scored(out, other)
    (tmp_path / "half.partial").mkdir()
    with pytest.raises(DataFormatError, match="Scoring was not finished"):
        load_scored(tmp_path / "half")


# ---- Killed and resumed


def command(folder: Path, checkpoints: list[str], output: str, *options: str) -> list[str]:
    rows = folder / "rows.jsonl"
    if not rows.exists():
        rows.write_text("".join(json.dumps(row) + "\n" for row in conversations(150)))
    return [
        "score", str(rows), "--assistant", checkpoints[0], "--assistant", checkpoints[1],
        "--output", str(folder / output), "--batch-tokens", "24", *options,
    ]  # fmt: skip


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def shards(partial: Path) -> dict[Path, int]:
    return {path: path.stat().st_ino for path in partial.glob("assistant-*/*.safetensors")}


def kill_when(arguments: list[str], reached) -> None:
    """Start the command in a process of its own and kill it (SIGKILL) as soon as `reached()`."""
    root = Path(scoring.__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, "-m", "collm.cli", *arguments], env=environment, stderr=subprocess.PIPE)
    try:
        while not reached():
            if process.poll() is not None:
                pytest.fail(f"ended before it was killed: {process.stderr.read().decode()[-2000:]}")
            time.sleep(0.0005)
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()


@pytest.fixture
def _datasets_cache(monkeypatch, tmp_path):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))


MOMENTS = {
    "at the start": lambda partial: (partial / "manifest.json").exists(),
    "after some batches": lambda partial: len(shards(partial)) > 5,
    "between the assistants": lambda partial: (partial / "assistant-1").exists(),
    "in the second assistant": lambda partial: len(list(partial.glob("assistant-1/*.safetensors"))) > 20,
    "while assembling": lambda partial: (partial / "dataset").exists(),
    "while moving": lambda partial: partial.with_suffix("").exists(),
}


@pytest.mark.usefixtures("_datasets_cache")
@pytest.mark.parametrize(
    "moments",
    [
        ["in the second assistant"],
        pytest.param(["at the start", "after some batches", "in the second assistant"], marks=pytest.mark.slow),
        pytest.param(["between the assistants", "while assembling"], marks=pytest.mark.slow),
        pytest.param(["while moving"], marks=pytest.mark.slow),
    ],
    ids=" and ".join,
)
def test_killed_at_any_point_it_loses_and_repeats_nothing(checkpoints, tmp_path, monkeypatch, capsys, moments):
    batches, ask = [], scoring._ask
    monkeypatch.setattr(scoring, "_ask", lambda *arguments: (batches.append(1), ask(*arguments))[1])
    assert cli.main(command(tmp_path, checkpoints, "whole")) == 0
    assert capsys.readouterr().out.strip().splitlines()[-1] == str(tmp_path / "whole")
    total = len(batches)

    again, partial = command(tmp_path, checkpoints, "killed"), tmp_path / "killed.partial"
    done: dict[Path, int] = {}
    for moment in moments:
        kill_when(again, lambda moment=moment: MOMENTS[moment](partial))
        now = shards(partial)
        assert done.items() <= now.items() or (tmp_path / "killed").exists()  # still there, not written again
        done = now

    batches.clear()
    finished = (tmp_path / "killed").exists()
    assert cli.main(again) == 0
    assert len(batches) == (0 if finished else total - len(done))
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    assert not partial.exists()


@pytest.mark.slow
@pytest.mark.usefixtures("_datasets_cache")
def test_two_processes_give_the_same_bytes_as_one(checkpoints, tmp_path):
    assert cli.main(command(tmp_path, checkpoints, "one")) == 0
    root = Path(scoring.__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    launch = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--cpu",
        "--num_processes",
        "2",
        "--num_machines",
        "1",
    ]
    launch += ["--main_process_port", "0", "-m", "collm.cli", *command(tmp_path, checkpoints, "two")]
    finished = subprocess.run(launch, env=environment, capture_output=True, text=True, timeout=300)
    assert finished.returncode == 0, finished.stderr[-3000:]
    assert contents(tmp_path / "two") == contents(tmp_path / "one")


# ---- Command line


@pytest.mark.usefixtures("_datasets_cache")
def test_the_command_reports_and_refuses(checkpoints, tmp_path, capsys):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in conversations(6)))
    run = ["score", str(rows), "--assistant", *checkpoints, "--output", str(tmp_path / "out"), "--max-length", "12"]
    own = ["--assistant-chat-template", "own", "shared", "--assistant-system-prompt", "w1", ""]
    assert cli.main([*run, *own]) == 0
    shown = capsys.readouterr()
    assert "6 rows: " in shown.err
    assert "truncated" in shown.err
    assert shown.out.strip().splitlines()[-1] == str(tmp_path / "out")
    assert load_scored(tmp_path / "out")[1]["formatting"]["rows"] == 6

    assert cli.main([*run, "--assistant-system-prompt", "w1"]) == 2
    assert "assistant_system_prompt has 1 values for 2 assistants" in capsys.readouterr().err
    assert cli.main([*run, "--max-length", "11"]) == 2
    assert "different: data" in capsys.readouterr().err
