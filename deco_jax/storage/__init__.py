"""Files and folders on disks and in buckets: paths, whole writes, errors that pass, and who holds a folder."""

from deco_jax.storage.fetch import host_lock, local_copy
from deco_jax.storage.lease import Lease, hold
from deco_jax.storage.mirror import Mirror
from deco_jax.storage.paths import AnyPath, is_remote, resolved, to_folder, to_path
from deco_jax.storage.retry import is_transient, patience, retried, with_causes
from deco_jax.storage.writing import reading, upload, wait_until, write_beside, write_bytes, write_json, writing

__all__ = [
    "AnyPath",
    "Lease",
    "Mirror",
    "hold",
    "host_lock",
    "is_remote",
    "is_transient",
    "local_copy",
    "patience",
    "reading",
    "resolved",
    "retried",
    "to_folder",
    "to_path",
    "upload",
    "wait_until",
    "with_causes",
    "write_beside",
    "write_bytes",
    "write_json",
    "writing",
]
