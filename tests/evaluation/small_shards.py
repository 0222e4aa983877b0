"""`deco`, but shards of features hold eight images, and each batch takes so many seconds: DECO_TEST_SECONDS."""

import os
import time

from deco_jax import cli
from deco_jax.evaluation import extract

extract.SHARD_IMAGES, compute = 8, extract._compute


def compute_slowly(*arguments):
    for features in compute(*arguments):
        time.sleep(float(os.environ["DECO_TEST_SECONDS"]))
        yield features


extract._compute = compute_slowly
if __name__ == "__main__":
    cli.main()
