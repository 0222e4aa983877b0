"""Does every mesh compute the same? Prints the table of docs/numbers.md and writes equivalence.json.

python benchmarks/equivalence.py [OUTPUT.json]

One training step (every loss on) and a guided sampling on eight simulated devices under each preset, against the same
on one device. tests/parallel/test_equivalence.py runs the same comparisons.
"""

import json
import os
import sys

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax

if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 8)

import numpy as np

from deco_jax.config import default_config
from deco_jax.encoders.dinov2.model import DINOv2
from deco_jax.encoders.frozen import FrozenWeights
from deco_jax.encoders.qwen3.model import Qwen3
from deco_jax.encoders.teacher import teacher_of
from deco_jax.encoders.text import encoder_of
from deco_jax.parallel import mesh as meshes
from deco_jax.sampling.sample import image_noise, sample
from deco_jax.training.start import abstract_state, check_devices
from deco_jax.training.step import jit_step, make_train_step

BATCH, SIDE, SETTINGS = 16, 28, {"steps": 3, "guidance": 2.0, "guidance_interval": (0.3, 1.0)}
TEACHER = DINOv2(24, 2, 2, patch_size=14, image_patch=7, table_side=3, dtype=np.dtype("float32"))
ENCODER = Qwen3(16, 2, 4, 32, kv_heads=2, head_dim=8, vocabulary=64, padding=1, dtype=np.dtype("float32"))
TEXT = {"model.kind": "deco_text", "model.text_tokens": 6, "model.text_features": 16, "model.text_depth": 1}
CASES = {  # settings that differ from the reference's
    "data": {"mesh.preset": "data"},
    "fsdp": {"mesh.preset": "fsdp"},
    "fsdp_tensor": {"mesh.preset": "fsdp_tensor"},
    "zero1": {"mesh.preset": "zero1"},
    "zero1, 2 × 4, 2 parts": {
        "mesh.preset": "zero1",
        "mesh.data": 2,
        "mesh.fsdp": 4,
        "optimizer.accumulation": 2,
    },
    "zero1 with tensor, dots remat": {"mesh.preset": "zero1", "mesh.tensor": 2, "model.remat": "dots"},
    "data, 2 parts": {"mesh.preset": "data", "optimizer.accumulation": 2},
    "fsdp, 2 parts": {"mesh.preset": "fsdp", "optimizer.accumulation": 2},
    "fsdp, 2 parts, added up once": {
        "mesh.preset": "fsdp",
        "optimizer.accumulation": 2,
        "optimizer.accumulate": "step",
    },
    "hybrid, 2 slices": {"mesh.preset": "hybrid", "mesh.slices": 2},
    "fsdp_tensor, 2 parts, dots remat, unrolled": {
        "mesh.preset": "fsdp_tensor",
        "optimizer.accumulation": 2,
        "model.remat": "dots",
        "model.scan": False,
    },
}
TEXT_CASES = {  # of a network that is told text, against TEXT on one device
    "text, fsdp": TEXT | {"mesh.preset": "fsdp"},
    "text, zero1": TEXT | {"mesh.preset": "zero1"},
    "text, fsdp_tensor": TEXT | {"mesh.preset": "fsdp_tensor"},
}


def make_config(changes):
    c = default_config()
    c.model.update(num_classes=10, patch_size=7, width=16, depth=2, heads=2, decoder_width=8, decoder_depth=1)
    c.model.update(dtype="float32", remat="none")
    c.data.update(image_size=SIDE, batch_size=BATCH)
    c.loss.update(alignment_weight=0.5, alignment_layer=1, alignment_features=24)
    c.optimizer.lr = 1e-3
    for field, value in changes.items():
        part, name = field.split(".")
        c[part][name] = value
    return c


