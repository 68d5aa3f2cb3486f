"""Deferral checkpoints on the Hugging Face Hub: what is uploaded, and the model card that says what was run.

A push uploads the files of a checkpoint by name (weights as safetensors, configs, tokenizer, card) and nothing else
that lies in the folder: no optimiser state, no pickles, no logs. Paths of the machine it was trained on stay there.
Full weights take the place of what the repository has in another form or in other shards.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from .checkpoints import ADAPTER_FILE, ADAPTER_FILES, FULL_FILES, HEAD_FILE, TRAINING_FILE, check_base_untrained
from .configuration import DeferralConfig
from .errors import CheckpointError, HubError

FILES = (
    "config.json", "generation_config.json", "model*.safetensors", "model.safetensors.index.json", HEAD_FILE,
    ADAPTER_FILE, "adapter_model*.safetensors", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "*.model", "*.jinja",
)  # fmt: skip
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")
WRITTEN_BY_COLLM = "<!-- Written by collm from what was run. Delete this line to keep your own changes. -->"
ACCESS_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{30,}\b")


def push_checkpoint(
    folder: str | os.PathLike[str],
    repo_id: str,
    *,
    head_only: bool = False,
    private: bool | None = None,
    base_model: str | None = None,
    license: str | None = None,
    results: Sequence[str | os.PathLike[str]] = (),
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
) -> str:
    """Upload a checkpoint folder of any form (full, head-only, LoRA) with a model card, in one commit.

    Args:
        folder (`str`): what `save_pretrained`, `collm train` or [`save_head_only`] wrote.
        repo_id (`str`): `"me/name"`; created where missing.
        head_only (`bool`, *optional*, defaults to `False`): of a full checkpoint, upload the head and config.json
            alone: a few kilobytes, right only where the base was not trained.
        private (`bool`, *optional*): of a new repository; default as set for the account.
        base_model (`str`, *optional*): Hub name of the base, where the checkpoint names it by a local folder.
        license (`str`, *optional*): for the card, e.g. `"apache-2.0"`; default: that of the base, where it says one.
        results (`list[str]`, *optional*): files `results.json` of `collm eval`, for the card.
        token (`str` or `bool`, *optional*): default: `HF_TOKEN` or what `hf auth login` stored.
        revision (`str`, *optional*): branch, created where missing.
        create_pr (`bool`, *optional*): open a pull request instead of writing to the branch.
        commit_message (`str`, *optional*).

    Returns:
        `str`: URL of the commit.

    Raises:
        CheckpointError: no checkpoint there, weights that are no safetensors, a base that only this machine knows, a
            head alone of a base that was trained, a head or an adapter where the repository holds other weights, or no
            results where there should be some.
        HubError: the Hub refuses (401, 403, 404, ...), cannot be reached, or a file holds an access token.
    """
    from huggingface_hub import HfApi

    training = read_json(Path(folder, TRAINING_FILE))
    if head_only:
        check_base_untrained(str(folder))
    with tempfile.TemporaryDirectory() as staged:
        files = _stage(Path(folder), Path(staged), head_only, base_model)
        refuse_secrets(files.values(), token)
        records = [_results_of(Path(path)) for path in results]
        with hub_errors(repo_id):
            api = HfApi(token=token)
            repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
            if not _is_written_by_hand(repo_id, token):
                base = json.loads(files["config.json"].read_text(encoding="utf-8"))["deferral"].get("base_model")
                license = license or _license_of(base, token)
                card = model_card(files, repo_id, training, records, license)
                files["README.md"] = Path(staged, "README.md")
                files["README.md"].write_text(card, encoding="utf-8")
                refuse_secrets([files["README.md"]], token)
            commit = _commit(api, repo_id, files, commit_message=commit_message, revision=revision, create_pr=create_pr)
    return commit.pr_url or str(commit.commit_url)


def upload_saved(
    folder: Path,
    repo_id: str,
    files_timestamps: Mapping[str, float],
    *,
    token: str | bool | None = None,
    **options: Any,
) -> Any:
    """What transformers does with a folder that it has saved, with public names in config.json and our card.

    Args:
        folder (`Path`): what `save_pretrained` wrote, a README.md of transformers or of the repository in it.
        repo_id (`str`): where it goes.
        files_timestamps (`dict[str, float]`): when what lay there before was written; what is newer goes too.
        token (`str` or `bool`, *optional*): as in `push_to_hub`.
        options: of [`_commit`].

    Returns:
        `CommitInfo`, as in transformers.

    Raises:
        CheckpointError: adapters, where the repository holds other weights.
    """
    from huggingface_hub import HfApi

    new = {p.name for p in folder.iterdir() if p.is_file() and p.stat().st_mtime > files_timestamps.get(p.name, 0)}
    files = _stage(folder, folder, head_only=False, base_model=None)
    files = {name: path for name, path in files.items() if name in new or not _is_of(FULL_FILES, name)}
    readme = folder / "README.md"
    if not readme.is_file() or _is_generated(readme.read_text(encoding="utf-8")):
        base = json.loads(files["config.json"].read_text(encoding="utf-8"))["deferral"].get("base_model")
        readme.write_text(model_card(files, repo_id, license=_license_of(base, token)), encoding="utf-8")
    files |= {name: folder / name for name in {*new, "README.md"}}
    refuse_secrets(files.values(), token)
    return _commit(HfApi(token=token), repo_id, files, **options)


def _commit(
    api: Any,
    repo_id: str,
    files: Mapping[str, Path],
    *,
    commit_message: str | None = None,
    commit_description: str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
) -> Any:
    """Upload a checkpoint's files; full weights take the place of what the repository holds, in the same commit."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete
    from huggingface_hub.errors import HfHubHTTPError

    if revision and not revision.startswith("refs/pr"):
        try:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        except HfHubHTTPError as error:
            if not (create_pr and error.response.status_code == 403):  # who may not write may still propose
                raise
    there = [entry.path for entry in api.list_repo_tree(repo_id, revision=revision)]
    stale = [name for name in there if name not in files and _is_of((*FULL_FILES, HEAD_FILE, *ADAPTER_FILES), name)]
    if not any(_is_of(FULL_FILES, name) for name in files):
        if stale and not {HEAD_FILE, ADAPTER_FILE}.isdisjoint(files):
            raise CheckpointError(
                f'"{repo_id}" holds other weights ({stale[0]}), and a head or an adapter does not go beside them. '
                f"Take another repository, or remove them first: hf repos delete-files {repo_id} {stale[0]}"
            )
        stale = []  # a variant of the weights, which lies beside them
    operations = [
        *(CommitOperationAdd(name, str(path)) for name, path in sorted(files.items())),
        *(CommitOperationDelete(name) for name in stale),
    ]
    return api.create_commit(
        repo_id, operations, commit_message=commit_message or "Upload deferral checkpoint",
        commit_description=commit_description, revision=revision, create_pr=create_pr,
    )  # fmt: skip


