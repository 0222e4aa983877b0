"""`deco`, but every process writes down which images it places on its devices: DECO_TEST_RECORD names the file.

One line per batch: {row of the global batch: hash of image and label}. DECO_TEST_SECONDS makes every batch take longer;
the process of number DECO_TEST_FAILS has a mistake of its own to report at its third, and to that of number
DECO_TEST_ABSENT no more than three come.
"""

import hashlib
import itertools
import json
import os
import sys
import time

import jax

from deco_jax import cli
from deco_jax.data import pipeline
from deco_jax.errors import UsageError
from deco_jax.parallel import mesh as meshes

place_batch, read, count = meshes.place_batch, pipeline.batches, []
sys.modules["deco_jax.storage.writing"].SHARED_FOLDER_DELAY = 3


def record_and_place(batch, mesh, rows, batch_size):
    """`meshes.place_batch`, recorded."""
    hashes = {}
    for row, image, label in zip(rows.tolist(), batch["image"], batch["label"], strict=True):
        hashes[row] = hashlib.sha256(image.tobytes() + label.tobytes()).hexdigest()[:16]
    with open(f"{os.environ['DECO_TEST_RECORD']}.{jax.process_index()}", "a") as file:
        file.write(json.dumps(hashes) + "\n")
    time.sleep(float(os.environ.get("DECO_TEST_SECONDS", 0)))
    if os.environ.get("DECO_TEST_FAILS") == str(jax.process_index()):
        count.append(1)
        if len(count) == 3:
            raise UsageError("the data of this host are gone")
    return place_batch(batch, mesh, rows, batch_size)


def read_three(*args):
    """`pipeline.batches`, of which this process gets three."""
    yield from itertools.islice(read(*args), 3)
    raise ConnectionResetError("the server is gone")


meshes.place_batch = record_and_place
if os.environ.get("DECO_TEST_ABSENT") == os.environ["JAX_PROCESS_ID"]:
    pipeline.batches = read_three
meshes.SMALL = 0  # split whatever divides, also in a tiny network
if __name__ == "__main__":  # data workers load this file, too
    cli.main()
