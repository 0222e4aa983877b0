"""The paper's ablations (Table 4; alignment: Table 1), one or two fields from the L run: ImageNet 256², 200k steps.

  deco train --config configs/ablations.py:NAME --workdir DIR --config.data.path=TFDS_DIR

Expected with Euler-50 and no guidance: the FID-50K beside each name below (paper; not reproduced here). Width and
depth were chosen before the frequency loss was there, so those six train without it. The paper has no equations for
larger decoder patches and for upsample-and-add; `deco_jax/models/pixel_decoder.py` says how they are read here.
"""

import pathlib
import runpy

from ml_collections import ConfigDict

from deco_jax.errors import UsageError

DECO_L = pathlib.Path(__file__).with_name("imagenet256_deco_l.py")
WITHOUT_FREQUENCY = {"loss.frequency_weight": 0.0}

# Name: (what differs from the L run, the paper's FID). An empty difference is that run itself.
ABLATIONS = {
    "decoder_width_16": (WITHOUT_FREQUENCY | {"model.decoder_width": 16}, 37.63),
    "decoder_width_32": (WITHOUT_FREQUENCY, 34.12),
    "decoder_width_64": (WITHOUT_FREQUENCY | {"model.decoder_width": 64}, 35.88),
    "decoder_depth_1": (WITHOUT_FREQUENCY | {"model.decoder_depth": 1}, 37.10),
    "decoder_depth_3": (WITHOUT_FREQUENCY, 34.12),
    "decoder_depth_6": (WITHOUT_FREQUENCY | {"model.decoder_depth": 6}, 35.46),
    "decoder_patch_1": ({}, 31.35),
    "decoder_patch_4": ({"model.decoder_patch": 4}, 34.39),
    "decoder_patch_16": ({"model.decoder_patch": 16}, 55.59),
    "interaction_adaln": ({}, 31.35),
    "interaction_add": ({"model.decoder_interaction": "add"}, 36.02),
    "frequency_weight_0": (WITHOUT_FREQUENCY, 34.12),
    "frequency_weight_0_5": ({"loss.frequency_weight": 0.5}, 33.54),
    "frequency_weight_1": ({}, 31.35),
    "frequency_weight_2": ({"loss.frequency_weight": 2.0}, 32.97),
    "frequency_quality_50": ({"loss.frequency_quality": 50}, 31.54),
    "frequency_quality_85": ({}, 31.35),
    "frequency_quality_100": ({"loss.frequency_quality": 100}, 33.84),
    "alignment_on": ({}, 31.35),
    "alignment_off": ({"loss.alignment_weight": 0.0}, 67.55),
}


def get_config(name: str = "") -> ConfigDict:
    """The configuration of one ablation."""
    if name not in ABLATIONS:
        raise UsageError(f"{name!r} is no ablation; after the file and a colon stands one of: {', '.join(ABLATIONS)}.")
    c = runpy.run_path(str(DECO_L))["get_config"]()
    differences, _ = ABLATIONS[name]
    c.update_from_flattened_dict(differences)
    return c
