#!/usr/bin/env python3
"""Captioned pictures to try text to image with, from a Debian package: makes WebDataset shards of Tux Paint's stamps.

    apt-get download tuxpaint-stamps-default          (161 MB; Debian and Ubuntu; needs no root)
    dpkg-deb -x tuxpaint-stamps-default_*.deb stamps
    python launch/tuxpaint_stamps.py stamps shards    (needs Pillow)
    deco train --config CONFIG --workdir RUN --config.data.source=webdataset --config.data.path=shards

A stamp is a PNG of a thing without its surroundings, and a text whose first line says in English what it is; the other
lines translate it. It is put on a white square, a little larger than it is, and stays a PNG. Letters, symbols and
cartoons are left out, which leaves photos and a few drawings. The stamps are under the GPL, version 2.
"""

import argparse
import collections
import io
import pathlib
import sys
import tarfile
from collections.abc import Iterator

from PIL import Image

LEFT_OUT = ("symbols", "cartoon")  # folders
PER_SHARD = 100
MARGIN = 16  # the square is larger than the stamp by its long side over this


def stamps(folder: pathlib.Path, left_out: collections.Counter) -> Iterator[tuple[str, bytes, str]]:
    """Key, PNG and caption of each stamp below a folder, in the order of names; counts the others by the reason."""
    for path in sorted(folder.rglob("*.png")):
        name, text = path.relative_to(folder), path.with_suffix(".txt")
        kind = next((kind for kind in LEFT_OUT if kind in name.parts), None)
        caption = first_line(text) if text.is_file() else ""
        if kind or not caption:
            left_out[kind or "without a caption"] += 1
            continue
        try:
            content = on_white(path)
        except (OSError, SyntaxError):  # Pillow's errors for what is no PNG
            left_out["unreadable"] += 1
            continue
        yield str(name.with_suffix("")).replace("/", "-").replace(".", "-"), content, caption


def first_line(path: pathlib.Path) -> str:
    """The English caption in a stamp's text."""
    return path.read_text("utf-8-sig", errors="replace").partition("\n")[0].strip()


def on_white(path: pathlib.Path) -> bytes:
    """A PNG of the stamp in the middle of a white square."""
    with Image.open(path) as image:
        stamp = image.convert("RGBA")
    side = max(stamp.size) + 2 * -(-max(stamp.size) // (2 * MARGIN))
    square, stream = Image.new("RGBA", (side, side), "white"), io.BytesIO()
    square.alpha_composite(stamp, ((side - stamp.width) // 2, (side - stamp.height) // 2))
    square.convert("RGB").save(stream, "png")
    return stream.getvalue()


def write_shard(path: pathlib.Path, samples: list[tuple[str, bytes, str]]) -> None:
    """The same bytes whenever it is done; what is there under this name is whole."""
    draft = path.with_name(f".{path.name}.draft")
    with tarfile.open(draft, "w", format=tarfile.PAX_FORMAT) as tar:
        for key, image, caption in samples:
            for name, content in ((f"{key}.png", image), (f"{key}.txt", caption.encode())):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    draft.rename(path)


def main(arguments: list[str]) -> None:
    """Writes OUT/stamps-00000.tar … and says how many stamps are in them."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=pathlib.Path, help="where the package was unpacked")
    parser.add_argument("out", type=pathlib.Path, help="a new folder, for the shards")
    options = parser.parse_args(arguments)
    if options.out.exists() and any(options.out.iterdir()):
        parser.error(f"{options.out} is not empty; choose another folder.")
    root = next((path for path in sorted(options.folder.rglob("stamps")) if any(path.rglob("*.png"))), options.folder)
    left_out: collections.Counter = collections.Counter()
    samples = list(stamps(root, left_out))
    if not samples:
        parser.error(f"{options.folder} holds no stamps; unpack the package there: dpkg-deb -x PACKAGE.deb FOLDER")
    options.out.mkdir(parents=True, exist_ok=True)
    for shard, first in enumerate(range(0, len(samples), PER_SHARD)):
        write_shard(options.out / f"stamps-{shard:05}.tar", samples[first : first + PER_SHARD])
    counts = ", ".join(f"{count} {reason}" for reason, count in left_out.most_common())
    print(f"{options.out}: {len(samples)} stamps with captions. Left out: {counts or 'none'}.")


if __name__ == "__main__":
    main(sys.argv[1:])
