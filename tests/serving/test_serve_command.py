"""`collm serve` as a process: engines from folders, a URL as assistant, SIGTERM; and which vLLM it accepts."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time

import httpx
import pytest

from collm import CoLLMForCausalLM
from collm.checkpoints import save_head_only
from collm.commands import serve
from collm.errors import CoLLMError, ConfigurationError, TokenizerMismatchError, UnsupportedModelError
from tests.conftest import save_plain, tiny_collm, tiny_model, tiny_tokenizer
from tests.engines.oracle import oracle


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    base, helper = tiny_collm(), tiny_model(seed=1)
    base.generation_config.eos_token_id = 2
    return save_plain(base, root / "base"), save_plain(helper, root / "helper"), base, helper


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def start(*arguments):
    port = free_port()
    engine = [] if "--engine" in arguments else ["--engine", "transformers"]
    command = [sys.executable, "-m", "collm.cli", "serve", "--port", str(port), *engine, *arguments]
    process = subprocess.Popen(command, env={**os.environ, "HF_HUB_OFFLINE": "1"}, stderr=subprocess.STDOUT)
    url = f"http://127.0.0.1:{port}"
    for _ in range(1800):
        if process.poll() is not None:
            raise AssertionError(f"the server exited with {process.returncode}")
        try:
            if httpx.get(url + "/health").is_success:
                return process, url
        except httpx.TransportError:
            time.sleep(0.1)
    raise AssertionError("the server did not start")


def stop(process):
    process.send_signal(signal.SIGTERM)
    return process.wait(timeout=20)


@pytest.mark.slow
def test_a_server_whose_assistant_is_another_server(folders):
    base_folder, helper_folder, base, helper = folders
    remote, url = start("--model", base_folder, "--assistant", helper_folder, "--threshold", "-1", "--api-key", "k")
    near, near_url = start(
        "--model", base_folder, "--assistant", url, "--assistant-api-key", "k", "--served-model-name", "pair"
    )
    try:
        body = {"model": "pair", "prompt": [5, 6, 7], "max_tokens": 12, "temperature": 0, "return_source": True}
        choice = httpx.post(near_url + "/v1/completions", json=body, timeout=60).json()["choices"][0]
        truth = oracle(base, [helper], [5, 6, 7], 12, 0.5, stop_ids={2})
        assert (choice["token_ids"], choice["source"]) == (truth.tokens, truth.source)
    finally:
        codes = [stop(near), stop(remote)]
    assert all(code in (0, -signal.SIGTERM) for code in codes)


@pytest.mark.vllm
def test_a_server_of_two_vllm_engines(tmp_path):
    """From folders to an answer, a stream and a clean end, as a user starts it."""
    from tests.vllm_plugin.support import ENGINE, save_assistant, save_base

    base_folder, base = save_base(tmp_path / "base", "llama")
    helper_folder, helper = save_assistant(tmp_path / "helper", "llama", 1)
    arguments = json.dumps({k: v for k, v in ENGINE.items() if k != "dtype"})
    process, url = start(
        "--model", base_folder, "--assistant", helper_folder, "--engine", "vllm", "--dtype", "float32",
        "--engine-args", arguments, "--assistant-engine-args", arguments, "--served-model-name", "pair",
    )  # fmt: skip
    try:
        body = {"model": "pair", "prompt": [5, 6, 7], "max_tokens": 24, "temperature": 0, "return_source": True}
        choice = httpx.post(url + "/v1/completions", json=body, timeout=60).json()["choices"][0]
        truth = oracle(base, [helper], [5, 6, 7], 24, 0.5, stop_ids={2})
        assert (choice["token_ids"], choice["source"]) == (truth.tokens, truth.source)
        with httpx.stream("POST", url + "/v1/completions", json={**body, "stream": True}, timeout=60) as stream:
            lines = [line for line in stream.iter_lines() if line]
        assert lines[-1] == "data: [DONE]"
        assert [t for line in lines[:-1] for t in json.loads(line[6:])["choices"][0]["token_ids"]] == truth.tokens
    finally:
        assert stop(process) in (0, -signal.SIGTERM)


def test_a_head_alone_is_served_with_what_its_base_has(folders, tmp_path):
    _, helper_folder, _, _ = folders
    plain = tiny_model()
    plain.generation_config.eos_token_id = [2, 7]
    plain.save_pretrained(tmp_path / "plain")
    tiny_tokenizer().save_pretrained(tmp_path / "plain")
    model = CoLLMForCausalLM.from_pretrained(str(tmp_path / "plain"))
    save_head_only(model, tmp_path / "head")
    service = serve.build_service(serve.Arguments(str(tmp_path / "head"), [helper_folder], engine="transformers"))
    assert service.eos_ids == {2, 7}
    assert service.tokenizer.get_vocab() == tiny_tokenizer().get_vocab()


def test_assistants_that_do_not_fit_are_refused_before_any_engine_starts(folders, tmp_path):
    base_folder, helper_folder, _, _ = folders
    with pytest.raises(ConfigurationError, match="1 assistants and --assistant names 2"):
        serve.build_service(serve.Arguments(base_folder, [helper_folder, helper_folder]))
    with pytest.raises(ConfigurationError, match="no deferral head"):
        serve.build_service(serve.Arguments(helper_folder, [base_folder]))
    other = tiny_model(seed=1)
    save_plain(other, tmp_path)
    text = (tmp_path / "tokenizer.json").read_text().replace('"w1"', '"other"')
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(TokenizerMismatchError, match="other"):
        serve.build_service(serve.Arguments(base_folder, [str(tmp_path)], engine="transformers"))


@pytest.mark.parametrize(
    ("version", "wanted", "engine", "says"),
    [
        (None, "auto", "transformers", None),
        (None, "vllm", None, "install_vllm_cpu.sh"),
        ("0.32.1+cpu", "auto", "vllm", None),
        ("0.31.0", "auto", None, r"vllm>=0\.32,<0\.33"),
        ("0.31.0", "transformers", "transformers", None),
        ("0.33.0", "vllm", None, "0.33.0 is installed"),
    ],
)
def test_the_supported_vllm_is_checked_at_start(monkeypatch, version, wanted, engine, says):
    monkeypatch.setattr(serve, "vllm_version", lambda: version)
    if engine:
        assert serve.choose_engine(wanted) == engine
    else:
        with pytest.raises(UnsupportedModelError, match=says):
            serve.choose_engine(wanted)


def test_engines_on_a_cpu_get_cores_of_their_own(monkeypatch):
    monkeypatch.delenv("VLLM_CPU_OMP_THREADS_BIND", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3, 4})
    assert [p.devices for p in serve.placements([None, None])] == ["0,1", "2,3"]
    assert [p.devices for p in serve.placements(["0-3", "4"])] == ["0-3", "4"]
    with serve.placements([None, None])[1].environment():
        assert os.environ["VLLM_CPU_OMP_THREADS_BIND"] == "2,3"
    assert "VLLM_CPU_OMP_THREADS_BIND" not in os.environ


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"api_key": [""]}, "API key is empty"),
        ({"engine_args": '{"tensor_parallel_size": 2}'}, 'no argument "tensor_parallel_size"'),
        ({"base_devices": "0-3"}, "binds no CPU cores"),
        ({"model": "EMPTY"}, "config.json"),
    ],
)
def test_what_cannot_be_meant_is_said_before_any_model_is_loaded(folders, tmp_path, options, message):
    (tmp_path / "config.json").write_text("{}")
    options = {"model": folders[0], "assistant": [folders[1]], "engine": "transformers", **options}
    if options["model"] == "EMPTY":
        options["model"] = str(tmp_path)
    with pytest.raises(CoLLMError, match=message):
        serve.run(serve.Arguments(**options))


@pytest.mark.parametrize(
    "option", [{"max_running": 0}, {"max_waiting": -1}, {"threshold": 60.0}, {"max_tokens": 0}, {"max_model_len": 0}]
)
def test_limits_that_no_request_could_meet_are_refused(option):
    with pytest.raises(ConfigurationError, match=next(iter(option)).replace("_", "-")):
        serve.Arguments("model", **option)


def test_engine_arguments_must_be_an_object():
    with pytest.raises(ConfigurationError, match="JSON"):
        serve.engine_options("{")
    with pytest.raises(ConfigurationError, match="object"):
        serve.engine_options("[1]")
