"""Spectra: every energy in its bin, counted once; what is written, and what is refused."""

import csv
import itertools
import json
import math
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.fft
from PIL import Image
from safetensors.numpy import save_file

from deco_jax.cli import main
from deco_jax.conditions import ClassLabels
from deco_jax.diffusion.flow import shift_time
from deco_jax.errors import UsageError
from deco_jax.evaluation import spectra as module
from deco_jax.evaluation.spectra import Spectra, measure_spectra, write_spectra
from deco_jax.evaluation.spectra_report import ZIGZAG_64x2, half_bin
from deco_jax.porting.convert import convert
from deco_jax.sampling.sample import image_noise
from deco_jax.sampling.settings import Sampling
from tests.helpers import Golden, relative_error

LIGHTNING = str(pathlib.Path(__file__).parents[1] / "golden" / "lightning_c2i.ckpt")

# ITU-T T.81, figure A.6: the place of each coefficient in the zig-zag sequence; rows are vertical frequencies.
JPEG = """
 0  1  5  6 14 15 27 28
 2  4  7 13 16 26 29 42
 3  8 12 17 25 30 41 43
 9 11 18 24 31 40 44 53
10 19 23 32 39 45 52 54
20 22 33 38 46 51 55 60
21 34 37 47 50 56 59 61
35 36 48 49 57 58 62 63"""
JPEG_8x8 = np.array(JPEG.split(), int).reshape(8, 8)


def test_the_order_is_jpegs():
    assert [JPEG_8x8[u, v] for u, v in ZIGZAG_64x2] == list(range(64))


