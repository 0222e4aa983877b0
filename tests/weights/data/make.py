"""Made zip.pt, zip_protocol4.pt and legacy.pt beside this file, with torch 2.13.0: python tests/weights/data/make.py

What they hold is said again, in NumPy, by `expected_tensors` and `REST` of tests/weights/test_pickles.py.
"""

import argparse
import collections
import pathlib

import numpy as np
import torch

FOLDER = pathlib.Path(__file__).parent


def content():
    base = torch.arange(12, dtype=torch.float32)
    wide = torch.arange(6, dtype=torch.float32).reshape(2, 3)
    tensors = collections.OrderedDict()
    for name in (
        "float64",
        "float32",
        "float16",
        "bfloat16",
        "complex64",
        "complex128",
        "float8_e4m3fn",
        "float8_e5m2",
    ):
        tensors[name] = (torch.arange(6, dtype=torch.float32) / 4 - 0.5).to(getattr(torch, name)).reshape(2, 3)
    for name in ("int64", "int32", "int16", "int8", "uint64", "uint32", "uint16", "uint8"):
        tensors[name] = torch.arange(6).to(getattr(torch, name)).reshape(2, 3)
    tensors["bool"] = torch.tensor([True, False, True])
    tensors["scalar"] = torch.tensor(2.5)
    tensors["empty"] = torch.zeros(0, 3)
    tensors["parameter"] = torch.nn.Parameter(torch.arange(4.0))
    tensors["transposed"] = wide.T
    tensors["expanded"] = torch.tensor([7.0]).expand(3, 4)
    tensors["stepped"] = base[2:11:3]
    tensors["head"] = base[:8]
    tensors["tail"] = base[4:]
    tensors["tied"] = tensors["float32"]
    tensors._metadata = {"": {"version": 1}}
    return {
        "state_dict": tensors,
        "epoch": 3,
        "metrics": {"fid": np.float64(1.5), "seen": np.int32(7), "good": np.bool_(True), "curve": np.arange(3.0)},
        "args": argparse.Namespace(lr=1e-4, betas=(0.9, 0.95)),
        "folder": pathlib.PurePosixPath("/runs/one"),
        "milestones": collections.Counter({10: 1, 20: 1}),
        "groups": collections.defaultdict(list, {"a": [1]}),
        "device": torch.device("cuda", 1),
        "dtype": torch.bfloat16,
        "size": torch.Size([2, 3]),
        "complex": 1 + 2j,
        "bytes": b"\x00\xff",
        "none": None,
        "set": {1, 2},
        "random": torch.arange(4, dtype=torch.uint8),
    }


def main():
    torch.save(content(), FOLDER / "zip.pt")
    torch.save(content(), FOLDER / "zip_protocol4.pt", pickle_protocol=4)
    torch.save(content(), FOLDER / "legacy.pt", _use_new_zipfile_serialization=False)


if __name__ == "__main__":
    main()
