"""How are weights exported? As a safetensors file, or as a Hugging Face folder with config.json and a model card."""

import contextlib
import dataclasses
import json
import os
import pathlib
from typing import Any

from ml_collections import ConfigDict
from safetensors.numpy import save_file

from deco_jax.checkpoints import store
from deco_jax.config import FIELDS, save_config
from deco_jax.errors import UsageError
from deco_jax.export.diffusers_folder import diffusers_files
from deco_jax.models.build import network_fields
from deco_jax.porting.bundle import Bundle
from deco_jax.sampling.settings import Sampling
from deco_jax.storage import resolved
from deco_jax.version import __version__
from deco_jax.weights import translate

# Of the kinds that PyTorch's DeCo (torch_model.py) computes, fields that it has no arguments for, as it has them.
IN_PYTORCH = {
    "deco": {"prediction": "velocity", "decoder_patch": 1, "decoder_interaction": "adaln"},
    "deco_text": {"prediction": "velocity"},
}
NAMES = {"deco": "DeCo", "deco_text": "Text-to-image DeCo", "baseline": "Baseline DiT", "pixnerd": "PixNerd"}


def check_known_to_pytorch(bundle: Bundle) -> None:
    """Raises UsageError for a DeCo with another decoder than PyTorch's, whose tensors have no names there."""
    model, fields = bundle.config.model, ("decoder_patch", "decoder_interaction")
    theirs = IN_PYTORCH.get(model.kind, {})
    if ours := [f"model.{field}={model[field]}" for field in fields if model[field] != theirs.get(field, model[field])]:
        raise UsageError(
            f"{bundle.origin} has {' and '.join(ours)}; only a checkpoint of ours holds such a network "
            "(--format checkpoint), as PyTorch's DeCo has decoder_patch=1 and decoder_interaction=adaln."
        )


def write_safetensors(bundle: Bundle, path: pathlib.Path) -> None:
    """The one set of weights under upstream's names; the metadata says which network they make.

    "architecture": its sizes, JSON; "prediction": velocity or image; "dtype": bfloat16 or float32, in which it was
    trained; "image_size"; "weights": ema or online; "step"; "text_encoder", of a network of text.
    """
    metadata = {
        "format": "pt",
        "architecture": json.dumps(architecture(bundle)),
        "prediction": bundle.config.model.prediction,
        "dtype": bundle.config.model.dtype,
        "image_size": str(bundle.config.data.image_size),
        "weights": bundle.weights,
        "step": str(bundle.step),
        **text_encoder(bundle),
    }
    save_file(translate.to_torch(bundle.table, getattr(bundle, bundle.weights)), path, metadata)
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(0o666 & ~mask)  # the library lets only the owner read it


def architecture(bundle: Bundle) -> dict[str, Any]:
    """The fields of `config.model` that make the network.

    PyTorch's DeCo takes them as its arguments, so they leave out what it is anyway; with anything more it refuses.
    """
    model = bundle.config.model
    known = IN_PYTORCH.get(model.kind, {})
    has = {"kind", *network_fields(model.kind)}
    fields = [name.removeprefix("model.") for name in FIELDS if name.removeprefix("model.") in has]
    return {field: model[field] for field in fields if model[field] != known.get(field)}


def text_encoder(bundle: Bundle) -> dict[str, str]:
    """The name of the encoder that a network of text listens to, if its source says it."""
    name = bundle.config.text.encoder
    return {"text_encoder": name} if name and bundle.config.model.kind == "deco_text" else {}


