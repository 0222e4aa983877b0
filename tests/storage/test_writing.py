"""Files appear whole or not at all."""

import json

import numpy as np
import pytest

from deco_jax import storage
from deco_jax.errors import UsageError
from deco_jax.sampling.pictures import save_png


def test_a_file_is_replaced_whole(tmp_path):
    path = tmp_path / "new" / "values.json"
    storage.write_json(path, {"a": 1})
    storage.write_json(path, {"ä": 2})
    assert json.loads(path.read_text(encoding="utf-8")) == {"ä": 2}
    assert [p.name for p in path.parent.iterdir()] == ["values.json"], "a draft was left behind"


@pytest.mark.parametrize("folder", [False, True])
def test_what_was_there_stays_if_writing_fails(tmp_path, folder):
    path = tmp_path / "it"

    def write(draft, text):
        if folder:
            draft.mkdir()
        (draft / "inside" if folder else draft).write_text(text)

    with storage.write_beside(path) as draft:
        write(draft, "first")
        assert draft.name == path.name and not path.exists(), "some writers look at the name"
    with pytest.raises(RuntimeError), storage.write_beside(path) as draft:
        write(draft, "second")
        raise RuntimeError
    assert (path / "inside" if folder else path).read_text() == "first"
    with storage.write_beside(path) as draft:
        write(draft, "third")
    with storage.write_beside(path, first_wins=True) as draft:
        write(draft, "fourth")
    assert (path / "inside" if folder else path).read_text() == ("third" if folder else "fourth")
    assert list(tmp_path.iterdir()) == [path]


def test_a_path_that_cannot_be_written_is_bad_input_only_where_a_user_gave_it(tmp_path):
    """In the middle of a run a full disk is no bad input: exit code 2 would keep a scheduler from trying again."""
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(UsageError, match="file/a cannot be written"):
        storage.write_bytes(tmp_path / "file" / "a", b"")
    with pytest.raises(OSError):
        save_png(np.zeros((2, 2, 3), np.uint8), tmp_path / "file" / "a.png")


def test_waiting_ends(monkeypatch):
    monkeypatch.setitem(storage.wait_until.__globals__, "SHARED_FOLDER_DELAY", 0.6)
    answers = iter([False, True])
    assert storage.wait_until(lambda: next(answers))
    assert not storage.wait_until(lambda: False)
