"""How does a PyTorch file hold its pickle and its storages? The two formats of `torch.save`, read in place.

Zip, since PyTorch 1.6: `NAME/data.pkl`, and each storage's bytes uncompressed in `NAME/data/KEY`. Only what torch
writes is read: nothing is decompressed, no entry overlaps another, and entries' names are looked up, not used as paths.

Legacy, before: pickles of a magic number, a protocol number, facts about the machine, the object, and the storages'
keys; then each storage in that order, its number of elements before it.
"""

import io
import os
import struct
from dataclasses import dataclass
from typing import Any

from deco_jax.errors import UsageError
from deco_jax.weights.admitted import Admitted
from deco_jax.weights.pickles import MAX_PICKLE, Unpickler
from deco_jax.weights.tensors import MappedFile, Storage, naming, short

MAX_ENTRIES = 500_000
MAX_UNFOLDED = 4  # bytes of all tensors together, as a multiple of the file's …
MAX_UNFOLDED_EXTRA = 256 * 2**20  # … and these, for small files with expanded tensors

_MAGIC, _PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
_Known = dict[tuple[str, str, int], Storage]  # by key, type and size: a storage may be looked at as several types
_RESAVE = "open it with PyTorch where you trust it, and save it again with torch.save"


def read_torch(source: str | os.PathLike | MappedFile) -> Any:
    """The content of a `.pt`, `.pth`, `.ckpt` or `.bin` file: plain containers and lazy tensors.

    Raises:
      UsageError: it has neither format, is damaged, or mentions what is not admitted; the message names the file.
    """
    path = source.path if isinstance(source, MappedFile) else source
    with naming(path):
        file = source if isinstance(source, MappedFile) else MappedFile(source)
        start = bytes(file.window(0, min(file.size, 512)))
        if start[:4] == b"PK\x03\x04":
            return _read_zip(file)
        if start[257:262] == b"ustar":
            raise UsageError(f"a tar file, the format of PyTorch before 0.1.10, is not read; {_RESAVE}.")
        if start[:1] == b"\x80":
            return _read_legacy(file)
        raise UsageError(
            f"not a weight file: it starts with {start[:8]!r}; torch.save's files and safetensors are read."
        )


def _unpickler(file: MappedFile, stream: io.BytesIO, find_storage: Any) -> Unpickler:
    return Unpickler(stream, find_storage, MAX_UNFOLDED * file.size + MAX_UNFOLDED_EXTRA)


def _storage_of(file: MappedFile, identifier: tuple, known: _Known, legacy: bool) -> Storage:
    """The storage of a persistent id ("storage", type, key, device, elements[, view]); its place is not yet known."""
    if len(identifier) != (6 if legacy else 5) or identifier[0] != "storage":
        raise UsageError(f"the pickle inside refers to {short(identifier)} outside it; only storages are admitted.")
    kind, key, _, count = identifier[1:5]
    typed = isinstance(kind, Admitted) and kind.dtype is not None and type(key) is str and type(count) is int
    if not typed or count < 0:
        raise UsageError(f"a storage is described as {short(identifier)}: the file is damaged.")
    if legacy and identifier[5] is not None:
        raise UsageError(f"it holds views of storages, as PyTorch before 0.4 wrote them; {_RESAVE}.")
    nbytes = count * kind.dtype.itemsize
    if nbytes > file.size:
        raise UsageError(f"storage {short(key)} should have {short(nbytes)} bytes, more than the file: it is damaged.")
    return known.setdefault((key, kind.name, nbytes), Storage(file, key, kind.dtype, nbytes))


# Zip


@dataclass(frozen=True, slots=True)
class _Entry:
    name: str
    header: int  # where its local header lies
    nbytes: int


