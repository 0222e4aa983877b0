"""Captioned images in WebDataset's tar shards, of which nothing is unpacked: where in which shard does each lie?"""

import collections
import concurrent.futures
import dataclasses
import json
import posixpath
import re
import time
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from deco_jax import storage
from deco_jax.conditions import Captions
from deco_jax.data.decode import Decoder
from deco_jax.data.index import NAME, RECENT, Listing, Telling, open_index
from deco_jax.data.reading import read_bytes
from deco_jax.data.records import SUFFIXES, Record, first_of
from deco_jax.data.tars import TAR, THREADS, Part, list_tars, members, tars_state
from deco_jax.data.wording import FIELD, Wording, captions_line, find_field
from deco_jax.errors import UsageError
from deco_jax.storage import AnyPath

IMAGES = (*SUFFIXES, ".output_image")
TEXTS = (".txt", ".input_prompt")  # members that are a caption
JSON = ".json"  # has the caption in a field
AS_TEXT, AS_JSON = 0, 1  # kinds of place in the index
GAP = 2**16  # bytes between an image and its caption that are rather read than skipped
EXPECTED = (
    "expected are tar shards, or a folder of them, in which every KEY.jpg (or .png, .webp, .output_image) has a "
    "KEY.txt (or .json, .input_prompt)"
)


class WebDataset:
    """Shards in a folder, in the order of their names, or one shard; samples in the order of their images in it.

    A sample is an image and a caption that differ in their last ending alone; they need not follow each other. Of one
    that has the caption both as text and in JSON, the text is taken, unless data.caption_field says which field is.
    Other members are ignored, and counted. An index (see there) is kept. The shards may be in a bucket; to list them
    there is to read all of them.
    """

    class_names = ()

    def __init__(self, config: ConfigDict, beside: AnyPath | None = None):
        where = f"data.path={config.path!r}"
        path = storage.to_path(config.path)
        self.decoder, self.wording = Decoder.from_config(config), Wording.from_config(config)
        self.condition, self.decoding = Captions(), str(self.decoder)
        name = NAME.replace("index", "index_webdataset")
        with storage.reading(path):
            if not config.path or not storage.retried(f"looking at {path}", path.exists):
                raise UsageError(f"{where} does not exist; {EXPECTED}.")
            if storage.retried(f"looking at {path}", path.is_dir):
                root, place, tars = path, path / name, list_tars(path, where, EXPECTED)
                _check_numbering(tars, where)
            else:
                root, place, tars = path.parent, path.parent / f".{path.name}{name}", [path.name]
            self.root = str(root).rstrip("/")
            self.index = open_index(
                str(path),
                place,
                beside,
                lambda: _list(self.root, tars, self.wording, where),
                lambda state: state == _state(self.root, tars, self.wording),
            )
        self.identity = self.index.identity

    def __len__(self) -> int:
        return len(self.index)

    def load(self, index: int, offset: float | None = None) -> Record:
        """See `Source`."""
        tar, start, size = self.index.place(index)
        kind, caption_start, caption_size = self.index.caption(index)
        first, stop = min(start, caption_start), max(start + size, caption_start + caption_size)
        if stop - first <= size + caption_size + GAP:  # in one go: of a bucket, each costs a request
            content = self._read(tar, first, stop - first)
            image = content[start - first :][:size]
            text = content[caption_start - first :][:caption_size]
        else:
            image, text = self._read(tar, start, size), self._read(tar, caption_start, caption_size)
        return {"image": self.decoder(image, offset), "caption": self._worded(kind, text)}

    def caption(self, index: int) -> str:
        """Of a record; raises as `load` does."""
        kind, start, size = self.index.caption(index)
        return self._worded(kind, self._read(self.index.place(index)[0], start, size))

    def describe(self, index: int) -> str:
        """See `Source`."""
        return f"{self.root}/{self.index.place(index)[0]}: {self.index.name(index)}"

    def summary(self) -> list[str]:
        """See `Source`."""
        return self.index.summary(captions_line(len(self), self.caption))

    def contents(self) -> dict[str, Any]:
        """See `Source`."""
        return self.index.contents

    def _worded(self, kind: int, text: bytes) -> str:
        return self.wording.of_bytes(text) if kind == AS_TEXT else self.wording.of_json(text)

    def _read(self, tar: str, start: int, size: int) -> bytes:
        path = f"{self.root}/{tar}"
        try:
            content = read_bytes(path, start, size)
        except FileNotFoundError as error:  # no fault of the record
            raise UsageError(f"{path} is not there any more.") from error
        if len(content) != size:
            raise ValueError(f"{path} ends within it")
        return content


def _check_numbering(tars: list[str], where: str) -> None:
    """Raises UsageError if shards are numbered, as 00000, and one between the first and the last is missing."""
    numbers: dict[tuple[str, int, str], list[int]] = {}
    for tar in tars:
        if match := re.fullmatch(r"(.*?)([0-9]+)(-of-[0-9]+[^0-9]*)", tar) or re.fullmatch(
            r"(.*?)([0-9]+)([^0-9]*)", tar
        ):
            numbers.setdefault((match[1], len(match[2]), match[3]), []).append(int(match[2]))
    for (front, digits, end), found in numbers.items():
        missing = max(found) - min(found) + 1 - len(found)
        if not missing or min(found) >= 10 ** (digits - 1):  # without zeros in front, it may be a year
            continue
        there, gaps = set(found), []
        number = min(found)
        while len(gaps) < min(missing, 5):
            gaps += [f"{front}{number:0{digits}}{end}"] if number not in there else []
            number += 1
        more = f" and {missing - len(gaps):,} more" if missing > len(gaps) else ""
        raise UsageError(
            f"{where} holds {front}{max(found):0{digits}}{end} but not {', '.join(gaps)}{more}; finish the download, "
            "or link the shards to train on in a folder of their own, numbered without a gap."
        )


