"""A user's session with the Hub, against the stand-in, in a process of its own: the client reads HF_ENDPOINT at import.

Prints one JSON object of what came of it; `test_hub.py` looks at it.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
from pathlib import Path

from hub_server import Hub

WRITER, READER = "hf_" + "w" * 34, "hf_" + "r" * 34


def main(folder: Path) -> dict:
    hub = Hub({WRITER: "write", READER: "read"})
    hub.start()
    os.environ.update(HF_ENDPOINT=hub.url, HF_TOKEN=WRITER, HF_HOME=str(folder / "home"), NO_PROXY="127.0.0.1")
    os.environ["HF_HUB_DISABLE_XET"] = "1"  # the stand-in knows plain LFS only
    os.environ.pop("HF_HUB_OFFLINE", None)

    import huggingface_hub
    import torch
    import transformers
    from conftest import randomise_head, tiny_model, tiny_tokenizer

    import collm
    from collm import CoLLMForCausalLM, cli
    from collm.checkpoints import save_deferral_config, save_head_only

    def run(*argv: str) -> dict:
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = cli.main(argv)
        return {"code": code, "out": out.getvalue(), "err": err.getvalue()}

    def same(model, other) -> bool:
        """Whether all weights are bit-identical and the settings equal."""
        return same_weights(model, other) and model.config.deferral == other.config.deferral

    def same_weights(model, other) -> bool:
        states = model.state_dict(), other.state_dict()
        return states[0].keys() == states[1].keys() and all(torch.equal(states[1][n], w) for n, w in states[0].items())

    def outputs(model) -> list:
        with torch.no_grad():
            out = model.eval()(torch.arange(3, 20).unsqueeze(0))
        return [out.logits.tolist(), out.deferral_logits.tolist()]

    def error(action) -> dict:
        try:
            action()
        except collm.CoLLMError as raised:
            return {"type": type(raised).__name__, "text": str(raised)}
        return {"type": None, "text": "nothing was raised"}

    def run_usage(repo_id: str) -> str:
        card = hub.files(repo_id)["README.md"].decode()
        code = card.split("```python\n")[1].split("```")[0]
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            exec(compile(code, f"README.md of {repo_id}", "exec"), {})
        return out.getvalue()

    result: dict = {"versions": huggingface_hub.__version__}

    # A base and an assistant by other people.
    tokenizer = tiny_tokenizer()
    for name, seed in (("org/base", 0), ("org/big", 1)):
        tiny_model("qwen2", seed).push_to_hub(name)
        tokenizer.push_to_hub(name)
    huggingface_hub.ModelCard("---\nlicense: mit\n---\n# A base\n").push_to_hub("org/base")

    # A full checkpoint, from Python.
    model = randomise_head(CoLLMForCausalLM.from_pretrained("org/base"))
    model.config.deferral.assistants = ["org/big"]
    model.config.deferral.calibration = [
        {"rate": 0.2, "threshold": 0.61, "realised": 0.21, "low": 0.18, "high": 0.24},
        {"rate": 0.4, "threshold": 0.45, "realised": 0.4, "low": 0.35, "high": 0.44},
    ]
    model.push_to_hub("me/full")
    tokenizer.push_to_hub("me/full")
    result["full"] = {
        "same": same(CoLLMForCausalLM.from_pretrained("me/full"), model),
        "files": sorted(hub.files("me/full")),
        "config": json.loads(hub.files("me/full")["config.json"]),
        "card": hub.files("me/full")["README.md"].decode(),
        "usage": run_usage("me/full"),
    }
    plain, info = transformers.AutoModelForCausalLM.from_pretrained("me/full", output_loading_info=True)
    result["plain"] = {"unexpected": sorted(info["unexpected_keys"]), "class": type(plain).__name__}

    # save_pretrained(push_to_hub=True) goes the same way.
    model.save_pretrained(folder / "saved", push_to_hub=True, repo_id="me/saved")
    result["saved"] = {
        "architectures": json.loads(hub.files("me/saved")["config.json"])["architectures"],
        "ours": "Written by collm" in hub.files("me/saved")["README.md"].decode(),
    }

    # A card that a person wrote stays.
    huggingface_hub.ModelCard("---\nlicense: mit\n---\n# By hand\n").push_to_hub("me/full")
    model.push_to_hub("me/full", commit_message="again")
    result["by_hand"] = hub.files("me/full")["README.md"].decode()

    # The head alone.
    model.push_to_hub("me/head", head_only=True)
    files = hub.files("me/head")
    result["head"] = {
        "same": same(CoLLMForCausalLM.from_pretrained("me/head"), model),
        "files": sorted(files), "bytes": sum(map(len, files.values())), "card": files["README.md"].decode(),
        "usage": run_usage("me/head"),
    }  # fmt: skip

    # LoRA, from the command line, private, with the record of its training, an evaluation, and rubbish in the folder.
    from peft import LoraConfig, get_peft_model

    base = CoLLMForCausalLM.from_pretrained("org/base")
    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["deferral_head"], init_lora_weights=False)
    adapted = get_peft_model(base, config)
    randomise_head(base, seed=3)
    lora = folder / "lora"
    adapted.save_pretrained(lora)
    base.config.deferral.assistants = [str(folder / "cache" / "big")]
    save_deferral_config(base, lora)
    tokenizer.save_pretrained(lora)
    (lora / "checkpoint-10").mkdir()
    for rubbish in ("optimizer.pt", "training_args.bin", "checkpoint-10/model.safetensors", "trainer_state.json"):
        (lora / rubbish).write_bytes(b"rubbish")
    (lora / "collm_training.json").write_text(json.dumps({
        "collm": "0.1.0", "mode": "lora", "objective": "marginal_likelihood", "base_model": "org/base",
        "data": str(folder / "private" / "scored"), "assistants": ["org/big"], "rows": 1234,
        "arguments": {"output_dir": str(lora), "learning_rate": 2e-5, "hub_token": WRITER},
        "results": {"train_loss": 0.4321, "log_history": [{"loss": 1.0}]},
    }))  # fmt: skip
    (folder / "results.json").write_text(json.dumps({
        "settings": {"task": "gsm8k", "threshold": 0.5}, "deferral_rate": 0.31, "truncated": 2,
        "metrics": {"exact": {"mean": 0.625, "low": 0.55, "high": 0.7, "n": 200}},
    }))  # fmt: skip
    pushed = run("push", str(lora), "me/lora", "--private", "--results", str(folder / "results.json"))
    difference = torch.tensor(outputs(CoLLMForCausalLM.from_pretrained("me/lora"))[1]) - torch.tensor(
        outputs(adapted)[1]
    )
    result["lora"] = {
        **pushed, "difference": difference.abs().max().item(), "files": sorted(hub.files("me/lora")),
        "private": hub.repositories["me/lora"].private, "card": hub.files("me/lora")["README.md"].decode(),
        "config": hub.files("me/lora")["config.json"].decode(),
    }  # fmt: skip
    run("push", str(lora), "me/lora", "--revision", "v2")
    result["branches"] = sorted(hub.repositories["me/lora"].branches)

    # One repository in one form after another: what was pushed last is loaded.
    merged = CoLLMForCausalLM.from_pretrained(lora)
    pushes = [
        ("head", model, lambda: model.push_to_hub("me/forms", head_only=True)),
        ("shards", merged, lambda: merged.push_to_hub("me/forms", max_shard_size="20KB")),
        ("full", model, lambda: model.push_to_hub("me/forms")),
        ("saved", merged, lambda: merged.save_pretrained(folder / "forms", push_to_hub=True, repo_id="me/forms")),
        ("again", model, lambda: model.save_pretrained(
            folder / "forms", max_shard_size="20KB", push_to_hub=True, repo_id="me/forms")),
    ]  # fmt: skip
    result["forms"] = {}
    for name, pushed, push in pushes:
        push()
        kept = sorted(file for file in hub.files("me/forms") if "safetensors" in file or file.startswith("adapter"))
        result["forms"][name] = [same_weights(CoLLMForCausalLM.from_pretrained("me/forms"), pushed), kept]
    result["head over full"] = error(lambda: model.push_to_hub("me/forms", head_only=True))
    result["lora over full"] = error(lambda: collm.hub.push_checkpoint(lora, "me/forms"))
    result["own base"] = error(lambda: model.push_to_hub("org/base", head_only=True))

    # The head of a full checkpoint, from the command line; its base has no name until one is given.
    model.config.deferral.base_model = str(folder / "cache" / "base")
    model.save_pretrained(folder / "full")
    result["unnamed_base"] = run("push", str(folder / "full"), "me/head2", "--head-only")
    result["head_only"] = run("push", str(folder / "full"), "me/head2", "--head-only", "--base-model", "org/base")
    model.config.deferral.base_model = "org/base"
    result["head_only"]["same"] = same(CoLLMForCausalLM.from_pretrained("me/head2"), model)

    # Folders that are not uploaded.
    before = len(hub.requests)
    save_head_only(model, folder / "secret")
    (folder / "secret" / "tokenizer_config.json").write_text(json.dumps({"note": WRITER}))
    result["secret"] = error(lambda: collm.hub.push_checkpoint(folder / "secret", "me/secret"))
    (folder / "pickled").mkdir()
    (folder / "pickled" / "config.json").write_text(json.dumps({"model_type": "qwen2", "deferral": {}}))
    (folder / "pickled" / "pytorch_model.bin").write_bytes(b"x")
    result["pickled"] = run("push", str(folder / "pickled"), "me/pickled")
    tiny_model().save_pretrained(folder / "plain")
    result["no_deferral"] = run("push", str(folder / "plain"), "me/plain")
    result["nothing"] = run("push", str(folder / "nowhere"), "me/nothing")
    result["requests_for_refused"] = hub.requests[before:]

    # What the Hub refuses.
    full = str(folder / "full")
    os.environ["HF_TOKEN"] = READER
    result["403"] = run("push", full, "me/other")
    result["403 python"] = error(lambda: model.push_to_hub("me/other"))
    os.environ["HF_TOKEN"] = "hf_" + "x" * 34
    result["401"] = run("push", full, "me/other")
    del os.environ["HF_TOKEN"]
    result["no token"] = run("push", full, "me/other")
    result["private"] = error(lambda: CoLLMForCausalLM.from_pretrained("me/lora", cache_dir=folder / "empty"))
    os.environ["HF_TOKEN"] = WRITER
    result["404"] = error(lambda: CoLLMForCausalLM.from_pretrained("me/nothing"))
    result["revision"] = error(lambda: CoLLMForCausalLM.from_pretrained("me/full", revision="v9"))
    hub.stop()
    result["down"] = run("push", full, "me/full")

    stored = b"".join(c for r in hub.repositories.values() for f in r.commits.values() for c in f.values())
    result["stored_tokens"] = [token for token in (WRITER, READER) if token.encode() in stored]
    result["stored_paths"] = str(folder).encode() in stored
    result["kinds"] = sorted(
        {Path(name).suffix for r in hub.repositories.values() for f in r.commits.values() for name in f}
    )
    return result


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]))))
