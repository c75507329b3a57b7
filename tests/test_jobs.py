"""Every launch form of every job: jobs/tokenize.py must never hide the standard library's tokenize."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
JOBS = sorted(p.stem for p in (ROOT / "jobs").glob("*.py"))
FORMS = {
    "file": ([sys.executable, "jobs/{job}.py"], ROOT),
    "file from another folder": ([sys.executable, str(ROOT / "jobs/{job}.py")], Path("/")),
    "file from its own folder": ([sys.executable, "{job}.py"], ROOT / "jobs"),
    "shebang": ([str(ROOT / "jobs/{job}.py")], Path("/")),
    "module": ([sys.executable, "-m", "jobs.{job}"], ROOT),
    "safe path": ([sys.executable, "-P", "jobs/{job}.py"], ROOT),
}
# What a job may have imported by the time it has printed its help; `attr` in Ray reads the standard `tokenize`.
PROBE = (
    "import runpy, sys; sys.argv=['x','--help']\n"
    "try: runpy.run_path({path!r}, run_name='__main__')\n"
    "except SystemExit: pass\n"
)


def test_there_is_a_job_for_every_batch_step() -> None:
    assert JOBS == ["finetune", "pretrain", "pseudolabel", "tokenize", "train_tokenizer"]


@pytest.mark.parametrize("job", JOBS)
@pytest.mark.parametrize("form", FORMS)
def test_job_prints_its_help_in_every_launch_form(job: str, form: str) -> None:
    if form == "safe path" and sys.version_info < (3, 11):
        pytest.skip("-P came with Python 3.11")
    command, folder = FORMS[form]
    env = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    env.pop("PYTHONPATH", None)
    done = subprocess.run(
        [part.format(job=job) for part in command] + ["--help"],
        cwd=folder,
        env=env,
        capture_output=True,
        check=False,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "--config" in done.stdout


@pytest.mark.parametrize("job", JOBS)
def test_job_folder_hides_no_standard_module(job: str) -> None:
    path = str(ROOT / "jobs" / f"{job}.py")
    code = PROBE.format(path=path) + "import tokenize; print(tokenize.__file__)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT / "jobs", capture_output=True, check=False, text=True)
    assert done.returncode == 0, done.stderr
    assert "jobs" not in Path(done.stdout.splitlines()[-1]).parts


def test_import_and_help_load_neither_torch_nor_ray_nor_transformers() -> None:
    code = (
        "import sys, fourmill, fourmill.cli\n"
        "from typer.testing import CliRunner\n"
        "assert CliRunner().invoke(fourmill.cli.app, ['--help']).exit_code == 0\n"
        "print(sorted({'torch', 'ray', 'transformers', 'pyarrow', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=False, text=True)
    assert done.stdout.strip() == "[]", done.stderr
