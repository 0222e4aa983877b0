"""Every setting of a run, with its default and meaning; reading and checking a configuration.

A file in `configs/` starts from `default_config()` and sets what its run needs. The tree is locked: a field that
does not stand here is an error that names the nearest one, and a value of another type is refused.
"""

import difflib
import pathlib
import re
import sys
from collections.abc import Sequence
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from deco_jax.data.sources import SOURCES
from deco_jax.diffusion.flow import TIME_DISTRIBUTIONS
from deco_jax.diffusion.frequency import WEIGHT_MODES
from deco_jax.encoders.teacher import check_grids
from deco_jax.errors import UsageError
from deco_jax.models import build_model
from deco_jax.parallel.mesh import axis_sizes
from deco_jax.sampling.solvers import SETTINGS, check_sampling


def default_config() -> ConfigDict:
    """The whole tree with the paper's values where it has one; sizes are DeCo-L/16 on ImageNet 256²."""
    c = ConfigDict()
    c.seed = 0  # of parameters, data order and every random draw

    c.model = m = ConfigDict()
    m.kind = "deco"  # deco; for comparison: baseline (DiT, no decoder), pixnerd (tokens generate the pixels' MLPs)
    m.num_classes = 1000  # labels 0 … num_classes − 1; one more row is the null label
    m.patch_size = 16  # p, pixels along a patch's side
    m.width = 1024  # D, channels of a token
    m.depth = 22  # L, DiT blocks
    m.heads = 16  # attention heads
    m.prediction = "velocity"  # of the last layer: velocity, or image (the paper's JiT), of which the velocity is made
    m.decoder_width = 32  # d, channels of a pixel (Table 4: 16 and 64 are worse)
    m.decoder_depth = 3  # residual blocks of the pixel decoder (Table 4: 1 and 6 are worse)
    m.decoder_patch = 1  # only in deco: pixels along the side of what a decoder's query stands for (4, 16 are worse)
    m.decoder_interaction = "adaln"  # only in deco: how tokens reach queries; add: once, by addition (worse)
    m.decoder_expansion = 2  # m, only in pixnerd: a generated MLP has m·d hidden channels
    m.dtype = "bfloat16"  # of matrix products; parameters, statistics and losses are fp32
    m.remat = "dots"  # recomputed in the backward pass: none, dots (all but linear layers), full (whole blocks)
    m.scan = True  # one compiled block in a loop; False unrolls: slower to compile, sometimes faster to run
    m.attention = "default"  # jax.nn.dot_product_attention's implementation: default, xla, cudnn (NVIDIA)

    c.data = d = ConfigDict()
    d.source = "tfds"  # digits, folder or tfds
    d.path = ""  # folder: the folder of class folders; tfds: its data_dir ("" = ~/tensorflow_datasets)
    d.name = "imagenet2012"  # tfds: data set; others: unused
    d.split = "train"  # tfds: split
    d.image_size = 256  # pixels along a side, after the crop
    d.batch_size = 256  # global: over all devices and accumulation steps
    d.workers = 8  # processes that read and decode, for each process of the run; 0 = in that process
    d.max_bad_records = 100  # unreadable images that are skipped before the run stops

    c.flow = f = ConfigDict()
    f.time_distribution = "lognorm"  # of u: lognorm (sigmoid of a normal) or uniform
    f.time_shift = 1.0  # t = u/(u + (1 − u)·shift); above 1 trains more near noise
    f.null_probability = 0.1  # share of examples trained without their label

    c.loss = s = ConfigDict()
    s.frequency_weight = 1.0  # of L_freq (Table 4: 0.5 and 2 are worse); 0 = off
    s.frequency_quality = 85  # JPEG quality behind its weights, 1 … 100 (Table 4: 50 and 100 are worse)
    s.frequency_mode = "inv_gamma"  # (mean Q/Q)^gamma, or inv: 1/Q
    s.frequency_gamma = 1.0  # see mode
    s.alignment_weight = 0.0  # of L_REPA (paper: 0.5); 0 = off, and no teacher is needed
    s.alignment_layer = 8  # tokens after this DiT block are aligned
    s.alignment_features = 768  # channels of the teacher's features (DINOv2 ViT-B/14)

    c.teacher = h = ConfigDict()
    h.weights = "facebook/dinov2-base"  # DINOv2: a file, a folder, or a name (downloaded from Hugging Face if that)
    h.cache = "~/.cache/deco_jax"  # folder where names are looked up and downloads go
    h.stored = ""  # folder of features that `deco prepare --teacher` wrote; "" = computed in every step

    c.optimizer = o = ConfigDict()
    o.lr = 1e-4  # AdamW's learning rate
    o.beta1 = 0.9  # decay of the first moment
    o.beta2 = 0.999  # decay of the second moment (0.95 is steadier in bf16)
    o.eps = 1e-8  # added to the root of the second moment
    o.weight_decay = 0.0  # decoupled; acts on every parameter
    o.warmup_steps = 0  # linear rise at the start
    o.decay_steps = 0  # linear fall to 0 at the end; 0 = constant
    o.clip_norm = 0.0  # of the global gradient; 0 = no clipping
    o.accumulation = 1  # the batch is worked through in this many parts

    c.ema = e = ConfigDict()
    e.decay = 0.9999  # a step, of the network's fp32 moving average
    e.warmup = False  # start with smaller decays: min(decay, (1 + n)/(10 + n))

    c.mesh = x = ConfigDict()
    x.preset = "data"  # data, fsdp, fsdp_tensor, hybrid (deco_jax/parallel/presets) or a file: sizes for axes of 0
    x.slices = 0  # groups of devices behind a slower network, over which the batch is split; −1 = all there are
    x.data = 0  # devices of a group over which the batch is split and parameters are copied; −1 = the rest
    x.fsdp = 0  # devices of a group over which the batch and the parameters are split; −1 = the rest
    x.tensor = 0  # devices of a group over which heads and MLP channels are split; −1 = the rest

    c.train = t = ConfigDict()
    t.steps = 200_000  # optimiser steps
    t.init_from = ""  # workdir or checkpoint whose weights a new run starts from; "" = random
    t.max_nonfinite = 20  # steps in a row with a loss or gradient that is not finite, before the run stops
    t.log_every = 50  # steps between scalars in the log
    t.save_every = 5_000  # steps between checkpoints
    t.keep = 3  # most recent checkpoints kept
    t.keep_every = 50_000  # checkpoints at multiples of this are kept for good; 0 = none
    t.sample_every = 5_000  # steps between sample grids; 0 = none
    t.compilation_cache = "compilation_cache"  # folder of compiled programs, within the workdir if relative; "" = none
    t.profile_at = 0  # a profile of the five steps from this one on goes to WORKDIR/profile; 0 = none
    t.heartbeat_timeout = 100  # seconds of silence after which a process of the run counts as dead

    c.sample = g = ConfigDict()
    g.steps = 50  # of the solver
    g.guidance = 1.0  # classifier-free guidance; 1 = none
    g.guidance_interval = (0.0, 1.0)  # guidance acts where low < t ≤ high
    g.shift = 1.0  # time shift of the sampler's grid
    g.solver = "euler"  # see diffusion/samplers.py
    g.num = 64  # images in a grid
    return c.lock()


