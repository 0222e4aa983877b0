"""Two runs that have just begun, of classes and of text, for the page to open."""

import pytest
from PIL import Image

from deco_jax.training.loop import train
from tests.encoders.test_text import write_encoder
from tests.helpers import new_tiny_config

COLOURS = {"red": (220, 30, 30), "blue": (30, 30, 220)}


@pytest.fixture(scope="session")
def runs(tmp_path_factory):
    """{"class": workdir, "text": workdir}, each with one step; no test changes them."""
    root = tmp_path_factory.mktemp("runs")
    (root / "images").mkdir()
    for i in range(8):
        name = list(COLOURS)[i % 2]
        Image.new("RGB", (16, 16), COLOURS[name]).save(root / "images" / f"{i}.png")
        (root / "images" / f"{i}.txt").write_text(f"a {name} circle\n")
    write_encoder(root / "qwen")
    classes = new_tiny_config()
    classes.sample.update(guidance=2.0, guidance_interval=(0.1, 1.0), shift=3.0, steps=6)
    text = new_tiny_config()
    text.model.update(kind="deco_text", patch_size=8, text_tokens=12, text_features=32, text_depth=1)
    text.data.update(source="captions", path=str(root / "images"), image_size=16, batch_size=8)
    text.text.encoder = str(root / "qwen")
    text.sample.update(guidance=4.0, solver="adams2", shift=3.0, steps=5, prompts=("a red circle",))
    for name, config in (("class", classes), ("text", text)):
        config.train.update(steps=1, save_every=1)
        config.optimizer.lr, config.ema.decay = 0.1, 0.0  # one step that makes more of noise than noise
        train(config, str(root / name))
    return {"class": str(root / "class"), "text": str(root / "text")}
