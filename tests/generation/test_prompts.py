"""Images of prompts on the command line: as `sample` draws them, in the layouts of benchmarks, and what is refused."""

import json
import re

import jax
import numpy as np
import pytest
from PIL import Image

import deco_jax
from deco_jax import cli
from deco_jax.conditions import ClassLabels, Text
from deco_jax.errors import UsageError
from deco_jax.generation.prompts import choose_prompts
from deco_jax.generation.requests import Asked, read_requests
from deco_jax.generation.shards import generate_samples
from tests.encoders.test_text import write_encoder
from tests.generation.texts import GENEVAL, write_dpg, write_geneval, write_text_network
from tests.helpers import relative_error

pytest.importorskip("tokenizers")
SMALL = {"image_size": "16", "steps": 2, "batch_size": 8, "guidance": 2.0}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A network, whose file says nothing of sampling, and its encoder; no test changes them."""
    root = tmp_path_factory.mktemp("made")
    return write_text_network(root / "text.safetensors"), write_encoder(root / "qwen")


def draw(made, out, **changes):
    source, encoder = made
    return generate_samples(source, str(out), text_encoder=encoder, dtype="float32", **SMALL | changes)


def drawn_by_sample(made, prompts, number, negative=""):
    """Images 0 to number − 1, of the prompts in turn, as uint8."""
    model, params = deco_jax.load_pretrained(made[0], dtype="float32")
    encoder = deco_jax.load_text_encoder(made[1], tokens=12, dtype="float32")
    shown = [prompts[i % len(prompts)] for i in range(number)]
    options = {
        "image_size": 16,
        "steps": 2,
        "guidance": 2.0,
        "solver": "adams2",
        "shift": 3.0,
        "encoder": encoder,
        "negative": [negative] * number,
    }
    images = deco_jax.sample(model, params, shown, jax.random.key(0), **options)
    return np.clip((np.asarray(images) + 1) * 127.5 + 0.5, 0, 255).astype(np.uint8)


def pixels(path):
    return np.asarray(Image.open(path)).astype(int)


@pytest.mark.slow
def test_geneval_gets_the_folders_that_its_scorer_reads(made, tmp_path, capsys):
    """Checked with what the scorer does: digits of folders, one JSON object each, NUMBER.png in samples."""
    prompts = write_geneval(tmp_path / "geneval.jsonl")
    out = tmp_path / "out"
    path = draw(made, out, prompts=prompts, per_prompt=2)
    assert "2 of each of 3 prompts" in capsys.readouterr().out
    folders = sorted(folder.name for folder in out.iterdir() if folder.is_dir() and folder.name.isdigit())
    assert folders == ["00000", "00001", "00002"]
    wanted = drawn_by_sample(made, [line["prompt"] for line in GENEVAL for _ in range(2)], 6)
    for k, folder in enumerate(folders):
        with (out / folder / "metadata.jsonl").open() as file:
            assert json.load(file) == GENEVAL[k]
        names = sorted(file.name for file in (out / folder / "samples").iterdir())
        assert names == ["0000.png", "0001.png"] and all(re.match(r"\d+\.png", name) for name in names)
        for sample, name in enumerate(names):
            ours = pixels(out / folder / "samples" / name)
            assert np.abs(ours - wanted[2 * k + sample]).max() <= 1
    with path.open("rb") as file, np.load(file) as arrays:
        assert arrays["arr_1"].tolist() == [0, 0, 1, 1, 2, 2]
    lines = (out / "prompts.jsonl").read_text().splitlines()
    assert [json.loads(line)["prompt"] for line in lines] == [line["prompt"] for line in GENEVAL]
    # What goes missing is made again, and nothing is drawn; four of each are what nobody asks otherwise for.
    (out / "00001" / "samples" / "0000.png").unlink()
    (out / "00002" / "samples" / "0000.png").unlink()
    (out / "00002" / "metadata.jsonl").unlink()
    draw(made, out, prompts=prompts, per_prompt=2)
    assert "Writing 2 pictures" in capsys.readouterr().out and (out / "00002" / "metadata.jsonl").exists()
    # The same prompts with other metadata: what the scorer looks for has been corrected.
    corrected = write_geneval(tmp_path / "geneval.jsonl", [*GENEVAL[:2], GENEVAL[2] | {"tag": "colors"}])
    draw(made, out, prompts=corrected, per_prompt=2)
    assert json.loads((out / "00002" / "metadata.jsonl").read_text())["tag"] == "colors"
    draw(made, tmp_path / "usual", prompts=prompts, steps=1)
    assert len(list(tmp_path.glob("usual/*/samples/*.png"))) == 12


def test_dpg_gets_a_picture_of_four_per_prompt(made, tmp_path):
    """The scorer cuts it into (0, 0), (side, 0), (0, side), (side, side) and takes its name for the prompt's."""
    out = tmp_path / "out"
    path = draw(made, out, prompts=write_dpg(tmp_path / "prompts"))
    assert sorted(file.name for file in (out / "dpg").iterdir()) == [
        "256.png",
        "COCOval2014_1.png",
        "partiprompts10.png",
    ]
    with path.open("rb") as file, np.load(file) as arrays:
        images = arrays["arr_0"].reshape(3, 4, 16, 16, 3)
    for k, name in enumerate(("256", "COCOval2014_1", "partiprompts10")):
        picture = pixels(out / "dpg" / f"{name}.png")
        for part, (left, top) in enumerate(((0, 0), (16, 0), (0, 16), (16, 16))):
            np.testing.assert_array_equal(picture[top : top + 16, left : left + 16], images[k, part])
    assert relative_error(images[0].astype(float), images[2].astype(float)) > 0.01, "another prompt, another image"


