"""A program of its own, so that XLA has its defaults: velocities of networks for the recorded inputs, in fp32.

python velocities.py OUT.npz PATH …
"""

import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np

import deco_jax

x, t = jax.random.normal(jax.random.key(1), (4, 28, 28, 3)), jnp.array([0.1, 0.4, 0.7, 0.9])
found = {}
for path in sys.argv[2:]:
    model, params = deco_jax.load_pretrained(path)
    model = model.clone(dtype=jnp.float32, remat="none")
    found[pathlib.Path(path).name] = model.apply({"params": params}, x, t, jnp.array([3, 10, 7, 0]))
np.savez(sys.argv[1], **found)
