"""Training from arguments to a checkpoint, with the stock `Trainer`: what `collm train` runs."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase, Trainer, set_seed

import collm
from collm.checkpoints import (
    TRAINING_FILE,
    check_no_other_weights,
    is_head_only,
    save_deferral_config,
    save_head_only,
)
from collm.configuration import DeferralConfig
from collm.data.collator import DataCollatorForCoLLM
from collm.data.scoring import SCORES_FILE, load_scored
from collm.data.tokenizers import load_tokenizer
from collm.errors import CoLLMError, ConfigurationError, ScoreMismatchError, TrainingError
from collm.files import write_json
from collm.modeling import CoLLMForCausalLM

from .arguments import TrainArguments
from .callbacks import AdapterConfigCallback, DeferralLoggingCallback, StopOnNaNCallback, is_complete, last_checkpoint
from .head import train_head
from .targets import deferral_model
from .zinit import ZInitializationCallback, has_trained_head

logger = logging.getLogger(__name__)

RUN_FILE = "collm_run.json"
HEAD_OPTIONS = ("features", "bias")
# What a run that goes on cannot change; the rest is warned of.
IDENTITY = ("model", "data", "data_fingerprint", "mode", "objective", *HEAD_OPTIONS)


def train(arguments: TrainArguments) -> dict[str, Any]:
    """Train a base and its deferral head (or, for objective `"sft"`, a plain model) and write a checkpoint.

    1. Check what would fail late: the folder can be written, nothing finished lies there. Find where to go on.
    2. Load data, tokenizer and model.
    3. Mode head: solve on cached features. Other modes: the stock Trainer with our callbacks.
    4. Write the checkpoint, and in `collm_training.json` what was run and what came of it.

    Args:
        arguments ([`TrainArguments`]).

    Returns:
        `dict`: what `collm_training.json` holds.

    Raises:
        ConfigurationError: options that cannot go together, a folder that cannot be written, a finished run in it, an
            interrupted one of another model or other data.
        DataFormatError, ScoreMismatchError, TokenizerMismatchError, CheckpointError: data or model do not fit, or (mode
            head) the folder holds other weights.
        TrainingError: a loss that is no number, or a disk that is full; the last good checkpoint stays.
    """
    # 1. What would fail late.
    output = Path(arguments.output_dir)
    if arguments.should_save:
        check_writable(output)
    checkpoint = _checkpoint_to_resume(arguments, output)
    if arguments.mode == "head":
        check_no_other_weights(output)
    set_seed(arguments.seed)  # the Trainer does it too, but adapters draw their weights before
    if arguments.deepspeed and arguments.use_cpu:
        import deepspeed

        # accelerate tells DeepSpeed of the process group on accelerators only; ZeRO-3 asks for it at loading.
        deepspeed.init_distributed("gloo", auto_mpi_discovery=False)

    # 2. Data and model.
    tokenizer = load_tokenizer(arguments.model)
    dataset, assistants = load_data(arguments, str(arguments.data), tokenizer)
    eval_dataset = None
    if arguments.eval_data:
        eval_dataset, theirs = load_data(arguments, arguments.eval_data, tokenizer)
        if theirs != assistants:
            raise ScoreMismatchError(
                f"{arguments.eval_data} was scored by {', '.join(theirs)}, {arguments.data} by "
                f"{', '.join(assistants)}: score both by the same ones, in one order."
            )
    model = load_model(arguments, assistants)
    collator = DataCollatorForCoLLM(pad_token_id=tokenizer.pad_token_id or 0)

    # 3. Train.
    if arguments.mode == "head":
        results = _train_head(arguments, model, dataset, collator)
    else:
        results = _train_weights(arguments, model, tokenizer, dataset, eval_dataset, collator, checkpoint)

    # 4. Leave a record.
    record = {
        "collm": collm.__version__,
        "mode": arguments.mode,
        "objective": arguments.objective,
        "base_model": arguments.model,
        "data": arguments.data,
        "assistants": assistants,
        "rows": len(dataset),
        "arguments": arguments.changed(),
        "results": results,
    }
    if arguments.should_save:
        tokenizer.save_pretrained(output)
        (output / TRAINING_FILE).write_text(json.dumps(record, indent=2, default=str) + "\n", encoding="utf-8")
    return record


def check_writable(folder: Path) -> None:
    """Create `folder` and a file in it, before any work.

    Raises:
        ConfigurationError: it cannot be created or written, or there is no space at all.
    """
    probe = folder / f".probe-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"x" * 4096)
        probe.unlink()
    except OSError as error:
        raise ConfigurationError(f"output_dir {str(folder)!r} cannot be written: {error.strerror}.") from error


def load_data(arguments: TrainArguments, source: str, tokenizer: PreTrainedTokenizerBase) -> tuple[Any, list[str]]:
    """A scored data set and the names of its assistants; for objective `"sft"`, any rows, formatted."""
    if arguments.objective != "sft":
        dataset, scores = load_scored(source, tokenizer)
        return dataset, [assistant["name"] for assistant in scores["assistants"]]
    from collm.data.formatting import format_rows
    from collm.data.reading import read_rows

    rows = read_rows(source, arguments.split)
    if {"input_ids", "labels"} <= set(rows.column_names):
        return rows.select_columns(["input_ids", "labels"]), []
    dataset, report = format_rows(rows, tokenizer, arguments.task, arguments.max_length, arguments.chat_template)
    print(report, file=sys.stderr)
    return dataset, []


def load_model(arguments: TrainArguments, assistants: list[str]) -> Any:
    """The model to train, on this process, with adapters in the modes lora and qlora."""
    dtype = arguments.dtype
    if dtype == "auto" and arguments.mode == "full":
        dtype = "float32"
    options: dict[str, Any] = {"dtype": dtype}
    if arguments.attn_implementation:
        options["attn_implementation"] = arguments.attn_implementation
    if arguments.mode == "qlora":
        options |= _quantisation(arguments)
    with _wrong_options(f"the model {arguments.model} cannot be loaded like this"):
        if arguments.objective == "sft":
            model = AutoModelForCausalLM.from_pretrained(arguments.model, **options)
            vars(model.config).pop("deferral", None)  # of a deferral checkpoint: this model has no head
        else:
            deferral = {
                "num_assistants": len(assistants),
                "deferral_cost": arguments.deferral_cost,
                "objective": arguments.objective,
                # A trained head keeps its own, and refuses others.
                **{name: value for name in HEAD_OPTIONS if (value := getattr(arguments, name)) is not None},
            }
            model = CoLLMForCausalLM.from_pretrained(str(arguments.model), deferral=deferral, **options)
            _settle(arguments, model.config.deferral, assistants)
    if arguments.mode in ("lora", "qlora"):
        with _wrong_options(f"{arguments.model} cannot get adapters on {arguments.lora_target_modules}"):
            model = add_adapters(arguments, model)
    return model


def _settle(arguments: TrainArguments, deferral: DeferralConfig, assistants: list[str]) -> None:
    """What a checkpoint says of its head and its base, made true for what comes of it."""
    name = str(arguments.model)
    if deferral.assistants != assistants and sorted(deferral.assistants) == sorted(assistants):
        raise ScoreMismatchError(
            f"the head of {name} has the assistants {', '.join(deferral.assistants)}, in the order of its "
            f"rows; the data was scored by {', '.join(assistants)}. Score it with the assistants in the head's order."
        )
    deferral.assistants = assistants
    deferral.base_trained = arguments.mode != "head"
    if deferral.calibration or deferral.threshold != DeferralConfig.threshold:
        logger.warning("Threshold and calibration of %s were for other weights and go: calibrate again.", name)
        deferral.calibration, deferral.threshold = [], DeferralConfig.threshold
    if arguments.mode != "full" and deferral.base_model != name and not is_head_only(name):
        deferral.base_model = name


@contextmanager
def _wrong_options(what: str) -> Iterator[None]:
    """What transformers and PEFT say about an option is the user's to read, without a traceback."""
    try:
        yield
    except CoLLMError:
        raise
    except (ImportError, ValueError) as error:
        raise ConfigurationError(f"{what}: {error}") from error


