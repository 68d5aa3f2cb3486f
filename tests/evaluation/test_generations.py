from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap

import pytest
import torch
from conftest import tiny_model

from collm.errors import ConfigurationError, DataFormatError
from collm.evaluation.generations import Generation, GenerationStore, data_fingerprint, weights_fingerprint
from collm.fingerprints import files_fingerprint


def generation(number: int, text: str = "a\u2028b\n") -> Generation:
    return Generation(number, text, [1, 2], [0, 1], [0.1, 0.75], False, 0.5)


def test_what_was_written_is_read_back(tmp_path):
    path = tmp_path / "new" / "generations.jsonl"
    store = GenerationStore(path, {"a": 1, "t": (1, 2)})
    store.add([generation(0), generation(3)])
    again = GenerationStore(path, {"a": 1, "t": (1, 2)})
    assert again.done == {0: generation(0), 3: generation(3)}
    assert again.done[0].deferred == 1


def test_a_line_cut_off_by_a_kill_is_dropped_and_nothing_else(tmp_path):
    path = tmp_path / "g.jsonl"
    GenerationStore(path, {}).add([generation(0), generation(1)])
    whole = path.read_bytes()
    for cut in range(len(whole) - 60, len(whole)):
        path.write_bytes(whole[:cut])
        store = GenerationStore(path, {})
        assert set(store.done) == {0}
        store.add([generation(1)])
        assert path.read_bytes() == whole


def test_a_kill_during_the_first_line_starts_again(tmp_path):
    path = tmp_path / "g.jsonl"
    path.write_text('{"settin')
    GenerationStore(path, {"a": 1}).add([generation(0)])
    assert set(GenerationStore(path, {"a": 1}).done) == {0}


def test_other_settings_are_refused_by_name(tmp_path):
    path = tmp_path / "g.jsonl"
    GenerationStore(path, {"threshold": 0.5, "same": 1})
    with pytest.raises(ConfigurationError, match=r"threshold: 0.5 there, 0.6 now.*Give another output folder"):
        GenerationStore(path, {"threshold": 0.6, "same": 1})
    with pytest.raises(ConfigurationError, match="new"):
        GenerationStore(path, {"threshold": 0.5, "same": 1, "new": None})


@pytest.mark.parametrize("content", ["hello\n", "hello", '{"a": 1}\n{"b"'])
def test_a_foreign_file_is_refused_and_left_alone(tmp_path, content):
    path = tmp_path / "g.jsonl"
    path.write_text(content)
    with pytest.raises(DataFormatError, match="no file of generations"):
        GenerationStore(path, {})
    assert path.read_text() == content


def test_in_memory():
    store = GenerationStore(None, {})
    store.add([generation(2)])
    assert set(store.done) == {2}


def test_sigkill_loses_nothing_that_was_added(tmp_path):
    path = tmp_path / "g.jsonl"
    code = textwrap.dedent(
        f"""
        from collm.evaluation.generations import Generation, GenerationStore
        store = GenerationStore({str(path)!r}, {{}})
        for i in range(10**6):
            store.add([Generation(i, "x" * 200, [1], [0])])
            print(i, flush=True)
        """
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    last = -1
    for line in process.stdout:
        last = int(line)
        if last >= 20:
            break
    os.kill(process.pid, signal.SIGKILL)
    rest = process.stdout.read().split()
    process.wait()
    process.stdout.close()
    last = int(rest[-1]) if rest else last
    done = GenerationStore(path, {}).done
    assert set(range(last + 1)) <= set(done)
    assert len(done) <= last + 2


def test_fingerprints_change_with_what_they_stand_for():
    assert data_fingerprint([{"a": 1}]) != data_fingerprint([{"a": 2}])
    assert data_fingerprint([{"a": 1, "b": 2}]) == data_fingerprint([{"b": 2, "a": 1}])
    model = tiny_model(dtype=torch.bfloat16)
    before = weights_fingerprint(model)
    assert weights_fingerprint(tiny_model(dtype=torch.bfloat16)) == before
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 1
    assert weights_fingerprint(model) != before


def test_files_are_known_by_all_of_their_content(tmp_path):
    def fingerprint(files: dict[str, bytes], config: dict) -> str:
        folder = tmp_path / "model"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        for name, content in {**files, "config.json": json.dumps(config).encode()}.items():
            (folder / name).write_bytes(content)
        return files_fingerprint(str(folder), None)

    plain, trained = bytes(3 * 2**20), bytes(2**20) + b"1" * (2 * 2**20)  # the same up to the second megabyte
    for name in ("model.safetensors", "pytorch_model.bin"):
        before = fingerprint({name: plain}, {"layers": 2})
        assert fingerprint({name: plain}, {"layers": 2}) == before
        assert fingerprint({name: trained}, {"layers": 2}) != before
        assert fingerprint({name: plain}, {"layers": 3}) != before
    calibrated = [fingerprint({"m.bin": plain}, {"layers": 2, "deferral": {"threshold": t}}) for t in (0.5, 0.2)]
    assert calibrated[0] == calibrated[1]
    config = tiny_model().config
    config._commit_hash = "abc"
    assert files_fingerprint("org/name", config) == "org/name@abc"


def test_lines_are_plain_json(tmp_path):
    path = tmp_path / "g.jsonl"
    GenerationStore(path, {}).add([generation(0)])
    with open(path, encoding="utf-8") as file:
        lines = [json.loads(line) for line in file]
    assert list(lines[0]) == ["settings"]
    assert lines[1]["text"] == "a\u2028b\n"
