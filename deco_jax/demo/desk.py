"""What is on the page, and what happens at a click? Fields, buttons and pictures, by Gradio."""

import dataclasses
import html
import pathlib
import tempfile
import time
from collections.abc import Iterator
from typing import Any

from absl import logging

from deco_jax.demo.studio import Drawn, Studio, save_drawn
from deco_jax.demo.wishes import MOST_SEED, MOST_STEPS, Fields
from deco_jax.errors import UsageError
from deco_jax.sampling.solvers import SOLVERS

KEEP = 3600  # seconds that drawn pictures are kept for their viewers
PAUSE = 0.1  # seconds between two messages about progress
SMALL = 128  # pixels of a side up to which they are shown as squares
CSS = """
.progress progress { width: 100%; }
.film img { min-height: 240px; object-fit: contain; }
.grid-wrap { max-height: none !important; }
.small img { image-rendering: pixelated; }
footer { display: none !important; }
"""
RANDOM = f"() => Math.floor(Math.random() * {MOST_SEED + 1})"


def make_page(studio: Studio, folder: pathlib.Path) -> Any:
    """The page as Gradio's Blocks; new pictures go through `folder`."""
    import gradio as gr

    def drawing(*values: Any) -> Iterator[list[Any]]:
        yield from draw_for_page(studio, Fields(*values), folder)

    with gr.Blocks(title=f"DeCo: {studio.name}", analytics_enabled=False, delete_cache=(KEEP // 6, KEEP)) as page:
        gr.Markdown(f"# DeCo\n{html.escape(studio.name)}, {studio.weights} weights")
        with gr.Row():
            with gr.Column(scale=2, min_width=320):
                shown = _shown(studio)
                with gr.Row():
                    draw = gr.Button("Draw", variant="primary")
                    stop = gr.Button("Stop")
                with gr.Accordion("Sampler", open=False):
                    sampler = _sampler(studio)
            with gr.Column(scale=3, min_width=320):
                outputs = _outputs(studio)
        clicked = gr.on(
            [draw.click, *([shown[0].submit] if studio.is_text else [])],
            drawing,
            [*shown, *sampler],
            outputs,
            show_progress="minimal",
            show_progress_on=outputs[:1],
            concurrency_limit=1,
            api_visibility="private",
        )
        stopped = _tell("Stopped.")
        stop.click(lambda: stopped, None, outputs[:1], cancels=[clicked], queue=False, api_visibility="private")
    return page


def _shown(studio: Studio) -> list[Any]:
    """What is drawn: the first of `Fields`, in their order."""
    import gradio as gr

    if studio.is_text:
        shown = gr.Textbox(label="Prompt", lines=3, max_lines=8, placeholder="What the images shall show")
        negative = gr.Textbox(label="Negative prompt", placeholder="What guidance leads away from")
    else:
        named, choices = {"allow_custom_value": True, "filterable": True}, studio.classes()
        shown = gr.Dropdown(choices, value="0", label="Class", info="Type a number or name", **named)
        negative = gr.Dropdown([("none", ""), *choices], value="", label="Negative class", **named)
    with gr.Row():
        images = gr.Number(1, label="Images", precision=0, min_width=80)
        seed = gr.Number(0, label="Seed", precision=0, min_width=120)
    gr.Button("Random seed", size="sm").click(None, None, [seed], js=RANDOM, api_visibility="private")
    with gr.Row():
        side = {"precision": 0, "step": studio.model.patch_size, "min_width": 100}
        height = gr.Number(studio.side, label="Height", **side)
        width = gr.Number(studio.side, label="Width", **side)
    film = gr.Checkbox(label="Show how the images come about")
    return [shown, negative, images, seed, height, width, film]


def _sampler(studio: Studio) -> list[Any]:
    """How it is drawn: the other fields."""
    import gradio as gr

    settings, part = studio.trained, {"step": 0.05, "min_width": 100}
    with gr.Row():
        steps = gr.Number(settings.steps, label="Steps", info=f"at most {MOST_STEPS}", precision=0)
        guidance = gr.Number(settings.guidance, label="Guidance", info="1 = none", step=0.5)
    with gr.Row():
        low = gr.Number(settings.guidance_interval[0], label="Guidance from", info="0 = noise", **part)
        high = gr.Number(settings.guidance_interval[1], label="Guidance to", info="1 = image", **part)
    with gr.Row():
        solver = gr.Dropdown(list(SOLVERS), value=settings.solver, label="Solver", info="how a step is taken")
        shift = gr.Number(settings.shift, label="Shift", info="1 = equal steps", step=0.5)
    return [steps, guidance, low, high, solver, shift]


def _outputs(studio: Studio) -> list[Any]:
    """What people look at: progress, images, film, files to keep, settings."""
    import gradio as gr

    look = ["small"] if studio.side <= SMALL else []
    fit = {"columns": 2, "height": "auto", "object_fit": "contain", "elem_classes": look}
    progress = gr.HTML(_tell("Nothing is drawn yet."), elem_classes="progress")
    gallery = gr.Gallery(label="Images", interactive=False, **fit)
    later = {"interactive": False, "visible": False}
    film = gr.Image(label="How they came about", buttons=["download"], elem_classes=["film", *look], **later)
    files = gr.Files(label="PNGs, which say how they were drawn", **later)
    with gr.Accordion("How they were drawn", open=False):
        how = gr.JSON(show_label=False)
    return [progress, gallery, film, files, how]


def draw_for_page(studio: Studio, fields: Fields, folder: pathlib.Path) -> Iterator[list[Any]]:
    """Yields what the page's outputs become while a wish is fulfilled; what goes wrong is a message on the page."""
    import gradio as gr

    try:
        yield from _draw(studio, fields, folder)
    except UsageError as error:
        raise gr.Error(html.escape(str(error)), duration=None, print_exception=False) from error
    except Exception as error:
        logging.exception("A drawing failed: %s", dataclasses.asdict(fields))
        told = "Something failed that should not; the server's log says what."
        raise gr.Error(told, duration=None, print_exception=False) from error


def _draw(studio: Studio, fields: Fields, folder: pathlib.Path) -> Iterator[list[Any]]:
    import gradio as gr

    wish = studio.read(fields)
    for line in studio.warnings(wish):
        gr.Warning(html.escape(line))
    steps, unchanged = wish.settings.steps, [gr.skip()] * 4
    yield [_tell("Preparing; a first drawing of this size, number and solver takes longer.", 0, steps), *unchanged]
    began = latest = time.monotonic()
    for item in studio.draw(wish):
        if isinstance(item, Drawn):
            with tempfile.TemporaryDirectory(dir=folder) as drafts:  # Gradio has a copy when it asks for more
                paths, film = save_drawn(item, pathlib.Path(drafts))
                names = [str(path) for path in paths]
                told = _tell(f"{len(names)} image{'s'[: len(names) > 1]} in {time.monotonic() - began:.1f} s.")
                shown = gr.update(value=None if film is None else str(film), visible=film is not None)
                yield [told, names, shown, gr.update(value=names, visible=True), dict(item.how)]
        elif time.monotonic() - latest > PAUSE or item == steps:
            latest = time.monotonic()
            yield [_tell(f"Step {item} of {steps}", item, steps), *unchanged]


def _tell(text: str, done: int = 0, of: int = 0) -> str:
    return f"<p>{text}</p>" + (f'<progress max="{of}" value="{done}"></progress>' if of else "")
