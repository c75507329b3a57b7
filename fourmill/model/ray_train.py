"""Pretraining by Ray Train: `pretrain.workers` processes on a cluster, each of which calls the same `pretrain`.

Ray starts the processes, joins them into one torch group, and starts them again if a node is lost; what is trained and
where states and checkpoints lie is `fourmill.model.train`'s affair. Besides the pipeline's runner this is the only
module that imports Ray.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fourmill.model.config import PretrainConfig
from fourmill.model.progress import PretrainResult, Progress
from fourmill.pipeline.store import StoreSettings, open_store

_RESTARTS = 3  # of all workers, from the newest state, before the run is given up


def pretrain_on_ray(
    dataset: str,
    config: PretrainConfig,
    progress: Callable[[Progress], None] | None = None,
    storage: StoreSettings | None = None,
) -> PretrainResult:
    """As `pretrain`, in `config.workers` processes. `out` and `dataset` must be where all nodes see them.

    Reports are printed by the first worker, and Ray shows them here. RuntimeError says why the workers gave up.
    """
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    _connect(ray)
    gpus = config.device != "cpu" and ray.cluster_resources().get("GPU", 0) > 0
    alone = config.model_copy(update={"workers": None})
    with tempfile.TemporaryDirectory(prefix="fourmill-ray-") as folder:
        trainer = TorchTrainer(
            _work,
            train_loop_config={
                "dataset": dataset,
                "config": alone.model_dump(mode="json"),
                "storage": None if storage is None else storage.model_dump(mode="json"),
                "reports": progress is not None,
            },
            scaling_config=ScalingConfig(num_workers=config.workers or 1, use_gpu=gpus),
            # Ray's own results are not used; states and checkpoint go to `out`.
            run_config=RunConfig(
                name="pretrain", storage_path=folder, failure_config=FailureConfig(max_failures=_RESTARTS)
            ),
        )
        trainer.fit()
    return PretrainResult(**json.loads(open_store(config.out, storage).get("metrics.json")))


def _work(options: dict[str, Any]) -> None:
    """What each worker does."""
    from fourmill.model.train import pretrain

    config = PretrainConfig.model_validate(options["config"])
    storage = None if options["storage"] is None else StoreSettings.model_validate(options["storage"])
    pretrain(options["dataset"], config, _say if options["reports"] else None, storage)


def _say(report: Progress) -> None:
    """Not by `print`, which Ray Train replaces by one that says everything twice."""
    sys.stdout.write(f"{report}\n")
    sys.stdout.flush()


def _connect(ray: Any) -> None:
    """Join the cluster that is there (a submitted job's, RAY_ADDRESS), or start one on this machine."""
    if ray.is_initialized():
        return
    address = os.environ.get("RAY_ADDRESS", "local")
    package = Path(__file__).parents[1]
    if "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ:  # its working directory brings the package
        ray.init(address="auto" if address == "local" else address)
    elif address == "local":
        rest = os.environ.get("PYTHONPATH", "")
        path = f"{package.parent}{os.pathsep}{rest}" if rest else str(package.parent)
        ray.init(address="local", include_dashboard=False, runtime_env={"env_vars": {"PYTHONPATH": path}})
    else:
        ray.init(address=address, runtime_env={"py_modules": [str(package)]})
