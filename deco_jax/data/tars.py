"""Images in tars as they were downloaded, of which nothing is unpacked: where in which file does each image lie?"""

import collections
import concurrent.futures
import dataclasses
import posixpath
import tarfile
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from deco_jax import storage
from deco_jax.conditions import ClassLabels
from deco_jax.data.decode import Decoder
from deco_jax.data.index import NAME, RECENT, Listing, Telling, open_index
from deco_jax.data.reading import file_version, read_bytes
from deco_jax.data.records import SUFFIXES, Record, first_of
from deco_jax.errors import UsageError
from deco_jax.storage import AnyPath

EXPECTED = "expected are a tar of <class>.tar, a tar of <class>/<image>, or a folder of <class>.tar"
FOLDERS = f'{EXPECTED}. Class folders are data.source="folder"'
COMPRESSED = {  # how such files begin
    b"\x1f\x8b": "gunzip",
    b"BZh": "bunzip2",
    b"\xfd7zXZ\x00": "unxz",
    b"\x28\xb5\x2f\xfd": "unzstd",
}
BLOCK, REMOTE_BLOCK = 4096, 2**23  # bytes that are read at a time: of a disk a header, of a bucket much
THREADS = 16  # tars that are listed together
TAR = ".tar"


class Tars:
    """A tar of <class>.tar, as ILSVRC2012_img_train.tar is, or of <class>/<image>; or a folder of <class>.tar.

    Records, labels and order are those of the folder of class folders that unpacking makes, and so are the files that
    are ignored. An index (see there) is kept. The tars may be in a bucket; to list them there is to read all of them.
    """

    def __init__(self, config: ConfigDict, beside: AnyPath | None = None):
        where = f"data.path={config.path!r}"
        path = storage.to_path(config.path)
        self.decoder = Decoder.from_config(config)
        with storage.reading(path):
            if not config.path or not storage.retried(f"looking at {path}", path.exists):
                raise UsageError(f"{where} does not exist; {EXPECTED}.")
            if storage.retried(f"looking at {path}", path.is_dir):
                root, place, tars = path, path / NAME.replace("index", "index_tars"), list_tars(path, where, FOLDERS)
            else:
                root, place, tars = path.parent, path.parent / f".{path.name}{NAME}", [path.name]
            self.root = str(root).rstrip("/")
            self.index = open_index(
                str(path),
                place,
                beside,
                lambda: _list(self.root, tars, whole=root != path, where=where),
                lambda state: state == tars_state(self.root, tars),
            )
        self.class_names, self.identity = self.index.class_names, self.index.identity
        self.condition, self.decoding = ClassLabels(len(self.class_names)), str(self.decoder)

    def __len__(self) -> int:
        return len(self.index)

    def load(self, index: int, offset: float | None = None) -> Record:
        """See `Source`."""
        tar, start, size = self.index.place(index)
        path = f"{self.root}/{tar}"
        try:
            content = read_bytes(path, start, size)
        except FileNotFoundError as error:  # no fault of the record
            raise UsageError(f"{path} is not there any more.") from error
        if len(content) != size:
            raise ValueError(f"{path} ends within it")
        return {"image": self.decoder(content, offset), "label": self.index.labels_K[index]}

    def describe(self, index: int) -> str:
        """See `Source`."""
        return f"{self.root}/{self.index.place(index)[0]}: {self.index.name(index)}"

    def summary(self) -> list[str]:
        """See `Source`."""
        return self.index.summary()

    def contents(self) -> dict[str, Any]:
        """See `Source`: that of the folder."""
        return self.index.contents


def list_tars(folder: AnyPath, where: str, expected: str) -> list[str]:
    """Names of the tars in a folder, in order; raises UsageError if there are none, where `expected` says what was."""
    names = storage.retried(f"listing {folder}", lambda: sorted(path.name for path in folder.iterdir()))
    tars = [name for name in names if name.lower().endswith(TAR) and not name.startswith(".")]
    if not tars:
        found = f"holds {first_of(names, 3)}" if names else "is empty"
        raise UsageError(f"{where} {found}; {expected}.")
    return tars


