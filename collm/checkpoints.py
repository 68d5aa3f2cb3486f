"""Reading and writing deferral checkpoints in all their forms.

full          an ordinary checkpoint of the architecture plus `deferral_head.weight` (plain `save_pretrained`)
head-only     config.json and `deferral_head.safetensors`, a few kilobytes, naming its base in `deferral.base_model`
LoRA          PEFT's adapter folder with `deferral_head` among `modules_to_save`, plus our config.json
merged        the paper's: one more vocabulary row, `<|defer|>`, in embedding and LM head
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, PreTrainedConfig
from transformers.utils import cached_file

from .configuration import DeferralConfig
from .errors import CheckpointError, ConfigurationError
from .modeling import CoLLMForCausalLM, base_class_for, collm_class

HEAD_FILE = "deferral_head.safetensors"
INDEX_FILE = "model.safetensors.index.json"
ADAPTER_FILE = "adapter_config.json"
FULL_FILES = ("model.safetensors", "model-*.safetensors", INDEX_FILE)
ADAPTER_FILES = (ADAPTER_FILE, "adapter_model*.safetensors")
TRAINING_FILE = "collm_training.json"  # what `collm train` leaves beside a checkpoint
DEFER_TOKEN = "<|defer|>"
# Arguments that say where a file lies; everything else in from_pretrained's kwargs is about the model.
HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
# Arguments that AutoConfig would swallow although the model needs them.
MODEL_ARGUMENTS = ("attn_implementation", "dtype", "experts_implementation", "quantization_config", "torch_dtype")


def load_deferral_checkpoint(
    name: str,
    *args: Any,
    num_assistants: int | None = None,
    deferral: DeferralConfig | dict[str, Any] | None = None,
    **kwargs: Any,
) -> Any:
    """What `CoLLMForCausalLM.from_pretrained` does; its docstring says what comes in, out, and which errors.

    1. Read config.json; find the architecture's own class.
    2. Settle the `DeferralConfig`: the checkpoint's, or a new one.
    3. Load the weights by the form of the checkpoint.
    """
    # 1. config.json and the architecture.
    hub = {key: kwargs[key] for key in HUB_ARGUMENTS if key in kwargs}
    held = {key: kwargs.pop(key) for key in MODEL_ARGUMENTS if key in kwargs}
    config = kwargs.pop("config", None)
    if config is None:
        config, kwargs = read_config(name, kwargs)
    kwargs = {**kwargs, **hub, **held}
    want_info = kwargs.pop("output_loading_info", False)
    base_class = base_class_for(config)

    # 2. The head's settings.
    trained = getattr(config, "deferral", None) is not None
    defer_row = None if trained else _paper_defer_row(name, hub)
    config.deferral = _settle_deferral(name, config, trained, defer_row is not None, num_assistants, deferral)
    if not trained and config.deferral.base_model is None:
        config.deferral.base_model = name

    # 3. The weights.
    info: dict[str, Any] = {"missing_keys": set(), "unexpected_keys": set(), "mismatched_keys": set(), "error_msgs": []}
    with _checkpoint_errors(name):
        if defer_row is not None:
            model = _load_paper_checkpoint(name, base_class, config, defer_row, kwargs)
        elif trained and _is_only(ADAPTER_FILE, name, hub):
            model = _load_adapter(name, config, hub, kwargs)
        elif trained and _is_only(HEAD_FILE, name, hub):
            model = _load_head_only(name, config, hub, kwargs)
        else:
            model, info = _load_full(name, base_class, config, trained, args, kwargs)
    return (model, info) if want_info else model


def read_config(name: str, kwargs: dict[str, Any]) -> tuple[PreTrainedConfig, dict[str, Any]]:
    """The config, and the arguments that it did not use."""
    looks_like_path = os.path.isabs(name) or name.startswith((".", "~")) or name.count("/") > 1
    if looks_like_path and not os.path.isdir(name):
        raise CheckpointError(f'there is no folder "{name}".')
    if os.path.isdir(name) and _find(name, "config.json", kwargs) is None:
        hint = (
            ": it is an adapter that PEFT saved alone; add one with collm.checkpoints.save_deferral_config"
            if _find(name, ADAPTER_FILE, kwargs)
            else ""
        )
        raise CheckpointError(f'there is no config.json in "{name}"{hint}.')
    with _checkpoint_errors(name):
        try:
            return AutoConfig.from_pretrained(name, return_unused_kwargs=True, **kwargs)
        except ValueError as error:  # no model type, an unknown one, or values that make no config
            raise CheckpointError(f'config.json of "{name}" cannot be used: {error}') from error


def read_deferral(name: str) -> DeferralConfig:
    """What a checkpoint's config says of deferral; the defaults for a plain model.

    Raises:
        [`CheckpointError`]: there is no usable config.json.
    """
    return DeferralConfig.from_any(getattr(read_config(name, {})[0], "deferral", None))


def _settle_deferral(
    name: str,
    config: PreTrainedConfig,
    trained: bool,
    from_paper: bool,
    num_assistants: int | None,
    given: DeferralConfig | dict[str, Any] | None,
) -> DeferralConfig:
    if from_paper:
        saved = DeferralConfig(features=["hidden"])
    elif trained:
        saved = DeferralConfig.from_any(config.deferral)
    else:
        new = DeferralConfig.from_any(given if given is not None else {"num_assistants": num_assistants or 1})
        if num_assistants not in (None, new.num_assistants):
            raise ConfigurationError(
                f"num_assistants={num_assistants} but deferral has num_assistants={new.num_assistants}."
            )
        return new
    settings = dict(given or {})
    if isinstance(given, DeferralConfig):  # a whole config: only what differs from the defaults was meant
        settings = {key: value for key, value in given.items() if value != DeferralConfig()[key]}
    if num_assistants is not None:
        settings["num_assistants"] = num_assistants
    for key in ("num_assistants", "features", "bias"):
        if settings.get(key, saved[key]) != saved[key]:
            raise CheckpointError(
                f'the deferral head of "{name}" was trained with {key}={saved[key]!r}, not {settings[key]!r}. Load it '
                f"as it is, or start a new head from its base{f' ({saved.base_model})' if saved.base_model else ''}."
            )
    return DeferralConfig.from_any({**saved, **settings})


def _load_full(
    name: str, base_class: Any, config: PreTrainedConfig, trained: bool, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, dict[str, Any]]:
    try:
        model, info = collm_class(base_class).from_pretrained(
            name, *args, config=config, output_loading_info=True, **kwargs
        )
    except RuntimeError as error:
        if trained and "ignore_mismatched_sizes" in str(error):
            raise CheckpointError(
                f'the weights of "{name}" have other shapes than its config.json says, e.g. for the head, which should '
                f"have {config.deferral.num_assistants} rows (transformers' report above names them): one of the two "
                "files was replaced."
            ) from error
        raise
    if trained and any(key.startswith("deferral_head.") for key in info["missing_keys"]):
        raise CheckpointError(
            f'"{name}" says in config.json that it has a deferral head, but its weights have none. It was probably '
            "saved through AutoModelForCausalLM: save it again from a CoLLMForCausalLM, or delete `deferral` from its "
            "config.json to start a new head."
        )
    return model, info


def _load_head_only(name: str, config: PreTrainedConfig, hub: dict[str, Any], kwargs: dict[str, Any]) -> Any:
    model = _load_base_of(name, config, hub, kwargs)
    try:
        model.deferral_head.load_state_dict(load_file(str(_find(name, HEAD_FILE, hub))))
    except RuntimeError as error:
        raise CheckpointError(
            f'the head in "{name}" does not fit its config.json or its base {config.deferral.base_model}: {error}'
        ) from error
    model.name_or_path = name
    return model


def _load_adapter(name: str, config: PreTrainedConfig, hub: dict[str, Any], kwargs: dict[str, Any]) -> Any:
    from peft import PeftModel

    model = _load_base_of(name, config, hub, kwargs)
    adapted = PeftModel.from_pretrained(model, name, **{k: v for k, v in hub.items() if v is not None})
    merged = adapted.merge_and_unload()
    merged.name_or_path = name
    merged.config.deferral.base_trained = True  # whoever wrote the adapter
    return merged


def _load_base_of(name: str, config: PreTrainedConfig, hub: dict[str, Any], kwargs: dict[str, Any]) -> Any:
    deferral = config.deferral
    if not deferral.base_model:
        raise CheckpointError(
            f'"{name}" holds only a head or an adapter and does not name its base: its config.json has no '
            "deferral.base_model."
        )
    # Revision and subfolder belong to the checkpoint, the rest (token, cache, offline) to both.
    kwargs = {key: value for key, value in kwargs.items() if key not in ("revision", "subfolder")}
    hub = {key: value for key, value in hub.items() if key in kwargs}
    if os.path.realpath(deferral.base_model) == os.path.realpath(name):
        raise CheckpointError(f'"{name}" holds only a head or an adapter and names itself as its base.')
    base_config, _ = read_config(deferral.base_model, dict(hub))
    if getattr(base_config, "deferral", None) is None and _paper_defer_row(deferral.base_model, hub) is None:
        base_class = base_class_for(base_config)
        model = base_class.from_pretrained(deferral.base_model, **kwargs)
        return CoLLMForCausalLM.from_base(model, deferral=deferral)
    settings = {key: value for key, value in deferral.items() if key != "base_model"}  # the base has its own
    model = load_deferral_checkpoint(deferral.base_model, deferral=settings, **kwargs)
    model.config.deferral.base_model = deferral.base_model
    model.config.deferral.base_trained = deferral.base_trained
    return model


def _load_paper_checkpoint(
    name: str, base_class: Any, config: PreTrainedConfig, defer_row: int, kwargs: dict[str, Any]
) -> Any:
    """Cut the row of `<|defer|>` (and padding behind it) off the vocabulary; it becomes the head."""
    deferral, config.deferral = config.deferral, None
    del config.deferral
    model = base_class.from_pretrained(name, config=config, **kwargs)
    weight = model.get_output_embeddings().weight
    if defer_row >= len(weight):
        raise CheckpointError(
            f'the tokenizer of "{name}" gives {DEFER_TOKEN} the id {defer_row}, but its LM head ends at '
            f"{len(weight) - 1}."
        )
    row = weight[defer_row].detach().float().clone()
    model.resize_token_embeddings(defer_row, mean_resizing=False)
    model = CoLLMForCausalLM.from_base(model, deferral=deferral)
    model.deferral_head.weight.data.copy_(row.unsqueeze(0))
    return model


def _paper_defer_row(name: str, hub: dict[str, Any]) -> int | None:
    """Token id of `<|defer|>` where the checkpoint's tokenizer has added it, else `None`."""
    for file in ("added_tokens.json", "tokenizer_config.json", "tokenizer.json"):
        path = _find(name, file, hub)
        content = json.loads(Path(path).read_text(encoding="utf-8")) if path else {}
        if DEFER_TOKEN in content:
            return int(content[DEFER_TOKEN])
        decoder = content.get("added_tokens_decoder", {})
        tokens = [*content.get("added_tokens", []), *({"id": key, **value} for key, value in decoder.items())]
        for token in tokens:
            if token.get("content") == DEFER_TOKEN:
                return int(token["id"])
        if decoder:
            return None  # complete: tokenizer.json, megabytes to download and to read, says nothing else
    return None


