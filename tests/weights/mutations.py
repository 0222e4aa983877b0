"""Damaged and hostile weight files, made at random from small sound ones: what tests/weights/fuzz.py reads."""

import collections
import io
import json
import pathlib
import pickle
import pickletools
import random
import struct
import warnings
import zipfile

DATA = pathlib.Path(__file__).parent / "data"

# Names that hostile files call, with an argument that leaves a file where the call is obeyed.
HOSTILE = """os system;posix system;nt system;os remove;os _exit;os execv;subprocess Popen;subprocess call;pty spawn;
builtins eval;builtins exec;__builtin__ eval;builtins compile;builtins __import__;builtins getattr;builtins open;
builtins print;builtins apply;builtins object;builtins type;builtins bytes.fromhex;builtins int.__class__;sys exit;
functools partial;operator attrgetter;operator methodcaller;importlib import_module;runpy run_path;shutil rmtree;
torch load;torch.hub load;torch.jit load;torch.serialization load;torch._utils _rebuild_qtensor;
torch._utils _rebuild_sparse_tensor;torch._utils _rebuild_tensor_v2.__globals__;torch.fx _symbolic_trace;
numpy load;numpy memmap;numpy.core.multiarray fromfile;numpy.f2py.crackfortran getlincoef;
omegaconf.dictconfig DictConfig;
pickle loads;_pickle loads;marshal loads;types FunctionType;types CodeType;signal raise_signal;ctypes CDLL;
webbrowser open;http.client HTTPConnection;socket create_connection;copyreg _reconstructor;copyreg __newobj__;
collections OrderedDict.__init__.__globals__;idlelib.run Executive;code InteractiveInterpreter"""
HOSTILE = tuple(name.strip() for name in HOSTILE.split(";"))

NUMBERS = (-1, 0, 1, 2, 3, 255, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**62, 2**63 - 1, 2**63, 2**64)
NUMBERS += (2**255, 2**300, 2**4000, -(2**31), -(2**80))


# Building files.


