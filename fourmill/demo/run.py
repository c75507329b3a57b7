"""`fourmill demo`: the whole line on procedural scenes, from pictures to a trained 4M and a report, offline.

Nothing here is special to the demo: each step is the command that a user would type, and is printed as such.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fourmill.config import Config, load_config, save_config

COUNT, SIZE, SEED = 768, 128, 7  # seed 7: neither teachers nor tokenizers were trained or chosen on it


def demo_config_path() -> Path:
    """configs/demo.yaml of the checkout, or the copy that an installed package carries."""
    package = Path(__file__).parent.parent
    installed = package / "configs" / "demo.yaml"
    return installed if installed.is_file() else package.parent / "configs" / "demo.yaml"


def run_demo(out: str, overrides: Sequence[str] = (), count: int = COUNT) -> int:
    """Run every step below `out` and print where the report is. Finished steps are not done again.

    Returns 0 if the manifest verifies and the held-out loss beats token frequencies in every modality, else 1.
    """
    folder = Path(out).absolute()
    paths = [f"dataset={folder / 'dataset'}", f"corpus={folder / 'corpus'}", f"pretrain.out={folder / 'model'}"]
    config = load_config(demo_config_path(), [*paths, *overrides])
    assert config.pretrain is not None
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_bytes(save_config(config))
    steps = _Steps()
    corpus = Path(str(config.corpus))
    if not any(corpus.glob("*.tar")):
        steps.run(
            f"fourmill scenes {corpus} --count {count} --size {SIZE} --seed {SEED} --truth",
            lambda: _scenes(corpus, count),
        )
    steps.run(f"fourmill ingest {corpus} {config.dataset}", lambda: _ingest(corpus, config))
    with _shared_ray(config):
        steps.run("fourmill pseudolabel --config configs/demo.yaml", lambda: _stages(config, "labelers"))
        steps.run("fourmill tokenize --config configs/demo.yaml", lambda: _stages(config, "tokenizers"))
    verified = steps.run(f"fourmill manifest verify {config.dataset} --deep", lambda: _verify(config, folder))
    steps.run(f"fourmill manifest show {config.dataset}", lambda: _show(config))
    learned = steps.run("fourmill pretrain --config configs/demo.yaml", lambda: _pretrain(config))
    checked = folder / "verification.json"
    steps.run(f"fourmill report {config.dataset} --verification {checked}", lambda: _report(config, folder))
    steps.summary()
    print(f"\nreport         {folder / 'report.html'}\ncontact sheet  {folder / 'report.png'}")
    return 0 if verified and learned else 1


class _Steps:
    """Runs steps under their command lines and remembers how long each took."""

    def __init__(self) -> None:
        self.times: list[tuple[str, float]] = []

    def run(self, command: str, step: Callable[[], Any]) -> Any:
        print(f"\n$ {command}", flush=True)
        start = time.monotonic()
        result = step()
        words = [w for w in command.split()[1:3] if w.isalpha()]  # "manifest verify", but not paths and options
        self.times.append((" ".join(words), time.monotonic() - start))
        return result

    def summary(self) -> None:
        print("\nseconds: " + ", ".join(f"{name} {seconds:.0f}" for name, seconds in self.times))


def _scenes(corpus: Path, count: int) -> None:
    from fourmill.scenes import write_corpus

    write_corpus(corpus, count=count, size=SIZE, seed=SEED, truth=True, workers=2)
    print(f"{count} scenes of {SIZE} x {SIZE} pixels (seed {SEED})")


def _ingest(corpus: Path, config: Config) -> None:
    from fourmill.pipeline.ingest import IngestConfig, ingest

    print(ingest(str(corpus), config.dataset, IngestConfig(shard_size=128)))


def _shared_ray(config: Config) -> Any:
    """One Ray for both jobs: starting it takes as long as labeling a few hundred scenes."""
    from fourmill.pipeline.runner import ray_session

    return ray_session(config)


def _stages(config: Config, section: str) -> None:
    from fourmill.pipeline.runner import run

    report = run(config, [n for n, s in config.resolved_stages().items() if getattr(s, section)])
    print(report)
    if not report.ok:
        raise RuntimeError("some shards could not be made; run the demo again to try them once more")


def _verify(config: Config, folder: Path) -> bool:
    from fourmill.pipeline.manifest import read_manifest
    from fourmill.pipeline.manifest.verify import Options, verify
    from fourmill.pipeline.store import open_store

    store = open_store(config.dataset)
    outcome = verify(store, read_manifest(store), Options(deep=True))
    print(outcome)
    (folder / "verification.json").write_text(json.dumps(outcome.to_json(), indent=1), encoding="utf-8")
    return outcome.ok


def _show(config: Config) -> None:
    from fourmill.cli.manifest_show import manifest_show

    manifest_show(config.dataset)


def _pretrain(config: Config) -> bool:
    from fourmill.model.train import pretrain

    assert config.pretrain is not None
    result = pretrain(config.dataset, config.pretrain, progress=print)
    print(result)
    return result.beats_frequencies


def _report(config: Config, folder: Path) -> None:
    from fourmill.pipeline.report import write_report

    assert config.pretrain is not None
    verification = folder / "verification.json"
    write_report(config.dataset, folder / "report.html", config, config.pretrain.out, verification=verification)
