"""Every setting of a run, with its default and meaning; reading and checking a configuration.

A file in `configs/` starts from `default_config()` and sets what its run needs. The tree is locked: a field that
does not stand here is an error that names the nearest one, and a value of another type is refused.
"""

import difflib
import json
import pathlib
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from deco_jax.data.sources import SOURCES
from deco_jax.diffusion.flow import TIME_DISTRIBUTIONS
from deco_jax.diffusion.frequency import WEIGHT_MODES
from deco_jax.diffusion.samplers import check_sampling
from deco_jax.errors import UsageError
from deco_jax.models import build_model


def default_config() -> ConfigDict:
    """The whole tree with the paper's values where it has one; sizes are DeCo-L/16 on ImageNet 256²."""
    c = ConfigDict()
    c.seed = 0  # of parameters, data order and every random draw

    c.model = m = ConfigDict()
    m.kind = "deco"  # architecture
    m.num_classes = 1000  # labels 0 … num_classes − 1; one more row is the null label
    m.patch_size = 16  # p, pixels along a patch's side
    m.width = 1024  # D, channels of a token
    m.depth = 22  # L, DiT blocks
    m.heads = 16  # attention heads
    m.decoder_width = 32  # d, channels of a pixel (Table 4: 16 and 64 are worse)
    m.decoder_depth = 3  # residual blocks of the pixel decoder (Table 4: 1 and 6 are worse)
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
    d.workers = 8  # processes that read and decode, on each host; 0 = in the main process
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
    s.alignment_weight = 0.0  # of L_REPA (paper: 0.5); needs teacher features in the batch
    s.alignment_layer = 8  # tokens after this DiT block are aligned
    s.alignment_features = 768  # channels of the teacher's features (DINOv2 ViT-B/14)

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
    x.data = -1  # devices over which the batch is split and parameters are copied; −1 = the rest
    x.fsdp = 1  # devices over which the batch and the parameters are split
    x.tensor = 1  # devices over which heads and MLP channels are split

    c.train = t = ConfigDict()
    t.steps = 200_000  # optimiser steps
    t.init_from = ""  # workdir or checkpoint whose weights a new run starts from; "" = random
    t.max_nonfinite = 20  # steps in a row with a loss or gradient that is not finite, before the run stops
    t.log_every = 50  # steps between scalars in the log
    t.save_every = 5_000  # steps between checkpoints
    t.keep = 3  # most recent checkpoints kept
    t.keep_every = 50_000  # checkpoints at multiples of this are kept for good; 0 = none
    t.sample_every = 5_000  # steps between sample grids; 0 = none

    c.sample = g = ConfigDict()
    g.steps = 50  # of the solver
    g.guidance = 1.0  # classifier-free guidance; 1 = none
    g.guidance_interval = (0.0, 1.0)  # guidance acts where low < t ≤ high
    g.shift = 1.0  # time shift of the sampler's grid
    g.solver = "euler"  # see diffusion/samplers.py
    g.num = 64  # images in a grid
    return c.lock()


def load_config(path: str, overrides: list[str]) -> ConfigDict:
    """Reads a configuration file, applies `--config.a.b=value` overrides, and checks the result.

    Args:
      path: a Python file with `get_config()`, or `file.py:argument` for `get_config(argument)`.
      overrides: what stood on the command line.

    Raises:
      UsageError: no such file or field, a value of the wrong type, or one out of range.
    """
    file = path.split(":")[0] if not pathlib.Path(path).exists() else path
    if not pathlib.Path(file).is_file():
        known = sorted(str(p) for p in pathlib.Path("configs").glob("*.py"))
        raise UsageError(f"--config={path} is no file." + (f" Here are: {', '.join(known)}." if known else ""))
    for override in overrides:
        if not override.startswith("--config."):
            raise UsageError(f"{override} is not known; settings are given as --config.<part>.<field>=<value>.")
        if "=" not in override:
            raise UsageError(f"{override} has no value; write {override}=<value>.")
    argv = ["deco", f"--config={path}", *overrides]
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=argv)
    try:
        values(argv)
    except flags.Error as error:
        raise UsageError(_explain(error, path, overrides)) from error
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UsageError(f"{path}: {error}") from error
    config = values.config
    check_config(config)
    return config
