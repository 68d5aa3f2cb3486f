"""Rows from wherever they are: the Hub, a folder, a file."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from collm.errors import DataFormatError, did_you_mean

if TYPE_CHECKING:
    from datasets import Dataset

FILE_TYPES = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}


def read_rows(source: str | os.PathLike | Dataset, split: str = "train", config: str | None = None) -> Dataset:
    """Rows from wherever they are.

    Args:
        source (`str`, `os.PathLike` or `datasets.Dataset`):
            A JSON-lines, JSON or parquet file (BioASQ's own JSON too), a folder written by `save_to_disk`, a folder of
            data files, or the name of a data set on the Hub.
        split (`str`, defaults to `"train"`): split of a data set that has several, or a slice of it (`"train[:100]"`).
        config (`str`, *optional*): configuration of a Hub data set (`"main"` of `openai/gsm8k`).

    Raises:
        [`DataFormatError`]: nothing there, unknown split, unreadable file, no rows.
    """
    from datasets import Dataset, DatasetDict, load_dataset, load_from_disk

    if isinstance(source, Dataset):
        return _not_empty(source, "the data set")
    path = Path(source)
    if path.is_dir() and ((path / "state.json").exists() or (path / "dataset_dict.json").exists()):
        loaded = _read(str(path), lambda: load_from_disk(str(path)))
        splits = loaded if isinstance(loaded, DatasetDict) else {"train": loaded}
        name = split.split("[")[0]
        if name not in splits:
            raise DataFormatError(
                f'{path} has no split "{name}"; it has {", ".join(splits)}.{did_you_mean(name, splits)}'
            )
        loaded = _read(str(path), lambda: _slice(splits[name], split))
    elif path.is_file():
        if path.suffix not in FILE_TYPES:
            allowed = ", ".join(FILE_TYPES)
            raise DataFormatError(f"{path} ends in {path.suffix!r}; files can be {allowed}.")
        questions = _bioasq_questions(path)
        if questions is not None:
            return _not_empty(_read(str(path), lambda: _slice(questions, split)), str(path))
        if path.stat().st_size == 0:
            raise DataFormatError(f"{path} is empty.")
        kind, files = FILE_TYPES[path.suffix], {split.split("[")[0]: str(path)}
        loaded = _read(str(path), lambda: load_dataset(kind, data_files=files, split=split))
    elif path.is_dir():
        loaded = _read(str(path), lambda: load_dataset(str(path), config, split=split))
    else:
        if path.suffix in FILE_TYPES or path.is_absolute():
            beside = [str(other) for other in path.parent.iterdir()] if path.parent.is_dir() else []
            raise DataFormatError(f"There is no file or folder {path}.{did_you_mean(str(path), beside)}")
        loaded = _read(
            f"{source} (no local file or folder; looked up on the Hub)",
            lambda: load_dataset(str(source), config, split=split),
        )
    return _not_empty(loaded, str(source))


def _read(name: str, load: Callable[[], Any]) -> Any:
    from datasets.exceptions import DatasetsError

    try:
        return load()
    except (DatasetsError, OSError, ValueError) as error:
        raise DataFormatError(f"Cannot read {name}: {error.__cause__ or error}") from error


def _slice(rows: Dataset, split: str) -> Dataset:
    """The rows that `split`, e.g. `"train[:100]"`, takes of all of them."""
    from datasets import ReadInstruction, concatenate_datasets

    parts = ReadInstruction.from_spec(split).to_absolute({split.split("[")[0]: len(rows)})
    return concatenate_datasets([rows.select(range(part.from_, part.to)) for part in parts])


def _not_empty(dataset: Dataset, name: str) -> Dataset:
    if len(dataset) == 0:
        raise DataFormatError(f"{name} has no rows.")
    return dataset


def _bioasq_questions(path: Path) -> Dataset | None:
    """The questions of a file of the BioASQ challenge, whose answers have too many shapes for one column type."""
    from datasets import Dataset

    with open(path, encoding="utf-8") as file:
        if path.suffix != ".json" or re.match(r'\s*\{\s*"questions"\s*:', file.read(1000)) is None:
            return None
        file.seek(0)
        try:
            questions = json.load(file)["questions"]
        except json.JSONDecodeError as error:
            raise DataFormatError(f"{path} is not JSON: {error}") from error
    return Dataset.from_list([{"bioasq": json.dumps(question)} for question in questions])