def _is_only(file: str, name: str, hub: dict[str, Any]) -> bool:
    """Whether a checkpoint has this form, known by `file`.

    Raises:
        CheckpointError: it has another one, too: there is no telling which was written last.
    """
    if not _find(name, file, hub):
        return False
    for other in (HEAD_FILE, ADAPTER_FILE, "model.safetensors", INDEX_FILE):
        if other != file and _find(name, other, hub):
            raise CheckpointError(
                f'"{name}" holds two checkpoints, {file} and {other}: remove the one that is not meant.'
            )
    return True


def _find(name: str, file: str, hub: dict[str, Any]) -> str | None:
    if os.path.isdir(name):
        path = Path(name, hub.get("subfolder") or "", file)
        return str(path) if path.is_file() else None
    return cached_file(
        name, file, **hub,
        _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_connection_errors=False,
        _raise_exceptions_for_gated_repo=False,
    )  # fmt: skip


@contextmanager
def _checkpoint_errors(name: str) -> Iterator[None]:
    try:
        yield
    except SafetensorError as error:
        raise CheckpointError(
            f'a weight file of "{name}" is damaged or cut off ({error}). Copy or download the checkpoint again.'
        ) from error
    except OSError as error:
        hint = "" if os.path.isdir(name) else f' "{name}" is no local folder; is the path or the Hub id right?'
        raise CheckpointError(f'cannot read a checkpoint from "{name}": {str(error).strip()}{hint}') from error


