"""Is a checkpoint still what was written?

    <step>/checksums.<process>.json   {"processes": those of the run, "files": {name: [bytes, digest]}}

Each process notes its own files once a step is complete. A bucket keeps digests itself, so nothing is read there. Of
checkpoints without these notes, written by an older version or cut off just then, every array is read instead.
"""

import base64
import concurrent.futures
import functools
import hashlib
import json
import os
import pathlib
import re
import zlib
from collections.abc import Iterable, Iterator

import fsspec
import tensorstore

from deco_jax.storage import AnyPath, is_remote, is_transient, retried, write_json

NOTES = re.compile(r"checksums\.\d+\.json")
THREADS = 8
BLOCK = 2**24  # bytes that are read at a time


def note(step_folder: AnyPath, process: int, processes: int) -> int:
    """Writes down the checksums of the files of a complete step that `process` wrote; returns the bytes of all."""
    found = _files(step_folder)
    mine = {name: size for name, (size, _) in found.items() if _writer(name, processes) == process}
    digests = _digests(step_folder, {name: found[name][1] or "crc32" for name in mine})
    files = {name: [size, digests[name]] for name, size in mine.items()}
    write_json(step_folder / f"checksums.{process}.json", {"processes": processes, "files": files})
    return sum(size for size, _ in found.values())


def damage(step_folder: AnyPath, process: int = 0, processes: int = 1) -> str:
    """What is wrong with a complete step; "" if nothing is. Of several processes each reads its share of the files.

    Raises:
      TransientError: the storage fails.
    """
    found = _files(step_folder)
    notes = {}
    for name in filter(NOTES.fullmatch, found):
        try:
            notes[name] = json.loads(retried(f"reading {step_folder / name}", (step_folder / name).read_bytes))
        except ValueError:
            return f"{name} is no JSON"
    written = {name: file for noted in notes.values() for name, file in noted["files"].items()}
    problems = []
    for name, (size, _) in written.items():
        if name not in found:
            problems.append(f"{name} is missing")
        elif found[name][0] != size:
            problems.append(f"{name} has {found[name][0]} bytes of {size}")
    if not problems:
        share = sorted(written)[process::processes]
        now = _digests(step_folder, {name: found[name][1] or written[name][1] for name in share})
        problems = [f"the checksum of {name} is another" for name in share if _differ(now[name], written[name][1])]
    if not problems and not (notes and len(notes) == next(iter(notes.values()))["processes"]):
        problems = list(_unreadable(step_folder, process, processes))
    more = f", and {len(problems) - 3} more" if len(problems) > 3 else ""
    return ", ".join(problems[:3]) + more


def _writer(name: str, processes: int) -> int:
    """Which process notes a file: its own arrays, and process 0 everything else."""
    match = re.match(r"state/ocdbt\.process_(\d+)/", name)
    return int(match[1]) if match and int(match[1]) < processes else 0


def _files(folder: AnyPath) -> dict[str, tuple[int, str]]:
    """{name within the folder: (bytes, the digest that a bucket keeps of it, or "")}."""
    if not is_remote(folder):
        found = {}
        for inside, folders, names in os.walk(folder):
            folders[:] = [name for name in folders if not name.startswith(".checksums.")]  # drafts of other processes
            for path in (pathlib.Path(inside) / name for name in names):
                found[path.relative_to(folder).as_posix()] = path.stat().st_size, ""
        return found
    system, inside = fsspec.core.url_to_fs(os.fspath(folder))
    found = retried(f"reading {folder}", lambda: system.find(inside, detail=True))
    return {
        name.removeprefix(inside).strip("/"): (
            info["size"],
            next(
                (f"{kind} {info[key]}" for key, kind in (("md5Hash", "md5"), ("ETag", "etag")) if key in info), "none"
            ),
        )
        for name, info in found.items()
    }


def _digests(folder: AnyPath, wanted: dict[str, str]) -> dict[str, str]:
    """{name: its digest}, of the kind with which `wanted` begins; that of a bucket is already one."""
    if is_remote(folder):
        return wanted

    def compute(name: str) -> str:
        path = folder / name
        stat = retried(f"reading {path}", path.stat)
        kind = wanted[name].split()[0]
        return retried(f"reading {path}", lambda: _digest(os.fspath(path), stat.st_size, stat.st_mtime_ns, kind))

    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        return dict(zip(wanted, pool.map(compute, wanted), strict=True))


@functools.lru_cache(maxsize=2**16)
def _digest(path: str, size: int, time: int, kind: str) -> str:
    """Of a local file, once as long as it has this size and time."""
    md5, crc32 = hashlib.md5(), 0
    if kind not in ("md5", "crc32"):
        return "none"
    with open(path, "rb", buffering=0) as file:
        while block := file.read(BLOCK):
            if kind == "md5":
                md5.update(block)
            else:
                crc32 = zlib.crc32(block, crc32)
    return f"md5 {base64.b64encode(md5.digest()).decode()}" if kind == "md5" else f"crc32 {crc32:08x}"


def _differ(now: str, written: str) -> bool:
    """Digests of different kinds (a checkpoint that was copied into a bucket, or out of it) say nothing."""
    return now.split()[0] == written.split()[0] and now != written


def _unreadable(step_folder: AnyPath, process: int, processes: int) -> Iterator[str]:
    """Reads the arrays of a state without keeping them; yields what fails."""
    state = step_folder / "state"
    if not retried(f"reading {state}", (state / "manifest.ocdbt").exists):
        return
    base = f"{state}/" if is_remote(state) else f"file://{state}/"
    try:
        store = tensorstore.KvStore.open({"driver": "ocdbt", "base": base}).result()
        keys = store.list().result()[process::processes]
        for some in _split(keys, THREADS):
            for read in [store.read(key) for key in some]:
                read.result()
    except Exception as error:
        if is_transient(error):
            raise
        yield (str(error).splitlines() or [type(error).__name__])[0]


def _split(keys: list[bytes], size: int) -> Iterable[list[bytes]]:
    return (keys[start : start + size] for start in range(0, len(keys), size))
