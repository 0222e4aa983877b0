"""Images in a folder of class folders."""

import collections
import concurrent.futures
import os
import time
from typing import Any

from ml_collections import ConfigDict

from deco_jax import storage
from deco_jax.conditions import ClassLabels
from deco_jax.data.decode import Decoder
from deco_jax.data.index import FIRST_TIME, NAME, RECENT, Listing, Telling, open_index
from deco_jax.data.reading import list_files, read_bytes, times_of
from deco_jax.data.records import SUFFIXES, Record
from deco_jax.errors import UsageError
from deco_jax.storage import AnyPath

THREADS = 16  # folders whose times are looked at together


class Folder:
    """One folder per class; labels number the folders in alphabetical order. Images are centre-cropped.

    The folder may be in a bucket. Hidden files and class folders, files beside the class folders and files with other
    endings than images have are ignored, and counted. An index (see there) is kept, except of a bucket, which is always
    listed.
    """

    def __init__(self, config: ConfigDict, beside: AnyPath | None = None):
        where = f"data.path={config.path!r}"
        root = storage.to_path(config.path)
        self.decoder = Decoder.from_config(config)
        with storage.reading(root):
            if not config.path or not storage.retried(f"looking at {root}", root.is_dir):
                tar = ' A tar is data.source="tars".' if config.path.endswith(".tar") else ""
                raise UsageError(f"{where} is no folder; it must hold one folder per class.{tar}")
            self.index = open_index(
                str(root),
                root / NAME,
                beside,
                lambda: _list(root, where),
                lambda state: storage.retried(
                    f"looking at {root}", lambda: folder_state(root, state["folders"]) == state
                ),
            )
        self.root, self.class_names, self.identity = str(root), self.index.class_names, self.index.identity
        self.condition, self.decoding = ClassLabels(len(self.class_names)), str(self.decoder)

    def __len__(self) -> int:
        return len(self.index)

    def load(self, index: int, offset: float | None = None) -> Record:
        """See `Source`."""
        return {"image": self.decoder(read_bytes(self.describe(index)), offset), "label": self.index.labels_K[index]}

    def describe(self, index: int) -> str:
        """See `Source`."""
        return f"{self.root.rstrip('/')}/{self.index.name(index)}"

    def summary(self) -> list[str]:
        """See `Source`."""
        return self.index.summary()

    def contents(self) -> dict[str, Any]:
        """See `Source`."""
        return self.index.contents


def _list(root: AnyPath, where: str) -> Listing:
    """Looks at every file; raises UsageError if there is nothing to train on."""
    begun, times, telling = time.time(), {}, Telling(str(root))
    entries = None if storage.is_remote(root) else entries_of(root)
    names, classes, ignored = [], set(), collections.Counter()
    for name in list_files(root, times, lambda files: telling(f"{files:,} files")):
        first, _, rest = name.partition("/")
        if is_ours(first):
            continue
        if name.startswith(".") or os.path.basename(name).startswith("."):
            ignored["hidden"] += 1
        elif "/" not in name:
            ignored["beside the class folders"] += 1
        else:
            suffix = os.path.splitext(rest)[1].lower()
            classes.add(first)
            if suffix in SUFFIXES:
                names.append(name)
            else:
                ignored[suffix or "without an ending"] += 1
    if entries is not None:  # a bucket has no empty folders
        classes |= {name[:-1] for name in entries if name.endswith("/") and not name.startswith(".")}
    if empty := sorted(classes - {name.partition("/")[0] for name in names}):
        raise UsageError(f"{where} has the empty class folder {empty[0]!r}; fill or remove it.")
    if not names:
        tars = entries is not None and any(name.endswith(".tar") for name in entries)
        hint = ' Tars are data.source="tars".' if tars else ""
        raise UsageError(f"{where} holds no images; expected <class>/<name> with one of {', '.join(SUFFIXES)}.{hint}")
    state, why = None, "a bucket does not say whether it has changed"
    if entries is not None:
        state, why, changed = {"entries": entries, "folders": times}, "", [time for _, time in times.values()]
        if max(changed) > (begun - RECENT) * 1e9:
            state, why = None, "its files have just changed"
        elif min(changed) < FIRST_TIME * 1e9:
            state, why = None, "it does not say when its folders have changed"
    return Listing(names, tuple(sorted(classes)), ignored, state, why)


def folder_state(root: os.PathLike, folders: dict[str, Any]) -> dict[str, Any] | None:
    """What changes when a file comes or goes; None if one of the folders is gone.

    Of the root it is the names in it: the index that is written there changes its time.
    """

    try:
        with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
            times = pool.map(lambda folder: times_of(os.path.join(root, folder)), folders)
            return {"entries": entries_of(root), "folders": dict(zip(folders, times, strict=True))}
    except (FileNotFoundError, NotADirectoryError):
        return None


def entries_of(root: os.PathLike) -> list[str]:
    """Names in the root, folders with a slash at the end."""
    with os.scandir(root) as entries:
        return sorted(f"{e.name}/" if e.is_dir() else e.name for e in entries if not is_ours(e.name))


def is_ours(name: str) -> bool:
    """Whether an entry of the root is an index, or a draft of one."""
    return name.startswith(".") and "deco_jax_index" in name
