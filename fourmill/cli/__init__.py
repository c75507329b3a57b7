"""The command line, and the jobs: `fourmill pseudolabel …` and `jobs/pseudolabel.py …` are the same call.

Exit codes: 0 done; 1 finished, but something is wrong with the data; 2 the command was misused; other: crash.
Nothing heavy is imported until a command runs.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from fourmill.cli.evaluate import decode, evaluate_labels, evaluate_tokens
from fourmill.cli.evaluate_model import evaluate_model
from fourmill.cli.finetune import finetune
from fourmill.cli.generate import generate
from fourmill.cli.labelers import labelers_app, tokenizers
from fourmill.cli.manifest import manifest_app
from fourmill.cli.options import At, ConfigOption, Dataset, DryRun, Overrides, Recheck, WithConfig
from fourmill.cli.trace import trace

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)
app.add_typer(manifest_app, name="manifest")
app.add_typer(labelers_app, name="labelers")
evaluate_app = typer.Typer(no_args_is_help=True, help="Measure labels, tokens and models against truth.")
app.add_typer(evaluate_app, name="evaluate")
evaluate_app.command("labels")(evaluate_labels)
evaluate_app.command("tokens")(evaluate_tokens)
evaluate_app.command("model")(evaluate_model)


_INTERRUPTED = 130  # 128 + SIGINT, as shells have it


def main(*first: str) -> NoReturn:
    """Run the command line; `first` stands before the arguments given (jobs put their command's name there).

    Errors that a user can mend are one line on stderr and exit code 2, data that is wrong is exit code 1.
    """
    # Idle OpenMP threads that spin take a busy machine's cores: 16-50 samples/s against 210-270 when they sleep.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    try:
        result = app(args=[*first, *sys.argv[1:]], standalone_mode=False, prog_name="fourmill")
        if result == _INTERRUPTED:  # typer has turned Ctrl-C into an exit code by now
            _fail("interrupted; run the same command again to go on", _INTERRUPTED)
        sys.exit(result if isinstance(result, int) else 0)
    except typer.Abort:
        _fail("interrupted; run the same command again to go on", _INTERRUPTED)
    except Exception as error:
        # typer's own usage errors; it may carry a click of its own, whose classes cannot be named here
        if hasattr(error, "show") and hasattr(error, "exit_code"):
            error.show()
            sys.exit(2)
        code = _exit_code(error)
        if code is None:
            raise
        _fail(str(error), code)


def _exit_code(error: Exception) -> int | None:
    """2 for what the user can mend, 1 for wrong data, None for a crash."""
    if type(error).__name__ == "BudgetExceededError":
        return 1
    mendable = {"ConfigError", "SetupError", "StoreError"}
    return (
        2
        if isinstance(error, ValueError | FileNotFoundError | FileExistsError) or type(error).__name__ in mendable
        else None
    )


def _fail(message: str, code: int) -> NoReturn:
    print(f"fourmill: {message}", file=sys.stderr)
    sys.exit(code)


@app.command()
def scenes(
    out: Annotated[str, typer.Argument(help="Folder for the tars; must not exist or be empty.")],
    count: Annotated[int, typer.Option(help="Number of scenes.", min=1)] = 512,
    size: Annotated[int, typer.Option(help="Side of the pictures in pixels.", min=16, max=2048)] = 224,
    seed: Annotated[int, typer.Option(help="Another seed gives other scenes.")] = 0,
    truth: Annotated[
        bool, typer.Option("--truth", help="Write exact depth, normals, classes and instances too.")
    ] = False,
    workers: Annotated[int, typer.Option(help="Processes.", min=1)] = 1,
) -> None:
    """Write a procedural image-text corpus with exact ground truth, in img2dataset's layout."""
    from fourmill.scenes import write_corpus

    write_corpus(out, count=count, size=size, seed=seed, truth=truth, workers=workers)
    print(f"{count} scenes of {size} x {size} pixels (seed {seed}) in {out}")


@app.command()
def ingest(
    src: Annotated[str, typer.Argument(help="Corpus: tars, a folder, Parquet, or COCO; a path or s3:// URI.")],
    dataset: Dataset,
    format: Annotated[
        str | None, typer.Option(help="webdataset, folder, parquet or coco; found out if not given.")
    ] = None,
    shard_size: Annotated[int, typer.Option(help="Samples in a shard.", min=1)] = 1000,
    text_field: Annotated[str | None, typer.Option(help="Where the text is, if not under a usual name.")] = None,
    image_field: Annotated[str | None, typer.Option(help="Where the image is, if not under a usual name.")] = None,
    check: Annotated[str, typer.Option(help="Try each picture's 'header' only, or 'decode' it.")] = "decode",
    limit: Annotated[int | None, typer.Option(help="Only the first samples.", min=1)] = None,
) -> int:
    """Bring a corpus into a dataset: pictures verbatim, texts, and where each came from."""
    from fourmill.pipeline.ingest import IngestConfig
    from fourmill.pipeline.ingest import ingest as run_ingest

    fields = {"format": format, "shard_size": shard_size, "text_field": text_field, "image_field": image_field}
    report = run_ingest(src, dataset, IngestConfig.model_validate({**fields, "check": check, "limit": limit}))
    print(report)
    return 0


@app.command()
def pseudolabel(
    config: ConfigOption, overrides: Overrides = None, dry_run: DryRun = False, recheck: Recheck = False
) -> int:
    """Label a dataset: run every stage that has labelers; rerun to finish what is missing."""
    return _run_stages(config, overrides or [], "labelers", dry_run, recheck)


@app.command()
def tokenize(
    config: ConfigOption, overrides: Overrides = None, dry_run: DryRun = False, recheck: Recheck = False
) -> int:
    """Run every stage that has tokenizers over the dataset; rerun to finish what is missing."""
    return _run_stages(config, overrides or [], "tokenizers", dry_run, recheck)


def _run_stages(path: str, overrides: Sequence[str], section: str, dry_run: bool, recheck: bool) -> int:
    from fourmill.config import ConfigError, load_config
    from fourmill.pipeline.runner import dry_run as describe
    from fourmill.pipeline.runner import run

    config = load_config(path, overrides)
    _placed(config.model_copy(update={"pretrain": None}))
    stages = config.resolved_stages()
    chosen = [n for n, s in stages.items() if (s.labelers if section == "labelers" else s.tokenizers)]
    if not chosen:
        raise ConfigError(f"{path}: no stage has {section}")
    if dry_run:
        print(describe(config, chosen, recheck))
        return 0
    report = run(config, chosen, recheck)
    print(report)
    return 0 if report.ok else 1


def _placed(config: Any) -> None:
    """Refuse relative outputs in a submitted job: they would land in Ray's temporary copy of the working directory."""
    outputs = {"dataset": config.dataset, **({"pretrain.out": config.pretrain.out} if config.pretrain else {})}
    for name, uri in outputs.items():
        if "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ and "://" not in uri and not Path(uri).is_absolute():
            raise ValueError(
                f"{name}={uri!r} is relative, and a submitted job runs in Ray's temporary copy of the working "
                "directory: give an absolute path that all nodes share, or s3://bucket/prefix"
            )


@app.command("train-tokenizer")
def train_tokenizer(config: ConfigOption, overrides: Overrides = None) -> int:
    """Train one tokenizer from the label shards of a dataset."""
    from fourmill.config import load_config
    from fourmill.tokenizers.training.config import TrainTokenizerConfig
    from fourmill.tokenizers.training.run import train_tokenizer as train

    print(train(load_config(config, overrides or [], TrainTokenizerConfig), progress=print))
    return 0


@app.command()
def pretrain(config: ConfigOption, overrides: Overrides = None) -> int:
    """Train 4M on a dataset's token shards."""
    from fourmill.config import ConfigError, load_config
    from fourmill.model.train import pretrain as train

    loaded = load_config(config, overrides or [])
    _placed(loaded)
    if loaded.pretrain is None:
        raise ConfigError(f"{config}: no `pretrain` section")
    result = train(loaded.dataset, loaded.pretrain, progress=print, storage=loaded.storage)
    if os.environ.get("RANK", "0") == "0":  # of torchrun's processes the first one speaks
        print(result)
    return 0


app.command()(finetune)
app.command()(generate)
app.command()(trace)
app.command()(decode)


@app.command()
def report(
    dataset: Dataset,
    out: Annotated[
        str, typer.Option("-o", "--out", help="The HTML file; a PNG contact sheet goes beside it.")
    ] = "report.html",
    config: WithConfig = None,
    checkpoint: Annotated[str | None, typer.Option(help="A trained 4M, to show what it predicts from RGB.")] = None,
    truth: Annotated[
        str | None, typer.Option(help="Truth as of `evaluate labels`; else scenes rendered again.")
    ] = None,
    count: Annotated[int, typer.Option(help="Samples shown.", min=1)] = 12,
    at: At = None,
    verification: Annotated[
        str | None, typer.Option(help="Output of `manifest verify --json`, or the journal of a deep one.")
    ] = None,
) -> int:
    """Write one self-contained page: what a dataset is, its health, cost, errors, values, samples and lineage.

    fourmill report s3://bucket/dataset -o report.html
    fourmill manifest verify runs/demo/dataset --deep --json > v.json
    fourmill report runs/demo/dataset --verification v.json
    """
    from fourmill.config import load_config
    from fourmill.pipeline.report import write_report

    loaded = load_config(config, [f"dataset={dataset}"]) if config else None
    page, sheet = write_report(dataset, out, loaded, checkpoint, count, truth, at, verification)
    print(f"report: {page}\ncontact sheet: {sheet}")
    return 0


@app.command()
def demo(
    out: Annotated[str, typer.Option("--out", help="Folder for everything the demo makes.")] = "runs/demo",
    overrides: Overrides = None,
) -> int:
    """Scenes, ingest, labels, tokens, a verified manifest, a trained 4M and a report, in minutes, offline."""
    from fourmill.demo.run import run_demo

    return run_demo(out, overrides or [])


@app.command()
def modalities() -> None:
    """List the catalogue of modalities."""
    from fourmill.modalities import CATALOGUE

    for entry in CATALOGUE.values():
        print(
            f"{entry.name:21} {entry.kind.value:9} {'per crop' if entry.per_crop else 'per sample':10} {entry.summary}"
        )


app.command()(tokenizers)
