"""What the folder of an encoder tells before a weight is read: its class, its settings, its tensors' shapes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from difax.weights.checkpoint import tensor_shapes
from difax.weights.published import Shapes, Table, choose_layout
from difax.weights.settings import Setting


class EncoderFolder(NamedTuple):
    """path: of the weights. kind: the class of transformers. file, config: the config.json, and its part that describes
    the encoder; {} where there is none, as beside a single file."""

    path: Path
    kind: str
    file: Path
    config: Mapping[str, Any]

    def part(self, name: str) -> EncoderFolder:
        """The same, with the part of the configuration that is named so, where it has one (models of several parts)."""
        inner = self.config.get(name)
        return self._replace(config=inner) if isinstance(inner, dict) else self

    def settled(self, settings: Mapping[str, tuple[Setting, Any]]) -> dict[str, Any]:
        """The value of every key that has a setting, or what the class takes where the file lacks it.

        Args:
          settings: key -> (its `Setting`, what a missing key stands for).

        Raises:
          ValueError: a value that is not allowed (file, key, value, what is).
        """
        for name, (setting, _) in settings.items():
            if name in self.config and not setting.fits(self.config[name]):
                raise ValueError(f"{self.file}: {name}={self.config[name]!r}; allowed: {setting.allowed}")
        return {name: self.config.get(name, default) for name, (_, default) in settings.items()}

    def tensors(self, what: str, tables: Mapping[str, Table]) -> tuple[Table, Shapes]:
        """The layout that the weights are in, and the shapes of its tensors."""
        shapes = tensor_shapes(self.path, tables.values())
        return tables[choose_layout(self.path, what, tables, shapes)], shapes


Find = Callable[..., Any]  # (EncoderFolder, **arguments of the encoder's factory) -> difax.weights.published.Foreign