def save_head_only(model: Any, folder: str | os.PathLike[str]) -> None:
    """Write config.json and `deferral_head.safetensors`: a few kilobytes that name their base.

    Args:
        model ([`CoLLMForCausalLM`]): only its head differs from `config.deferral.base_model`.
        folder (`str`): created where missing.

    Raises:
        CheckpointError: the base was trained, the model does not know its name, or `folder` holds other weights.
    """
    if model.config.deferral.base_trained:
        raise _base_was_trained("this model", model.config.deferral)
    if not model.config.deferral.base_model:
        raise CheckpointError(
            "this model does not know the name of its base: set model.config.deferral.base_model to a Hub id or folder."
        )
    check_no_other_weights(folder)
    os.makedirs(folder, exist_ok=True)
    save_deferral_config(model, folder)
    state = {key: value.detach().cpu().contiguous() for key, value in model.deferral_head.state_dict().items()}
    temporary = Path(folder, HEAD_FILE + ".partial")
    save_file(state, temporary, metadata={"format": "pt"})
    os.replace(temporary, Path(folder, HEAD_FILE))


def check_no_other_weights(folder: str | os.PathLike[str]) -> None:
    """Refuse to write a head beside other weights: one of the two would not be loaded.

    Raises:
        CheckpointError: full weights or an adapter lie in `folder`.
    """
    found = _files(folder, *FULL_FILES, *ADAPTER_FILES)
    if found:
        raise CheckpointError(
            f'"{folder}" holds other weights ({found[0].name}), and a head does not go beside them. '
            "Take another folder, or remove them first."
        )


