"""What does `deco evaluate` do? It measures images, those there or those that a network draws, once or as a sweep."""

from collections.abc import Sequence
from typing import Any

from deco_jax.evaluation.extract import load_networks
from deco_jax.evaluation.measure import Judge, Request, measure
from deco_jax.evaluation.sweep import measure_sweep, parse_sweep
from deco_jax.parallel import processes


def evaluate(
    source: str,
    out: str,
    reference: str,
    features: str = "inception",
    feature_weights: Sequence[str] = (),
    sweep: Sequence[str] = (),
    num: int | None = None,
    labels: str | None = None,
    prompt: Sequence[str] = (),
    prompts: str | None = None,
    text_encoder: str | None = None,
    seed: int = 0,
    weights: str = "ema",
    dtype: str | None = None,
    batch_size: int = 64,
    **sampling: Any,
) -> bool:
    """Writes metrics.json and metrics.md into `out`; of a sweep sweep.json, sweep.md and sweep.png.

    The reference and everything else is opened and compared before anything is drawn. The same command goes on where
    an earlier start ended, whatever ended it.

    Args:
      source: images (NAME.npz, a folder of pictures, or of `deco generate`), or anything that `load_pretrained` opens.
      out: the folder, on this machine or in a bucket; with several processes one they all see.
      reference: of `deco stats` or the ADM suite.
      features: networks that see the images, "inception,dinov2".
      feature_weights: "NAME=FILE", see `extract.load_networks`.
      sweep: "guidance=1,2", "guidance_interval=0:1,0.1:1", see `sweep.parse_sweep`; () = one evaluation.
      num: images to draw (None: 50,000), or to look at (None: all).
      labels, prompt, prompts, text_encoder, seed, weights, dtype, batch_size: of what is drawn, see `generate_samples`.
      **sampling: `image_size` and fields of `Sampling`; None = as the run's configuration says.

    Returns:
      Whether it is done; otherwise it was told to stop.

    Raises:
      BrokenRun: this process of several fails alone, or others went away.
      TransientError: storage does not answer; or this machine is about to be taken away.
      UsageError: see `measure` and `measure_sweep`.
    """

    with processes.fail_together():
        fields = processes.agree(lambda: parse_sweep(sweep))  # connects the processes before any of them takes long
        judge = processes.agree(lambda: Judge.open(load_networks(features, feature_weights), reference))
    request = Request(
        source, num, labels, tuple(prompt), prompts, text_encoder, seed, weights, dtype, batch_size, sampling
    )
    return measure_sweep(request, judge, out, fields) if fields else measure(request, judge, out)
