"""Generated texts on disk: JSON lines that survive a kill, resume, and refuse to mix settings."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from collm.errors import ConfigurationError, DataFormatError


@dataclass
class Generation:
    """
    One generated text.

    Args:
        id (`int`): number of the problem in its data.
        text (`str`): what was generated, special tokens left out.
        token_ids (`list[int]`): the new tokens, the end-of-sequence token included, padding not.
        source (`list[int]`): who wrote each: 0 the base, k assistant k.
        deferral_probs (`list[float]`): d_t per token; empty where no head was asked.
        truncated (`bool`): the text stopped at the length limit, not at its end.
        seconds (`float`): wall-clock seconds of its batch, divided by the rows of the batch.
    """

    id: int
    text: str
    token_ids: list[int]
    source: list[int]
    deferral_probs: list[float] = field(default_factory=list)
    truncated: bool = False
    seconds: float = 0.0

    @property
    def deferred(self) -> int:
        """Number of tokens that an assistant wrote."""
        return sum(writer > 0 for writer in self.source)


class GenerationStore:
    """
    A file of JSON lines: first the settings, then one [`Generation`] per line.

    What a process that was killed has written is kept; a last line cut off in the middle is dropped. `path=None` keeps
    everything in memory.

    Args:
        path (`str` or `Path`, *optional*): the file; created with its folder where missing.
        settings (mapping): everything that the texts depend on (models, data, threshold, sampling...), JSON values.

    Raises:
        [`ConfigurationError`]: the file holds texts of other settings; the message names those that differ.
        [`DataFormatError`]: the file is damaged elsewhere than at its end, or is something else.
    """

    def __init__(self, path: str | Path | None, settings: Mapping[str, Any]):
        self.path = Path(path) if path is not None else None
        self.settings = json.loads(json.dumps(settings))  # as they will be read back
        self.done: dict[int, Generation] = {}
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists() and self.path.stat().st_size:
            self._read()
        if not self.path.exists() or not self.path.stat().st_size:
            self._append([{"settings": self.settings}])

    def add(self, generations: Iterable[Generation]) -> None:
        """Appends the texts of a batch; they are on disk when this returns."""
        generations = list(generations)
        if self.path is not None:
            self._append([asdict(generation) for generation in generations])
        self.done |= {generation.id: generation for generation in generations}

    def _append(self, lines: list[dict[str, Any]]) -> None:
        assert self.path is not None
        with open(self.path, "a", encoding="utf-8") as file:
            file.write("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
            file.flush()
            os.fsync(file.fileno())

    def _read(self) -> None:
        assert self.path is not None
        content = self.path.read_bytes()
        complete = content[: content.rfind(b"\n") + 1]  # a process killed while writing leaves part of a line behind
        lines = complete.decode("utf-8", "replace").split("\n")[:-1]
        try:
            if not lines:
                begun = b'{"settings": '
                if not begun.startswith(content[: len(begun)]):
                    raise KeyError("settings")
                os.truncate(self.path, 0)
                return
            found = json.loads(lines[0])["settings"]
            self.done = {g.id: g for g in (Generation(**json.loads(line)) for line in lines[1:])}
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise DataFormatError(f"{self.path} is no file of generations, or is damaged: {error}") from error
        os.truncate(self.path, len(complete))
        different = sorted(
            key
            for key in found.keys() | self.settings.keys()
            if found.get(key, _MISSING) != self.settings.get(key, _MISSING)
        )
        if different:
            changes = "; ".join(f"{key}: {found.get(key)!r} there, {self.settings.get(key)!r} now" for key in different)
            raise ConfigurationError(
                f"{self.path} holds texts generated with other settings ({changes}). Give another output folder, or "
                "remove the file to start again."
            )


_MISSING = object()


def data_fingerprint(rows: Iterable[Mapping[str, Any]]) -> str:
    """Hash of the rows' contents, in order."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row, sort_keys=True, default=str).encode() + b"\n")
    return digest.hexdigest()[:16]


def weights_fingerprint(model: Any) -> str:
    """Hash of the beginning of every parameter: cheap, and other after any training."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        beginning = parameter.detach().flatten()[:64]
        if beginning.is_floating_point():
            beginning = beginning.float()
        digest.update(name.encode() + beginning.cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
