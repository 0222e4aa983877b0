"""The benchmarks at least begin: what they take from the package exists. They are run by hand (docs/numbers.md)."""

import pathlib
import subprocess
import sys

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