def add_adapters(arguments: TrainArguments, model: Any) -> Any:
    """LoRA adapters on the decoder's linear layers; the deferral head is trained whole."""
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

    if arguments.mode == "qlora":
        model = prepare_model_for_kbit_training(model, arguments.gradient_checkpointing)
    has_head = isinstance(model, CoLLMForCausalLM)
    config = LoraConfig(
        r=arguments.lora_r,
        lora_alpha=arguments.lora_alpha,
        lora_dropout=arguments.lora_dropout,
        target_modules=arguments.lora_target_modules,
        exclude_modules=["deferral_head"] if has_head else None,
        modules_to_save=["deferral_head"] if has_head else None,
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, config)


def _quantisation(arguments: TrainArguments) -> dict[str, Any]:
    import importlib.util

    import torch
    from transformers import BitsAndBytesConfig

    if arguments.device.type == "cpu":
        # Seen in 0.50: it trains there, with gradients that are silently wrong after the first evaluation.
        raise ConfigurationError(
            "mode qlora needs a GPU: the 4-bit kernels of bitsandbytes have no backward pass on CPUs. Take mode lora."
        )
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigurationError("mode qlora needs bitsandbytes: pip install 'collm[qlora]', or take mode lora.")
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=["lm_head", "deferral_head"],
    )
    return {"quantization_config": config, "device_map": {"": arguments.device}}