def _is_of(forms: Iterable[str], name: str) -> bool:
    return any(fnmatch(name, form) for form in forms)


# ------------------------------------------------------------------------------------------------ what is uploaded


def _stage(folder: Path, staged: Path, head_only: bool, base_model: str | None) -> dict[str, Path]:
    """Files to upload by name; those that differ from the folder's are written to `staged`."""
    config = read_json(folder / "config.json")
    if "deferral" not in config:
        raise CheckpointError(
            f'"{folder}" is no deferral checkpoint'
            + (": its config.json has no `deferral`." if config else ": there is no config.json in it.")
        )
    found = {path.name: path for path in sorted(folder.iterdir()) if any(fnmatch(path.name, name) for name in FILES)}
    if head_only and HEAD_FILE not in found:
        weights = {name for name in found if name.endswith((".safetensors", ".index.json"))}
        found = {name: path for name, path in found.items() if name not in weights}
        found[HEAD_FILE] = _extract_head(folder, staged)
    if not any(name.endswith(".safetensors") for name in found):
        pickled = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth"))
        raise CheckpointError(
            f'there are no safetensors in "{folder}"'
            + (f" but {', '.join(pickled)}: load it and save it again with save_pretrained." if pickled else ".")
        )

    deferral = DeferralConfig.from_any(config["deferral"])
    needs_base = not any(name.startswith("model") for name in found)
    deferral.base_model = base_model or deferral.base_model
    if needs_base and not _is_public(deferral.base_model):
        raise CheckpointError(
            f'"{folder}" is nothing without its base, and names it "{deferral.base_model}", which others cannot load. '
            "Say where the base is on the Hub: --base-model org/name (base_model= in Python)."
        )
    config["architectures"] = ["CoLLMForCausalLM"]
    config["deferral"] = {
        **deferral,
        "base_model": deferral.base_model if _is_public(deferral.base_model) else None,
        "assistants": [public_name(name) for name in deferral.assistants],
    }
    found["config.json"] = _write_json(staged / "config.json", config)
    if ADAPTER_FILE in found:
        adapter = {**read_json(folder / ADAPTER_FILE), "base_model_name_or_path": deferral.base_model}
        found[ADAPTER_FILE] = _write_json(staged / ADAPTER_FILE, adapter)
    return found