def wave(u, v, side):
    """The DCT's basis pattern (u, v) in every 8×8 block of a square: (side, side)."""
    coefficients = np.zeros((8, 8))
    coefficients[u, v] = 1
    return np.tile(scipy.fft.idctn(coefficients, norm="ortho"), (side // 8, side // 8))


class Waves:
    """A "network" whose tokens and velocity are one pattern each, larger for larger labels and times."""

    patch_size, depth, condition = 2, 7, ClassLabels(3)

    def apply(self, variables, x, t, labels, hidden_layer):
        assert hidden_layer == self.depth, "the tokens after the last block are wanted"
        size = (1 + labels + t)[:, None, None, None]
        tokens = size * wave(6, 1, x.shape[1] // 2)[None, :, :, None] * jnp.array([1.0, 2, 0, -1])
        v = size * variables["params"] * wave(0, 5, x.shape[1])[None, :, :, None] * jnp.ones(3)
        return v.astype(jnp.float32), tokens.reshape(len(x), -1, 4).astype(jnp.bfloat16)


@pytest.mark.parametrize("batch_size", [1, 9])
def test_a_single_wave_fills_its_bin_alone(batch_size):
    """Images 0, 1, …, 10 show the labels 0, 1, 2, 0, …

    Eight devices: two batches of 8 or one of 16, and five images too many either way, which do not count.
    """
    measured = measure_spectra(
        Waves(), jnp.float32(0.5), images=11, seed=0, image_size=32, batch_size=batch_size, steps=4, shift=3.0
    )
    times = shift_time(np.arange(4) / 4, 3.0)
    square = np.mean([(1 + i % 3 + t) ** 2 for i in range(11) for t in times])
    for energy_64, s_64, (u, v), value, tolerance in (
        (measured.transformer_energy_64, measured.transformer, (6, 1), 6 * square, 1e-2),  # the tokens are bfloat16
        (measured.velocity_energy_64, measured.velocity, (0, 5), 3 * 0.25 * square, 1e-5),
    ):
        k = JPEG_8x8[u, v]
        assert energy_64.dtype == np.float64 and energy_64.shape == (64,)
        assert abs(energy_64[k] / value - 1) < tolerance
        assert np.delete(energy_64, k).max() < tolerance * value
        assert s_64[k] == 1 and s_64.argmax() == k


def by_hand(model, params, images, seed, image_size, steps, shift):
    """The same energies step by step, block by block, with SciPy in fp64: tokens' and velocity's, (64,) each."""
    apply = jax.jit(lambda x, t, y: model.apply({"params": params}, x, t, y, hidden_layer=model.depth))
    x = np.asarray(image_noise(jax.random.key(seed), jnp.arange(images), (image_size, image_size, 3)))
    labels = np.arange(images) % model.num_classes
    times = shift_time(np.arange(steps + 1) / steps, shift)
    side = image_size // model.patch_size
    energies = np.zeros((2, 64))
    for t, until in itertools.pairwise(times):
        v, tokens = map(np.asarray, apply(x, np.full(images, t, np.float32), labels))
        for energy_64, field in zip(energies, (tokens.reshape(images, side, side, -1), v), strict=True):
            blocks = math.ceil(field.shape[1] / 8)
            pad = 8 * blocks - field.shape[1]
            field = np.pad(field.astype(np.float64), ((0, 0), (0, pad), (0, pad), (0, 0)), mode="reflect")
            for i, j in np.ndindex(blocks, blocks):
                block = field[:, 8 * i : 8 * i + 8, 8 * j : 8 * j + 8]
                squares_8x8 = (scipy.fft.dctn(block, axes=(1, 2), norm="ortho") ** 2).sum(axis=(0, 3))
                for u, row in enumerate(JPEG_8x8):
                    for v_, k in enumerate(row):
                        energy_64[k] += squares_8x8[u, v_] / (images * steps * blocks**2)
        x = x + np.float32(until - t) * v
    return energies


def test_a_network_measures_as_by_hand():
    """72² in patches of 8: nine tokens per side, so two blocks per side, of which the second is mostly reflected."""
    g = Golden("deco_c2i")
    model, params = g.model(), g.params()
    settings = {"images": 11, "seed": 3, "image_size": 72, "steps": 3, "shift": 2.0}
    theirs = by_hand(model, params, **settings)
    assert (theirs > 0).all()
    measured = measure_spectra(model, params, batch_size=8, **settings)
    assert relative_error(measured.transformer_energy_64, theirs[0]) < 1e-5
    assert relative_error(measured.velocity_energy_64, theirs[1]) < 1e-5
    log = np.log(1 + theirs[0])
    np.testing.assert_allclose(measured.transformer, log / log.max(), rtol=1e-5)


def test_images_that_are_wider_than_high():
    """Energies are per block, whatever the size; height is not width."""
    settings = {"images": 3, "seed": 0, "batch_size": 8, "steps": 1}
    g = Golden("deco_c2i")
    wide = measure_spectra(g.model(), g.params(), image_size=(72, 136), **settings)
    high = measure_spectra(g.model(), g.params(), image_size=(136, 72), **settings)
    square = measure_spectra(g.model(), g.params(), image_size=(72, 72), **settings)
    assert wide.image_size == (72, 136) and square.image_size == 72
    assert 0.5 < wide.velocity_energy_64.sum() / square.velocity_energy_64.sum() < 2, "per block, whatever the size"
    assert relative_error(wide.velocity_energy_64, high.velocity_energy_64) > 1e-4


def test_a_hundred_times_as_many_steps_need_hardly_more_memory():
    """A step leaves its energies, 2 × 64 numbers per image; its tokens and velocities are not kept."""

    def temporaries(steps):
        inputs = jnp.float32(1), jnp.zeros((2, 64, 64, 3)), jnp.zeros(2, jnp.int32)
        program = module._compiled(Waves(), Sampling(steps)).lower(*inputs).compile()
        return program.memory_analysis().temp_size_in_bytes

    energies, velocities = 2 * 2 * 64 * 4, 2 * 64 * 64 * 3 * 4
    assert temporaries(200) <= temporaries(2) + 198 * energies + 2**13 < temporaries(2) + 198 * velocities / 20


def test_a_network_that_diverges_is_an_error():
    with pytest.raises(UsageError, match="With steps=1 the network's output is not finite"):
        measure_spectra(Waves(), jnp.float32(np.nan), images=1, seed=0, image_size=32, batch_size=1, steps=1)


def falling(last):
    return Spectra(np.expm1(np.linspace(1, last, 64)), np.expm1(np.linspace(1, 0.3, 64)), 4, 0, 32, 5, 1.0)


def test_where_a_curve_falls():
    """Below half for good, not for the first time."""
    assert half_bin(np.linspace(1, 0, 64)) == 32
    assert half_bin(np.array([1, 0.4, 0.6, 0.4, 0.3])) == 3
    assert half_bin(np.linspace(1, 0.5, 64)) is None
    assert half_bin(np.zeros(64)) == 0, "a fresh network's velocity is 0"


def test_what_is_written_is_what_was_measured(tmp_path):
    pytest.importorskip("matplotlib", reason="needs the extra `eval`")
    spectra = {"_a, $b$": falling(0.125), "b": falling(0.75)}
    text = write_spectra(tmp_path / "new", spectra)
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == ["spectra.csv", "spectra.json", "spectra.png"]
    assert "_a, $b$  0.125 at the last bin, below half from bin 37 on" in text
    assert "b        0.750 at the last bin, not below half there" in text
    assert "0.13 in DeCo and to 0.385 in the baseline; both velocities to 0.295" in text

    rows = list(csv.DictReader((tmp_path / "new" / "spectra.csv").open(newline="")))
    content = json.loads((tmp_path / "new" / "spectra.json").read_text())
    assert [JPEG_8x8[int(row["u"]), int(row["v"])] for row in rows] == [int(row["bin"]) for row in rows]
    assert content["zigzag"] == ZIGZAG_64x2.tolist() and list(content["networks"]) == list(spectra)
    for name, measured in spectra.items():
        entry = content["networks"][name]
        assert (entry["images"], entry["steps"], entry["shift"], entry["image_size"]) == (4, 5, 1.0, 32)
        for part in ("transformer", "velocity"):
            energy_64, s_64 = getattr(measured, f"{part}_energy_64"), getattr(measured, part)
            assert [float(row[f"{name} {part} E"]) for row in rows] == energy_64.tolist() == entry[part]["energy"]
            assert [float(row[f"{name} {part} S"]) for row in rows] == s_64.tolist() == entry[part]["normalised_log"]
            assert entry[part]["last_bin"] == s_64[-1] and entry[part]["half_bin"] == half_bin(s_64)
    picture = np.asarray(Image.open(tmp_path / "new" / "spectra.png").convert("RGB")).astype(int)
    colourful = np.ptp(picture, axis=2) > 60
    assert picture.shape[1] > 2 * picture.shape[0] and colourful.mean() > 2e-3, "no lines"


@pytest.fixture
def baseline(tmp_path):
    """The recorded baseline as a file of its own."""
    (tmp_path / "other").mkdir()
    path = tmp_path / "other" / "run"
    save_file(Golden("baseline_dit").group("param:"), path.with_suffix(".safetensors"), {"prediction": "velocity"})
    return str(path.with_suffix(".safetensors"))


def test_the_command(tmp_path, capsys, baseline):
    pytest.importorskip("matplotlib", reason="needs the extra `eval`")
    run, out = str(tmp_path / "run"), tmp_path / "out"
    convert(LIGHTNING, run, image_size=40)
    arguments = ["spectra", "--checkpoint", run, "--against", baseline, "--out", str(out), "--num", "3", "--steps", "2"]
    main([*arguments, "--image-size", "40"])
    text = capsys.readouterr().out
    assert "run: 3 images of 40×40 pixels, 2 steps, shift 1" in text and "run.safetensors  0." in text
    content = json.loads((out / "spectra.json").read_text())["networks"]
    assert content["run"]["origin"] == f"{run}, ema weights, in bfloat16"
    assert 0 < content["run"]["transformer"]["last_bin"] < 1 and content["run.safetensors"]["velocity"]["last_bin"] > 0

    before = {p.name: p.read_bytes() for p in out.iterdir()}
    with pytest.raises(SystemExit):
        main(arguments)
    assert "already holds spectra; choose another folder or pass --overwrite" in capsys.readouterr().err
    assert before == {p.name: p.read_bytes() for p in out.iterdir()}
    main(["spectra", "--checkpoint", run, "--out", str(out), "--num", "2", "--steps", "2", "--overwrite"])
    assert "2 images of 40×40 pixels, 2 steps" in capsys.readouterr().out, "the image size is the run's own"
    assert list(json.loads((out / "spectra.json").read_text())["networks"]) == ["run"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--num", "0"], "--num=0 must be at least 1"),
        (["--batch-size", "-1"], "--batch-size=-1 must be at least 1"),
        (["--seed", "-1"], "--seed=-1 must be from 0"),
        (["--steps", "0"], "steps=0 must be at least 1"),
        (["--shift", "nan"], "shift=nan must be positive"),
        (["--image-size", "41"], "image_size=41 must be a positive multiple of the network's patch size, 4"),
        (
            ["--image-size", "16"],
            "4×4 tokens, too few for an 8×8 block; the smallest image_size that works is 20",
        ),
        (["--against", "none"], "none does not exist"),
        (["--against", LIGHTNING], "lightning_c2i.ckpt is given twice"),
        (["--out", __file__], "test_spectra.py is no folder"),
        (["--out", f"{__file__}/out"], "test_spectra.py/out/.writable cannot be written: [Errno 20] Not a directory"),
    ],
)
def test_mistakes_are_one_line(tmp_path, capsys, monkeypatch, arguments, message):
    pytest.importorskip("matplotlib", reason="needs the extra `eval`")
    monkeypatch.setattr(module, "measure_spectra", lambda *_, **__: pytest.fail("was sampled"))
    with pytest.raises(SystemExit) as caught:
        main(["spectra", "--checkpoint", LIGHTNING, "--image-size=40", "--out", str(tmp_path / "out"), *arguments])
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert caught.value.code == 2 and line.startswith("deco: error: ") and message in line
    assert not (tmp_path / "out").exists()


def test_without_matplotlib_nothing_is_sampled(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(module, "measure_spectra", lambda *_, **__: pytest.fail("was sampled"))
    with pytest.raises(SystemExit):
        main(["spectra", "--checkpoint", LIGHTNING, "--out", str(tmp_path / "out")])
    assert "needs matplotlib: pip install -e '.[eval]' in the repo" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_names_are_as_short_as_they_can_be():
    assert module._names(["runs/deco", "runs/baseline/"]) == ["deco", "baseline"]
    assert module._names(["a/checkpoints/10", "b/checkpoints/10"]) == ["a/checkpoints/10", "b/checkpoints/10"]