def torch_zip(pickled: bytes, storages=(), method=zipfile.ZIP_STORED, folder="archive", byteorder=b"little") -> bytes:
    """A file as torch.save lays it out. storages: (key, bytes)."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", method) as archive, warnings.catch_warnings(action="ignore"):  # names there twice
        archive.writestr(f"{folder}/data.pkl", pickled)
        archive.writestr(f"{folder}/byteorder", byteorder)
        for key, content in storages:
            archive.writestr(f"{folder}/data/{key}", content)
        archive.writestr(f"{folder}/version", b"3\n")
    return out.getvalue()


def safetensors(header: bytes, data: bytes) -> bytes:
    return struct.pack("<Q", len(header)) + header + data


def number_opcode(value: int) -> bytes:
    return pickle.dumps(value, 2)[2:-1]


def hostile_call(name: str, canary: str, rng: random.Random) -> bytes:
    """Opcodes that call `name` with an argument that makes `canary`, and leave the result on the stack."""
    module, attribute = name.split(" ")
    argument = rng.choice([f"touch {canary}", f"open({canary!r}, 'w')", canary])
    text = b"X" + struct.pack("<I", len(argument)) + argument.encode()
    named = f"c{module}\n{attribute}\n".encode()
    stacked = (
        b"\x8c"
        + bytes([len(module)])
        + module.encode()
        + b"\x8c"
        + bytes([len(attribute)])
        + attribute.encode()
        + b"\x93"
    )
    return rng.choice(
        [
            named + text + b"\x85R",
            stacked + text + b"\x85R",
            named + text + b"\x85\x81",  # NEWOBJ
            named + text + b"\x85}\x92",  # NEWOBJ_EX
            b"(" + named + text + b"o",  # OBJ
            b"(" + text + f"i{module}\n{attribute}\n".encode(),  # INST
            named + b")R}" + text + b"K\x01sb",  # BUILD
            named + text + b"\x85R" + text + b"\x85R",
            b"ctorch._tensor\n_rebuild_from_type_v2\n(" + named + b"ctorch\nTensor\n" + text + b"\x85}tR",
            b"ccollections\ndefaultdict\n" + named + b"\x85R",
            text + b"Q",  # a persistent id
            f"P{canary}\n".encode(),
            b"\x82\x01",  # EXT1
        ]
    )


class Zip:
    """A seed taken apart: its pickle, and what else is in it."""

    def __init__(self, content: bytes):
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            self.entries = {i.filename.split("/", 1)[1]: archive.read(i) for i in archive.infolist()}
        self.pickled = self.entries["data.pkl"]
        self.storages = [(n.removeprefix("data/"), c) for n, c in self.entries.items() if n.startswith("data/")]


def seeds() -> dict[str, bytes]:
    found = {name: (DATA / f"{name}.pt").read_bytes() for name in ("zip", "zip_protocol4", "legacy")}
    entries, data = {"__metadata__": {"format": "pt"}}, b""
    for i, (dtype, width) in enumerate([("F32", 4), ("BF16", 2), ("I64", 8), ("BOOL", 1), ("F8_E4M3", 1)]):
        shape = [i + 1, 4] if i else []
        size = width * (4 * (i + 1) if i else 1)
        entries[f"layer.{i}.weight"] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + size]}
        data += bytes(range(size))
    found["safetensors"] = safetensors(json.dumps(entries).encode(), data)
    return found


# Mutating them. Each takes (rng, seeds, canary) and returns a file's bytes, or a folder's files by name.


def truncate(rng, seeds, canary):
    content = seeds[rng.choice(list(seeds))]
    return content[: rng.randrange(len(content))]


def flip_bits(rng, seeds, canary):
    content = bytearray(seeds[rng.choice(list(seeds))])
    for _ in range(rng.choice([1, 1, 2, 4, 16])):
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    return bytes(content)


def splice(rng, seeds, canary):
    content, other = (bytearray(seeds[rng.choice(list(seeds))]) for _ in range(2))
    start, source, length = rng.randrange(len(content)), rng.randrange(len(other)), rng.choice([1, 4, 8, 64, 512])
    content[start : start + rng.choice([0, length, 2 * length])] = other[source : source + length]
    return bytes(content)


def zip_fields(rng, seeds, canary):
    """Numbers of the zip's own structures: sizes, offsets, counts, methods, flags."""
    content = bytearray(seeds[rng.choice(["zip", "zip_protocol4"])])
    for _ in range(rng.choice([1, 1, 2])):
        signature, widths = rng.choice(
            [
                (b"PK\x01\x02", {8: 2, 10: 2, 20: 4, 24: 4, 28: 2, 30: 2, 32: 2, 42: 4}),
                (b"PK\x03\x04", {6: 2, 8: 2, 18: 4, 22: 4, 26: 2, 28: 2}),
                (b"PK\x05\x06", {8: 2, 10: 2, 12: 4, 16: 4, 20: 2}),
                (b"PK\x06\x06", {4: 8, 24: 8, 32: 8, 40: 8, 48: 8}),
                (b"PK\x06\x07", {8: 8, 16: 4}),
            ]
        )
        places = [i for i in range(len(content)) if content.startswith(signature, i)]
        offset, width = rng.choice(list(widths.items()))
        if places:
            place = rng.choice(places) + offset
            old = int.from_bytes(content[place : place + width], "little")
            value = rng.choice(
                [*NUMBERS, old - 1, old + 1, len(content), rng.randrange(len(content)), rng.choice(places)]
            )
            content[place : place + width] = (value % 2 ** (8 * width)).to_bytes(width, "little")
    return bytes(content)


def zip_layout(rng, seeds, canary):
    """Zips that hold the right things in the wrong way."""
    whole = Zip(seeds["zip"])
    pickled, storages = whole.pickled, list(whole.storages)
    choice = rng.randrange(9)
    if choice == 0:
        return torch_zip(pickled, storages, zipfile.ZIP_DEFLATED)
    if choice == 1:  # a zip bomb
        return torch_zip(pickled, [(key, bytes(2**20)) for key, _ in storages[:8]], zipfile.ZIP_DEFLATED)
    if choice == 2:
        storages[rng.randrange(len(storages))] = (
            rng.choice(["../../0", "/etc/passwd", "0\\1", "\0", "ä" * 300, ""]),
            b"1",
        )
        return torch_zip(pickled, storages)
    if choice == 3:
        storages.pop(rng.randrange(len(storages)))
        return torch_zip(pickled, storages)
    if choice == 4:
        storages.append(rng.choice(storages))  # twice the same name
        return torch_zip(pickled, storages)
    if choice == 5:
        return torch_zip(pickled, storages, byteorder=rng.choice([b"big", b"", b"middle", b"\xff" * 9]))
    if choice == 6:
        return torch_zip(pickled, storages, folder=rng.choice(["..", "a/b", "", "ä", "x" * 60000]))
    if choice == 7:
        i = rng.randrange(len(storages))
        storages[i] = (storages[i][0], storages[i][1][: rng.randrange(len(storages[i][1]) + 1)])
        return torch_zip(pickled, storages)
    return (
        rng.choice([b"", b"\x1f\x8b", b"#!/bin/sh\n"])
        + torch_zip(pickled, storages)
        + rng.choice([b"", b"PK\x05\x06" * 9])
    )


