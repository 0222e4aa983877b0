"""Which images are in a folder or in tars, without listing them at every start? A file says it, which is mapped.

    DATA/.deco_jax_index.safetensors     beside the data, or where that cannot be written, in the folder of the job;
                                         made at the first start, and anew when the data have changed
    TMPDIR/deco_jax_UID/….safetensors    this machine's copy, which all processes and their workers map

The format is that of safetensors: names, labels or the places of captions, and for images in tars their places; in
the metadata what a run says of them, with a checksum. Only the copy is mapped: a page of a network folder that does not
come kills a process.
"""

import collections
import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
import tempfile
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from absl import logging
from safetensors.numpy import save

from deco_jax import storage
from deco_jax.data.reading import read_bytes
from deco_jax.data.records import FEW, first_of, images_line
from deco_jax.errors import TransientError, UsageError
from deco_jax.storage import AnyPath

VERSION = 1
ENDING = ".safetensors"
NAME = f".deco_jax_index{ENDING}"
RECENT = 2.0  # seconds before a listing in which a change need not change the time of a folder again
FIRST_TIME = 10 * 365 * 86400  # seconds since 1970: storage that keeps no times says less
UNUSED = 30 * 86400  # seconds for which a copy is kept that no run begins with
FIRST_PAUSE, LONGEST_PAUSE = 5.0, 60.0  # seconds between lines on a listing
TYPES = {"I64": np.int64, "I32": np.int32, "U8": np.uint8}


@dataclasses.dataclass(frozen=True)
class Listing:
    """What was found in a folder or in tars."""

    names: Sequence[str]  # of the images, "cat/1.png", in the order of the records
    class_names: tuple[str, ...]
    ignored: Mapping[str, int]  # files that are no images, by kind
    state: Any  # JSON that tells whether the data are still the same; None: nothing could
    why: str = ""  # there is no state
    tars: Sequence[str] = ()  # files that the images lie in
    places_Kx3: np.ndarray | None = None  # number of that file, first byte, bytes
    source: str = "folder"  # kind of data; tars of classes are as the folder that unpacking makes
    captions_Kx3: np.ndarray | None = None  # kind of place, first byte, bytes; None: the images have classes


class Index:
    """The images of a data set by number, mapped from a file that all processes of the machine share.

    Its pickle is a path: a worker maps the same pages.
    """

    def __init__(self, path: pathlib.Path, identity: str, line: str = ""):
        """Maps it.

        Args:
          path: of the file, on this machine.
          identity: of the images, see `Source`.
          line: says where the file came from.

        Raises:
          TransientError: it is gone; the same command makes it anew.
          UsageError: it is by now of other images.
        """
        self.path, self.line = path, line
        try:
            content = np.memmap(path, np.uint8, "r")
        except OSError as error:
            raise TransientError(f"{path} went away while this run started: {error}") from error
        about, arrays = _parse(np.asarray(content))
        self.identity: str = about["identity"]
        if self.identity != identity:
            raise UsageError(f"{path}: the images have changed while this run started; start it again.")
        self.class_names = tuple(about["class_names"])
        self.contents: dict[str, Any] = about["contents"]  # see `Source`
        self.ignored = collections.Counter(about["ignored"])
        self.tars: list[str] = about["tars"]
        self.hint: str = about["hint"]
        self.labels_K, self._captions_Kx3 = arrays.get("labels"), arrays.get("captions")  # one of them is there
        self._names, self._starts, self._places_Kx3 = arrays["names"], arrays["starts"], arrays.get("places")

    def __len__(self) -> int:
        return len(self._starts) - 1

    def __reduce__(self) -> tuple:
        return Index, (self.path, self.identity)

    def name(self, number: int) -> str:
        """Of an image: "cat/1.png"."""
        start, stop = self._starts[number : number + 2]
        return self._names[start:stop].tobytes().decode()

    def place(self, number: int) -> tuple[str, int, int]:
        """Of an image in tars: the file, its first byte in it, and how many there are."""
        file, start, size = self._places_Kx3[number].tolist()
        return self.tars[file], start, size

    def caption(self, number: int) -> tuple[int, int, int]:
        """Of a captioned image: in which kind of place its caption is, its first byte there, and how many there are."""
        kind, start, size = self._captions_Kx3[number].tolist()
        return kind, start, size

    def summary(self, images: str = "") -> list[str]:
        """See `Source`; `images`: the line on them, if they have no classes."""
        lines = [images or images_line(len(self), self.class_names, np.bincount(self.labels_K).tolist())]
        if self.ignored:
            kinds = [f"{count:,} {kind}" for kind, count in self.ignored.most_common()]
            lines.append(f"Ignored: {self.ignored.total():,} files ({first_of(kinds)}).")
        return [*lines, *(line for line in (self.hint, self.line) if line)]