def _extract_head(folder: Path, staged: Path) -> Path:
    """The head's tensors of a full checkpoint, in a file of their own; other weights are not read."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    head = {}
    for path in folder.glob("model*.safetensors"):
        with safe_open(path, framework="pt") as weights:
            for name in weights.keys():
                if name.startswith("deferral_head."):
                    head[name.removeprefix("deferral_head.")] = weights.get_tensor(name)
    if not head:
        raise CheckpointError(f'the weights in "{folder}" have no deferral head.')
    save_file(head, staged / HEAD_FILE, metadata={"format": "pt"})
    return staged / HEAD_FILE


def refuse_secrets(files: Any, token: str | bool | None) -> None:
    """Raise `HubError` where a text file to upload holds an access token."""
    from huggingface_hub import get_token

    own = token if isinstance(token, str) else get_token()
    for path in files:
        if path.suffix == ".safetensors":
            continue
        text = path.read_text(encoding="utf-8", errors="replace")
        if ACCESS_TOKEN.search(text) or (own and own in text):
            raise HubError(f"{path.name} holds an access token. Nothing was uploaded; take the token out of that file.")


def _is_public(name: str | None) -> bool:
    """Whether a model's name can mean something on another machine."""
    return bool(name) and not os.path.isdir(str(name)) and bool(re.fullmatch(r"[\w.-]+(/[\w.-]+)?", str(name)))


def public_name(name: str) -> str:
    """A Hub name as it is; of a local folder only its last part."""
    return name if _is_public(name) else Path(name).name


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file's content, empty where there is no file."""
    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is no JSON: {error}") from error


