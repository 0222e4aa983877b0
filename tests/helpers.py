"""What several tests and benchmarks share: the recordings of the PyTorch system, errors, small configurations."""

import contextlib
import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from deco_jax.config import default_config
from deco_jax.diffusion.flow import Draws, shift_time
from deco_jax.models.build import KINDS, network_fields, parameter_shapes
from deco_jax.pretrained import names
from deco_jax.pretrained.infer import ARCHITECTURES
from deco_jax.sampling.settings import Sampling
from deco_jax.training.state import TrainState
from deco_jax.training.step import make_train_step
from deco_jax.weights import translate

GOLDEN = pathlib.Path(__file__).parent / "golden"
RECORDED = GOLDEN / "before_redesign"  # what the commit before the redesign wrote
TOLERANCE = 1e-6  # where sums are added in another order; XLA's two ways of fusing on a CPU differ by 3.3e-7


def relative_error(ours, theirs) -> float:
    """‖a − b‖/‖b‖ in float64."""
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    assert ours.shape == theirs.shape, f"shape {ours.shape}, recorded {theirs.shape}"
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))


def assert_as_recorded(ours, theirs):
    """To rounding: linear layers add up a weight gradient's sum in another order than when this was recorded."""
    assert ours.keys() == theirs.keys()
    for name in theirs:
        if theirs[name].any():
            assert relative_error(ours[name], theirs[name]) <= TOLERANCE, name
        else:
            assert not np.asarray(ours[name]).any(), name


def recorded_sampler(config: dict, solver: str) -> Sampling:
    """The settings of a run in the recording `samplers`."""
    return Sampling(
        config["num_steps"],
        solver,
        config["guidance"],
        (config.get("guidance_interval_min", 0.0), config.get("guidance_interval_max", 1.0)),
        config.get("timeshift", 1.0),
        config.get("last_step") or 0.0,
    )


class Golden:
    """A recorded run of the PyTorch system: arrays by key (images turned to NHWC by `image`), and its configuration."""

    def __init__(self, name: str):
        self.arrays = dict(np.load(GOLDEN / f"{name}.npz"))
        self.config = json.loads(str(self.arrays["config"])) if "config" in self.arrays else {}

    def __getitem__(self, key: str) -> np.ndarray:
        return self.arrays[key]

    def image(self, key: str) -> np.ndarray:
        return np.moveaxis(self.arrays[key], -3, -1)

    def group(self, prefix: str) -> dict[str, np.ndarray]:
        return {k.removeprefix(prefix): v for k, v in self.arrays.items() if k.startswith(prefix)}

    @property
    def kind(self) -> str:
        """The recorded network's `model.kind`."""
        if "txt_max_length" in self.config:
            return "deco_text"
        return "pixnerd" if "nerf_mlpratio" in self.config else "deco" if "hidden_size_x" in self.config else "baseline"

    def sizes(self) -> dict[str, int]:
        """The recorded network's sizes under our names."""
        c = self.config
        if self.kind == "deco_text":
            return {
                "patch_size": c["patch_size"],
                "width": c["hidden_size"],
                "depth": c["num_encoder_blocks"],
                "heads": c["num_groups"],
                "text_tokens": c["txt_max_length"],
                "text_features": c["txt_embed_dim"],
                "text_depth": c["num_text_blocks"],
                "decoder_width": c["decoder_hidden_size"],
                "decoder_depth": c["num_decoder_blocks"],
            }
        blocks = c.get("num_cond_blocks", c["num_blocks"])  # of the transformer; the decoder's come after them
        known = {
            "num_classes": c["num_classes"],
            "patch_size": c["patch_size"],
            "width": c["hidden_size"],
            "depth": blocks,
            "heads": c["num_groups"],
            "decoder_width": c.get("hidden_size_x"),
            "decoder_depth": c["num_blocks"] - blocks,
            "decoder_expansion": c.get("nerf_mlpratio"),
        }
        return {field: known[field] for field in network_fields(self.kind) if field in known}

    def model(self, **changes):
        return KINDS[self.kind](**self.sizes() | {"dtype": jnp.float32} | changes)

    def params(self, prefix: str = "param:"):
        return translate.from_torch(ARCHITECTURES[self.kind][0], self.group(prefix), parameter_shapes(self.model()))

    def replay(self):
        """Our training steps with the recorded draws: (final state, metrics of each step)."""
        c = self.config
        config = default_config()
        config.model.update(self.sizes(), dtype="float32", remat="full")
        config.loss.update(
            frequency_weight=c["freq_loss_weight"],
            frequency_quality=c["freq_quality"],
            alignment_weight=c["feat_loss_weight"],
            alignment_layer=c["align_layer"],
            alignment_features=c["enc_dim"],
        )
        config.optimizer.update(
            lr=c["lr"], beta1=c["betas"][0], beta2=c["betas"][1], eps=c["eps"], weight_decay=c["weight_decay"]
        )
        config.ema.decay = c["ema_decay"]
        config.train.steps = c["steps"]
        train_step = make_train_step(config)

        tokens = jnp.zeros((1, 1, c["hidden_size"]))
        projector_like = jax.eval_shape(train_step.projector.init, jax.random.key(0), tokens)["params"]
        params = {
            "network": self.params("param:denoiser."),
            "projector": translate.from_torch(
                names.PROJECTOR, self.group("param:diffusion_trainer."), nn.meta.unbox(projector_like)
            ),
        }
        params = jax.tree.map(jnp.asarray, params)
        zero = jnp.int32(0)
        state = TrainState(zero, params, params["network"], train_step.optimizer.init(params), zero, zero)

        @jax.jit
        def step(state, batch, draws):
            return dataclasses.replace(train_step, draw=lambda keys_B, shape: draws)(state, batch)

        history = []
        for k in range(c["steps"]):
            draws = Draws(
                shift_time(jax.nn.sigmoid(self["time_normal"][k]), c["timeshift"]),
                self.image("noise")[k],
                self["drop_label"][k],
            )
            batch = {
                "image": (self.image("images")[k] + 1) * 127.5,  # the step turns pixels of [0, 255] into [-1, 1]
                "label": self["labels"][k].astype(np.int32),
                "features": self["repa_features"][k],
            }
            state, metrics = step(state, batch, draws)
            history.append(metrics)
        return state, history