@pytest.mark.slow
def test_prompts_and_what_guidance_leads_away_from(made, tmp_path, capsys):
    """`deco sample`: four of each prompt unless asked otherwise, a row of the grid each, a film, and more later."""
    argv = ["sample", f"--checkpoint={made[0]}", f"--text-encoder={made[1]}", f"--out={tmp_path / 'out'}"]
    argv += ["--image-size=16", "--steps=2", "--guidance=2", "--batch-size=8", "--dtype=float32"]
    prompts = ["--prompt=a red circle", "--prompt=a blue circle"]
    cli.main([*argv, *prompts, "--negative=a circle", "--trajectory=1"])
    wanted = drawn_by_sample(made, ["a red circle", "a blue circle"], 8, "a circle")
    for i in range(8):
        assert np.abs(pixels(tmp_path / "out" / f"{i:05d}.png") - wanted[i]).max() <= 1
    with Image.open(tmp_path / "out" / "grid.png") as grid, Image.open(tmp_path / "out" / "trajectory.gif") as film:
        assert grid.size == (4 * 17 - 1, 2 * 17 - 1) and film.n_frames == 3
    cli.main([*argv, *prompts, "--negative=a circle", "--num=10"])
    assert "8 are there already" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        cli.main([*argv, *prompts])
    assert "negative: a circle there, None here" in capsys.readouterr().err
    long = "a circle " * 40
    cli.main([*argv, f"--prompt={long}", "--num=1", "--overwrite"])
    assert "1 prompt(s) have more than 12 tokens" in capsys.readouterr().out


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.txt", "a cat\n\na\x07 dog\n", r"--prompts=.*a\.txt, line 3: .*control character '\\x07'"),
        ("a.txt", "a\x0bcat\n", r"line 1: .*control character '\\x0b'"),
        ("a.jsonl", "[" * 100_000, "line 1: expected is JSON"),
        ("a.txt", "x" * 10_001, "line 1: .*has 10,001 characters; at most 10,000"),
        ("a.txt", " \n\n", "holds no prompt; expected is a .txt"),
        ("a.txt", b"\xff\xfe", "is no text in UTF-8"),
        ("a.jsonl", '{"prompt": "a"}\n{"text": "b"}\n', r'line 2: expected is JSON, \{"prompt": TEXT'),
        ("a.jsonl", '{"prompt": ["a"]}\n', r"line 1: a prompt is text; \['a'\] is none"),
        ("a.jsonl", '{"prompt": " "}\n', "line 1: the prompt is empty"),
        ("a.csv", "a cat", "is none of the files that are read"),
    ],
)
def test_bad_prompts_are_named_with_their_place(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UsageError, match=message):
        choose_prompts((), str(tmp_path / name))


