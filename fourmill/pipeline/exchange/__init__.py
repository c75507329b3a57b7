"""Export and import: a dataset in the layouts that other tools read, and back.

`export_dataset` writes ml-4m's folders, WebDataset, Energon and Parquet; `import_dataset` reads them again, and ml-4m
folders that others have made. docs/exchange.md says what each layout holds and what it cannot.
"""

from fourmill.pipeline.exchange.export import LAYOUTS, ExportOptions, ExportReport, export_dataset
from fourmill.pipeline.exchange.imports import ImportOptions, ImportReport, import_dataset
from fourmill.pipeline.exchange.ml4m_read import ReadOptions
from fourmill.pipeline.exchange.rows import WrongDataError

__all__ = [
    "LAYOUTS",
    "ExportOptions",
    "ExportReport",
    "ImportOptions",
    "ImportReport",
    "ReadOptions",
    "WrongDataError",
    "export_dataset",
    "import_dataset",
]