def _train_head(arguments: TrainArguments, model: Any, dataset: Any, collator: Any) -> dict[str, Any]:
    model.to(arguments.device)
    with _disk_errors(arguments):
        report = train_head(
            model,
            dataset,
            collator,
            cache_dir=arguments.features_dir or Path(arguments.output_dir, "features"),
            method=arguments.z_method,
            ignore_both_wrong=arguments.z_ignore_both_wrong,
            positive_weight=arguments.positive_weight,
            l2=arguments.head_l2,
            held_out=arguments.head_held_out,
            batch_size=arguments.per_device_train_batch_size,
            seed=arguments.seed,
            progress=not arguments.disable_tqdm,
        )
        if arguments.should_save:
            print(report, file=sys.stderr)
            save_head_only(model, arguments.output_dir)
    return asdict(report)


def _train_weights(
    arguments: TrainArguments,
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Any,
    eval_dataset: Any,
    collator: Any,
    checkpoint: str | None,
) -> dict[str, Any]:
    has_head, has_adapter = arguments.objective != "sft", arguments.mode in ("lora", "qlora")
    callbacks: list[Any] = [StopOnNaNCallback()]
    z_initialization = arguments.z_initialization
    if has_head and z_initialization is None:
        z_initialization = not has_trained_head(model)
        if not z_initialization:
            logger.warning("Z-initialisation skipped: %s has a trained head.", arguments.model)
    if has_head and z_initialization:
        callbacks.append(
            ZInitializationCallback(
                method=arguments.z_method,
                ignore_both_wrong=arguments.z_ignore_both_wrong,
                positive_weight=arguments.positive_weight,
                max_tokens=arguments.z_max_tokens,
                l2=arguments.z_l2,
                seed=arguments.seed,
            )
        )
    if has_head and has_adapter:
        callbacks.append(AdapterConfigCallback())
    trainer = Trainer(
        model,
        arguments,
        train_dataset=dataset,
        eval_dataset=eval_dataset,
        data_collator=collator,
        processing_class=tokenizer,
        callbacks=callbacks,
    )
    if has_head:
        DeferralLoggingCallback.attach(trainer)
    with _disk_errors(arguments):
        metrics = trainer.train(resume_from_checkpoint=checkpoint).metrics
        trainer.save_model()
        trainer.save_state()
        if arguments.should_save and has_adapter:
            _finish_adapter(arguments, deferral_model(model) if has_head else None)
    return {**metrics, "log_history": trainer.state.log_history}


def _finish_adapter(arguments: TrainArguments, deferral: Any | None) -> None:
    if deferral is not None:
        save_deferral_config(deferral, arguments.output_dir)
    if arguments.merge_adapter:
        merge_adapter(arguments.output_dir, Path(arguments.output_dir, "merged"), arguments.dtype)


