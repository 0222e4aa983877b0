"""Are stored states those that the text encoder computes, does a cut-off start go on, and is no image looked at?"""

import itertools
import json
import pathlib

import ml_dtypes
import numpy as np
import pytest
from PIL import Image

from deco_jax import cli
from deco_jax.data.captions import CaptionFolder
from deco_jax.data.sources import open_source
from deco_jax.data.states import open_states
from deco_jax.data.stored import array_file
from deco_jax.encoders.text import load_run_encoder
from deco_jax.errors import TransientError, UsageError
from deco_jax.preparation import arrays
from deco_jax.preparation.text import prepare_text
from tests.encoders.test_text import WORDS, write_encoder
from tests.helpers import relative_error
from tests.preparation.running import write_config

pytest.importorskip("tokenizers")
RECORDS, A_FILE, TOKENS, WIDTH = 10, 4, 12, 32
CAPTIONS = ["a red circle", "a blue circle", "red", "a circle", "blue blue red " * 6]


def write_images(root, count=RECORDS):
    root.mkdir(exist_ok=True)
    for i in range(count):
        Image.new("RGB", (20, 24), (i, 0, 0)).save(root / f"{i:02}.png")
        (root / f"{i:02}.txt").write_text(CAPTIONS[i % len(CAPTIONS)])
    return root


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The recorded Qwen3 and ten captioned images; no test changes them."""
    root = tmp_path_factory.mktemp("made")
    write_encoder(root / "qwen")
    write_images(root / "images")
    return root


@pytest.fixture
def config(made, tiny_config):
    c = tiny_config
    c.model.update(kind="deco_text", text_tokens=TOKENS, text_features=WIDTH)
    c.data.update(source="captions", path=str(made / "images"), max_bad_records=2, max_bad_share=1.0, workers=0)
    c.text.encoder = str(made / "qwen")
    return c


@pytest.fixture(autouse=True)
def small_files(monkeypatch):
    """Ten records and the empty prompt are three files."""
    monkeypatch.setattr(arrays, "FILE_BYTES", A_FILE * TOKENS * WIDTH * 2 + 1)


def stored_numbers(folder):
    """All files' rows, (records + 1, L, E) fp32."""
    arrays = [np.load(array_file("states", folder, k), allow_pickle=False) for k in range(3)]
    return np.concatenate(arrays).view(ml_dtypes.bfloat16).astype(np.float32)


def files_of(folder):
    return {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.iterdir() if path.is_file()}


@pytest.mark.parametrize("dtype, tolerance", [("float32", 2**-8), ("bfloat16", 2**-5)])
def test_stored_states_are_those_the_encoder_computes(config, tmp_path, capsys, dtype, tolerance):
    """Prompt by prompt, padding and the empty prompt too. fp32 loses half of bfloat16's last bit of eight."""
    config.model.dtype = dtype
    prepare_text(config, str(tmp_path), batch_size=3)
    assert "States of 10 records, 12×32 bfloat16 each: 0.000 GB in 3 files; 3 are to be made" in capsys.readouterr().out
    stored, encoder = stored_numbers(tmp_path), load_run_encoder(config)
    prompts = [CAPTIONS[i % len(CAPTIONS)] for i in range(RECORDS)] + [""]
    expected = np.concatenate([np.asarray(encoder([prompt]), np.float32) for prompt in prompts])
    assert stored.shape == expected.shape == (RECORDS + 1, TOKENS, WIDTH)
    np.testing.assert_allclose(stored, expected, rtol=tolerance, atol=tolerance)
    assert relative_error(expected[1], expected[0]) > 0.1, "equal states would agree with anything"
    assert relative_error(expected[0, 5:], expected[2, 5:]) > 0.01, "padding does not depend on the prompt"
    if dtype == "float32":
        np.testing.assert_array_equal(stored, expected.astype(ml_dtypes.bfloat16).astype(np.float32))

    config.text.stored = str(tmp_path)
    states = open_states(config, open_source(config.data))
    assert states.digest == encoder.weights.digest
    for record in (0, 3, 4, 9):
        np.testing.assert_array_equal(states[record].astype(np.float32), stored[record])
    np.testing.assert_array_equal(states.nothing_LxE.astype(np.float32), stored[-1])


class Cut(Exception):
    """The preparation is killed."""


def test_a_second_start_and_parts_make_what_is_missing(config, tmp_path, monkeypatch):
    """Whoever makes a file, it is the same to the bit."""
    cut, parts, whole = tmp_path / "cut", tmp_path / "parts", tmp_path / "whole"
    read_ahead = arrays.read_ahead

    def reads_some(dataset, workers):
        yield from itertools.islice(read_ahead(dataset, workers), 2)
        raise Cut

    with monkeypatch.context() as patch:
        patch.setattr(arrays, "read_ahead", reads_some)
        with pytest.raises(Cut):
            prepare_text(config, str(cut), batch_size=8)
    before = files_of(cut)
    assert sorted(before) == ["states-00000.npy", "states.partial.json"]
    config.text.stored = str(cut)
    with pytest.raises(UsageError, match="is incomplete: 2 of 3 files are missing"):
        open_states(config, open_source(config.data))
    prepare_text(config, str(cut), batch_size=8)
    prepare_text(config, str(parts), batch_size=8, part="0/2")
    assert not (parts / "states.json").exists()
    prepare_text(config, str(parts), batch_size=8, part="1/2")
    prepare_text(config, str(whole), batch_size=8)
    assert files_of(cut)["states-00000.npy"] == before["states-00000.npy"], "a finished file was made again"
    straight = {name: data for name, (_, data) in files_of(whole).items()}
    for folder in (cut, parts):
        assert {name: data for name, (_, data) in files_of(folder).items()} == straight


