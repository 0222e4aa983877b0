"""Images in a folder with a text for each: in a file beside it, or in one file for all."""

import collections
import hashlib
import json
import os
import time
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from deco_jax import storage
from deco_jax.conditions import Captions
from deco_jax.data.decode import Decoder
from deco_jax.data.folder import entries_of, folder_state, is_ours
from deco_jax.data.index import FIRST_TIME, NAME, RECENT, Listing, Telling, open_index
from deco_jax.data.reading import file_version, list_files, read_bytes
from deco_jax.data.records import SUFFIXES, Record
from deco_jax.data.wording import Wording, captions_line, clean, find_field
from deco_jax.errors import UsageError
from deco_jax.storage import AnyPath

METADATA = "metadata.jsonl"
BESIDE = (".txt", ".caption")  # endings of the files beside images, by the kind of place in the index
LINE = len(BESIDE)  # the kind of place that is a line of metadata.jsonl
TEXT = "text"  # field of such a line, if it has not the one of data.caption_field
EXPECTED = (
    f"expected are images at any depth, beside each NAME.jpg a NAME.txt or NAME.caption, or one {METADATA} with "
    '{"file_name": …, "text": …} in each line'
)


class CaptionFolder:
    """Images at any depth of a folder, each with NAME.txt or NAME.caption beside it, or all in one metadata.jsonl.

    The latter is as Hugging Face's imagefolder has it, and if it is there, it alone counts. The folder may be in a
    bucket. Images without a caption and other files are ignored, and counted. An index (see there) is kept, except of
    a bucket. Captions beside images are read with them: whether one is empty turns out then.
    """

    class_names = ()

    def __init__(self, config: ConfigDict, beside: AnyPath | None = None):
        where = f"data.path={config.path!r}"
        root = storage.to_path(config.path)
        self.decoder, self.wording = Decoder.from_config(config), Wording.from_config(config)
        self.condition, self.decoding = Captions(), str(self.decoder)
        with storage.reading(root):
            if not config.path or not storage.retried(f"looking at {root}", root.is_dir):
                raise UsageError(f"{where} is no folder; {EXPECTED}.")
            self.index = open_index(
                str(root),
                root / NAME.replace("index", "index_captions"),
                beside,
                lambda: _list(root, self.wording, where),
                lambda state: storage.retried(
                    f"looking at {root}", lambda: _state(root, state["folders"], self.wording) == state
                ),
            )
        self.root, self.identity = str(root).rstrip("/"), self.index.identity

    def __len__(self) -> int:
        return len(self.index)

    def load(self, index: int, offset: float | None = None) -> Record:
        """See `Source`."""
        caption = self.caption(index)
        return {"image": self.decoder(read_bytes(self.describe(index)), offset), "caption": caption}

    def caption(self, index: int) -> str:
        """Of a record; raises as `load` does."""
        kind, start, size = self.index.caption(index)
        if kind != LINE:
            return self.wording.of_bytes(read_bytes(os.path.splitext(self.describe(index))[0] + BESIDE[kind]))
        path = f"{self.root}/{METADATA}"
        try:
            line = read_bytes(path, start, size)
        except FileNotFoundError as error:  # no fault of the record
            raise UsageError(f"{path} is not there any more.") from error
        return self.wording.of_json(line, TEXT)

    def describe(self, index: int) -> str:
        """See `Source`."""
        return f"{self.root}/{self.index.name(index)}"

    def summary(self) -> list[str]:
        """See `Source`."""
        return self.index.summary(captions_line(len(self), self.caption))

    def contents(self) -> dict[str, Any]:
        """See `Source`."""
        return self.index.contents


