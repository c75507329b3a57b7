"""`fourmill evaluate labels`, `evaluate tokens` and `decode`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from fourmill.cli.options import AsJson, Dataset, WithConfig, parse_names


def evaluate_labels(
    dataset: Dataset,
    truth: Annotated[
        str | None,
        typer.Option(
            help="Tars of `scenes --truth`, COCO annotations, or an NYUv2 folder; else scenes rendered again."
        ),
    ] = None,
    labels: Annotated[str | None, typer.Option(help="Only these modalities: depth,normal,…")] = None,
    count: Annotated[int | None, typer.Option(help="Only the first samples that have truth.", min=1)] = None,
    out: Annotated[str | None, typer.Option("-o", "--out", help="HTML page with the worst labels pictured.")] = None,
    depth_unit: Annotated[float, typer.Option(help="16-bit depth: units in a metre (1000: millimetres).")] = 1000.0,
    eigen_crop: Annotated[bool, typer.Option(help="480 x 640 depth counts inside Eigen's crop only.")] = True,
    as_json: AsJson = False,
) -> int:
    """Figures of every teacher's labels against truth. Exit code 1 if nothing could be compared.

    fourmill evaluate labels runs/demo/dataset --truth runs/demo/corpus -o labels.html
    """
    from fourmill.evaluate.command import run_evaluate_labels

    names = parse_names(labels)
    return run_evaluate_labels(dataset, truth, names, count, out, as_json, depth_unit, eigen_crop)


TokenModalities = Annotated[str | None, typer.Option("--modality", help="Only these: tok_depth,tok_rgb,…")]
Checkpoints = Annotated[
    list[str] | None, typer.Option("--checkpoint", help="Where weights lie now: tok_depth=PATH; may be repeated.")
]


def evaluate_tokens(
    dataset: Dataset,
    truth: Annotated[
        str | None, typer.Option(help="Truth as of `evaluate labels`; else scenes rendered again.")
    ] = None,
    modality: TokenModalities = None,
    count: Annotated[int, typer.Option(help="Samples decoded, chosen by the hash of their keys.", min=1)] = 512,
    config: WithConfig = None,
    checkpoint: Checkpoints = None,
    rfid_network: Annotated[
        str | None, typer.Option(help="Local folder of a timm network, for a Fréchet distance of its features.")
    ] = None,
    json_file: Annotated[
        str | None, typer.Option("--json", help="JSON file; - prints it instead of the table.")
    ] = None,
    html: Annotated[
        str | None, typer.Option("--html", "-o", "--out", help="HTML page with the worst reconstructions pictured.")
    ] = None,
) -> int:
    """Decode tokens and compare them with labels and truth; use of codes, bits. Exit code 1 if nothing was compared.

    fourmill evaluate tokens runs/demo/dataset --truth runs/demo/corpus --html tokens.html
    """
    from fourmill.evaluate.command import run_evaluate_tokens

    names, loaded = parse_names(modality), _decoding_config(config, dataset)
    return run_evaluate_tokens(dataset, truth, names, count, loaded, checkpoint or (), rfid_network, json_file, html)


def _decoding_config(path: str | None, dataset: str) -> Any:
    from fourmill.config import load_config

    return load_config(path, [f"dataset={dataset}"]) if path else None


def decode(
    dataset: Dataset,
    key: Annotated[str, typer.Argument(help="The sample's key.")],
    out: Annotated[str, typer.Option("-o", "--out", help="Folder or s3:// URI for the files.")],
    modality: TokenModalities = None,
    crop: Annotated[int, typer.Option(help="Which of the sample's crops.", min=0)] = 0,
    config: WithConfig = None,
    checkpoint: Checkpoints = None,
) -> int:
    """One sample's tokens back to pictures, boxes and texts. Exit code 1 if some could not be decoded.

    fourmill decode runs/demo/dataset 00000000000000000042 -o decoded
    """
    from fourmill.evaluate.command import run_decode

    names = parse_names(modality)
    return run_decode(dataset, key, out, names, crop, _decoding_config(config, dataset), checkpoint or ())