def remove_other_forms(folder: str | os.PathLike[str]) -> None:
    """Remove a head file and an adapter from a folder that full weights were written into: they would be loaded."""
    for path in _files(folder, HEAD_FILE, *ADAPTER_FILES):
        path.unlink(missing_ok=True)


def _files(folder: str | os.PathLike[str], *patterns: str) -> list[Path]:
    return [path for pattern in patterns for path in sorted(Path(folder).glob(pattern))]


def is_head_only(name: str) -> bool:
    """Whether a deferral checkpoint holds a head alone: its weights are those of `deferral.base_model`.

    Raises:
        CheckpointError: it holds another form, too.
    """
    return _is_only(HEAD_FILE, name, {})


def check_base_untrained(name: str) -> None:
    """Refuse to take the head alone where it would be wrong.

    Raises:
        CheckpointError: the base of the checkpoint `name` was trained too.
    """
    deferral = read_deferral(name)
    with _checkpoint_errors(name):
        if deferral.base_trained or _find(name, ADAPTER_FILE, {}):
            raise _base_was_trained(f'"{name}"', deferral)


def _base_was_trained(of: str, deferral: DeferralConfig) -> CheckpointError:
    return CheckpointError(
        f"the base of {of} was trained too: it differs from {deferral.base_model}, so that the head alone would be "
        "wrong. Take all of it."
    )


def link_full_checkpoint(name: str, folder: str | os.PathLike[str]) -> bool:
    """
    Make `folder` a full checkpoint of the head-only checkpoint `name`, without copying: links to the files of its base,
    the head beside them, and an index of both. For engines that read one folder.

    Returns:
        `bool`: whether `name` is head-only; if not, nothing is written.

    Raises:
        CheckpointError: an adapter, a head whose base is no plain safetensors checkpoint, or two forms in one folder.
    """
    if not (_find(name, ADAPTER_FILE, {}) or _find(name, HEAD_FILE, {})):
        return False
    deferral = getattr(read_config(name, {})[0], "deferral", None)
    if deferral is None:
        return False
    head = not _is_only(ADAPTER_FILE, name, {}) and is_head_only(name)
    base = DeferralConfig.from_any(deferral).base_model or ""
    files = sorted(_whole(base).iterdir()) if head and base else []
    weights = [file for file in files if file.suffix == ".safetensors"]
    if not weights or getattr(read_config(base, {})[0], "deferral", None) is not None:
        raise CheckpointError(
            f'an engine needs all weights in one folder, and "{name}" has not: `collm export {name} FULL` writes one.'
        )
    folder = Path(folder)
    for file in (*files, *sorted(_whole(name).iterdir())):  # of two with one name, the checkpoint's own
        if file.is_file() and file not in weights and file.name not in (HEAD_FILE, INDEX_FILE):
            (folder / file.name).unlink(missing_ok=True)
            (folder / file.name).symlink_to(file.resolve())

    state = {f"deferral_head.{key}": value for key, value in load_file(str(_find(name, HEAD_FILE, {}))).items()}
    places = dict.fromkeys(state, f"linked-{HEAD_FILE}")
    save_file(state, folder / f"linked-{HEAD_FILE}", metadata={"format": "pt"})
    for file in weights:  # not by their own names: a `model.safetensors` would be taken for everything
        (folder / f"linked-{file.name}").symlink_to(file.resolve())
        with safe_open(file, "pt") as opened:
            places |= dict.fromkeys(opened.keys(), f"linked-{file.name}")
    (folder / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": places}), encoding="utf-8")
    return True


def _whole(name: str) -> Path:
    """All files of a checkpoint but weights in other formats, in one folder."""
    if os.path.isdir(name):
        return Path(name)
    return Path(snapshot_download(name, allow_patterns=["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja"]))


def save_deferral_config(model: Any, folder: str | os.PathLike[str]) -> None:
    """Write the model's config.json into `folder`, naming `CoLLMForCausalLM` (an adapter folder needs it too)."""
    model.config.architectures = ["CoLLMForCausalLM"]
    model.config.dtype = str(model.dtype).removeprefix("torch.")
    model.config.save_pretrained(folder)