def write_folder(bundle: Bundle, path: pathlib.Path) -> None:
    """config.json, model.safetensors, README.md, and what diffusers needs to sample if PyTorch's DeCo can."""
    path.mkdir()
    write_safetensors(bundle, path / "model.safetensors")
    c, saved = bundle.config, save_config(bundle.config)
    config = {
        **architecture(bundle),
        "prediction": c.model.prediction,
        "dtype": c.model.dtype,
        "image_size": c.data.image_size,
        "weights": bundle.weights,
        "step": bundle.step,
        **text_encoder(bundle),
        "deco_jax_version": __version__,
        "sampling": dataclasses.asdict(Sampling.from_config(c.sample)),
        "training": saved["config"],
        "config_version": saved["config_version"],
    }
    (path / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (path / "README.md").write_text(model_card(bundle))
    if _runs_in_pytorch(bundle):
        encoder = c.text.encoder if c.model.kind == "deco_text" else ""
        for name, text in diffusers_files(c.data.image_size, encoder, c.model.dtype).items():
            (path / name).parent.mkdir(exist_ok=True)
            (path / name).write_text(text)


def _runs_in_pytorch(bundle: Bundle) -> bool:
    """Whether torch_model.py computes this network."""
    model = bundle.config.model
    return model.kind in IN_PYTORCH and all(model[field] == value for field, value in IN_PYTORCH[model.kind].items())


def model_card(bundle: Bundle) -> str:
    """README.md of an exported folder: architecture, training and what was measured, as far as the source says."""
    c, m = bundle.config, bundle.config.model
    table = [
        ("architecture", f"{m.kind}, {m.depth} blocks of width {m.width}, {m.heads} heads, patches of {m.patch_size}"),
        *([("pixel decoder", f"{m.decoder_depth} blocks of width {m.decoder_width}")] if m.kind != "baseline" else []),
        ("predicts", m.prediction),
        *(
            [
                ("text", f"{m.text_tokens} tokens of {m.text_features} channels; {m.text_depth} blocks of their own"),
                *([("text encoder", c.text.encoder)] if c.text.encoder else []),
            ]
            if m.kind == "deco_text"
            else [("classes", f"{m.num_classes}, and the null class")]
        ),
        ("parameters", f"{bundle.parameters:,}"),
        ("weights", f"{bundle.weights} (fp32), step {bundle.step:,}"),
    ]
    run = [
        ("data", f"{c.data.source} {c.data.name if c.data.source == 'tfds' else ''}".strip()),
        ("image size", c.data.image_size),
        ("batch", c.data.batch_size),
        ("AdamW", f"lr {c.optimizer.lr:g}, betas {c.optimizer.beta1:g} and {c.optimizer.beta2:g}"),
        ("EMA decay", c.ema.decay),
        ("frequency loss", f"weight {c.loss.frequency_weight:g}, quality {c.loss.frequency_quality}"),
        ("alignment loss", f"weight {c.loss.alignment_weight:g}"),
    ]
    unknown = "Converted from PyTorch weights, which do not say how they were trained."
    measured = _last_metrics(bundle.origin, bundle.step)
    name, paper = NAMES[m.kind], "DeCo, arXiv 2511.19365"
    origin = paper if m.kind in IN_PYTORCH else f"{name}, as compared with in {paper}"
    in_torch = f"""
model = DeCo.from_safetensors("THIS_FOLDER/model.safetensors")  # PyTorch: transformer/torch_model.py
# diffusers
pipe = DiffusionPipeline.from_pretrained("THIS_FOLDER", custom_pipeline="THIS_FOLDER", trust_remote_code=True)
images = pipe({_call(c)}).images"""
    return f"""---
library_name: deco_jax
tags: [pixel-diffusion, {"text" if m.kind == "deco_text" else "class"}-to-image]
---
# {name} {m.width}×{m.depth}, {c.data.image_size}²

A pixel diffusion network ({origin}), exported by deco_jax {__version__}.

{_table(table)}

## Training

{_table(run) if bundle.fingerprint else unknown}

{"## Last logged" if measured else "## Metrics"}

{_table(measured) if measured else "None are recorded with these weights."}

## Use

```python
model, params = deco_jax.load_pretrained("THIS_FOLDER")  # JAX{in_torch if _runs_in_pytorch(bundle) else ""}
```
"""


def _call(config: ConfigDict) -> str:
    """What the pipeline is asked, with the settings of the run's samples as far as it knows them."""
    g = config.sample
    told = f"prompt={next(iter(g.prompts), '')!r}" if config.model.kind == "deco_text" else "class_labels=[0]"
    settings = {"num_inference_steps": g.steps, "guidance_scale": g.guidance}
    if g.guidance != 1:
        settings["guidance_interval"] = tuple(g.guidance_interval)
    settings |= {"shift": g.shift} if g.shift != 1 else {}
    settings |= {"solver": g.solver} if g.solver.startswith("adams") else {}
    return ", ".join([told, *(f"{name}={value!r}" for name, value in settings.items())])


def _table(rows: list[tuple[str, Any]]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)])


def _last_metrics(origin: str, step: int) -> list[tuple[str, Any]]:
    """What the run logged last up to `step`, if `origin` is a workdir of ours or a checkpoint in one."""
    given = resolved(origin)
    workdir = given.parents[1] if given.parent.name == store.FOLDER else given
    log, last = workdir / "metrics.jsonl", {}
    for text in log.read_text(encoding="utf-8").splitlines() if log.is_file() else []:
        with contextlib.suppress(ValueError):  # a line that was cut off
            line = json.loads(text)
            last = line if line["step"] <= step else last
    return [(name, f"{value:.5g}") for name, value in last.items() if name != "time" and value is not None]