def load_config(path: str, overrides: Sequence[str] = ()) -> ConfigDict:
    """Reads a configuration file, applies `--config.<part>.<field>=<value>` overrides, and checks the result.

    Args:
      path: a Python file with `get_config()`, or `file.py:argument` for `get_config(argument)`.
      overrides: what stood on the command line.

    Raises:
      UsageError: no such file or field, a value of the wrong type, or one out of range.
    """
    file = path.partition(":")[0]
    if not pathlib.Path(file).is_file():
        known = ", ".join(sorted(str(p) for p in pathlib.Path("configs").glob("*.py")))
        raise UsageError(f"--config={path} is no file." + (f" Here are: {known}." if known else ""))
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=["deco"])
    try:
        values(["deco", f"--config={path}"])
        config = values.config
    except Exception as error:  # the file is a program; whatever it raises is the answer to "why not"
        raise UsageError(f"{path}: {_last_line(error)}") from error
    if not isinstance(config, ConfigDict) or flatten(config).keys() != flatten(default_config()).keys():
        raise UsageError(f"{path}: get_config() must start from deco_jax.config.default_config() and return it.")
    for override in overrides:
        config = _override(config, override)
    check_config(config)
    return config


def _override(config: ConfigDict, override: str) -> ConfigDict:
    name, equals, value = override.partition("=")
    if not name.startswith("--config.") or not equals:
        raise UsageError(f"{override} is not understood; settings are given as --config.<part>.<field>=<value>.")
    field, fields = name.removeprefix("--config."), flatten(config)
    if field not in fields:
        near = difflib.get_close_matches(field, fields, n=1, cutoff=0)
        raise UsageError(f"{name} does not exist; nearest: --config.{near[0]}.")
    values = flags.FlagValues()
    config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=["deco", override])
    try:
        values(["deco", override])
    except (flags.Error, TypeError, ValueError) as error:
        kind = type(fields[field]).__name__
        raise UsageError(f"{name}={value} is not of type {kind}; its value now is {fields[field]!r}.") from error
    return values.config