def _opcodes(pickled: bytes) -> list[tuple[str, bytes]]:
    found = list(pickletools.genops(pickled))
    ends = [position for _, _, position in found[1:]] + [len(pickled)]
    return [(op.name, pickled[start:end]) for (op, _, start), end in zip(found, ends, strict=True)]


def _mutate_opcodes(pickled: bytes, rng: random.Random, canary: str, hostile: bool) -> bytes:
    ops = [(name, code) for name, code in _opcodes(pickled) if name != "FRAME"]
    for _ in range(rng.choice([1, 1, 2, 5])):
        i = rng.randrange(len(ops))
        choice = 0 if hostile else rng.randrange(1, 7)
        if choice == 0:
            name = rng.choice(HOSTILE)
            mentions = [j for j, (op, _) in enumerate(ops) if op == "GLOBAL"]
            if mentions and rng.random() < 0.5:
                ops[rng.choice(mentions)] = ("GLOBAL", ("c" + name.replace(" ", "\n") + "\n").encode())
            else:
                ops.insert(max(1, i), ("HOSTILE", hostile_call(name, canary, rng) + rng.choice([b"", b"0"])))
        elif choice == 1:
            ops.pop(i)
        elif choice == 2:
            ops.insert(i, rng.choice(ops))
        elif choice == 3:
            j = rng.randrange(len(ops))
            ops[i], ops[j] = ops[j], ops[i]
        elif choice == 4:
            ops[i] = ("ANY", rng.choice(pickletools.opcodes).code.encode("latin1") + rng.randbytes(rng.randrange(9)))
        elif choice == 5:  # other globals that are admitted, in the wrong place
            mentions = [code for op, code in ops if op in ("GLOBAL", "STACK_GLOBAL")]
            ops[i] = ("GLOBAL", rng.choice(mentions or [b"0"]))
        else:
            numbers = [j for j, (op, _) in enumerate(ops) if "INT" in op or op.startswith("LONG1")]
            ops[rng.choice(numbers or [i])] = ("LONG", number_opcode(rng.choice(NUMBERS)))
    return b"".join(code for _, code in ops)


def opcodes(rng, seeds, canary):
    whole = Zip(seeds[rng.choice(["zip", "zip_protocol4"])])
    return torch_zip(_mutate_opcodes(whole.pickled, rng, canary, hostile=False), whole.storages)


def hostile(rng, seeds, canary):
    """Pickles that call what they must not; some are nothing else."""
    whole = Zip(seeds[rng.choice(["zip", "zip_protocol4"])])
    if rng.random() < 0.3:
        alone = b"\x80\x02" + hostile_call(rng.choice(HOSTILE), canary, rng) + b"."
        return alone if rng.random() < 0.3 else torch_zip(alone)
    return torch_zip(_mutate_opcodes(whole.pickled, rng, canary, hostile=True), whole.storages)


