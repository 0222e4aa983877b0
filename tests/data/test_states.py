"""Is each caption given its own states, and are states of something else, or damaged ones, refused?"""

import itertools
import json
import pickle

import ml_dtypes
import numpy as np
import pytest

from deco_jax.conditions import Captions
from deco_jax.data.pipeline import batches
from deco_jax.data.states import Contents, StoredStates, captions_of, open_states, wording_of
from deco_jax.data.stored import array_file
from deco_jax.errors import TransientError, UsageError

RECORDS, A_FILE, TOKENS, WIDTH = 10, 4, 3, 8
BAD = 5  # its caption is unreadable


class Numbers:
    """Record i is an image full of i, whose caption is the number."""

    identity, decoding, condition = "numbers", "", Captions()
    told = "number"

    def __len__(self):
        return RECORDS

    def load(self, index, offset=None):
        return {"image": np.full((32, 32, 3), index, np.uint8), "caption": self.caption(index)}

    def caption(self, index):
        if index == BAD:
            raise ValueError("its caption is empty")
        return f"{self.told} {index}"

    def describe(self, index):
        return f"number {index}"


@pytest.fixture
def config(tiny_config):
    tiny_config.model.update(kind="deco_text", text_tokens=TOKENS, text_features=WIDTH)
    tiny_config.data.update(image_size=32, batch_size=4, workers=0, max_bad_records=2, max_bad_share=1.0)
    return tiny_config


def numbered(folder, config, **changes):
    """A whole folder in which the states of record i are full of i, and those of the empty prompt of 10."""
    folder.mkdir(exist_ok=True)
    source = Numbers()
    how = config.model.dtype, wording_of(config.data), captions_of(source)
    contents = Contents("numbers", RECORDS, A_FILE, TOKENS, WIDTH, "digest", *how)
    for k in range(3):
        rows = np.arange(A_FILE * k, min(A_FILE * (k + 1), RECORDS + 1))
        states = np.broadcast_to(rows[:, None, None], (len(rows), TOKENS, WIDTH)).astype(ml_dtypes.bfloat16)
        np.save(array_file("states", folder, k), np.ascontiguousarray(states).view("<u2"))
    (folder / "states.json").write_text(json.dumps(contents.__dict__ | {"bad": [BAD]} | changes))
    return folder


@pytest.mark.parametrize("workers", [0, 2])
def test_every_image_comes_with_the_states_of_its_caption(config, tmp_path, workers):
    """Over two epochs, for a share of the rows, in this process and in workers: also where a record stands in."""
    config.text.stored, config.data.workers = str(numbered(tmp_path, config)), workers
    source = Numbers()
    states, rows = open_states(config, source), np.array([0, 1, 3])
    found = list(itertools.islice(batches(config.data, 0, source, 1, rows, states=states), 5))
    for batch in found:
        assert batch.keys() == {"image", "text", "bad"}
        assert batch["text"].shape == (3, TOKENS, WIDTH) and batch["text"].dtype == ml_dtypes.bfloat16
        expected = np.broadcast_to(batch["image"][:, :1, 0, :1], batch["text"].shape)
        np.testing.assert_array_equal(batch["text"].astype(np.float32), expected)
    assert BAD in np.concatenate([batch["bad"] for batch in found]), "of 15 records, it must have come up"


def test_rows_of_a_folder(config, tmp_path):
    """The empty prompt's are after the last record's. A copy for a worker is small."""
    states = StoredStates(numbered(tmp_path, config))
    assert (states.nothing_LxE == 10).all() and states.nothing_LxE.shape == (TOKENS, WIDTH)
    assert states.digest == "digest"
    with pytest.raises(ValueError, match="it has no stored states: it was unreadable when they were made"):
        states[BAD]
    text = pickle.dumps(states)
    assert len(text) < 1000
    np.testing.assert_array_equal(pickle.loads(text)[9], states[9])


def test_states_of_other_data_or_another_run_are_refused(config, tmp_path):
    for change, message in (
        (
            {"identity": "letters"},
            "states of other images, captions or another order: of 10 records of 'letters'",
        ),
        ({"records": 9, "records_a_file": 4}, "of 9 records of 'numbers'; the data are 10 of 'numbers'"),
        ({"tokens": 4}, "was made with tokens=4, and the run has model.text_tokens=3; they must be equal"),
        ({"features": 16}, "was made with features=16, and the run has model.text_features=8; they must be equal"),
        ({"version": 2}, "is of version 2, and this deco_jax reads version 1; prepare into another folder"),
        ({"encoder": None, "tokens": "4"}, "states.json is damaged: tokens, encoder"),
        ({"bad": [True]}, "states.json is damaged: bad"),
        ({"records_a_file": 5}, r"states-00000.npy holds \(4, 3, 8\) uint16, not \(5, 3, 8\) uint16"),
        ({"wording": '["caption", "a photo of ", 3]'}, r'made with .* = \["caption", "a photo of ", 3\], and the run'),
        ({"computed": "bfloat16"}, "computed with model.dtype=bfloat16, and the run has float32; they must be equal"),
        ({"captions": "0" * 16}, "holds states of other captions of these images. Prepare into another folder"),
    ):
        config.text.stored = str(numbered(tmp_path, config, **change))
        if change.get("records_a_file") == 5:
            array_file("states", tmp_path, 2).touch()
        with pytest.raises(UsageError, match=message):
            open_states(config, Numbers())


def test_captions_that_were_rewritten_in_place_are_noticed(config, tmp_path, monkeypatch):
    """A folder keeps its identity when better captions are written into the same files."""
    config.text.stored = str(numbered(tmp_path, config))
    open_states(config, Numbers())
    monkeypatch.setattr(Numbers, "told", "the number")
    with pytest.raises(UsageError, match=f"text.stored={tmp_path} holds states of other captions"):
        open_states(config, Numbers())


def test_what_does_not_answer_is_no_other_caption(monkeypatch):
    def caption(self, index):
        raise TransientError("reading it still fails")

    monkeypatch.setattr(Numbers, "caption", caption)
    with pytest.raises(TransientError):
        captions_of(Numbers())


def test_damaged_or_incomplete(config, tmp_path):
    command = rf"deco prepare --config FILE --text --out {tmp_path}"
    for name, message in (("nowhere", "is no folder"), ("", "holds no states")):
        config.text.stored = str(tmp_path / name)
        with pytest.raises(UsageError, match=rf"{message}\. Made by: deco .* --text .*every step: text.stored=''"):
            open_states(config, Numbers())
    numbered(tmp_path, config)
    path = array_file("states", tmp_path, 1)
    whole = path.read_bytes()
    for content, message in (
        (whole[:-1], "bytes, not what its header says"),
        (b"", "cannot be read"),
        (whole.replace(b"<u2", b"<f2"), r"holds \(4, 3, 8\) float16, not \(4, 3, 8\) uint16"),
    ):
        path.write_bytes(content)
        with pytest.raises(UsageError, match=f"states-00001.npy .*{message}.* This makes it anew: {command}"):
            open_states(config, Numbers())
    path.unlink()
    with pytest.raises(UsageError, match=f"is incomplete: 1 of 3 files are missing. This goes on with them: {command}"):
        open_states(config, Numbers())