def any_state(abstract):
    """A state with random parameters: at the published initialisation most gradients are 0."""
    draw = np.random.default_rng(1).normal
    params = jax.tree.map(lambda p: draw(0, 0.2, p.shape).astype(np.float32), abstract.params)
    zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), abstract)
    state = zeros.replace(params=params, ema=jax.tree.map(np.copy, params["network"]))
    return jax.tree.map(lambda x, a: jax.device_put(x, a.sharding), state, abstract)


def compute(changes, devices):
    """One step's metrics and first moments (a tenth of the gradients), and images; another step; the layout."""
    config = make_config(changes)
    networks, layout = [teacher_of(TEACHER, config)], meshes.make_layout(config.mesh, devices)
    if config.model.kind == "deco_text":
        networks.append(encoder_of(ENCODER, np.full(6, -1), "Qwen3"))
    train_step, mesh = make_train_step(config, networks), layout.mesh
    check_devices(config, mesh)
    abstract = abstract_state(train_step, layout)
    state = any_state(abstract)
    rng = np.random.default_rng(0)
    batch = {
        "image": rng.integers(0, 256, (BATCH, SIDE, SIDE, 3), np.uint8),
        "label": rng.integers(0, 10, BATCH).astype(np.int32),
    }
    asked, more = np.arange(BATCH) % 10, {}
    if config.model.kind == "deco_text":
        batch["tokens"] = np.where(np.arange(6) < rng.integers(0, 7, (BATCH, 1)), batch.pop("label")[:, None], -1)
        asked, more["negative"] = rng.normal(size=(2, BATCH, 6, 16)).astype(np.float32)
    noise = image_noise(jax.random.key(0), np.arange(BATCH), (SIDE, SIDE, 3))
    with meshes.use_mesh(layout):
        noise = jax.device_put(noise, meshes.batch_sharding(mesh))
        images = sample(train_step.network, state.ema, asked, noise=noise, **SETTINGS, **more)
        images = meshes.fetch(images, mesh)
        step = jit_step(train_step, abstract, layout)
        placed = meshes.place_batch(batch, mesh, np.arange(BATCH), BATCH)
        messages = meshes.place_messages(0, np.full(BATCH, -1), mesh, np.arange(BATCH), BATCH)
        frozen = {}
        for network in networks:
            shapes = network.abstract_params(layout)
            params = jax.tree.map(lambda p: rng.normal(0, 0.2, p.shape).astype(np.float32), shapes)
            frozen[network.name] = FrozenWeights.of(network, params).place(layout)
        state, metrics, _ = step(state, placed, messages, frozen)
    results = jax.device_get((metrics, state.opt_state[0].mu))
    return results, images, lambda: step(state, placed, messages, frozen)[0], layout


def errors(reference, case):
    """Largest relative errors of metrics, of the gradient of a parameter, and of the images."""
    (metrics, gradients), images = case
    (metrics_1, gradients_1), images_1 = reference

    def relative(a, b):
        return float(np.linalg.norm(np.float64(a) - b) / np.linalg.norm(np.float64(b)))

    return {
        "metrics": max(relative(metrics[name], value) for name, value in metrics_1.items() if value != 0),
        "gradients": max(map(relative, jax.tree.leaves(gradients), jax.tree.leaves(gradients_1))),
        "images": relative(images, images_1),
    }


def main():
    meshes.SMALL = 0  # split whatever divides, also in a tiny network
    reference = compute({}, jax.devices()[:1])[:2]
    table = {name: errors(reference, compute(changes, jax.devices())[:2]) for name, changes in CASES.items()}
    reference = compute(TEXT, jax.devices()[:1])[:2]
    table |= {name: errors(reference, compute(changes, jax.devices())[:2]) for name, changes in TEXT_CASES.items()}
    print("| against one device | metrics | gradients | images |\n|---|---|---|---|")
    for name, row in table.items():
        print(f"| {name} | {row['metrics']:.1e} | {row['gradients']:.1e} | {row['images']:.1e} |")
    with open(sys.argv[1] if len(sys.argv) > 1 else "equivalence.json", "w") as file:
        json.dump(table, file, indent=1)


if __name__ == "__main__":
    main()