class Telling:
    """Says in growing pauses what a long listing is doing."""

    def __init__(self, root: str):
        self.root, self.last, self.pause = root, time.monotonic(), FIRST_PAUSE

    def __call__(self, done: str) -> None:
        """`done`: how far it is."""
        if (now := time.monotonic()) - self.last >= self.pause:
            self.last, self.pause = now, min(2 * self.pause, LONGEST_PAUSE)
            logging.warning("Listing the images in %s: %s so far.", self.root, done)


def open_index(
    root: str,
    place: AnyPath,
    beside: AnyPath | None,
    find: Callable[[], Listing],
    is_current: Callable[[Any], bool],
) -> Index:
    """The index of a data set, made by listing it if there is none or the data have changed.

    Only one process of the machine lists at a time, and those that waited for it take what it found.

    Args:
      root: the data's path.
      place: of the index, beside the data.
      beside: a folder in which it is kept if it cannot be there.
      find: lists.
      is_current: whether a listing's state is that of the data.

    Raises:
      UsageError: there is nothing to list, or the temporary folder is full.
    """
    begun, clock = time.time(), time.monotonic()
    key = hashlib.sha256(repr((os.fspath(storage.resolved(root)), place.name)).encode()).hexdigest()[:16]
    name = f"{place.name.removesuffix(ENDING)}-{key}{ENDING}"
    copy = _machine_folder() / name.lstrip(".")
    places = [place, *([beside / name] if beside is not None else [])]
    with storage.host_lock(copy):
        reasons = []
        for path in [*places, copy]:
            content = _read(path)
            if content is None:
                continue
            try:
                about, arrays = _parse(np.frombuffer(content, np.uint8), check=True)
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                reasons.append(f"{path} is damaged or of another version: {error}")
                continue
            state = json.loads(arrays["state"].tobytes())
            just_made = path == copy and copy.stat().st_mtime >= begun  # by a process that was waited for
            if just_made or (state is not None and is_current(state)):
                line = f"Index: {path}, checked in {time.monotonic() - clock:.1f} s."
                break
            reasons += ["the data have changed"] if state is not None else []
        else:
            listing = find()
            content, about = _content(root, listing)
            kept = None if listing.state is None else _keep(content, places) or copy
            line = _line(listing, time.monotonic() - clock, kept, "; ".join(reasons[:1]))
        if _read(copy) != content:
            _remove_old(copy.parent)
            with storage.writing(copy), storage.write_beside(copy) as draft:
                draft.write_bytes(content)
        os.utime(copy)
    return Index(copy, about["identity"], line)


def _machine_folder() -> pathlib.Path:
    """This user's, for files that are shared by the processes of this machine."""
    folder = pathlib.Path(tempfile.gettempdir()) / f"deco_jax_{os.getuid()}"
    with storage.writing(folder):
        folder.mkdir(mode=0o700, exist_ok=True)
    if folder.is_symlink() or folder.stat().st_uid != os.getuid():
        raise UsageError(f"{folder} belongs to another user; set TMPDIR to a folder of your own.")
    return folder


def _remove_old(folder: pathlib.Path) -> None:
    """Removes copies that no run has begun with for long."""
    for copy in folder.glob(f"*{ENDING}"):
        with contextlib.suppress(OSError):
            if copy.stat().st_mtime < time.time() - UNUSED:
                copy.unlink()


def _line(listing: Listing, seconds: float, kept: AnyPath | None, reason: str) -> str:
    because = f" ({reason})" if reason else ""
    where = f"kept in {kept}" if kept else f"and again at the next start, as {listing.why}"
    return f"Index: {len(listing.names):,} images listed in {seconds:.1f} s{because}, {where}."


# --- the file


def _content(root: str, listing: Listing) -> tuple[bytes, dict[str, Any]]:
    """Of the file, and what its metadata say."""
    try:
        encoded = [name.encode() for name in listing.names]
    except UnicodeEncodeError as error:
        raise UsageError(
            f"{root} holds the file {os.fsencode(error.object)}, whose name is no UTF-8; rename it."
        ) from None
    identity, contents, arrays = (_labelled if listing.captions_Kx3 is None else _captioned)(listing, encoded)
    about = {
        "version": VERSION,
        "identity": identity,
        "class_names": listing.class_names,
        "contents": {"source": listing.source, "records": len(encoded)} | contents,
        "ignored": dict(listing.ignored),
        "hint": _hint(listing),
        "tars": listing.tars,
    }
    arrays |= {
        "names": np.frombuffer(b"".join(encoded), np.uint8),
        "starts": np.cumsum([0, *map(len, encoded)], dtype=np.int64),
        "state": np.frombuffer(json.dumps(listing.state).encode(), np.uint8),
    }
    if listing.places_Kx3 is not None:
        arrays["places"] = listing.places_Kx3
    text = json.dumps(about)
    return save(arrays, {"deco_jax_index": f"{_checksum(text, arrays)} {text}"}), about