def _results_of(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise CheckpointError(f'there are no results in "{path}": name a results.json of `collm eval`.')
    return read_json(path)


def _write_json(path: Path, content: Mapping[str, Any]) -> Path:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return path


# -------------------------------------------------------------------------------------------------------- the card


def model_card(
    files: Mapping[str, Path],
    repo_id: str,
    training: Mapping[str, Any] | None = None,
    results: Sequence[Mapping[str, Any]] = (),
    license: str | None = None,
) -> str:
    """README.md of a checkpoint: how to use it, and what was run to make it, as far as the files say.

    Args:
        files (`dict[str, Path]`): the checkpoint's files by name.
        repo_id (`str`): name in the usage block.
        training (`dict`, *optional*): content of `collm_training.json`.
        results (`list[dict]`, *optional*): contents of `results.json` of `collm eval`.
        license (`str`, *optional*).
    """
    from huggingface_hub import ModelCardData

    config = json.loads(files["config.json"].read_text(encoding="utf-8"))
    deferral, training = DeferralConfig.from_any(config["deferral"]), training or {}
    full = any(name.startswith("model") for name in files)
    data = public_name(str(training["data"])) if training.get("data") else None
    metadata = ModelCardData(
        base_model=deferral.base_model,
        base_model_relation=("finetune" if full else "adapter") if deferral.base_model else None,
        datasets=[data] if data and "/" in data else None,
        library_name="collm",
        license=license,
        pipeline_tag="text-generation",
        tags=["collm", "deferral", "collaborative-decoding", str(config["model_type"])],
    )
    sections = [
        f"---\n{metadata.to_yaml()}\n---",
        WRITTEN_BY_COLLM,
        f"# {repo_id.split('/')[-1]}",
        _introduction(deferral, full),
        f"## Use\n\n```python\n{usage(files, repo_id, deferral)}```",
        _thresholds(deferral),
        _training(deferral, training, data),
        *(_results(result) for result in results),
        "## Limits\n\nBase and assistant must share one vocabulary. Thresholds and rates hold for prompts like those "
        "they were measured on.\n\nMethod: Shen et al., *Learning to Decode Collaboratively with Multiple Language "
        "Models*, ACL 2024, [arXiv 2403.03870](https://arxiv.org/abs/2403.03870).",
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _introduction(deferral: DeferralConfig, full: bool) -> str:
    base = f"`{deferral.base_model}`" if deferral.base_model else "a language model"
    helpers = " and ".join(f"`{name}`" for name in deferral.assistants) or "an assistant"
    text = f"{base} that decides token by token whether to write itself or to let {helpers} write. "
    text = text[0].upper() + text[1:]
    if full:
        return text + (
            "It is an ordinary checkpoint plus one tensor, the deferral head: `AutoModelForCausalLM` loads it as the "
            "base alone, and reports `deferral_head.weight` as unexpected."
        )
    return text + f"This repository holds only what was trained on top of {base}, which is loaded with it."


def usage(files: Mapping[str, Path], repo_id: str, deferral: DeferralConfig) -> str:
    """The card's example: a program that runs as it stands."""
    tokenizer = repo_id if any(name in files for name in TOKENIZER_FILES) else deferral.base_model or "BASE"
    names = list(deferral.assistants) or [f"ASSISTANT-{k}" for k in range(1, deferral.num_assistants + 1)]
    loaded = [f'AutoModelForCausalLM.from_pretrained("{name}", dtype="auto", device_map="auto")' for name in names]
    assistant = loaded[0] if len(loaded) == 1 else "[\n    " + ",\n    ".join(loaded) + ",\n]"
    rows = [row for row in deferral.calibration if 0 < row["rate"] < 1]
    amount = f"deferral_rate={rows[len(rows) // 2]['rate']}" if rows else f"threshold={deferral.threshold}"
    return f'''from collm import CoLLMForCausalLM  # pip install collm
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{tokenizer}")
model = CoLLMForCausalLM.from_pretrained("{repo_id}", dtype="auto", device_map="auto")
assistant = {assistant}

messages = [{{"role": "user", "content": "What is 12 * 7 + 5?"}}]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
out = model.generate(
    **inputs.to(model.device), assistant=assistant, {amount}, max_new_tokens=128, return_dict_in_generate=True
)
print(tokenizer.decode(out.sequences[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
print(f"{{(out.source > 0).sum() / (out.source >= 0).sum():.0%}} of the tokens are the assistant's")
'''


def _thresholds(deferral: DeferralConfig) -> str:
    if not deferral.calibration:
        return (
            f"## Thresholds\n\nThe assistant writes where the deferral probability exceeds the threshold, by default "
            f"{deferral.threshold:.4g}. It is not calibrated: `collm calibrate` turns budgets into thresholds."
        )
    rows = [["share of tokens deferred", "threshold", "realised", "95% interval"]]
    for row in deferral.calibration:
        interval = f"{row['low']:.3f} to {row['high']:.3f}" if {"low", "high"} <= row.keys() else ""
        realised = f"{row['realised']:.3f}" if "realised" in row else ""
        rows.append([f"{row['rate']:g}", f"{row['threshold']:.4g}", realised, interval])
    return (
        f"## Thresholds\n\nThe assistant writes where the deferral probability exceeds the threshold (default "
        f"{deferral.threshold:.4g}); `generate(deferral_rate=...)` reads this table.\n\n{_table(rows)}"
    )


def _training(deferral: DeferralConfig, training: Mapping[str, Any], data: str | None) -> str:
    rows = [["setting", "value"]]
    if training:
        rows += [["mode", str(training["mode"])], ["objective", str(training["objective"])]]
        rows += [["data", f"{data}, {training['rows']} rows"]]
        hidden = ("output_dir", "data", "eval_data", "model", "mode", "objective", "features_dir")
        changed = {name: value for name, value in training.get("arguments", {}).items() if name not in hidden}
        rows += [[name, public_name(str(value))] for name, value in sorted(changed.items()) if not _is_secret(name)]
    rows += [
        ["assistants", ", ".join(deferral.assistants) or f"{deferral.num_assistants}, not named"],
        ["what the head sees", ", ".join(deferral.features)],
        ["deferral cost (nats per deferred token)", f"{deferral.deferral_cost:g}"],
    ]
    numbers = [
        [name, f"{value:.5g}"]
        for name, value in training.get("results", {}).items()
        if isinstance(value, (int, float)) and not isinstance(value, bool)
    ]
    outcome = f"\n\n{_table([['result', 'value'], *numbers])}" if numbers else ""
    version = f" with collm {training['collm']}" if "collm" in training else ""
    return f"## Training\n\nTrained{version}.\n\n{_table(rows)}{outcome}" if training else f"## Head\n\n{_table(rows)}"


def _results(result: Mapping[str, Any]) -> str:
    settings = result.get("settings", {})
    name = settings.get("task") or settings.get("data") or "Evaluation"
    rows = [["metric", "mean", "95% interval", "problems"]]
    for metric, value in result.get("metrics", {}).items():
        rows.append([metric, f"{value['mean']:.4g}", f"{value['low']:.4g} to {value['high']:.4g}", str(value["n"])])
    facts = {
        "share of tokens deferred": result.get("deferral_rate"), "truncated answers": result.get("truncated"),
        "threshold": settings.get("threshold"),
    }  # fmt: skip
    facts_text = "; ".join(f"{label}: {value:.4g}" for label, value in facts.items() if isinstance(value, (int, float)))
    return f"## Results: {public_name(str(name))}\n\n{_table(rows)}\n\n{facts_text}"


def _table(rows: Sequence[Sequence[str]]) -> str:
    cells = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows]
    lines = ["| " + " | ".join(row) + " |" for row in cells]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def _is_secret(name: str) -> bool:
    return name.endswith(("token", "password", "key"))


def _is_generated(card: str) -> bool:
    """Whether a card comes from us or from transformers' template, rather than from a person."""
    return WRITTEN_BY_COLLM in card or "This model card has been automatically generated" in card


def _is_written_by_hand(repo_id: str, token: str | bool | None) -> bool:
    from huggingface_hub import ModelCard
    from huggingface_hub.errors import EntryNotFoundError

    try:
        return not _is_generated(ModelCard.load(repo_id, token=token).content)  # type: ignore[arg-type]
    except EntryNotFoundError:
        return False


def _license_of(base_model: str | None, token: str | bool | None) -> str | None:
    """What the base's card on the Hub says, `None` where there is no such card or no answer."""
    from huggingface_hub import model_info
    from huggingface_hub.errors import HTTPError

    if not _is_public(base_model):
        return None
    try:
        card = model_info(str(base_model), token=token).card_data
    except HTTPError:
        return None
    return card.get("license") if card else None


# ---------------------------------------------------------------------------------------------------------- errors


@contextmanager
def hub_errors(repo_id: str) -> Iterator[None]:
    """Turn what the Hub or the network says into a `HubError` that says what to do."""
    # HTTPError is the base of the HTTP library's own errors, network errors among them; the library changed twice.
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        HTTPError,
        LocalTokenNotFoundError,
        OfflineModeIsEnabled,
    )

    try:
        yield
    except HFValidationError as error:
        raise HubError(f'"{repo_id}" cannot be the name of a repository: {error}') from error
    except OfflineModeIsEnabled as error:
        raise HubError("the Hub is switched off here: HF_HUB_OFFLINE is set.") from error
    except LocalTokenNotFoundError as error:
        raise HubError(f"{_ADVICE[401]} ({repo_id})") from error
    except HfHubHTTPError as error:
        raise HubError(_refusal(repo_id, error)) from error
    except (HTTPError, ConnectionError) as error:
        raise HubError(f"the Hub cannot be reached ({error or type(error).__name__}); is the network up?") from error
    except RuntimeError as error:  # a worker thread's upload
        if isinstance(error.__cause__, HfHubHTTPError):
            raise HubError(_refusal(repo_id, error.__cause__)) from error
        if isinstance(error.__cause__, HTTPError):
            raise HubError(f"the upload broke off ({error.__cause__}); push again, it goes on.") from error
        raise


_ADVICE = {
    401: "the Hub does not know who you are: run `hf auth login`, or set HF_TOKEN to a token that may write",
    403: "your token may not write there: it needs write permission, for this namespace",
    404: "the Hub has no such repository, or your token may not see it",
}


def _refusal(repo_id: str, error: Any) -> str:
    status = error.response.status_code
    said = f': "{error.server_message}"' if error.server_message else ""
    return f"{_ADVICE.get(status, 'the Hub refused')} ({repo_id}, HTTP {status}{said})."
