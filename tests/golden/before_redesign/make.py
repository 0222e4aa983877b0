"""Records what a commit writes, for later commits to read: workdirs, their continuation, samples, exported files.

    git worktree add /tmp/then COMMIT && cd /tmp/then && python PATH_OF_THIS_FILE OUTPUT_FOLDER

It was run at commit 1dcd10d (before the redesign), Python 3.11, jax 0.10.2; `recorded.json` says on which processor.
"""

import hashlib
import json
import os
import pathlib
import platform
import sys
import tarfile
import tempfile

os.environ["JAX_PLATFORMS"] = "cpu"

import jax

jax.config.update("jax_num_cpu_devices", 8)

import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from PIL import Image
from safetensors.numpy import save_file

import deco_jax
from deco_jax.config import default_config
from deco_jax.porting.convert import convert
from deco_jax.training.loop import train


def tiny_config():
    c = default_config()
    c.model.update(num_classes=10, patch_size=7, width=16, depth=2, heads=2, decoder_width=8, decoder_depth=1)
    c.model.update(dtype="float32", remat="none")
    c.data.update(source="digits", image_size=28, batch_size=16, workers=0)
    c.optimizer.lr = 1e-3
    c.train.update(steps=3, log_every=1, save_every=3, sample_every=3, keep=10, compilation_cache="")
    c.sample.update(steps=2, num=8)
    return c


def clipped():
    c = tiny_config()
    c.optimizer.update(clip_norm=0.05, warmup_steps=2, accumulation=2)
    c.train.sample_every = 0
    return c


def images(folder):
    """Eight small images of two classes."""
    rng = np.random.default_rng(0)
    for k in range(8):
        path = folder / "ab"[k % 2] / f"{k}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8)).save(path)


def teacher(path, width=64):
    """A random DINOv2 of one block."""
    rng = np.random.default_rng(0)
    shapes = {"cls_token": (1, 1, width), "pos_embed": (1, 10, width), "norm.weight": (width,), "norm.bias": (width,)}
    shapes |= {"patch_embed.proj.weight": (width, 3, 14, 14), "patch_embed.proj.bias": (width,)}
    linear = {"attn.qkv": (192, 64), "attn.proj": (64, 64), "mlp.fc1": (256, 64), "mlp.fc2": (64, 256)}
    for name, shape in linear.items():
        shapes |= {f"blocks.0.{name}.weight": shape, f"blocks.0.{name}.bias": shape[:1]}
    shapes |= {f"blocks.0.{n}": (width,) for n in ("norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias")}
    shapes |= {"blocks.0.ls1.gamma": (width,), "blocks.0.ls2.gamma": (width,)}
    save_file({name: rng.normal(0, 0.2, shape).astype(np.float32) for name, shape in shapes.items()}, path)


def aligned(folder):
    images(folder / "images")
    teacher(folder / "teacher.safetensors")
    c = tiny_config()
    c.model.update(num_classes=2, patch_size=16)
    c.data.update(source="folder", path=str(folder / "images"), image_size=32, batch_size=8)
    c.loss.update(alignment_weight=0.5, alignment_layer=1, alignment_features=64)
    c.teacher.weights = str(folder / "teacher.safetensors")
    c.train.sample_every = 0
    return c


def state_of(workdir, step):
    """Every number of a checkpoint, by its path in the tree."""
    with ocp.PyTreeCheckpointer() as reader:
        tree = reader.restore(workdir.absolute() / "checkpoints" / str(step) / "state", args=ocp.args.PyTreeRestore())
    return {jax.tree_util.keystr(k): np.asarray(v) for k, v in jax.tree_util.tree_leaves_with_path(tree)}


def processor():
    """Its name, and a hash of what it can do: XLA's order of adding depends on that."""
    lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines() if os.path.exists("/proc/cpuinfo") else []
    facts = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    flags = " ".join(sorted(facts.get("flags", "").split()))
    digest = hashlib.sha256(flags.encode()).hexdigest()[:16]
    return {"processor": facts.get("model name", "unknown"), "flags": digest}


def main(out):
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        scratch = pathlib.Path(scratch)
        for name, config in {"plain": tiny_config(), "clipped": clipped(), "aligned": aligned(scratch)}.items():
            workdir, straight = scratch / name, scratch / f"{name}_straight"
            train(config, str(workdir))
            config.train.steps = 6
            train(config, str(straight))
            np.savez_compressed(out / f"{name}_step6.npz", **state_of(straight, 6))
        model, params = deco_jax.load_pretrained(str(scratch / "plain"))
        labels = [3, "null", 7, 0]
        drawn = deco_jax.sample(
            model, params, labels, jax.random.key(5), image_size=28, steps=4, guidance=3.0, guidance_interval=(0.3, 1.0)
        )
        x, t = jax.random.normal(jax.random.key(1), (4, 28, 28, 3)), jnp.array([0.1, 0.4, 0.7, 0.9])
        velocity = model.apply({"params": params}, x, t, jnp.array([3, 10, 7, 0]))
        np.savez_compressed(out / "outputs.npz", samples=drawn, velocity=velocity)
        convert(str(scratch / "plain"), str(scratch / "plain.safetensors"))
        convert(str(scratch / "plain"), str(scratch / "folder"), kind="huggingface")
        convert(str(scratch / "aligned"), str(scratch / "aligned.ckpt"), train_state=True)
        kept = ("plain", "clipped", "aligned", "images", "teacher.safetensors")
        kept += ("plain.safetensors", "folder", "aligned.ckpt")
        with tarfile.open(out / "written.tar.xz", "w:xz") as tar:
            for name in kept:
                tar.add(scratch / name, name)
    facts = {"deco_jax": deco_jax.__version__, "jax": jax.__version__, "python": platform.python_version()}
    facts |= processor()
    (out / "recorded.json").write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]).absolute())
