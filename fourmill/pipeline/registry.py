"""A lazy table of component classes: naming one imports its module, listing them imports nothing."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from fourmill.modalities import unknown
from fourmill.pipeline.component import Component


class Registry:
    """Names to `module:Class`. A dotted `package.module:Class` that is not in the table is imported as it stands, so
    that users can add components from their own code."""

    def __init__(self, what: str, table: Mapping[str, str]) -> None:
        self.what, self.table = what, dict(table)

    def build(self, name: str, options: Mapping[str, Any]) -> Component:
        """The component `name` from its configuration; `kind` defaults to the name where the table has it."""
        kind = options.get("kind", name)
        found = self.load(kind)
        return found(name, found.Config(**{**options, "kind": kind}))

    def load(self, kind: str) -> type[Component]:
        path = self.table.get(kind, kind)
        if ":" not in path:
            raise ValueError(unknown(self.what, kind, list(self.table)))
        module, _, attribute = path.partition(":")
        loaded = getattr(importlib.import_module(module), attribute)
        assert issubclass(loaded, Component)
        return loaded
