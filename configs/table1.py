"""The paper's own rows of its Table 1: L size, ImageNet 256², 200k steps at batch 256.

  deco train --config configs/table1.py:ROW --workdir DIR --config.data.path=TFDS_DIR

  ROW                     parameters    FID     sFID    IS
  baseline                459.2 M       61.10   15.86   16.81   DiT/16 on pixels, no decoder
  baseline_image          459.2 M       39.06   11.45   39.57   the same, predicting the image ("JiT" in the table)
  pixnerd                 452.1 M       37.49   10.65   43.01   tokens generate the pixels' MLPs
  deco_without_alignment  426.9 M       67.55   10.58   19.10
  deco_without_frequency  426.9 M       34.12   10.41   46.44
  deco                    426.9 M       31.35    9.34   48.35   as configs/imagenet256_deco_l.py

FID-50K, sFID and IS with Euler-50 and no guidance (paper; not reproduced here). Every row is DeCo's L run except for
the fields below: all but one align with DINOv2, and only DeCo has the frequency loss.
"""

import pathlib
import runpy

from ml_collections import ConfigDict

from deco_jax.errors import UsageError

DECO_L = pathlib.Path(__file__).with_name("imagenet256_deco_l.py")

# What differs from the L run.
ROWS = {
    "baseline": {"model.kind": "baseline", "model.depth": 24, "loss.frequency_weight": 0.0},
    "baseline_image": {
        "model.kind": "baseline",
        "model.depth": 24,
        "model.prediction": "image",
        "loss.frequency_weight": 0.0,
    },
    "pixnerd": {
        "model.kind": "pixnerd",  # 22 blocks as DeCo, and 2 of the decoder; model.decoder_expansion is 2 by default
        "model.decoder_width": 64,
        "model.decoder_depth": 2,
        "loss.frequency_weight": 0.0,
    },
    "deco_without_alignment": {"loss.alignment_weight": 0.0},
    "deco_without_frequency": {"loss.frequency_weight": 0.0},
    "deco": {},
}


def get_config(row: str = "") -> ConfigDict:
    """The configuration of one row."""
    if row not in ROWS:
        raise UsageError(f"{row!r} is no row; after the file and a colon stands one of: {', '.join(ROWS)}.")
    c = runpy.run_path(str(DECO_L))["get_config"]()
    c.update_from_flattened_dict(ROWS[row])
    return c