def merge_adapter(adapter: str | os.PathLike[str], output: str | os.PathLike[str], dtype: str = "auto") -> None:
    """Write an ordinary checkpoint from a LoRA or QLoRA folder: adapters added to the unquantised base's weights.

    Args:
        adapter (`str`): folder of an adapter, with a deferral head or without.
        output (`str`): folder to write; the tokenizer goes there too.
        dtype (`str`, *optional*, defaults to `"auto"`): of the merged weights.
    """
    config = Path(adapter, "config.json")
    if config.is_file() and "deferral" in json.loads(config.read_text(encoding="utf-8")):
        model = CoLLMForCausalLM.from_pretrained(str(adapter), dtype=dtype)
    else:
        from peft import AutoPeftModelForCausalLM

        model = AutoPeftModelForCausalLM.from_pretrained(adapter, dtype=dtype).merge_and_unload()
    model.save_pretrained(output)
    load_tokenizer(str(adapter)).save_pretrained(output)


def _checkpoint_to_resume(arguments: TrainArguments, output: Path) -> str | None:
    """The checkpoint asked for, or the last complete one of an interrupted run in the same folder."""
    if (output / TRAINING_FILE).is_file():
        raise ConfigurationError(f"{output} holds a finished run ({TRAINING_FILE}); choose another output_dir.")
    if arguments.mode == "head":
        return None  # the cached features are its checkpoint
    settings = arguments.changed()
    asked = settings.pop("resume_from_checkpoint", None)
    checkpoint = asked if isinstance(asked, str) else last_checkpoint(output)
    if isinstance(asked, str) and not is_complete(Path(asked)):
        last = last_checkpoint(output)
        raise ConfigurationError(
            f'resume_from_checkpoint is "{asked}", which is no complete checkpoint.'
            + (f" The last one in {output} is {last}; without the option it is taken." if last else "")
        )
    settings |= _data_fingerprint(arguments)
    if checkpoint is not None:
        logger.warning("Going on from %s.", checkpoint)
        record = Path(checkpoint).parent / RUN_FILE
        if record.is_file():
            before = json.loads(record.read_text(encoding="utf-8"))
            _check_same_run(before, json.loads(json.dumps(settings, default=str)), checkpoint)
    if arguments.should_save:
        write_json(output / RUN_FILE, settings, default=str)  # in one step: other processes may be reading it
    return checkpoint


def _data_fingerprint(arguments: TrainArguments) -> dict[str, str]:
    """Of a scored data set, so that one scored again under the same name is another."""
    file = Path(str(arguments.data), SCORES_FILE)
    return {"data_fingerprint": hashlib.sha256(file.read_bytes()).hexdigest()} if file.is_file() else {}


def _check_same_run(before: dict[str, Any], now: dict[str, Any], checkpoint: str) -> None:
    """Compare the options that were given to the interrupted run with those of this one."""
    different = sorted(name for name in {*before, *now} if before.get(name) != now.get(name))
    before, now = (
        {name: given.get(name, getattr(TrainArguments, name, None)) or DeferralConfig().get(name) for name in IDENTITY}
        for given in (before, now)
    )
    was, wanted = (
        {name: os.path.realpath(v) if name in ("model", "data") and os.path.exists(v) else v for name, v in run.items()}
        for run in (before, now)
    )
    if was["data_fingerprint"] is None or was["data_fingerprint"] == wanted["data_fingerprint"]:
        was["data_fingerprint"] = wanted["data_fingerprint"]  # unknown, or the same data wherever it lies
        was["data"] = wanted["data"] if before["data_fingerprint"] else was["data"]
    mixed = [f"{name} was {was[name]}, is now {wanted[name]}" for name in IDENTITY if was[name] != wanted[name]]
    if mixed:
        raise ConfigurationError(
            f"{checkpoint} is of another run: {'; '.join(mixed)}. Take another output_dir, or remove the checkpoints "
            "and start anew."
        )
    if different:
        logger.warning("These options differ from those of the interrupted run: %s.", ", ".join(different))


@contextmanager
def _disk_errors(arguments: TrainArguments) -> Iterator[None]:
    """A disk that is full while a checkpoint is written is said so, with what is left to go on from."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        # safetensors and torch.save report what the system said as text.
        said = ("No space left", "File too large", "quota exceeded", "PytorchStreamWriter failed", "unexpected pos")
        if not full and not any(text in str(error) for text in said):
            raise
        last = last_checkpoint(arguments.output_dir)
        raise TrainingError(
            f"{arguments.output_dir!r} cannot be written to any more ({str(error).strip().splitlines()[0]}). "
            + (f"The last good checkpoint is {last}" if last else "There is no complete checkpoint yet")
            + "; free some space and run the same command again to go on from there."
        ) from error
