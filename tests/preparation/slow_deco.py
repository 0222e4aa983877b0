"""`deco`, but files of features hold four records of 4×64, and each batch takes so many seconds: DECO_TEST_SECONDS."""

import os
import time

from deco_jax import cli
from deco_jax.preparation import arrays

arrays.FILE_BYTES, compute = 4 * 4 * 64 * 2 + 1, arrays._compute


def compute_slowly(*arguments):
    for features in compute(*arguments):
        time.sleep(float(os.environ["DECO_TEST_SECONDS"]))
        yield features


arrays._compute = compute_slowly
if __name__ == "__main__":  # and not in a process that reads for it
    cli.main()