def _state(root: str, tars: list[str], wording: Wording) -> dict[str, Any]:
    """What changes when one of the shards does, or when there are others, or another field is asked for."""
    return {"tars": tars_state(root, tars), "field": wording.field}


# --- the listing


@dataclasses.dataclass
class Found:
    """The samples of a shard, in order."""

    names: list[str] = dataclasses.field(default_factory=list)  # of the images
    places: list[tuple[int, int]] = dataclasses.field(default_factory=list)  # first byte, bytes
    captions: list[tuple[int, int, int]] = dataclasses.field(default_factory=list)  # kind of place, first byte, bytes
    ignored: collections.Counter = dataclasses.field(default_factory=collections.Counter)


def _list(root: str, tars: list[str], wording: Wording, where: str) -> Listing:
    """Looks at the header of every member."""
    begun, state, telling = time.time(), _state(root, tars, wording), Telling(root)
    sizes = [version[0] for _, version in state["tars"]]
    parts = [Part(f"{root}/{tar}", k, 0, sizes[k], f"{root}/{tar}", tar[: -len(TAR)]) for k, tar in enumerate(tars)]
    names, places, captions, ignored = [], [], [], collections.Counter()
    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        for k, found in enumerate(pool.map(lambda part: _look_into(part, wording), parts)):
            names += found.names
            places.append(np.array([(k, *place) for place in found.places], np.int64))
            captions.append(np.array(found.captions, np.int64))
            ignored += found.ignored
            telling(f"{k + 1:,} of {len(parts):,} shards, {len(names):,} images")
    if state != _state(root, tars, wording):
        raise UsageError(f"{where} changed while it was listed; start again when it is complete.")
    recent = not storage.is_remote(root) and max(version[-1] for _, version in state["tars"]) > (begun - RECENT) * 1e9
    return Listing(
        names,
        (),
        ignored,
        None if recent else state,
        "it has just changed" if recent else "",
        tars,
        np.concatenate(places),
        "webdataset",
        np.concatenate(captions),
    )


def _look_into(part: Part, wording: Wording) -> Found:
    """The samples of a shard; raises UsageError if it has none."""
    images, texts, jsons = {}, {}, {}  # of each key the member
    found, others = Found(), []
    for name, member in members(part, EXPECTED):
        if member.isdir():
            continue
        key, suffix = posixpath.splitext(name)
        suffix = suffix.lower()
        kinds = [(images, IMAGES), (texts, TEXTS), (jsons, (JSON,))]
        kept = next((kept for kept, endings in kinds if suffix in endings), None)
        if posixpath.basename(name).startswith(".") or kept is None:
            found.ignored["hidden" if posixpath.basename(name).startswith(".") else suffix or "without an ending"] += 1
            others += [name] if len(others) < 3 else []
            continue
        if key in kept:
            raise UsageError(f"{part.name} holds {kept[key][0]} and {name}; a sample has one; make it anew.")
        if member.issparse() or not member.isreg():
            how = "a sparse file" if member.issparse() else "a link"
            raise UsageError(f"{part.name} holds {name} as {how}, which is not read; pack it as a file.")
        kept[key] = (name, member.offset_data, member.size)
    first, second = (texts, jsons) if wording.field == FIELD else (jsons, texts)
    empty = 0
    for key, (name, *place) in images.items():
        caption, other = first.get(key), second.get(key)
        if caption is None or (not caption[2] and other is not None):
            caption = other
        if caption is None:
            continue
        if not caption[2]:
            empty += 1
            continue
        kind = AS_JSON if caption[0].lower().endswith(JSON) else AS_TEXT
        found.names.append(name)
        found.places.append(tuple(place))
        found.captions.append((kind, *caption[1:]))
    captions = texts.keys() | jsons.keys()
    if not found.names:
        there = [name for kept in (images, texts, jsons) for name, *_ in list(kept.values())[:1]] + others
        shown = f"files like {first_of(there, 3).partition(' and ')[0]}" if there else "nothing"
        lack = "captions" if images and not captions & images.keys() else "captioned images"
        raise UsageError(f"{part.name} holds no {lack}, but {shown}; {EXPECTED}.")
    found.ignored["images without a caption"] += len(images.keys() - captions)
    found.ignored["images with an empty caption"] += empty
    found.ignored["captions without an image"] += len(captions - images.keys())
    found.ignored = +found.ignored  # without zeros
    _check_field(part, found, wording)
    return found


def _check_field(part: Part, found: Found, wording: Wording) -> None:
    """Raises UsageError if the first caption that is in JSON has not the field: the others will not have it either."""
    first = next((k for k, (kind, *_) in enumerate(found.captions) if kind == AS_JSON), None)
    if first is None:
        return
    content = read_bytes(part.path, *found.captions[first][1:])
    try:
        find_field(json.loads(content.decode("utf-8-sig")), wording.field)
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError):  # a record that cannot be read
        return
    except ValueError as error:
        name = f"{posixpath.splitext(found.names[first])[0]}{JSON}"
        raise UsageError(f"{part.name}: of {name}: {error}.") from error