def _read_zip(file: MappedFile) -> Any:
    entries = _zip_entries(file)
    pickles = [name for name in entries if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise UsageError(f"a zip file with {len(pickles)} entries NAME/data.pkl, not one: torch.save did not write it.")
    folder = pickles[0].removesuffix("data.pkl")
    if f"{folder}constants.pkl" in entries:
        raise UsageError("a TorchScript program, not weights; save the module's state_dict() instead.")
    order = bytes(file.window(*entries[f"{folder}byteorder"])[:8]) if f"{folder}byteorder" in entries else b"little"
    if order not in (b"little", b"big"):
        raise UsageError(f"the byte order is {order!r}, neither little nor big: the file is damaged.")
    known: _Known = {}

    def find_storage(identifier: tuple) -> Storage:
        storage = _storage_of(file, identifier, known, legacy=False)
        if storage.start is None:
            place = entries.get(f"{folder}data/{storage.key}")
            if place is None:
                raise UsageError(f"storage {short(storage.key)} is not in the file: it is damaged.")
            if place[1] - place[0] < storage.nbytes:
                raise UsageError(
                    f"storage {short(storage.key)} has {place[1] - place[0]} bytes in the file and {storage.nbytes} in "
                    "the pickle: the file is damaged."
                )
            storage.start, storage.big_endian = place[0], order == b"big"
        return storage

    start, stop = entries[pickles[0]]
    if stop - start > MAX_PICKLE:
        raise UsageError(f"the pickle inside has {stop - start} bytes; at most {MAX_PICKLE} are read.")
    return _unpickler(file, io.BytesIO(file.window(start, stop)), find_storage).load()


def _zip_entries(file: MappedFile) -> dict[str, tuple[int, int]]:
    """Name → first and last byte of every entry's content."""
    directory_start, directory_stop, count = _zip_directory(file)
    directory = file.window(directory_start, directory_stop)
    if count > MAX_ENTRIES:
        raise UsageError(f"a zip file of {count} entries; at most {MAX_ENTRIES} are read.")
    listed, position = [], 0
    for _ in range(count):
        entry, position = _zip_entry(directory, position)
        listed.append(entry)
    places: dict[str, tuple[int, int]] = {}
    end = 0
    for entry in sorted(listed, key=lambda e: e.header):
        name = entry.name.encode()
        header = _fields(file.window(0, directory_start), "<4s22xHH", entry.header, "local header")
        start = entry.header + 30 + header[1] + header[2]
        if header[0] != b"PK\x03\x04" or file.window(entry.header, start)[30 : 30 + len(name)] != name:
            raise UsageError(f"the zip entry {short(entry.name)} is not where the directory says: the file is damaged.")
        if entry.header < end or start + entry.nbytes > directory_start:
            raise UsageError(f"the zip entry {short(entry.name)} overlaps another: the file is damaged.")
        if entry.name in places:
            raise UsageError(f"the zip entry {short(entry.name)} is there twice: the file is damaged.")
        end = start + entry.nbytes
        places[entry.name] = start, end
    return places


def _zip_directory(file: MappedFile) -> tuple[int, int, int]:
    """First and last byte of the list of entries, and how many there are."""
    tail_start = max(0, file.size - 22 - 65535)
    end = tail_start + bytes(file.window(tail_start, file.size)).rfind(b"PK\x05\x06")
    if end < tail_start:
        raise UsageError("a zip file without its end: it is truncated. Copy or download it again.")
    whole = file.window(0, file.size)
    count, nbytes, start, comment = _fields(whole, "<10xHIIH", end, "end")
    if end + 22 + comment != file.size:
        raise UsageError("a zip file with bytes after its end: it is damaged. Copy or download it again.")
    if end >= 20 and whole[end - 20 : end - 16] == b"PK\x06\x07":  # zip64: the same numbers with 64 bits
        (end,) = _fields(whole, "<8xQ", end - 20, "zip64 locator")
        signature, count, nbytes, start = _fields(whole, "<4s28xQQQ", end, "zip64 end")
        if signature != b"PK\x06\x06":
            raise UsageError("a zip file whose zip64 end is not where it says: it is damaged.")
    if start + nbytes > end or count * 46 > nbytes:
        raise UsageError("a zip file whose directory does not fit: it is damaged. Copy or download it again.")
    return start, start + nbytes, count


def _zip_entry(directory: memoryview, position: int) -> tuple[_Entry, int]:
    """The directory's entry at `position`, and where the next one starts."""
    fields = _fields(directory, "<4s4xHH8xIIHHH8xI", position, "directory")
    signature, flags, method, packed, nbytes, name_length, extra_length, comment_length, header = fields
    name_start = position + 46
    extra_start = name_start + name_length
    extra = bytes(directory[extra_start : extra_start + extra_length])
    try:
        name = bytes(directory[name_start:extra_start]).decode()
    except UnicodeDecodeError:
        raise UsageError("a zip entry's name is not text: the file is damaged.") from None
    if signature != b"PK\x01\x02" or not name or len(extra) < extra_length:
        raise UsageError("a zip file whose directory is damaged. Copy or download it again.")
    if flags & 1:
        raise UsageError(f"the zip entry {short(name)} is encrypted; torch.save writes none that is.")
    wide = _zip64_numbers(extra)
    nbytes, packed, header = (
        next(wide, number) if number == 0xFFFFFFFF else number for number in (nbytes, packed, header)
    )
    if method != 0 or packed != nbytes:
        raise UsageError(f"the zip entry {short(name)} is compressed; torch.save never does, and {_RESAVE}.")
    return _Entry(name, header, nbytes), extra_start + extra_length + comment_length


def _zip64_numbers(extra: bytes) -> Any:
    """The 64-bit numbers of a directory entry, in order."""
    position = 0
    while position + 4 <= len(extra):
        kind, length = struct.unpack_from("<HH", extra, position)
        if kind == 1:
            field = extra[position + 4 : position + 4 + length]
            return iter(struct.unpack_from(f"<{len(field) // 8}Q", field))
        position += 4 + length
    return iter(())


def _fields(data: memoryview, layout: str, position: int, what: str) -> tuple:
    if position + struct.calcsize(layout) > len(data):
        raise UsageError(f"a zip file whose {what} is cut short: it is damaged. Copy or download it again.")
    return struct.unpack_from(layout, data, position)


# Legacy


def _read_legacy(file: MappedFile) -> Any:
    stream = io.BytesIO(file.window(0, min(file.size, MAX_PICKLE)))
    known: _Known = {}
    unpickler = _unpickler(file, stream, lambda identifier: _storage_of(file, identifier, known, legacy=True))
    magic = unpickler.load()
    if type(magic) is not int or magic != _MAGIC:
        raise UsageError("a pickle, but not one that torch.save wrote; only weight files of PyTorch are read.")
    protocol, machine = unpickler.load(), unpickler.load()
    if type(protocol) is not int or protocol != _PROTOCOL:
        raise UsageError(f"a PyTorch file of protocol {short(protocol)} is not read; {_RESAVE}.")
    if not isinstance(machine, dict) or machine.get("little_endian") is not True:
        raise UsageError(f"a legacy PyTorch file of a big-endian machine is not read; {_RESAVE}.")
    content, keys = unpickler.load(), unpickler.load()
    if not isinstance(keys, list) or not all(type(key) is str for key in keys) or len(set(keys)) < len(keys):
        raise UsageError("the list of its storages is damaged.")
    first_of: dict[str, Storage] = {}
    for storage in known.values():
        first_of.setdefault(storage.key, storage)
    position, places = stream.tell(), {}
    for key in keys:
        if key not in first_of:
            raise UsageError(f"storage {short(key)} is listed but never used: the file is damaged.")
        start = position + 8
        count = int.from_bytes(file.window(position, start), "little")
        position = start + count * first_of[key].dtype.itemsize
        file.window(start, position)  # ends inside the file
        places[key] = start, position
    for storage in known.values():
        start, stop = places.get(storage.key, (0, -1))
        if stop - start < storage.nbytes:
            raise UsageError(f"storage {short(storage.key)} is not in the file as described: it is damaged.")
        storage.start = start
    return content