def tars_state(root: str, tars: list[str]) -> list[list[Any]]:
    """What changes when one of the tars does, or when there are others."""
    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        versions = pool.map(lambda tar: file_version(f"{root}/{tar}"), tars)
        return [[tar, version] for tar, version in zip(tars, versions, strict=True)]


# --- the listing


@dataclasses.dataclass(frozen=True)
class Part:
    """A tar: a whole file, or bytes of one."""

    path: str
    file: int  # its number
    start: int
    size: int
    name: str  # for a person
    label: str  # the class of which it holds the images, if it is a tar of one


@dataclasses.dataclass
class Found:
    """Images, with number of the file, first byte and bytes; and what is ignored, by kind."""

    places: dict[str, tuple[int, int, int]] = dataclasses.field(default_factory=dict)
    ignored: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    classes: set[str] = dataclasses.field(default_factory=set)
    others: list[str] = dataclasses.field(default_factory=list)  # the first names that are ignored

    def add(self, part: Part, name: str, member: tarfile.TarInfo) -> None:
        """A member of `part` that would be the file `name` of the folder."""
        if name in self.places:
            raise UsageError(f"{part.name} holds {name} twice; make it anew.")
        suffix = posixpath.splitext(name)[1].lower()
        kind = suffix or "without an ending"
        if posixpath.basename(name).startswith(".") or name.startswith("."):
            kind = "hidden"
        elif "/" not in name:
            kind = "beside the class folders"
        else:
            self.classes.add(name.partition("/")[0])
            if suffix in SUFFIXES:
                if member.issparse() or not member.isreg():
                    how = "a sparse file" if member.issparse() else "a link"
                    raise UsageError(f"{part.name} holds {name} as {how}, which is not read; pack it as a file.")
                self.places[name] = (part.file, part.start + member.offset_data, member.size)
                return
        self.ignored[kind] += 1
        self.others += [name] if len(self.others) < 3 else []

    def __str__(self) -> str:
        """What there is beside images, in words."""
        return f"files like {', '.join(self.others)}" if self.others else "nothing"


def _list(root: str, tars: list[str], whole: bool, where: str) -> Listing:
    """Looks at the header of every member; `whole`: the one tar holds all classes."""
    begun, state, telling = time.time(), tars_state(root, tars), Telling(root if not whole else f"{root}/{tars[0]}")
    sizes = [version[0] for _, version in state]
    parts = [Part(f"{root}/{tar}", k, 0, sizes[k], f"{root}/{tar}", _label(tar)) for k, tar in enumerate(tars)]
    found = Found()
    if whole:
        parts = _look_into(parts[0], found, telling)
        if parts and found.places:
            raise UsageError(f"{where} holds both {parts[0].name} and {next(iter(found.places))}; {EXPECTED}.")
    if twice := [name for name, count in collections.Counter(part.label for part in parts).items() if count > 1]:
        raise UsageError(f"{where} holds the class {twice[0]!r} twice; {EXPECTED}.")
    _look_into_classes(parts, found, telling)
    if found.ignored[".cls"]:
        raise UsageError(f"{where} holds WebDataset's shards, whose labels are in .cls files; {EXPECTED}.")
    if not found.places:
        raise UsageError(f"{where} holds no images of classes, but {found}; {EXPECTED}.")
    names = sorted(found.places, key=lambda name: name.replace("/", "\0"))
    if empty := sorted(found.classes - {name.partition("/")[0] for name in names}):
        raise UsageError(f"{where} has no images of the class {empty[0]!r}; {EXPECTED}.")
    if state != tars_state(root, tars):
        raise UsageError(f"{where} changed while it was listed; start again when it is complete.")
    recent = not storage.is_remote(root) and max(version[-1] for _, version in state) > (begun - RECENT) * 1e9
    return Listing(
        names,
        tuple(sorted(found.classes)),
        found.ignored,
        None if recent else state,
        "it has just changed" if recent else "",
        tars,
        np.array([found.places[name] for name in names], np.int64),
    )


def _label(tar: str) -> str:
    return posixpath.basename(tar)[: -len(TAR)]


