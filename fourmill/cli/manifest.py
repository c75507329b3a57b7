"""`fourmill manifest …`: what a dataset holds, whether it can be trusted, what made it. One module per command."""

from __future__ import annotations

import typer

manifest_app = typer.Typer(no_args_is_help=True, help="Look into a dataset through its manifest.")

# The commands register themselves on `manifest_app`, in the order in which `--help` lists them.
from fourmill.cli import manifest_show  # noqa: E402, F401, I001
from fourmill.cli import manifest_verify  # noqa: E402, F401
from fourmill.cli import manifest_stats  # noqa: E402, F401
from fourmill.cli import manifest_sample  # noqa: E402, F401
from fourmill.cli import manifest_diff  # noqa: E402, F401
from fourmill.cli import manifest_plan  # noqa: E402, F401
from fourmill.cli import manifest_quarantine  # noqa: E402, F401
from fourmill.cli import manifest_gc  # noqa: E402, F401
from fourmill.cli import manifest_export  # noqa: E402, F401
from fourmill.cli import manifest_import  # noqa: E402, F401
