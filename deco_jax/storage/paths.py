"""Which file or folder does a user name? A path of this machine, or an address in a bucket.

Local paths are `pathlib`'s, with everything the operating system offers. Addresses (`gs://bucket/folder`, `s3://…`) are
`etils.epath`'s, which has the same methods. A bucket has no folders: one is there as long as something is in it.
"""

import functools
import importlib.util
import logging
import os
import pathlib

from etils import epath

from deco_jax.errors import UsageError
from deco_jax.storage.retry import is_transient

AnyPath = pathlib.Path | epath.Path
LIBRARIES = {"gs": "gcsfs", "s3": "s3fs"}  # scheme of an address: what reads it


def to_path(name: str | os.PathLike) -> AnyPath:
    """The path that a user names; relative ones and `~` are those of this machine.

    Raises:
      UsageError: the address is of a kind that nothing here reads, or has characters that make patterns.
    """
    scheme, found, _ = os.fspath(name).partition("://")
    if not found:
        return pathlib.Path(name).expanduser()
    _prepare_scheme(scheme, os.fspath(name))
    if set("*?[") & set(os.fspath(name)):  # libraries for buckets take them for patterns, also where they delete
        raise UsageError(f"{name} is no address that can be used; allowed are those without *, ? and [.")
    return epath.Path(name)


def resolved(name: str | os.PathLike) -> AnyPath:
    """As `to_path`; a path of this machine is absolute, and its links are followed."""
    path = to_path(name)
    return path if is_remote(path) else path.resolve()


@functools.cache
def _prepare_scheme(scheme: str, name: str) -> None:
    if scheme not in LIBRARIES:
        known = ", ".join(f"{scheme}://" for scheme in LIBRARIES)
        raise UsageError(f"{name} is no address that can be read; allowed: {known} and paths of this machine.")
    if importlib.util.find_spec(LIBRARIES[scheme]) is None:
        extra = "pip install -e '.[gcs]' in the repository" if scheme == "gs" else f"pip install {LIBRARIES[scheme]}"
        raise UsageError(f"{name} is in a bucket, which needs {LIBRARIES[scheme]}: {extra}")
    import fsspec

    for library in (LIBRARIES[scheme], "fsspec"):  # they log tracebacks of errors that are handled
        logging.getLogger(library).setLevel(logging.CRITICAL)
    for protocol in ("gs", "gcs", "s3"):  # what other hosts write is seen at once
        fsspec.config.conf.setdefault(protocol, {}).setdefault("use_listings_cache", False)


def is_remote(path: str | os.PathLike) -> bool:
    """Whether a path is an address in a bucket: no rename, no append, no lock; what is written appears when closed."""
    return "://" in os.fspath(path)


def to_folder(option: str, name: str) -> AnyPath:
    """The folder that a user names with `option`, there or not; UsageError if it is a file."""
    folder = to_path(name)
    if not is_remote(folder):
        folder = folder.absolute()
        try:
            is_other = folder.exists() and not folder.is_dir()
        except OSError as error:
            if is_transient(error):
                raise
            raise UsageError(f"{option}={name} cannot be looked at: {error}.") from error
        if is_other:
            raise UsageError(f"{option}={name} is no folder.")
    return folder
