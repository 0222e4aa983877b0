"""`deco`, but files of prepared images hold four of 16², and each batch takes so many seconds: DECO_TEST_SECONDS."""

import os
import time

from deco_jax import cli
from deco_jax.preparation import images

images.FILE_BYTES, read_ahead = 4 * (4 + 3 * 16 * 16) + 1, images.read_ahead


def read_slowly(*arguments):
    for batch in read_ahead(*arguments):
        time.sleep(float(os.environ["DECO_TEST_SECONDS"]))
        yield batch


images.read_ahead = read_slowly
if __name__ == "__main__":  # and not in a process that reads for it
    cli.main()