def shapes(rng, seeds, canary):
    """Tensors whose shape, strides, offset or number of elements is absurd."""

    def numbers(count):
        usual = [rng.choice([0, 1, 2, 3, 4]) for _ in range(count)]
        for _ in range(rng.choice([0, 1, 1, 2])):
            if usual:
                usual[rng.randrange(count)] = rng.choice(NUMBERS)
        return b"(" + b"".join(map(number_opcode, usual)) + b"t"

    axes = rng.choice([0, 1, 2, 2, 3, 33, 70])
    kind = rng.choice(["FloatStorage", "LongStorage", "BFloat16Storage", "ComplexDoubleStorage", "BoolStorage"])
    count = rng.choice([4, 4, 4, 16, *NUMBERS])
    storage = (
        b"(X\x07\0\0\0storagectorch\n"
        + kind.encode()
        + b"\nX\x01\0\0\x000X\x03\0\0\0cpu"
        + number_opcode(count)
        + b"tQ"
    )
    offset = number_opcode(rng.choice([0, 0, 0, 1, *NUMBERS]))
    strides = numbers(rng.choice([axes, axes, axes, 1]))
    tensor = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + offset + numbers(axes) + strides + b"\x89}tR"
    repeats = b"".join(b"X\x01\0\0\0" + bytes([97 + i]) + tensor for i in range(rng.choice([1, 1, 20])))
    return torch_zip(b"\x80\x02}(" + repeats + b"u.", [("0", bytes(64))])


def bombs(rng, seeds, canary):
    """Small pickles that unfold, nest, collide or repeat without end."""
    n = rng.choice([10, 200, 3000, 100_000])
    many = b"".join(number_opcode(k * (2**61 - 1)) + b"N" for k in range(min(n, 20_000)))
    text = b"X" + struct.pack("<I", 2**20) + b"a" * 2**20
    body = rng.choice(
        [
            b"]q\0" + b"0](h\0h\0h\0h\0h\0h\0h\0h\0h\0h\0eq\0" * min(n, 3000),  # laughs, by lists
            b")q\0" + b"0(h\0h\0h\0h\0tq\0" * n,  # … by tuples
            b")q\0" + b"0h\0h\0\x86q\0" * n + b"0}h\0K\x02s",  # … as a key
            b"]" * n + b"a" * (n - 1),
            b"(" * n + b"t" * n,
            b")" + b"\x85" * n,
            b"]q\0h\0a",  # holds itself
            b"}q\0K\x01h\0s",
            b"}(" + many + b"u",
            b"\x8f(" + many + b"\x90",
            text + b"q\0" + b"0c_codecs\nencode\nh\0\x85R" * min(n, 3000),
            text + b"q\x000" + text + b"q\x010" + b"}" + b"h\0Nsh\1Ns" * min(n, 3000),
            b"](" + b"N" * n + b"eq\0" + b"0cbuiltins\nlist\nh\0\x85R" * min(n, 3000),
            b"Nr\xff\xff\xff\xff" + b"0j\xff\xff\xff\xff" * n,
            b"Np999999999999999999999\n",
            b"L" + b"9" * n + b"L\n",
            b"I" + b"9" * n + b"\n",
            b"\x8b" + struct.pack("<i", n) + b"\x7f" * n,
            b"\x8b" + struct.pack("<i", -1),
            b"\x8d" + struct.pack("<Q", 2**62) + b"a",
            b"\x8e" + struct.pack("<Q", 2**40) + b"a",
            b"\x96" + struct.pack("<Q", 2**63 - 1),
            b"X" + struct.pack("<I", 2**32 - 1) + b"a",
            b"X\x03\0\0\0\xed\xa0\x80",  # half a surrogate pair
            b"c" + b"a" * n + b"\n" + b"b" * n + b"\n",
            b"cos\nsystem",  # no end of line
            b"(" + b"\x8f" * n + b"l",
        ]
    )
    storage = b"(X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\x000X\x03\0\0\0cpuK\x04tQ"
    tensor = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + b"K\0K\x04\x85K\x01\x85\x89}tR"
    whole = b"}X\x01\0\0\0a" + body + b"sX\x01\0\0\0b" + tensor + b"s"
    return (
        torch_zip(b"\x80\x04" + whole + b".", [("0", bytes(16))]) if rng.random() < 0.9 else b"\x80\x02" + body + b"."
    )


