"""Do curves and pictures arrive in TensorBoard's files, and does a disk that fails hold up nobody?"""

import struct

import numpy as np
import pytest

from deco_jax.training.tensorboard import TensorBoard


def events(folder):
    """(step, tag) of all events, file by file, read by the format's definition."""
    proto = pytest.importorskip("tensorboardX.proto.event_pb2")
    found = []
    for path in sorted(folder.glob("events.out.tfevents.*")):
        content, start = path.read_bytes(), 0
        while start + 12 <= len(content):
            (length,) = struct.unpack_from("<Q", content, start)
            event = proto.Event.FromString(content[start + 12 : start + 12 + length])
            found += [(event.step, value.tag) for value in event.summary.value]
            start += 16 + length
    return found


def test_curves_and_pictures_arrive(tmp_path):
    board = TensorBoard(tmp_path / "tensorboard")
    board.scalars(1, {"loss": 2.0, "lr": 0.1})
    board.picture(2, "samples", np.zeros((4, 6, 3), np.uint8))
    board.flush()
    assert events(tmp_path / "tensorboard") == [(1, "loss"), (1, "lr"), (2, "samples")]
    board.scalars(3, {"loss": 1.0})
    board.close()
    assert events(tmp_path / "tensorboard")[-1] == (3, "loss")


def test_a_disk_that_fails_holds_up_nobody(tmp_path, caplog):
    """However much there is to write; and when it takes something again, that goes into another file."""
    board = TensorBoard(tmp_path)
    board.scalars(1, {"loss": 2.0})
    board.flush()
    board.events._py_recordio_writer._writer.close()
    for step in range(2, 50):
        board.scalars(step, {"loss": 1.0})
    board.flush()
    assert "TensorBoard's events cannot be written" in caplog.text and len(list(tmp_path.iterdir())) == 2
    assert events(tmp_path) == [(1, "loss"), *((step, "loss") for step in range(3, 50))]
    board.folder = tmp_path / "file"
    board.folder.write_text("in the way")
    board.events = None
    for step in range(50):
        board.scalars(step, {"loss": 1.0})
    board.close()
    assert caplog.text.count("TensorBoard's events cannot be written") >= 51
