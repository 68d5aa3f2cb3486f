"""How many prompts does a calibration need? Resampled from the texts of a sweep, nothing is generated.

    python -m benchmarks.quality.prompts results/gsm8k-calibrated

For each rate of the learned rows: n of its texts set a threshold, 200 of them use it, both drawn with replacement. The
scores along a text are taken as they are: what another threshold would change in the text is left out. Cells: how often
the realised rate is within two points of the asked one, and the points that 95% of the draws stay within.
"""

from __future__ import annotations

import argparse
import json
import tarfile
from pathlib import Path

import numpy as np

PROMPTS = (16, 32, 64, 128, 256, 512)
USED = 200
DRAWS = 2000
POINTS = 0.02


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sweep", type=Path, metavar="FOLDER")
    folder = parser.parse_args().sweep
    points = json.loads((folder / "sweep.json").read_text(encoding="utf-8"))["points"]
    learned = [point for point in points if point["method"] == "learned"]
    print(f"| prompts | {' | '.join(format(point['asked_rate'], '.0%') for point in learned)} |")
    print(f"{'|---' * (len(learned) + 1)}|")
    columns = [misses(scores(folder, point["texts"]), point["asked_rate"]) for point in learned]
    for i, n in enumerate(PROMPTS):
        cells = [f"{(c[i] <= POINTS).mean():.0%} ({100 * np.quantile(c[i], 0.95):.1f})" for c in columns]
        print(f"| {n} | {' | '.join(cells)} |")


def scores(folder: Path, name: str) -> list[np.ndarray]:
    """d_t of every token, ascending, one array per text."""
    with tarfile.open(folder / "texts.tar.xz") as archive:
        file = archive.extractfile(f"texts/{name.replace(' ', '-')}.jsonl")
        assert file is not None
        return [np.sort(json.loads(line)["deferral_probs"]) for line in file.read().splitlines()[1:]]


def misses(texts: list[np.ndarray], rate: float) -> np.ndarray:
    """|realised - asked|, shares of tokens, `(len(PROMPTS), DRAWS)`."""
    generator = np.random.default_rng(0)
    thresholds = np.quantile(np.concatenate(texts), np.linspace(0.005, 0.995, 1000))
    above = np.array([len(text) - np.searchsorted(text, thresholds, side="right") for text in texts])
    tokens = np.array([len(text) for text in texts])

    def rates(count: int) -> np.ndarray:
        chosen = generator.integers(0, len(texts), count)
        return above[chosen].sum(axis=0) / tokens[chosen].sum()

    found = np.empty((len(PROMPTS), DRAWS))
    for i, n in enumerate(PROMPTS):
        for draw in range(DRAWS):
            found[i, draw] = abs(rates(USED)[np.argmin(np.abs(rates(n) - rate))] - rate)
    return found


if __name__ == "__main__":
    main()
