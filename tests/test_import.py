"""What is loaded when, and is what is required also used?"""

import ast
import json
import pathlib
import re
import subprocess
import sys

import pytest

import deco_jax
from deco_jax.cli import load

ROOT = pathlib.Path(__file__).parents[1]
HEAVY = {"absl", "flax", "grain", "jax", "ml_collections", "numpy", "orbax", "scipy", "tensorflow", "torch"}


def modules_after(code, path=ROOT):
    """Names of the top-level modules that are loaded once the code has run in a process of its own."""
    code = f"import sys\nsys.path.insert(0, {str(path)!r})\n{code}\nimport json\n"
    code += "print(json.dumps(sorted({name.partition('.')[0] for name in sys.modules})))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize(
    "arguments", [["--help"], ["train", "--help"], ["train"], ["sample", "--steps=x"], ["nothing"]]
)
def test_help_and_usage_errors_load_nothing_heavy(arguments):
    """They answer in a fraction of the second that importing JAX alone takes."""
    loaded = modules_after(
        "from deco_jax.cli import main\n"
        f"try:\n    main({arguments})\n"
        "except SystemExit:\n    pass\nelse:\n    raise AssertionError('the command ran')"
    )
    assert "deco_jax" in loaded and not loaded & HEAVY, "some module of the command line imports it at its top"


def test_the_public_names_load_when_used_and_bring_neither_tensorflow_nor_torch(tmp_path):
    """Also where these are installed: here empty modules stand for them, so that a successful import is seen."""
    for name in ("tensorflow", "torch"):
        (tmp_path / f"{name}.py").touch()
    assert not modules_after("import deco_jax; dir(deco_jax); deco_jax.__version__", tmp_path) & HEAVY
    loaded = modules_after("from deco_jax import build_model, load_pretrained, sample", tmp_path)
    assert {"jax", "flax", "orbax"} <= loaded and not loaded & {"tensorflow", "torch"}
    loaded = modules_after("import deco_jax.cli, deco_jax.training.loop, deco_jax.metrics.frechet", tmp_path)
    assert {"clu", "grain"} <= loaded and not loaded & {"tensorflow", "torch"}


def test_the_public_names_are_what_they_say():
    from deco_jax import sample

    assert callable(sample) and deco_jax.sample is sample and deco_jax.sampling.sample.sample is sample
    assert set(deco_jax.__all__) <= set(dir(deco_jax))
    with pytest.raises(AttributeError, match="module 'deco_jax' has no attribute 'smaple'"):
        _ = deco_jax.smaple
    with pytest.raises(ImportError, match="smaple"):
        exec("from deco_jax import smaple")


def test_type_checkers_see_the_public_names():
    """`__init__.pyi`, which they read in place of the module, names the same objects."""
    stub = ast.parse((ROOT / "deco_jax/__init__.pyi").read_text())
    homes = {alias.asname: node.module for node in stub.body for alias in node.names}
    assert sorted(homes) == sorted(deco_jax.__all__)
    for name, module in homes.items():
        assert getattr(deco_jax, name) is load(f"{module}:{name}")


# Distributions whose module has another name.
MODULES = {
    "absl-py": "absl",
    "array-record": "array_record",
    "ml-collections": "ml_collections",
    "ml-dtypes": "ml_dtypes",
    "orbax-checkpoint": "orbax",
    "pillow": "PIL",
    "protobuf": "google",
    "tensorflow-datasets": "tensorflow_datasets",
}
OPTIONAL = {
    "diffusers",
    "fastapi",
    "gradio",
    "jinja2",
    "matplotlib",
    "plotly",
    "pyarrow",
    "tokenizers",
    "torch",
    "transformers",
    "uvicorn",
}  # in pyproject.toml's extras


def imported_modules():
    """{top-level module: one file of the package that imports it}, standard library and package itself left out."""
    found = {}
    for path in sorted((ROOT / "deco_jax").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
            found |= {name.partition(".")[0]: path.relative_to(ROOT) for name in names}
    return {name: path for name, path in found.items() if name not in {*sys.stdlib_module_names, "deco_jax"}}


def required_modules():
    """The modules of the distributions in requirements.txt."""
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    names = [re.split(r"[<>=!~\[; ]", line)[0] for line in lines if line and not line.startswith("#")]
    return {MODULES.get(name, name) for name in names}


def test_what_is_required_is_used_and_what_is_used_is_required():
    """A dependency that no file imports goes; one that comes along with another may go with it some day."""
    imported, required = imported_modules(), required_modules()
    assert not required - imported.keys(), "in requirements.txt, but imported nowhere in deco_jax"
    unknown = {name: str(path) for name, path in imported.items() if name not in required | OPTIONAL}
    assert not unknown, "imported, but neither in requirements.txt nor in an extra"