def new_tiny_config():
    """A configuration: the quickstart shrunk until a step takes milliseconds; the same code paths."""
    c = default_config()
    c.model.update(
        num_classes=10,
        patch_size=7,
        width=16,
        depth=2,
        heads=2,
        decoder_width=8,
        decoder_depth=1,
        dtype="float32",
        remat="none",
    )
    c.data.update(source="digits", image_size=28, batch_size=16, workers=0)
    c.optimizer.lr = 1e-3
    c.train.update(steps=6, log_every=2, save_every=2, sample_every=0, keep=10)
    c.sample.update(steps=2, num=8)
    return c


def random_dinov2(seed=0, width=64, depth=1):
    """Tensors of a small random DINOv2 in the official layout."""
    rng = np.random.default_rng(seed)
    shapes = {
        "cls_token": (1, 1, width),
        "pos_embed": (1, 1 + 9, width),
        "patch_embed.proj.weight": (width, 3, 14, 14),
        "patch_embed.proj.bias": (width,),
        "norm.weight": (width,),
        "norm.bias": (width,),
    }
    for i in range(depth):
        block = {
            "attn.qkv": (3 * width, width),
            "attn.proj": (width, width),
            "mlp.fc1": (4 * width, width),
            "mlp.fc2": (width, 4 * width),
        }
        for name, shape in block.items():
            shapes |= {f"blocks.{i}.{name}.weight": shape, f"blocks.{i}.{name}.bias": shape[:1]}
        for name in ("norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias", "ls1.gamma", "ls2.gamma"):
            shapes[f"blocks.{i}.{name}"] = (width,)
    return {name: rng.normal(0, 0.2, shape).astype(np.float32) for name, shape in shapes.items()}


@contextlib.contextmanager
def programs():
    """Yields start(*arguments, **environment) → a Python program of one device; what is left of them is killed."""
    started = []

    def start(*arguments, **environment):
        process = subprocess.Popen(
            [sys.executable, *map(str, arguments)],
            env={**os.environ, "JAX_NUM_CPU_DEVICES": "1", **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()
