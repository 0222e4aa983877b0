"""Made-up workdirs: what runs and commands leave behind, without a run."""

import io
import json

import numpy as np
from PIL import Image

from deco_jax.config import default_config


def make_workdir(folder, steps=100, every=5, grids=(20, 60, 100), shade=0, **settings):
    """A run of `steps` steps. Step s has a grey grid of value s + shade, at most 255: a test sees which is shown."""
    folder.mkdir(parents=True)
    config = default_config()
    config.update_from_flattened_dict({"train.steps": steps, **{k.replace("__", "."): v for k, v in settings.items()}})
    (folder / "config.json").write_text(config.to_json_best_effort())
    lines = [
        {"step": s, "time": 1.7e9 + s, "loss": 3 - s / 100, "loss_flow": 2.0, "loss_frequency": 1 - s / 100}
        | {"gradient_norm": 1.0, "learning_rate": 1e-4, "images_per_second": 250.0, "data_wait_seconds": 0.001}
        for s in range(every, steps + 1, every)
    ]
    write_lines(folder / "metrics.jsonl", lines)
    seconds = {"step": 30.0, "compile": 10.0, "init": 5.0, "lost to restarts": 5.0}
    write_lines(
        folder / "goodput.jsonl",
        [{"attempt": k, "step": 50 * k, "time": 1.7e9, "ended": k == 2, "seconds": seconds} for k in (1, 2)],
    )
    (folder / "samples").mkdir()
    for step in grids:
        (folder / "samples" / f"step_{step:08d}.png").write_bytes(
            png(np.full((28, 56, 3), min(step + shade, 255), np.uint8))
        )
    return folder


def add_results(folder):
    """What `deco evaluate`, `--sweep`, `deco spectra` and the evaluation in training write."""
    evaluation = [{"step": s, "time": 1.0, "metrics": {"fd_efficientnet": 300.0 - s}, "images": 64} for s in (50, 100)]
    write_lines(folder / "evaluation.jsonl", evaluation)
    write_result(folder / "evaluation/metrics.json", evaluated(fid=12.5))
    points = [({"guidance": g, "steps": 25}, {"fid": (g - 3) ** 2 + 10, "kid": 0.1}) for g in (1.0, 2.0, 3.0, 4.0)]
    found = []
    for settings, metrics in points:
        name = f"guidance={settings['guidance']},steps=25"
        write_result(folder / "sweep" / name / "metrics.json", evaluated(**metrics))
        found.append({"settings": settings, "metrics": metrics, "folder": name})
    write_result(folder / "sweep/sweep.json", {"points": found, "best": 2, "by": "fid"})
    curve = {"normalised_log": np.linspace(1, 0.125, 64).tolist()}
    write_result(folder / "spectra/spectra.json", {"networks": {"ours": {"transformer": curve, "velocity": curve}}})
    return folder


def evaluated(**metrics):
    """A metrics.json."""
    about = {"images": 1000, "warnings": ["1,000 images are few."], "line": "to compare", "device": "TPU v6e"}
    return about | {"metrics": metrics, "settings": {"guidance": 3.0}, "reference": {"path": "ref.npz", "hash": "00"}}


def write_result(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def write_lines(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def png(image_HxWx3):
    out = io.BytesIO()
    Image.fromarray(image_HxWx3).save(out, "PNG")
    return out.getvalue()