def _hint(listing: Listing) -> str:
    """What is suspicious about the classes, "" if nothing."""
    if listing.captions_Kx3 is not None:
        return ""
    below = {name.split("/")[1] for name in listing.names if name.count("/") > 1}
    if len(below) < 2 or any(name.count("/") == 1 for name in listing.names):
        return ""
    return (
        f"Attention: all images lie deeper, in {first_of(sorted(below), 3)}. If these are the classes, data.path "
        "begins one level too high."
    )


Told = tuple[str, dict[str, Any], dict[str, np.ndarray]]  # identity, what checkpoints keep, arrays


def _labelled(listing: Listing, encoded: list[bytes]) -> Told:
    """Of images in classes."""
    number = {name: label for label, name in enumerate(listing.class_names)}
    labels = np.array([number[name.partition("/")[0]] for name in listing.names], np.int32)
    joined = b"\0".join([*(name.encode() for name in listing.class_names), b"", *encoded])
    ends = np.cumsum(np.bincount(labels)).tolist()  # names are in the order of their classes
    classes = {
        name: [stop - start, hashlib.sha256(b"\0".join(encoded[start:stop])).hexdigest()[:8]]
        for name, start, stop in zip(listing.class_names, [0, *ends], ends, strict=False)
    }
    names = list(listing.names) if len(encoded) <= FEW else []
    return f"folder {hashlib.sha256(joined).hexdigest()}", {"classes": classes, "names": names}, {"labels": labels}


def _captioned(listing: Listing, encoded: list[bytes]) -> Told:
    """Of images with captions."""
    captions = hashlib.sha256(listing.captions_Kx3.tobytes()).hexdigest()
    found, tars = hashlib.sha256(captions.encode()), [f"{tar}: " for tar in listing.tars]
    fronts = [""] * len(encoded)
    if listing.places_Kx3 is not None:
        fronts = [tars[file] for file in listing.places_Kx3[:, 0].tolist()]  # the same few objects
    for front, name in zip(fronts, encoded, strict=True):
        found.update(b"%b%b\0" % (front.encode(), name))
    names = [front + name for front, name in zip(fronts, listing.names, strict=True)] if len(encoded) <= FEW else []
    contents = {"classes": {}, "names": names, "captions": captions[:8]}
    return f"{listing.source} {found.hexdigest()}", contents, {"captions": listing.captions_Kx3}


def _checksum(text: str, arrays: dict[str, np.ndarray]) -> str:
    value = zlib.crc32(text.encode())
    for name, array in sorted(arrays.items()):
        value = zlib.crc32(f"{name} {array.dtype} {array.shape}".encode(), value)
        value = zlib.crc32(np.ascontiguousarray(array).view(np.uint8), value)
    return f"{value:08x}"


def _parse(content: np.ndarray, check: bool = False) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """What the bytes of a file say, and its arrays, which lie in them.

    Raises:
      ValueError, KeyError, TypeError, AttributeError: they are no whole index of this version; with `check`, or a byte
        is another.
    """
    stop = 8 + int.from_bytes(content[:8].tobytes(), "little")
    if not 8 < stop <= len(content):
        raise ValueError("it is cut off")
    header = json.loads(content[8:stop].tobytes())
    metadata, arrays = header.pop("__metadata__"), {}
    checksum, _, text = metadata["deco_jax_index"].partition(" ")
    about = json.loads(text)
    if about["version"] != VERSION:
        raise ValueError(f"version {about['version']}, where {VERSION} is read")
    for name, tensor in header.items():
        first, last = (stop + offset for offset in tensor["data_offsets"])
        if last > len(content):
            raise ValueError("it is cut off")
        arrays[name] = content[first:last].view(TYPES[tensor["dtype"]]).reshape(tensor["shape"])
    if check and checksum != _checksum(text, arrays):
        raise ValueError("its checksum is another")
    return about, arrays


def _read(path: AnyPath) -> bytes | None:
    """The whole file; None if there is none that can be read."""
    try:
        with storage.reading(path):  # a folder of a job need not be there yet
            there = storage.retried(f"looking at {path}", path.exists)
        return read_bytes(str(path)) if there else None
    except (OSError, UsageError):
        return None


def _keep(content: bytes, places: Sequence[AnyPath]) -> AnyPath | None:
    """Writes the file to the first of `places` that takes it."""
    for path in places:
        try:
            with storage.writing(path), storage.write_beside(path) as draft:
                draft.write_bytes(content)
            return path
        except (UsageError, TransientError, OSError) as error:  # a folder that is read-only, a full disk
            logging.info("%s", error)
    return None