@pytest.mark.parametrize(
    "asked, message",
    [
        (Asked(), "needs --prompt=TEXT, or --prompts=FILE; one of them"),
        (Asked(prompt=("a",), prompts="b.txt"), "one of them"),
        (Asked(prompt=("",)), "--prompt: the prompt is empty"),
        (Asked(prompt=("a",), labels="1"), "--labels is for networks of classes; this one is told text"),
        (Asked(prompt=("a",), per_class=1), "--per-class is for networks of classes"),
        (Asked(prompt=("a",), per_prompt=0), "--per-prompt=0 must be at least 1"),
        (Asked(prompt=("a",), per_prompt=2, num=3), "--per-prompt=2 contradicts --num=3"),
        (Asked(prompts=""), "--prompts is empty"),
        (Asked(prompt=("a",), negative="b\x00"), "--negative: .*control character"),
        (Asked(prompts="/nowhere/a.txt"), "/nowhere/a.txt cannot be read"),
    ],
)
def test_flags_that_do_not_fit_a_network_of_text(asked, message):
    with pytest.raises(UsageError, match=message):
        read_requests(Text(12, 32), (), asked)


def test_flags_of_text_do_not_fit_a_network_of_classes():
    for asked in (Asked(prompt=("a",)), Asked(prompts="a.txt"), Asked(per_prompt=2), Asked(text_encoder="x")):
        with pytest.raises(UsageError, match="is for networks that are told text; this one knows classes: --labels"):
            read_requests(ClassLabels(10), (), asked)


def test_unknown_flags_are_refused(made, capsys):
    """Also of commands that run as several processes."""
    with pytest.raises(SystemExit):
        cli.main(["generate", made[0], "--out=anywhere", "--prompt=a", "--per-promt=4"])
    assert "unrecognized arguments: --per-promt=4" in capsys.readouterr().err


def test_layouts_that_do_not_fit_and_encoders_that_are_others(made, tmp_path, capsys):
    for changes, message in (
        ({"layout": "geneval", "prompt": ["a"]}, "takes GenEval's prompts, JSON lines with a tag; prompt 1 has none"),
        ({"layout": "dpg", "prompt": ["a"]}, "takes DPG-Bench's prompts, a folder of .txt"),
        ({"layout": "tif", "prompt": ["a"]}, "--layout=tif is not known; allowed: npz, png, geneval, dpg"),
        ({"layout": "geneval", "png": True, "prompt": ["a"]}, "--png contradicts --layout=geneval"),
    ):
        with pytest.raises(UsageError, match=message):
            draw(made, tmp_path / "none", **changes)
    prompts = write_dpg(tmp_path / "prompts")
    for k, (changes, message) in enumerate(
        (
            ({"per_prompt": 3}, "takes 4 images of a prompt, or 1; --per-prompt=3"),
            ({"num": 5}, "as many images of each prompt"),
            ({"image_size": "16x24"}, "takes square images, not 16×24"),
        )
    ):
        with pytest.raises(UsageError, match=message):
            draw(made, tmp_path / "none", prompts=prompts, layout="dpg", **changes)
        draw(made, tmp_path / f"plain{k}", prompts=prompts, steps=1, **changes)  # nobody has asked for that layout
        assert "look like prompts for --layout=dpg, which says why" in capsys.readouterr().out
        assert sorted(path.name for path in (tmp_path / f"plain{k}").iterdir() if path.name != ".lease") == [
            "generation.json",
            "prompts.jsonl",
            "samples.npz",
        ]
    assert not (tmp_path / "none").exists() or not list((tmp_path / "none").glob("*.npy"))
    draw(made, tmp_path / "out", prompt=["a red circle"], layout="png", steps=1)
    other = write_encoder(tmp_path / "other", words=["red", "a", "blue", "circle", "<|endoftext|>", "[UNK]"])
    for encoder in (made[1], f"{made[1]}/../qwen"):  # the same, also by another name
        draw((made[0], encoder), tmp_path / "out", prompt=["a red circle"], layout="png", steps=1)
    with pytest.raises(UsageError, match="text_encoder_digest: .*there, .* here"):  # all is drawn, of another's states
        draw((made[0], other), tmp_path / "out", prompt=["a red circle"], layout="png", steps=1)
    (tmp_path / "out" / "samples.npz").unlink()
    with pytest.raises(UsageError, match="text_encoder_digest: .*there, .* here"):
        draw((made[0], other), tmp_path / "out", prompt=["a red circle"], layout="png", steps=1)
