"""`deco`, but shards hold eight images, and every batch, packing and removing a shard take DECO_TEST_SECONDS each."""

import os
import time

from deco_jax import cli
from deco_jax.generation import packing, plan, shards

SECONDS = float(os.environ.get("DECO_TEST_SECONDS", "0"))
plan.SHARD_IMAGES, generate, read_shards, remove = 8, shards.generate, packing.read_shards, packing.remove


def each_slowly(items, every):
    for k, item in enumerate(items):
        if k % every == 0:
            time.sleep(SECONDS)
        yield item


def remove_slowly(path):
    time.sleep(SECONDS)
    remove(path)


shards.generate = lambda *arguments: each_slowly(generate(*arguments), 4)
packing.read_shards = lambda *arguments: each_slowly(read_shards(*arguments), 1)
packing.remove = remove_slowly
if __name__ == "__main__":
    cli.main()
