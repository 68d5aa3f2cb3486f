"""What the assistants say about a data set: log P_k(x_t | x_<t), and whether x_t is their first choice.

Training never holds an assistant in memory: it reads two columns that are written here, one number per target token and
assistant. [`score_dataset`] writes them so that it can be killed at any point:

1. Say what is scored (data, tokenizer, assistants, settings) in a manifest; refuse to go on with another one's.
2. For each assistant, batch sequences of similar length, the longest first. The plan depends on the data alone.
3. Score the batches that have no file yet: the decoder in one pass, the LM head on target positions only, in chunks.
   A batch's file appears complete or not at all. Several processes take every n-th batch each.
4. Put the files together as two columns of the data set, in a folder that appears complete or not at all.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from collm.data.tokenizers import check_same_tokenizer, load_tokenizer, tokenizer_fingerprint
from collm.errors import AssistantError, ConfigurationError, DataFormatError, ScoreMismatchError, did_you_mean
from collm.files import sync_folder, write_file, write_json
from collm.fingerprints import files_fingerprint

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from collm.data.formatting import FormatReport

SCORES_FILE = "collm_scores.json"
COLUMNS = {"input_ids", "labels", "assistant_input_ids", "assistant_labels"}
LAYOUT = ("device_map", "tensor_parallel_size")  # where an assistant runs, not what it says
LOGITS_PER_CHUNK = 2**25  # 128 MiB in float32, 220 positions of a vocabulary of 152k

# (input_ids, labels), one list per sequence -> float32 (N,) log-probabilities in nats and bool (N,) whether the target
# is the first choice; N = targets in the order of the sequences. Whatever can answer this can score.
Scorer = Callable[[list[list[int]], list[list[int]]], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class AssistantSettings:
    """An assistant and how it is loaded.

    Args:
        name (`str`): Hub name or local folder.
        dtype (`str`, defaults to `"auto"`): `"auto"` (as the checkpoint), `"float32"`, `"bfloat16"` or `"float16"`.
        quantization (`str`, *optional*): `"4bit"` or `"8bit"`, by bitsandbytes. A checkpoint that is quantised already
            needs nothing.
        attn_implementation (`str`, *optional*): as in transformers.
        device_map (`str`, *optional*): `"auto"` spreads one assistant over all devices of this process.
        engine (`str`, defaults to `"transformers"`): or `"vllm"`, which schedules a big assistant over several devices.
        tensor_parallel_size (`int`, defaults to 1): devices that vLLM splits the assistant over.

    Raises:
        [`ConfigurationError`]: a value that an option does not have, or options that exclude each other.
    """

    name: str
    dtype: str = "auto"
    quantization: str | None = None
    attn_implementation: str | None = None
    device_map: str | None = None
    engine: str = "transformers"
    tensor_parallel_size: int = 1

    def __post_init__(self) -> None:
        for option, value, allowed in (
            ("dtype", self.dtype, ("auto", "float32", "bfloat16", "float16")),
            ("quantization", self.quantization or "4bit", ("4bit", "8bit")),
            ("engine", self.engine, ("transformers", "vllm")),
        ):
            if value not in allowed:
                raise ConfigurationError(
                    f'{option} is "{value}"; it can be {", ".join(allowed)}.{did_you_mean(value, allowed)}'
                )
        if self.engine == "vllm" and (self.quantization == "8bit" or self.attn_implementation or self.device_map):
            raise ConfigurationError(
                'engine="vllm" has no quantization="8bit", attn_implementation or device_map: vLLM chooses its '
                "attention, and splits an assistant by tensor_parallel_size."
            )
        if self.engine == "transformers" and self.tensor_parallel_size != 1:
            raise ConfigurationError(
                'tensor_parallel_size is for engine="vllm"; with transformers use device_map="auto".'
            )


# ---- The model call -------------------------------------------------------------------------------------------------


@torch.inference_mode()
def score_batch(model: PreTrainedModel, input_ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probability of every target, without ever holding the logits of all positions.

    Rows are padded on the right. No attention mask is passed: what a causal model sees at a target lies before it, and
    without a mask attention takes its fast path.

    Args:
        model (`PreTrainedModel`): any causal language model.
        input_ids (`torch.Tensor` of shape `(batch, seq)`): int64; any id as padding.
        labels (`torch.Tensor` of shape `(batch, seq)`): int64; -100 = not a target. Column 0 is never a target.

    Returns:
        log P(x_t | x_<t), float32 `(N,)` in nats, and whether x_t is the argmax, bool `(N,)`, in row-major order.
    """
    from collm.modeling import decoder_path, lm_head_logits

    hidden = model.get_submodule(decoder_path(model))(input_ids=input_ids, use_cache=False)[0]
    targets = labels[:, 1:] != -100
    hidden, tokens = hidden[:, :-1][targets.to(hidden.device)], labels[:, 1:][targets].to(hidden.device)
    # Many rows per product with the LM head's weight, few in float32: less memory than the logits of all positions,
    # and what is read several times stays in the cache.
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    many = max(1, min(2 * LOGITS_PER_CHUNK // vocabulary, input_ids.numel() // 2))
    few = max(1, LOGITS_PER_CHUNK // (8 * vocabulary))
    logprobs = torch.empty(len(tokens), dtype=torch.float32, device=hidden.device)
    correct = torch.empty(len(tokens), dtype=torch.bool, device=hidden.device)
    for start in range(0, len(tokens), many):
        chunk = lm_head_logits(model, hidden[start : start + many].unsqueeze(0))[0]
        for offset in range(0, len(chunk), few):
            part = slice(start + offset, start + min(offset + few, len(chunk)))
            logits = chunk[offset : offset + few].float()
            correct[part] = logits.argmax(-1) == tokens[part]
            logprobs[part] = -F.cross_entropy(logits, tokens[part], reduction="none")
    return logprobs, correct


class TransformersScorer:
    """A [`Scorer`] over a transformers model: pads, moves to the device, calls [`score_batch`]."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model.eval()

    def __call__(self, input_ids: list[list[int]], labels: list[list[int]]) -> tuple[Tensor, Tensor]:
        length = max(len(row) for row in input_ids)
        ids = torch.tensor([row + [0] * (length - len(row)) for row in input_ids])
        targets = torch.tensor([row + [-100] * (length - len(row)) for row in labels])
        logprobs, correct = score_batch(self.model, ids.to(self.model.device), targets.to(self.model.device))
        return logprobs.cpu(), correct.cpu()


def load_scorer(settings: AssistantSettings, device: torch.device) -> Scorer:
    """Load an assistant.

    Raises:
        [`AssistantError`]: it cannot be loaded, or quantised, here.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    if settings.engine == "vllm":
        from collm.data.vllm_scoring import VLLMScorer

        quantization = "bitsandbytes" if settings.quantization else None
        return VLLMScorer(
            settings.name,
            dtype=settings.dtype,
            quantization=quantization,
            tensor_parallel_size=settings.tensor_parallel_size,
        )
    options: dict[str, Any] = {"dtype": settings.dtype, "device_map": settings.device_map}
    if settings.attn_implementation:
        options["attn_implementation"] = settings.attn_implementation
    if settings.quantization:
        options["quantization_config"] = BitsAndBytesConfig(**{f"load_in_{settings.quantization}": True})
        options["device_map"] = settings.device_map or {"": device}
    try:
        model = AutoModelForCausalLM.from_pretrained(settings.name, **options)
    except ImportError as error:
        advice = "pip install bitsandbytes; " if settings.quantization else ""
        raise AssistantError(f'The assistant "{settings.name}" cannot be loaded here ({advice}{error}).') from error
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise AssistantError(f'The assistant "{settings.name}" cannot be loaded: {error}') from error
    return TransformersScorer(model if options["device_map"] else model.to(device))


# ---- The data set ---------------------------------------------------------------------------------------------------


def score_dataset(
    dataset: Dataset,
    tokenizer: str | PreTrainedTokenizerBase,
    assistants: Sequence[str | AssistantSettings],
    output_dir: str | os.PathLike,
    batch_tokens: int = 4096,
    report: FormatReport | None = None,
) -> Dataset:
    """Score a formatted data set with K assistants; killed and started again, it goes on where it was.

    Under `accelerate launch` each process scores its share. While it runs, everything lies in `<output_dir>.partial`;
    `output_dir` appears when all is done.

    Args:
        dataset (`datasets.Dataset`): from [`~data.formatting.format_rows`].
        tokenizer (`str` or `PreTrainedTokenizerBase`): the one that the data was formatted with.
        assistants (sequence of `str` or [`AssistantSettings`]): K of them, in the order of the K axis.
        output_dir (`str` or `os.PathLike`): folder to write.
        batch_tokens (`int`, defaults to 4096): tokens per batch, padding included; a longer sequence is its own batch.
        report ([`FormatReport`], *optional*): kept beside the scores.

    Returns:
        The data set with `assistant_logprobs` (float32, `(seq, K)` per row, nats, 0.0 where there is no target) and
        `assistant_correct` (bool, `(seq, K)`); entry t belongs to `labels[t]`. Also on disk, with `collm_scores.json`.

    Raises:
        [`TokenizerMismatchError`]: an assistant has another vocabulary; before anything is loaded.
        [`ScoreMismatchError`]: there are scores of other models, tokenizers, data or settings; says which.
        [`AssistantError`]: an assistant cannot be loaded, cannot read a row, or answers with NaN.
    """
    from accelerate import PartialState
    from datasets import load_from_disk

    output, partial = Path(output_dir), _partial(output_dir)
    settings = [AssistantSettings(a) if isinstance(a, str) else a for a in assistants]
    if not settings or batch_tokens < 1:
        raise ConfigurationError("Scoring needs at least one assistant and a positive batch_tokens.")
    if len(dataset) == 0:
        raise DataFormatError("The data set has no rows.")
    tokenizer = load_tokenizer(tokenizer)
    for assistant in settings:
        check_same_tokenizer(tokenizer, assistant.name)
    state = PartialState(timeout=timedelta(days=1))  # shares end at different times; the default is ten minutes

    # 1. What is scored. Everything that the result depends on is in the manifest.
    views = [_view(dataset, k, len(settings)) for k in range(len(settings))]
    manifest = {
        "assistants": [_identity(assistant, view) for assistant, view in zip(settings, views, strict=True)],
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "data": _data_fingerprint(dataset),
        "batch_tokens": batch_tokens,
        "rows": len(dataset),
    }
    if output.exists() and any(output.iterdir()):
        if not (output / SCORES_FILE).exists():
            raise ConfigurationError(f"{output} exists and is not a scored data set; choose another folder.")
        _check_same(manifest, output / SCORES_FILE)
        if state.is_main_process:
            shutil.rmtree(partial, ignore_errors=True)
        return load_from_disk(str(output))
    if state.is_main_process:
        partial.mkdir(parents=True, exist_ok=True)
        if not (partial / "manifest.json").exists():
            write_json(partial / "manifest.json", manifest, sort_keys=True, ensure_ascii=False)
    state.wait_for_everyone()
    _check_same(manifest, partial / "manifest.json")

    # 2. and 3. One assistant in memory at a time.
    plans = [plan_batches(_lengths(view).tolist(), batch_tokens) for view in views]
    for k, (assistant, view, plan) in enumerate(zip(settings, views, plans, strict=True)):
        folder = partial / f"assistant-{k}"
        folder.mkdir(exist_ok=True)
        share = list(enumerate(plan))[state.process_index :: state.num_processes]
        _score_share(assistant, view, share, folder, state)
    state.wait_for_everyone()

    # 4. Put it together.
    if state.is_main_process:
        _assemble(dataset, views, plans, partial, output, manifest, report)
    state.wait_for_everyone()
    return load_from_disk(str(output))


def load_scored(
    path: str | os.PathLike, tokenizer: str | PreTrainedTokenizerBase | None = None
) -> tuple[Dataset, dict[str, Any]]:
    """A scored data set and what `collm_scores.json` says of it.

    Args:
        path (`str` or `os.PathLike`): folder that [`score_dataset`] wrote.
        tokenizer (`str` or `PreTrainedTokenizerBase`, *optional*): the base's, checked against the one of the scores.

    Raises:
        [`DataFormatError`]: no scored data set there.
        [`ScoreMismatchError`]: it was made with another vocabulary.
    """
    from datasets import load_from_disk

    file = Path(path) / SCORES_FILE
    if not file.is_file():
        unfinished = " Scoring was not finished: run the same `collm score` again." if _partial(path).exists() else ""
        raise DataFormatError(f"{path} is not a scored data set (no {SCORES_FILE}).{unfinished}")
    scores = json.loads(file.read_text(encoding="utf-8"))
    if tokenizer is not None and tokenizer_fingerprint(load_tokenizer(tokenizer)) != scores["tokenizer"]:
        raise ScoreMismatchError(
            f"{path} was scored with another tokenizer ({_brief(scores['tokenizer'])}) than the model's; score the "
            "data again with the model's tokenizer."
        )
    return load_from_disk(str(path)), scores


def plan_batches(lengths: Sequence[int], batch_tokens: int) -> list[list[int]]:
    """Rows of each batch: similar lengths together; the longest first, so that memory runs out at once or never."""
    batches: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lambda row: (-lengths[row], row)):
        if batches and lengths[batches[-1][0]] * (len(batches[-1]) + 1) <= batch_tokens:
            batches[-1].append(row)
        else:
            batches.append([row])
    return batches


def _score_share(
    settings: AssistantSettings, view: Dataset, share: list[tuple[int, list[int]]], folder: Path, state: Any
) -> None:
    from tqdm.auto import tqdm

    todo = [(number, rows) for number, rows in share if not _shard(folder, number).exists()]
    if not todo:
        return
    lengths = _lengths(view)
    total, left = (sum(int(lengths[rows].sum()) for _, rows in part) for part in (share, todo))
    scorer = load_scorer(settings, state.device)
    share_of = f" (share 1 of {state.num_processes})" if state.num_processes > 1 else ""
    with tqdm(
        total=total,
        initial=total - left,
        desc=f"scoring {Path(settings.name).name}{share_of}",
        unit="tok",
        unit_scale=True,
        disable=not state.is_main_process,
    ) as progress:
        for rows in score_batches(scorer, settings.name, view, todo, folder):
            progress.update(int(lengths[rows].sum()))


def score_batches(
    scorer: Scorer, name: str, view: Dataset, batches: list[tuple[int, list[int]]], folder: Path
) -> Iterator[list[int]]:
    """Score numbered batches of rows, one file each, and yield the rows of each as it is done."""
    from safetensors.torch import save

    with ThreadPoolExecutor(1) as writer:  # the disk is waited for while the next batch is computed
        writing: Future | None = None
        for number, rows in batches:
            logprobs, correct = _ask(scorer, name, view[rows])
            if writing is not None:
                writing.result()
            content = save({"logprobs": logprobs, "correct": correct})
            writing = writer.submit(write_file, _shard(folder, number), content)
            yield rows
        if writing is not None:
            writing.result()


def _ask(scorer: Scorer, name: str, batch: dict[str, list[list[int]]]) -> tuple[Tensor, Tensor]:
    try:
        logprobs, correct = scorer(batch["input_ids"], batch["labels"])
    except torch.OutOfMemoryError as error:
        longest = max(len(ids) for ids in batch["input_ids"])
        raise AssistantError(
            f'The assistant "{name}" ran out of memory on {len(batch["input_ids"])} sequences of up to {longest} '
            "tokens. Lower batch_tokens (and remove the .partial folder), or load it with quantization or device_map."
        ) from error
    if not torch.isfinite(logprobs).all():
        raise AssistantError(
            f'The assistant "{name}" gave a log-probability that is not a finite number. In float16 that is an '
            'overflow: choose dtype="bfloat16" or "float32".'
        )
    return logprobs, correct


def _partial(output: str | os.PathLike) -> Path:
    path = Path(output).absolute()
    return path.with_name(f"{path.name}.partial")


def _shard(folder: Path, number: int) -> Path:
    return folder / f"{number:07d}.safetensors"


# ---- What the result depends on -------------------------------------------------------------------------------------


def _identity(settings: AssistantSettings, view: Dataset) -> dict[str, Any]:
    """What identifies an assistant's answers; checks on the way, from its config alone, that it can read the rows."""
    from transformers import AutoConfig

    from collm.modeling import base_class_for

    try:
        config = AutoConfig.from_pretrained(settings.name)
    except (OSError, ValueError) as error:
        raise AssistantError(f'There is no assistant "{settings.name}": {error}') from error
    base_class_for(config)
    text = config.get_text_config(decoder=True)
    limit, vocabulary = getattr(text, "max_position_embeddings", None), text.vocab_size
    if limit is not None and settings.engine == "vllm":
        limit -= 1  # vLLM wants room for a token to generate
    lengths = _lengths(view)
    if limit is not None and lengths.max() > limit:
        raise AssistantError(
            f'{(lengths > limit).sum()} rows are longer than the {limit} tokens that the assistant "{settings.name}" '
            f"can read (the longest has {lengths.max()}). Format the data with max_length={limit} or less."
        )
    largest = max(_numbers(batch["input_ids"])[0].max() for batch in view.with_format("arrow").iter(1000))
    if largest >= vocabulary:
        raise AssistantError(
            f'The data has the token id {largest}; the assistant "{settings.name}" knows ids below {vocabulary}.'
        )
    answers = {key: value for key, value in asdict(settings).items() if key not in LAYOUT}
    return {**answers, "weights": files_fingerprint(settings.name, config)}


def _data_fingerprint(dataset: Dataset) -> str:
    digest = hashlib.sha256()
    for batch in dataset.with_format("arrow").iter(1000):
        for name in sorted(COLUMNS & set(batch.column_names)):
            digest.update(f"\n{name}\n".encode())
            for numbers in _numbers(batch[name]):
                digest.update(numbers.astype(np.int64).tobytes())
    return digest.hexdigest()


def _numbers(column: Any) -> list[np.ndarray]:
    """The integers of an arrow column of lists, flat, and the lengths of its lists, the innermost first."""
    array, lengths = column.combine_chunks(), []
    while hasattr(array, "value_lengths"):
        lengths.append(array.value_lengths().to_numpy())
        array = array.flatten()
    return [array.to_numpy(), *reversed(lengths)]


def _lengths(view: Dataset) -> np.ndarray:
    batches = view.with_format("arrow").iter(1000)
    return np.concatenate([_numbers(batch["input_ids"])[1] for batch in batches])


def _check_same(manifest: dict[str, Any], path: Path) -> None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise ScoreMismatchError(f"{path} cannot be read ({error}); remove its folder to score again.") from error
    differences = [
        f"{what} ({_brief(old)} there, {_brief(new)} asked for)" for what, old, new in _differences(found, manifest)
    ]
    if differences:
        raise ScoreMismatchError(
            f"{path.parent} has scores of something else; different: {'; '.join(differences)}. Choose another output "
            "folder, or remove that one to score again."
        )


def _differences(found: dict[str, Any], wanted: dict[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    ours, theirs = wanted["assistants"], found.get("assistants", [])
    defaults = {f.name: f.default for f in fields(AssistantSettings)}
    if len(ours) != len(theirs):
        yield "number of assistants", len(theirs), len(ours)
        return
    for k, (old, new) in enumerate(zip(theirs, ours, strict=True), start=1):
        old = defaults | old  # a setting that an older version did not record had its default
        yield from ((f"assistant {k}'s {key}", old.get(key), new[key]) for key in new if old.get(key) != new[key])
    for key in wanted.keys() - {"assistants"}:
        if found.get(key) != wanted[key]:
            yield key, found.get(key), wanted[key]


def _brief(value: Any) -> str:
    text = str(value)
    return text if len(text) < 64 else f"{text[:12]}…"


# ---- Files ----------------------------------------------------------------------------------------------------------


def _view(dataset: Dataset, k: int, assistants: int) -> Dataset:
    """Input ids and labels as assistant k reads them: its own sequence where a row has one, else the shared one."""
    from datasets import Dataset

    missing = {"input_ids", "labels"} - set(dataset.column_names)
    if missing:
        raise DataFormatError(
            f"The data set has no {' and no '.join(sorted(missing))}; format it with format_rows first."
        )
    if "assistant_input_ids" not in dataset.column_names:
        return dataset.select_columns(["input_ids", "labels"])
    columns: dict[str, list] = {"input_ids": [], "labels": []}
    for number, row in enumerate(dataset):
        own = {name: row[f"assistant_{name}"] for name in columns}
        if len(own["input_ids"]) != assistants:
            raise DataFormatError(
                f"Row {number} has sequences for {len(own['input_ids'])} assistants, not {assistants}."
            )
        which = own["input_ids"][k] and {name: own[name][k] for name in columns}
        for name in columns:
            columns[name].append((which or row)[name])
        if which and _targets(which["labels"]) != _targets(row["labels"]):
            raise DataFormatError(f"Row {number}: assistant {k + 1} has other targets than the row.")
    return Dataset.from_dict(columns)


def _targets(labels: list[int]) -> list[int]:
    return [label for label in labels[1:] if label != -100]


def _assemble(
    dataset: Dataset,
    views: list[Dataset],
    plans: list[list[list[int]]],
    partial: Path,
    output: Path,
    manifest: dict[str, Any],
    report: FormatReport | None,
) -> None:
    """Scatter the batches' numbers to their target positions and save the data set with its two new columns."""
    import pyarrow as pa
    from datasets import Dataset, Features, List, Value
    from safetensors.torch import load

    labels = [np.array(row) for row in dataset["labels"]]
    ends = np.cumsum([0, *(len(row) for row in labels)])
    positions = [start + 1 + np.flatnonzero(row[1:] != -100) for start, row in zip(ends, labels, strict=False)]
    logprobs = np.zeros((ends[-1], len(plans)), dtype=np.float32)
    correct = np.zeros((ends[-1], len(plans)), dtype=bool)
    for k, plan in enumerate(plans):
        for number, rows in enumerate(plan):
            where = np.concatenate([positions[row] for row in rows])
            scores = load(_shard(partial / f"assistant-{k}", number).read_bytes())
            logprobs[where, k], correct[where, k] = scores["logprobs"].numpy(), scores["correct"].numpy()

    targets = np.concatenate(positions)
    summary = {
        **manifest,
        "tokens": int(ends[-1]),
        "targets": len(targets),
        "mean_logprob": [float(logprobs[targets, k].mean(dtype=np.float64)) for k in range(len(plans))],
        "share_correct": [float(correct[targets, k].mean()) for k in range(len(plans))],
        "formatting": report and asdict(report),
    }
    features = Features(
        {
            "input_ids": List(Value("int32")),
            "labels": List(Value("int64")),
            "assistant_logprobs": List(List(Value("float32"), length=len(plans))),
            "assistant_correct": List(List(Value("bool"), length=len(plans))),
        }
    )
    tables = []
    for start in range(0, len(dataset), 10_000):
        table = dataset.select_columns(["input_ids", "labels"]).with_format("arrow")[start : start + 10_000]
        edges = ends[start : start + 10_001]
        for name, values in (("assistant_logprobs", logprobs), ("assistant_correct", correct)):
            here = pa.array(values[edges[0] : edges[-1]].reshape(-1))
            rows = pa.ListArray.from_arrays(
                pa.array(edges - edges[0], pa.int32()), pa.FixedSizeListArray.from_arrays(here, len(plans))
            )
            table = table.append_column(name, rows)
        tables.append(table.cast(features.arrow_schema))
    fingerprint = hashlib.sha256(json.dumps(summary, sort_keys=True).encode()).hexdigest()[:16]
    scored = Dataset(pa.concat_tables(tables), fingerprint=fingerprint)

    finished = partial / "dataset"
    shutil.rmtree(finished, ignore_errors=True)
    scored.save_to_disk(str(finished))
    write_json(finished / SCORES_FILE, summary, sort_keys=True, ensure_ascii=False)
    for path in finished.iterdir():
        with open(path, "rb") as file:
            os.fsync(file.fileno())
    os.replace(finished, output)  # onto nothing, or an empty folder
    sync_folder(output.absolute().parent)
    shutil.rmtree(partial)
