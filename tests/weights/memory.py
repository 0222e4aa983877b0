"""How much memory does it take to read one part of a large checkpoint?

    python tests/weights/memory.py 11000 2700        (MB of file, MB of its part `ema_denoiser.*`)

Writes a sparse file in the zip format, as large as wanted and almost nothing on disk, in the system's temporary folder.
Prints the MB of the part and the MB by which the process grew, at most, while it read that part into arrays.
"""

import os
import pathlib
import pickle
import struct
import sys
import tempfile

import ml_dtypes  # noqa: F401  # its memory belongs to the start
import numpy as np

from deco_jax.weights.files import open_weights

MB = 10**6
TENSOR = 4 * MB  # bytes


def pickled(names: list[str]) -> bytes:
    """A state dict of float32 tensors of TENSOR bytes, each with its own storage, as protocol 2."""

    def text(value: str) -> bytes:
        return b"X" + struct.pack("<I", len(value)) + value.encode()

    count = pickle.dumps(TENSOR // 4, 2)[2:-1]
    out = b"\x80\x02}" + text("state_dict") + b"}("
    for key, name in enumerate(names):
        storage = b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text(str(key)) + text("cpu") + count + b"tQ"
        out += (
            text(name) + b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + b"K\x00" + count + b"\x85K\x01\x85\x89}tR"
        )
    return out + b"us."


def write_sparse(path: pathlib.Path, names: list[str]) -> None:
    entries = [("x/data.pkl", pickled(names), 0)] + [(f"x/data/{i}", b"", TENSOR) for i in range(len(names))]
    directory = []
    with open(path, "wb") as file:
        for name, content, hole in entries:
            offset, size = file.tell(), len(content) + hole
            common = struct.pack("<HHHHHIII", 45, 0, 0, 0, 0, 0, size, size)
            file.write(b"PK\x03\x04" + common + struct.pack("<HH", len(name), 0) + name.encode() + content)
            file.seek(hole, os.SEEK_CUR)
            wide = struct.pack("<HHQ", 1, 8, offset)
            fields = struct.pack("<HHHHHII", len(name), len(wide), 0, 0, 0, 0, 0xFFFFFFFF)
            directory.append(b"PK\x01\x02" + struct.pack("<H", 45) + common + fields + name.encode() + wide)
        start, listed = file.tell(), b"".join(directory)
        numbers = struct.pack("<QHHIIQQQQ", 44, 45, 45, 0, 0, len(entries), len(entries), len(listed), start)
        file.write(listed + b"PK\x06\x06" + numbers)
        file.write(b"PK\x06\x07" + struct.pack("<IQI", 0, start + len(listed), 1))
        file.write(b"PK\x05\x06" + struct.pack("<HHHHIIH", 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0))


def peak() -> int:
    """Bytes of this process's largest resident size so far."""
    status = pathlib.Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))


def main() -> None:
    total, part = (int(argument) * MB for argument in sys.argv[1:3])
    names = [f"denoiser.{i}" for i in range((total - part) // TENSOR)]
    names += [f"ema_denoiser.{i}" for i in range(part // TENSOR)]
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "large.ckpt"
        write_sparse(path, names)
        pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        before = peak()
        tensors = open_weights(path).tensors
        arrays = {name: tensor.numpy() for name, tensor in tensors.items() if name.startswith("ema_denoiser.")}
        print(sum(array.nbytes for array in arrays.values()) / MB, (peak() - before) / MB)
        assert all(np.all(array[:10] == 0) for array in arrays.values())


if __name__ == "__main__":
    main()