def safetensors_header(rng, seeds, canary):
    seed = seeds["safetensors"]
    start = 8 + int.from_bytes(seed[:8], "little")
    header, data = json.loads(seed[8:start]), seed[start:]
    choice = rng.randrange(6)
    if choice == 0:
        length = rng.choice([n for n in NUMBERS if 0 <= n < 2**64])
        return struct.pack("<Q", length) + seed[8:]
    if choice == 1:
        n = rng.choice([10, 5000, 200_000])
        text = rng.choice(
            ["[" * n, '{"a":' * n, "{" + '"a":1,' * n + '"b":1}', '{"a":' + "9" * n + "}", '{"a":NaN}', "[]"]
        )
        text = rng.choice(
            [text, '{"__metadata__":[]}', '{"__metadata__":{"a":1e999}}', '{"\\ud800":1}', "{}" + " " * n, "nul"]
        )
        return safetensors(text.encode(), rng.choice([data, b""]))
    if choice == 2:
        text = bytearray(json.dumps(header).encode())
        for _ in range(rng.choice([1, 3])):
            text[rng.randrange(len(text))] = rng.choice(b'{}[]",:0123456789eE-.\\NaI\xff')
        return safetensors(bytes(text), data)
    for _ in range(rng.choice([1, 1, 2])):
        entry = header[rng.choice([n for n in header if n != "__metadata__"])]
        if choice == 3:
            entry["data_offsets"][rng.randrange(2)] = rng.choice([*NUMBERS, 1.5, "0", None, True, rng.randrange(100)])
        elif choice == 4:
            entry["shape"] = [
                rng.choice([*NUMBERS, 1, 2, 4, None, True, 2.0]) for _ in range(rng.choice([0, 1, 2, 40]))
            ]
        else:
            field = rng.choice(list(entry))
            entry[field] = rng.choice(
                [None, "F32", "F64", "F4", "U8", [], {}, [0, 0], [[]], 1, entry[rng.choice(list(entry))]]
            )
    return safetensors(json.dumps(header).encode(), data)


def legacy(rng, seeds, canary):
    """The legacy format's five pickles and its storages."""
    content, parts = seeds["legacy"], []
    stream = io.BytesIO(content)
    for _ in range(5):
        start = stream.tell()
        collections.deque(pickletools.genops(stream), maxlen=0)
        parts.append(content[start : stream.tell()])
    data = bytearray(content[stream.tell() :])
    choice = rng.randrange(5)
    if choice == 0:
        i = rng.randrange(5)
        parts[i] = (
            _mutate_opcodes(parts[i], rng, canary, hostile=rng.random() < 0.3) if len(parts[i]) > 40 else parts[i][:-2]
        )
    elif choice == 1:
        place = rng.randrange(len(data) - 8)
        data[place : place + 8] = (rng.choice(NUMBERS) % 2**64).to_bytes(8, "little")
    elif choice == 2:
        data[:8] = (rng.choice(NUMBERS) % 2**64).to_bytes(8, "little")
    elif choice == 3:
        values = [[], ["0"], [1, 2], {"a": 1}, None, [[]], list("abcabc"), {"little_endian": False}, 2**300, 1.5]
        parts[rng.randrange(5)] = pickle.dumps(rng.choice(values), 2)
    else:
        rng.shuffle(parts)
    return b"".join(parts) + bytes(data)


def folder(rng, seeds, canary):
    """A folder with an index: names that lead elsewhere, tensors that are not where it says."""
    whole = seeds["safetensors"]
    header = json.loads(whole[8 : 8 + int.from_bytes(whole[:8], "little")])
    files = {name: "part-1.safetensors" for name in header if name != "__metadata__"}
    for _ in range(rng.choice([0, 1, 1, 3])):
        name = rng.choice([*files, "", "extra"])
        files[name] = rng.choice(
            ["../part-1.safetensors", "/etc/passwd", "", ".", "..", "part-2.safetensors", "a" * 5000, "\0"]
        )
        files[name] = rng.choice(
            [files[name], "\ud800", None, 1, {}, "model.safetensors.index.json", "part-1.safetensors", "loop"]
        )
    index = json.dumps(
        rng.choice([{"weight_map": files}, {"weight_map": files}, {"weight_map": [files]}, [files], {}])
    ).encode()
    parts = {"part-1.safetensors": whole, "config.json": b'{"width": 1}', "model.safetensors.index.json": index}
    damaged = rng.choice([*parts, None])
    if damaged:
        damage = rng.choice([truncate, flip_bits])
        parts[damaged] = damage(rng, {"": parts[damaged]}, canary)
    if rng.random() < 0.1:
        parts.pop(rng.choice(list(parts)))
    return parts


MUTATIONS = (
    truncate,
    flip_bits,
    splice,
    zip_fields,
    zip_layout,
    opcodes,
    hostile,
    shapes,
    bombs,
    safetensors_header,
    legacy,
    folder,
)