def _look_into(part: Part, found: Found, telling: Telling) -> list[Part]:
    """The tars in the tar of all classes; other members are added to `found`."""
    inner = []
    for name, member in members(part):
        telling(f"{(member.offset_data + member.size) / part.size:.0%} of {part.size / 1e9:,.1f} GB")
        if member.isdir():
            found.classes |= {name.partition("/")[0]} if name and not name.startswith(".") else set()
        elif member.isreg() and name.lower().endswith(TAR) and not posixpath.basename(name).startswith("."):
            start = part.start + member.offset_data
            inner.append(Part(part.path, part.file, start, member.size, f"{part.path}: {name}", _label(name)))
        else:
            found.add(part, name, member)
    if inner:
        found.classes.clear()  # folders that the tars lie in
    return inner


def _look_into_classes(parts: list[Part], found: Found, telling: Telling) -> None:
    """Adds the images of tars of one class each to `found`."""

    def look(part: Part) -> Found:
        inside = Found()
        for name, member in members(part):
            if not member.isdir():
                inside.add(part, f"{part.label}/{name.removeprefix(f'{part.label}/')}", member)
        if not inside.places:
            raise UsageError(f"{part.name} holds no images, but {inside}; {EXPECTED}.")
        return inside

    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        for k, inside in enumerate(pool.map(look, parts), 1):
            found.places |= inside.places
            found.classes |= inside.classes
            found.ignored += inside.ignored
            telling(f"{k:,} of {len(parts):,} tars, {len(found.places):,} images")


def members(part: Part, expected: str = EXPECTED) -> Iterator[tuple[str, tarfile.TarInfo]]:
    """Names, without "./" in front, and headers of the members of a tar; raises UsageError if it is no whole one."""
    window = _Window(part)
    start = window.read(8)
    for magic, command in COMPRESSED.items():
        if start.startswith(magic):
            raise UsageError(f"{part.name} is compressed; unpack it first: {command} {part.path}")
    window.seek(0)
    try:
        with tarfile.open(fileobj=window, mode="r:") as tar:
            while (member := tar.next()) is not None:
                tar.members.clear()  # it would keep a million
                stop = member.offset_data + (0 if member.issparse() else member.size)
                if stop > part.size:
                    raise UsageError(
                        f"{part.name} is cut off: it has {part.size:,} bytes, and its member {member.name} ends at "
                        f"{stop:,}; finish the download."
                    )
                yield "/".join(step for step in member.name.split("/") if step not in ("", ".")), member
            window.seek(tar.offset)
            end = window.read(tarfile.BLOCKSIZE)
    except tarfile.TarError as error:
        if window.furthest <= tarfile.BLOCKSIZE:
            raise UsageError(f"{part.name} is no tar ({error}); {expected}.") from error
        raise UsageError(f"{part.name} is cut off or damaged ({error}) after {window.furthest:,} bytes.") from error
    if len(end) < tarfile.BLOCKSIZE:
        raise UsageError(f"{part.name} is cut off: its {part.size:,} bytes have no end mark; finish the download.")
    if end.strip(b"\0"):
        raise UsageError(f"{part.name} is damaged at byte {tar.offset:,}; get it anew.")


class _Window:
    """The bytes of a tar as a file, read in blocks."""

    def __init__(self, part: Part):
        self.part, self.position, self.furthest = part, 0, 0
        self.block_size = REMOTE_BLOCK if storage.is_remote(part.path) else BLOCK
        self.first, self.block = 0, b""  # of the block that was read last

    def tell(self) -> int:
        return self.position

    def seek(self, position: int) -> None:
        self.position = position

    def read(self, size: int) -> bytes:
        stop = min(self.position + size, self.part.size)
        if stop <= self.position:
            return b""
        if not self.first <= self.position or stop > self.first + len(self.block):
            wanted = min(max(self.block_size, stop - self.position), self.part.size - self.position)
            self.first, self.block = self.position, read_bytes(self.part.path, self.part.start + self.position, wanted)
        content = self.block[self.position - self.first : stop - self.first]
        self.position += len(content)
        self.furthest = max(self.furthest, self.position)
        return content
