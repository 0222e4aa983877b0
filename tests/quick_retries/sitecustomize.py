"""For processes that tests start with this folder on PYTHONPATH: gcsfs's pauses between retries are a fiftieth."""

from tests.bucket import retry_quickly

retry_quickly()
