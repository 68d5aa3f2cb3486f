"""`generate(assistant=...)`."""

from __future__ import annotations


class CollaborativeGenerationMixin:
    """Holds `generate`."""
