"""A program of its own, so that XLA has its defaults: trains recorded workdirs on to step 6 and samples from one.

python go_on.py WRITTEN OUT: WRITTEN is what lies in tests/golden/before_redesign/written.tar.xz.
"""

import pathlib
import runpy
import sys

import jax
import jax.numpy as jnp
import numpy as np

import deco_jax
from deco_jax.training.loop import train

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "before_redesign"
make = runpy.run_path(str(GOLDEN / "make.py"))  # what wrote the recordings; it also sets eight devices


def main(written: pathlib.Path, out: pathlib.Path):
    model, params = deco_jax.load_pretrained(str(written / "plain"))
    settings = {"image_size": 28, "steps": 4, "guidance": 3.0, "guidance_interval": (0.3, 1.0)}
    samples = deco_jax.sample(model, params, [3, "null", 7, 0], jax.random.key(5), **settings)
    x, t = jax.random.normal(jax.random.key(1), (4, 28, 28, 3)), jnp.array([0.1, 0.4, 0.7, 0.9])
    velocity = model.apply({"params": params}, x, t, jnp.array([3, 10, 7, 0]))
    np.savez(out / "outputs.npz", samples=samples, velocity=velocity)
    aligned = make["aligned"](out)
    aligned.data.path, aligned.teacher.weights = str(written / "images"), str(written / "teacher.safetensors")
    for name, config in {"plain": make["tiny_config"](), "clipped": make["clipped"](), "aligned": aligned}.items():
        config.train.steps = 6
        train(config, str(written / name))
        np.savez(out / f"{name}_step6.npz", **make["state_of"](written / name, 6))


main(*(pathlib.Path(argument).absolute() for argument in sys.argv[1:]))
