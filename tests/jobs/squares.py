"""The smallest job: shard k is a file with k². python tests/jobs/squares.py FOLDER SHARDS SECONDS [PART]"""

import os
import sys
import time

from deco_jax import cli, storage
from deco_jax.jobs import find_part, open_job
from deco_jax.parallel import processes


def squares(out, count, seconds, part=None):
    processes.initialize(heartbeat_timeout=10)
    with open_job("--out", out, find_part(part, os.environ)) as job:
        processes.agree(lambda: None)  # here a job opens what it needs

        def missing():
            return [k for k in range(count) if not (job.folder / f"{k:03d}.json").exists()]

        job.claim()
        job.say(f"{len(missing())} of {count} are missing.")
        for shard in job.shards(missing()):
            time.sleep(seconds)
            storage.write_json(job.folder / f"{shard:03d}.json", shard**2)
        if job.finish(missing, lambda: storage.write_json(job.folder / "all.json", count)):
            job.say("Done.")


if __name__ == "__main__":
    delays = sys.modules["deco_jax.storage.writing"]
    delays.SHARED_FOLDER_DELAY = float(os.environ.get("SHARED_FOLDER_DELAY", delays.SHARED_FOLDER_DELAY))
    with cli.exit_codes():
        squares(sys.argv[1], int(sys.argv[2]), float(sys.argv[3]), *sys.argv[4:])
