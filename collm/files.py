"""Files that are there with all their content or not at all, whatever is killed or loses power."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def write_json(path: str | Path, content: Any, **options: Any) -> None:
    """As [`write_file`]; `options` are those of `json.dumps`."""
    write_file(path, (json.dumps(content, **{"indent": 2, **options}) + "\n").encode())


def write_file(path: str | Path, content: bytes) -> None:
    """Replaces the file in one step: who reads it meanwhile sees the old or the new one."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def sync_folder(folder: str | Path) -> None:
    """What was renamed in the folder stays renamed."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