def _last_line(error: Exception) -> str:
    """The library's message for a field that does not exist ends with "Did you mean …"; it arrives as a repr."""
    lines = [line.strip(" '") for line in str(error).replace("\\n", "\n").splitlines() if line.strip(" '")]
    return re.sub(r"^[\w.]+Error: ", "", lines[-1])


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """{"model.width": 1024, …}, of a ConfigDict or of nested dicts."""
    flat = {}
    for key, value in config.items():
        if isinstance(value, ConfigDict | dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


# field: (lowest, highest) allowed, both included.
_RANGES = {
    "seed": (0, 2**31 - 1),
    "data.image_size": (1, None),
    "data.batch_size": (1, None),
    "data.workers": (0, None),
    "data.max_bad_records": (0, None),
    "flow.null_probability": (0, 1),
    "loss.frequency_weight": (0, None),
    "loss.frequency_quality": (1, 100),
    "loss.alignment_weight": (0, None),
    "loss.alignment_features": (1, None),
    "optimizer.lr": (0, None),
    "optimizer.beta1": (0, 1),
    "optimizer.beta2": (0, 1),
    "optimizer.eps": (0, None),
    "optimizer.weight_decay": (0, None),
    "optimizer.warmup_steps": (0, None),
    "optimizer.decay_steps": (0, None),
    "optimizer.clip_norm": (0, None),
    "optimizer.accumulation": (1, None),
    "ema.decay": (0, 1),
    "train.steps": (1, None),
    "train.max_nonfinite": (1, None),
    "train.log_every": (1, None),
    "train.save_every": (1, None),
    "train.keep": (1, None),
    "train.keep_every": (0, None),
    "train.sample_every": (0, None),
    "train.profile_at": (0, None),
    "train.heartbeat_timeout": (5, None),
    "sample.num": (1, None),
}
_CHOICES = {
    "data.source": tuple(SOURCES),
    "flow.time_distribution": TIME_DISTRIBUTIONS,
    "loss.frequency_mode": WEIGHT_MODES,
}


def check_config(config: ConfigDict) -> None:
    """Raises UsageError for the first value that is out of range or does not fit another."""
    fields = flatten(config)
    for field, (low, high) in _RANGES.items():
        value = fields[field]
        if not low <= value <= (sys.float_info.max if high is None else high):  # NaN fits nowhere
            allowed = f"{low} or more" if high is None else f"from {low} to {high}"
            raise UsageError(f"{field}={value} must be {allowed}.")
    for field, allowed in _CHOICES.items():
        if fields[field] not in allowed:
            raise UsageError(f"{field}={fields[field]!r} is not known; allowed: {', '.join(allowed)}.")
    if not 0 < config.flow.time_shift < float("inf"):
        raise UsageError(f"flow.time_shift={config.flow.time_shift} must be positive; 1 is no shift.")
    check_sampling(**{name: config.sample[name] for name in SETTINGS})
    model, size, p = config.model, config.data.image_size, config.model.patch_size
    build_model(model)
    tensor = axis_sizes(config.mesh)["tensor"]
    if tensor > 0 and model.heads % tensor:
        raise UsageError(f"mesh.tensor={tensor} must divide model.heads={model.heads}.")
    if config.loss.alignment_weight:
        check_grids(config)
    if size % p:
        lower = max(size // p, 1) * p
        raise UsageError(
            f"data.image_size={size} is not divisible by model.patch_size={p}; nearest: {lower} and {lower + p}."
        )
    if config.loss.alignment_weight and not 1 <= config.loss.alignment_layer <= model.depth:
        raise UsageError(
            f"loss.alignment_layer={config.loss.alignment_layer} does not exist; "
            f"model.depth={model.depth} allows 1 to {model.depth}."
        )
    if config.data.batch_size % config.optimizer.accumulation:
        raise UsageError(
            f"data.batch_size={config.data.batch_size} is not divisible by "
            f"optimizer.accumulation={config.optimizer.accumulation}."
        )
