from __future__ import annotations

import json
import math
import textwrap

import pytest
import torch

pytest.importorskip("lm_eval")

from conftest import VOCAB_SIZE, save_plain, tiny_collm, tiny_model

from collm.cli import main
from collm.errors import CalibrationError

# The harness and what it imports warn about things that are not ours.
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("harness")
    save_plain(tiny_collm("llama", num_assistants=2), folder / "base")
    for k in (1, 2):
        save_plain(tiny_model("llama", seed=4 + k), folder / f"big{k}")
    return folder


@pytest.fixture(scope="module")
def harness(folder):
    from collm.evaluation.harness import CoLLMHarness

    return CoLLMHarness(
        str(folder / "base"), f"{folder / 'big1'};{folder / 'big2'}", threshold=0.5, batch_size=3, device="cpu"
    )


def oracle(harness, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    """Token by token, whole forward passes, explicit sums in float64."""
    total, greedy = 0.0, True
    for n in range(len(continuation)):
        prefix = torch.tensor([context + continuation[:n]])
        with torch.no_grad():
            out = harness.model(prefix)
            models = [out.logits, *(a(prefix).logits for a in harness.assistants)]
        z = out.deferral_logits[0, -1].double()
        pi = torch.cat([z.new_zeros(1), z]).softmax(-1)
        mixture = sum(p * logits[0, -1].double().softmax(-1) for p, logits in zip(pi, models, strict=True))
        total += math.log(mixture[continuation[n]])
        greedy = greedy and int(mixture.argmax()) == continuation[n]
    return total, greedy


def test_loglikelihood_is_that_of_the_marginal_model(harness, monkeypatch):
    generator = torch.Generator().manual_seed(1)
    requests = []
    for n in range(8):
        ids = torch.randint(3, VOCAB_SIZE, (4 + 3 * n,), generator=generator).tolist()
        cut = 1 + n % 4
        requests.append((None, ids[:-cut], ids[-cut:]))
    # One whose continuation is what the mixture writes.
    context = requests[0][1]
    chosen = max(range(VOCAB_SIZE), key=lambda token: oracle(harness, context, [token])[0])
    requests.append((None, context, [chosen]))
    expected = [oracle(harness, context, continuation) for _, context, continuation in requests]
    for limit in (2**28, VOCAB_SIZE * 9):  # all at once, and in small batches
        monkeypatch.setattr("collm.evaluation.harness.LOGITS_PER_BATCH", limit)
        for (value, greedy), (wanted, wanted_greedy) in zip(
            harness._loglikelihood_tokens(requests, disable_tqdm=True), expected, strict=True
        ):
            assert value == pytest.approx(wanted, abs=1e-4)
            assert greedy == wanted_greedy
    assert expected[-1][1]


def test_contexts_longer_than_the_models_lose_their_beginning(harness):
    generator = torch.Generator().manual_seed(2)
    context = torch.randint(3, VOCAB_SIZE, (300,), generator=generator).tolist()
    [(value, _)] = harness._loglikelihood_tokens([(None, context, [7, 8])], disable_tqdm=True)
    wanted, _ = oracle(harness, context[-(harness.max_length - 1) :], [7, 8])  # the last token is not read
    assert value == pytest.approx(wanted, abs=1e-4)


def test_every_token_of_a_rolling_window_counts(harness, monkeypatch):
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    monkeypatch.setattr(harness, "_max_length", 40)
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(3, VOCAB_SIZE, (harness.max_length,), generator=generator).tolist()
    [window] = map(make_disjoint_window, get_rolling_token_windows(tokens, 1, harness.max_length, 1))
    assert len(window[0]) + len(window[1]) == harness.max_length + 1
    [(value, _)] = harness._loglikelihood_tokens([(None, *window)], disable_tqdm=True)
    wanted, _ = oracle(harness, *window)
    assert value == pytest.approx(wanted, abs=1e-4)


def test_an_automatic_batch_size_and_the_assistants_of_the_checkpoint(folder, harness, tmp_path):
    from collm import CoLLMForCausalLM
    from collm.evaluation.harness import CoLLMHarness

    model = CoLLMForCausalLM.from_pretrained(folder / "base")
    model.config.deferral.assistants = [str(folder / "big1"), str(folder / "big2")]
    automatic = CoLLMHarness(save_plain(model, tmp_path), batch_size="auto", device="cpu")
    requests = [(None, [4 + n, 5], [6, 7]) for n in range(5)]
    scores = [one._loglikelihood_tokens(requests, disable_tqdm=True) for one in (harness, automatic)]
    assert [value for value, _ in scores[1]] == pytest.approx([value for value, _ in scores[0]], abs=1e-5)


def test_generate_until_decodes_collaboratively_and_stops(harness):
    from lm_eval.api.instance import Instance

    def ask(until: list[str]) -> list[str]:
        requests = [
            Instance("generate_until", {}, (f"w{i} w1 =", {"until": until, "max_gen_toks": 10}), i) for i in range(4)
        ]
        return harness.generate_until(requests, disable_tqdm=True)

    texts = ask([])
    for i, text in enumerate(texts):
        ids = harness.tokenizer(f"w{i} w1 =", return_tensors="pt", add_special_tokens=False).input_ids
        out = harness.model.generate(
            ids, assistant=harness.assistants, threshold=0.5, max_new_tokens=10, do_sample=False,
            return_dict_in_generate=True,
        )  # fmt: skip
        assert text == harness.tokenizer.decode(out.sequences[0, ids.shape[1] :], skip_special_tokens=True)
    stop = harness.tokenizer.convert_ids_to_tokens(
        harness.tokenizer(texts[0], add_special_tokens=False).input_ids[4:5] or [4]
    )[0]
    for text, whole in zip(ask([stop]), texts, strict=True):
        assert text == whole.split(stop)[0]


def test_a_rate_without_a_table_is_refused_before_any_work(folder):
    from collm.evaluation.harness import CoLLMHarness

    with pytest.raises(CalibrationError, match="collm calibrate"):
        CoLLMHarness(str(folder / "base"), f"{folder / 'big1'};{folder / 'big2'}", deferral_rate=0.2, device="cpu")


@pytest.mark.slow  # the harness reads the thousands of its own task files first
def test_the_command_runs_local_tasks_of_both_kinds(folder, tmp_path, capsys):
    (tmp_path / "data.jsonl").write_text(
        "".join(json.dumps({"question": f"w{i} =", "choices": ["w1", "w2"], "answer": i % 2}) + "\n" for i in range(6))
    )
    header = f"""
        dataset_path: json
        dataset_kwargs: {{data_files: {{test: {tmp_path / "data.jsonl"}}}}}
        test_split: test
        doc_to_text: "{{{{question}}}}"
        """
    (tmp_path / "choice.yaml").write_text(
        textwrap.dedent(header)
        + textwrap.dedent(
            """
            task: tiny_choice
            output_type: multiple_choice
            doc_to_choice: choices
            doc_to_target: answer
            metric_list: [{metric: acc}]
            """
        )
    )
    (tmp_path / "generate.yaml").write_text(
        textwrap.dedent(header)
        + textwrap.dedent(
            """
            task: tiny_generate
            output_type: generate_until
            doc_to_target: "{{choices[answer]}}"
            generation_kwargs: {until: ["\\n"], max_gen_toks: 6}
            metric_list: [{metric: exact_match}]
            """
        )
    )
    arguments = f"pretrained={folder / 'base'},assistant={folder / 'big1'};{folder / 'big2'},threshold=0.5"
    code = main(
        ["lm-eval", "--model_args", arguments, "--include_path", str(tmp_path), "--tasks", "tiny_choice,tiny_generate",
         "--batch_size", "2", "--output_path", str(tmp_path / "out")]
    )  # fmt: skip
    assert code == 0
    assert "tiny_choice" in capsys.readouterr().out
    [path] = (tmp_path / "out").rglob("results_*.json")
    results = json.loads(path.read_text())["results"]
    assert 0 <= results["tiny_choice"]["acc,none"] <= 1
    assert "exact_match,none" in results["tiny_generate"]
