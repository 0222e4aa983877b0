"""Programs under way: their end, what they read their configuration from, and waiting for what they write."""

import time


def write_config(path, config):
    """A configuration file that gives just this one."""
    path.write_text(
        f"from ml_collections import ConfigDict\ndef get_config():\n  return ConfigDict({config.to_dict()})\n"
    )
    return path


def end_of(process):
    """(exit code, output)"""
    output, _ = process.communicate(timeout=90)
    return process.returncode, output


def wait_for(path):
    for _ in range(600):
        if path.exists():
            return
        time.sleep(0.1)
    raise AssertionError(f"{path} did not come")
