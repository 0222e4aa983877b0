"""How does a PyTorch file hold its pickle and its storages? The two formats of `torch.save`, read in place.

Zip, since PyTorch 1.6: `NAME/data.pkl`, and each storage's bytes uncompressed in `NAME/data/KEY`. Only what torch
writes is read: nothing is decompressed, no entry overlaps another, and entries' names are looked up, not used as paths.

Legacy, before: pickles of a magic number, a protocol number, facts about the machine, the object, and the storages'
keys; then each storage in that order, its number of elements before it.
"""

import functools
import io
import struct
import zipfile
from typing import Any

from deco_jax.errors import UsageError
from deco_jax.weights.admitted import Admitted
from deco_jax.weights.budget import Budget
from deco_jax.weights.pickles import MAX_PICKLE, Unpickler
from deco_jax.weights.tensors import MappedFile, Storage, short

MAX_DIRECTORY = 16 * 2**20  # bytes of a zip's list of entries; some 160,000 storages

_MAGIC, _PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
_Known = dict[tuple[str, str, int], Storage]  # by key, type and size: a storage may be looked at as several types
_RESAVE = "open it with PyTorch where you trust it, and save it again with torch.save"


def read_torch(file: MappedFile) -> Any:
    """The content of a `.pt`, `.pth`, `.ckpt` or `.bin` file: plain containers and lazy tensors.

    Raises:
      UsageError: it has neither format, is damaged, or mentions what is not admitted.
    """
    start = bytes(file.window(0, min(file.size, 512)))
    if start[:4] == b"PK\x03\x04":
        return _read_zip(file)
    if start[257:262] == b"ustar":
        raise UsageError(f"a tar file, the format of PyTorch before 0.1.10, is not read; {_RESAVE}.")
    if start[:1] == b"\x80":
        return _read_legacy(file)
    raise UsageError(f"not a weight file: it starts with {start[:8]!r}; torch.save's files and safetensors are read.")


def _find_storage(file: MappedFile, known: _Known, legacy: bool, identifier: tuple) -> Storage:
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


def _place(known: _Known, places: dict[str, tuple[int, int]], big_endian: bool) -> None:
    """Notes where the storages' first and last bytes are, by their keys."""
    for storage in known.values():
        start, stop = places.get(storage.key, (0, -1))
        if stop - start < storage.nbytes:
            raise UsageError(
                f"storage {short(storage.key)} has {max(stop - start, 0)} bytes in the file and {storage.nbytes} "
                "in the pickle: the file is damaged."
            )
        storage.start, storage.big_endian = start, big_endian


# Zip


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
    start, stop = entries[pickles[0]]
    if stop - start > MAX_PICKLE:
        raise UsageError(f"the pickle inside has {stop - start} bytes; at most {MAX_PICKLE} are read.")
    known: _Known = {}
    find_storage = functools.partial(_find_storage, file, known, False)
    content = Unpickler(io.BytesIO(file.window(start, stop)), find_storage, Budget(file.size)).load()
    data = f"{folder}data/"
    places = {name.removeprefix(data): place for name, place in entries.items() if name.startswith(data)}
    _place(known, places, order == b"big")
    return content


class _Directory:
    """A mapped file as `zipfile` reads it, but for a list of entries that would fill the memory."""

    def __init__(self, file: MappedFile):
        self._map, self.seek, self.tell = file.map, file.map.seek, file.map.tell

    def read(self, size: int = -1) -> bytes:
        if size > MAX_DIRECTORY:
            raise UsageError(f"a zip file whose list of entries has {size} bytes; at most {MAX_DIRECTORY} are read.")
        return self._map.read(size)


def _zip_entries(file: MappedFile) -> dict[str, tuple[int, int]]:
    """Name → first and last byte of every entry's content. `zipfile` lists them; where they lie is checked here."""
    if bytes(file.window(max(file.size - 22, 0), file.size))[:4] != b"PK\x05\x06":
        raise UsageError("a zip file that is truncated, or has bytes after its end. Copy or download it again.")
    try:
        with zipfile.ZipFile(_Directory(file), metadata_encoding="utf-8") as archive:
            listed = sorted(archive.infolist(), key=lambda entry: entry.header_offset)
    except (zipfile.BadZipFile, NotImplementedError, ValueError, OverflowError) as e:
        if isinstance(e, UsageError):
            raise
        raise UsageError(f"a zip file whose list of entries is damaged ({short(str(e))}).") from None
    places: dict[str, tuple[int, int]] = {}
    end = 0
    for entry in listed:
        what, header = f"the zip entry {short(entry.filename)}", entry.header_offset
        if entry.flag_bits & 1:
            raise UsageError(f"{what} is encrypted; torch.save writes none that is.")
        if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size:
            raise UsageError(f"{what} is compressed; torch.save never does, and {_RESAVE}.")
        signature, name, extra = struct.unpack("<4s22xHH", file.window(header, header + 30))
        named = bytes(file.window(header + 30, header + 30 + name)) == entry.orig_filename.encode()
        if signature != b"PK\x03\x04" or not named or header < end:
            raise UsageError(f"{what} is not where the list of entries says, or overlaps another: the file is damaged.")
        if entry.filename in places:
            raise UsageError(f"{what} is there twice: the file is damaged.")
        start = header + 30 + name + extra
        end = start + entry.file_size
        file.window(start, end)  # ends inside the file
        places[entry.filename] = start, end
    return places


# Legacy


def _read_legacy(file: MappedFile) -> Any:
    stream = io.BytesIO(file.window(0, min(file.size, MAX_PICKLE)))
    known: _Known = {}
    unpickler = Unpickler(stream, functools.partial(_find_storage, file, known, True), Budget(file.size))
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
    widths = {storage.key: storage.dtype.itemsize for storage in reversed(known.values())}  # of its first type
    position, places = stream.tell(), {}
    for key in keys:
        if key not in widths:
            raise UsageError(f"storage {short(key)} is listed but never used: the file is damaged.")
        start = position + 8
        count = int.from_bytes(file.window(position, start), "little")
        position = start + count * widths[key]
        file.window(start, position)  # ends inside the file
        places[key] = start, position
    _place(known, places, False)
    return content
