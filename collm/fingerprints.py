"""What a model that is not loaded is known by: results that depend on it are not mixed with another one's."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any


def files_fingerprint(name: str, config: Any) -> str:
    """The Hub's commit, or SHA-256 over names, sizes and samples of the files of a local folder.

    1,024 samples of a kilobyte per file notice a model that was trained again; reading all of it would take minutes.
    What `collm calibrate` writes into a checkpoint makes no other model of it.

    Args:
        name (`str`): Hub name or local folder.
        config (`PretrainedConfig`): the model's, loaded under that name.
    """
    if not Path(name).is_dir():
        return f"{name}@{getattr(config, '_commit_hash', None)}"
    digest = hashlib.sha256()
    for path in sorted(Path(name).iterdir()):
        if path.suffix not in (".safetensors", ".bin") and path.name not in ("config.json", "adapter_config.json"):
            continue
        if path.name == "config.json" and "deferral" in (settings := json.loads(path.read_bytes())):
            del settings["deferral"]
            digest.update(json.dumps(settings, sort_keys=True).encode())
            continue
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with open(path, "rb") as file:
            for start in range(0, size, max(1024, size // 1024)):
                file.seek(start)
                digest.update(file.read(1024))
    return digest.hexdigest()