def _list(root: AnyPath, wording: Wording, where: str) -> Listing:
    """Looks at every file; raises UsageError if no image has a caption."""
    begun, times, telling = time.time(), {}, Telling(str(root))
    entries = None if storage.is_remote(root) else entries_of(root)
    version = _metadata_version(root)
    images, texts, ignored = [], (set(), set()), collections.Counter()
    for name in list_files(root, times, lambda files: telling(f"{files:,} files")):
        if is_ours(name.partition("/")[0]) or (name == METADATA and version):
            continue
        stem, suffix = os.path.splitext(name)
        if name.startswith(".") or os.path.basename(name).startswith("."):
            ignored["hidden"] += 1
        elif suffix.lower() in SUFFIXES:
            images.append(name)
        elif suffix in BESIDE:
            texts[BESIDE.index(suffix)].add(stem)
        else:
            ignored[suffix or "without an ending"] += 1
    if version:
        found = _lines(root, set(images), wording, ignored)
        ignored.update({ending: len(stems) for ending, stems in zip(BESIDE, texts, strict=True) if stems})
    else:
        found = {}
        for name in images:
            stem = os.path.splitext(name)[0]
            if (kind := next((k for k, stems in enumerate(texts) if stem in stems), None)) is not None:
                found[name] = (kind, 0, 0)
        stems = {os.path.splitext(name)[0] for name in images}
        ignored["captions without an image"] += len((texts[0] | texts[1]) - stems)
    ignored["images without a caption"] += len(images) - len(found)
    ignored = +ignored  # without zeros
    if not found:
        holds = f"{len(images):,} images, and no caption of any" if images else "no images"
        raise UsageError(f"{where} holds {holds}; {EXPECTED}.")
    names = [name for name in images if name in found]
    state, why = None, "a bucket does not say whether it has changed"
    if entries is not None:
        state, why = _state(root, times, wording), ""
        changed = [time for _, time in times.values()]
        if (state or {}).get("entries") != _digest(entries) or max([*changed, *version[-1:]], default=0) > (
            begun - RECENT
        ) * 1e9:
            state, why = None, "its files have just changed"
        elif min(changed, default=begun * 1e9) < FIRST_TIME * 1e9:
            state, why = None, "it does not say when its folders have changed"
    captions_Kx3 = np.array([found[name] for name in names], np.int64)
    return Listing(names, (), ignored, state, why, source="captions", captions_Kx3=captions_Kx3)


def _lines(
    root: AnyPath, images: set[str], wording: Wording, ignored: collections.Counter
) -> dict[str, tuple[int, int, int]]:
    """Where in metadata.jsonl the captions of these images are."""
    found, start, path = {}, 0, f"{root}/{METADATA}"
    for number, line in enumerate(read_bytes(path).splitlines(keepends=True), 1):
        first, start = start, start + len(line)
        if not line.strip():
            continue
        try:
            values = json.loads(line.decode("utf-8-sig"))
            text, name = find_field(values, wording.field, TEXT), values.get("file_name")
            if not (isinstance(text, str | None) and isinstance(name, str)):
                raise ValueError('its name and its caption must be text, {"file_name": …, "text": …}')
        except (ValueError, RecursionError) as error:
            raise UsageError(f"{path}: line {number} is not understood ({error}).") from error
        name = name.removeprefix("./")
        if name in found:
            ignored["further lines of an image"] += 1
        elif name not in images:
            ignored["lines without an image"] += 1
        elif clean(text or ""):
            found[name] = (LINE, first, len(line))
    return found


def _metadata_version(root: AnyPath) -> list[Any]:
    """Of metadata.jsonl; [] if there is none."""
    there = storage.retried(f"looking at {root}", (root / METADATA).is_file)
    return file_version(f"{root}/{METADATA}") if there else []


def _state(root: AnyPath, folders: dict[str, Any], wording: Wording) -> dict[str, Any] | None:
    """What changes when a file comes or goes, or what metadata.jsonl says; None if one of the folders is gone."""
    state = folder_state(root, folders)
    if state is None:
        return None
    version = _metadata_version(root)
    return state | {"entries": _digest(state["entries"]), "metadata": version, "field": wording.field}


def _digest(entries: list[str]) -> str:
    """Of the names in the root, where all of a million images may lie."""
    return hashlib.sha256(os.fsencode("\0".join(entries))).hexdigest()