def test_images_are_not_looked_at(config, tmp_path, monkeypatch):
    """Decoding a million would take longer than encoding their captions."""

    def load(self, index, offset=None):
        raise AssertionError("an image was read")

    with monkeypatch.context() as patch:
        patch.setattr(CaptionFolder, "load", load)
        prepare_text(config, str(tmp_path), batch_size=8)
    assert (tmp_path / "states.json").exists()


def test_unreadable_captions_have_no_states(config, tmp_path, caplog):
    config.data.path = str(write_images(tmp_path / "images"))
    out, source = tmp_path / "states", open_source(config.data)
    broken = [pathlib.Path(source.describe(record)).with_suffix(".txt") for record in (2, 9)]
    broken[0].write_bytes(b"\xff\xfe broken")
    broken[1].write_text("  \n")
    config.data.max_bad_records = 1
    with pytest.raises(UsageError, match=r"2 records cannot be read, the last .*09\.png; .*=1 allows fewer"):
        prepare_text(config, str(out), batch_size=8)
    config.data.max_bad_records = 2
    with caplog.at_level("WARNING", logger="absl"):
        prepare_text(config, str(out), batch_size=8)
    assert "02.png (UnicodeDecodeError" in caplog.text and "09.png (ValueError: its caption is empty)" in caplog.text
    assert json.loads((out / "states.json").read_text())["bad"] == [2, 9]
    stored = stored_numbers(out)
    assert [bool(np.isnan(row).all()) for row in stored] == [record in (2, 9) for record in range(RECORDS + 1)]
    assert np.isfinite(np.delete(stored, [2, 9], axis=0)).all()
    config.text.stored = str(out)
    with pytest.raises(ValueError, match="no stored states"):
        open_states(config, source)[9]


def test_states_of_something_else_are_left_alone(config, made, tmp_path):
    """Another data set, encoder, length or wording under the same --out: named, and nothing there is touched."""
    out = tmp_path / "states"
    prepare_text(config, str(out), batch_size=8)
    before = files_of(out)
    other = write_images(tmp_path / "more", RECORDS + 1)
    rewritten = write_images(tmp_path / "rewritten")
    for file in rewritten.glob("*.txt"):
        file.write_text("a blue circle")
    write_encoder(tmp_path / "qwen", words=WORDS[::-1])
    for field, value, message in (
        ("data.path", str(other), "identity: captions .* there.*records: 10 there, 11 here"),
        ("data.path", str(rewritten), r"captions: \w+ there, \w+ here"),
        ("data.caption_prefix", "a photo of ", r'wording: \["caption", "", 0\] there, \["caption", "a photo of ", 0\]'),
        ("text.encoder", str(tmp_path / "qwen"), r"encoder: \w+-\w+ there, \w+-\w+ here"),
        ("model.text_tokens", 8, "tokens: 12 there, 8 here"),
    ):
        changed, (part, name) = config.copy_and_resolve_references(), field.split(".")
        changed[part][name] = value
        with pytest.raises(UsageError, match=f"holds states of something else: .*{message}"):
            prepare_text(changed, str(out), batch_size=8)
    assert files_of(out) == before


@pytest.mark.parametrize(
    "change, message",
    [
        ({"model.kind": "deco"}, "model.kind='deco' learns from class labels; --text is for 'deco_text'"),
        ({"data.source": "digits"}, "data.source='digits' has no captions of which states could be prepared"),
        ({"model.text_features": 48}, "has states of 32 channels, and model.text_features=48; they must be equal"),
        ({"text.encoder": "/nowhere"}, "text.encoder='/nowhere' is no file or folder"),
    ],
)
def test_what_does_not_fit(config, tmp_path, change, message):
    for field, value in change.items():
        part, name = field.split(".")
        config[part][name] = value
    with pytest.raises(UsageError, match=message):
        prepare_text(config, str(tmp_path / "states"), batch_size=8)
    assert not list(tmp_path.glob("states/states*"))


def test_captions_that_do_not_answer_are_to_be_tried_again(config, tmp_path, monkeypatch):
    """Not an unreadable record, which would stay one for good."""
    work_of = arrays.Work.__init__

    def caption(self, index):
        raise TransientError("reading it still fails")

    def then_it_fails(self, *arguments):
        work_of(self, *arguments)
        monkeypatch.setattr(CaptionFolder, "caption", caption)

    monkeypatch.setattr(arrays.Work, "__init__", then_it_fails)
    config.data.path = str(write_images(tmp_path / "images"))
    with pytest.raises(TransientError, match="reading it still fails"):
        prepare_text(config, str(tmp_path / "states"), 8)
    assert list(files_of(tmp_path / "states")) == ["states.partial.json"]


def test_the_command(config, tmp_path, capsys):
    file, out = write_config(tmp_path / "run.py", config), tmp_path / "states"
    command = ["prepare", f"--config={file}", "--text", f"--out={out}", "--batch-size=8"]
    cli.main(command)
    printed = capsys.readouterr().out
    assert f"{out} is done. To train with it: --config.text.stored={out}" in printed
    before = files_of(out)
    cli.main(command)
    assert f"{out} is done: it holds the states of all 10 records." in capsys.readouterr().out
    assert files_of(out) == before
