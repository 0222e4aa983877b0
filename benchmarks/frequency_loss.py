"""How long does the frequency-aware loss take beside PyTorch's, and which share of a training step is that?

python benchmarks/frequency_loss.py                        256² and 256 images on a GPU, 32² and 32 on a CPU
python benchmarks/frequency_loss.py --step train_step.json  also its share of the step timed there

Given the error of a velocity, (B, S, S, 3) fp32: the loss, and its gradient. In a step the compiler may join the ends
of it to what stands before, so the share is rather too large; what the step itself takes without it is shown by
benchmarks/train_step.py --variant loss.frequency_weight=0.0
"""

import argparse
import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import speed
import speed_parts

from deco_jax.diffusion.frequency import frequency_loss, frequency_weights

try:
    import speed_torch
    import torch
except ImportError:
    speed_torch = None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    speed_parts.add_arguments(parser)
    parser.add_argument("--step", help="JSON of benchmarks/train_step.py on the same device")
    args = speed.parse(parser)
    gpu = jax.default_backend() == "gpu"
    config = speed.configuration(args.size, args.batch)
    images, side, loss = (4 if gpu else 1) * args.batch, config.data.image_size, config.loss
    weights = frequency_weights(loss.frequency_quality, loss.frequency_mode, loss.frequency_gamma)
    error = np.random.default_rng(0).standard_normal((images, side, side, 3), np.float32)
    ours = speed_parts.Ours("xla", functools.partial(frequency_loss, weights_3x8x8=weights), (jnp.asarray(error),))
    theirs = None
    if speed_torch is not None and not args.no_torch:
        device = "cuda" if gpu else "cpu"
        module = speed_torch.FrequencyLoss(weights).to(device)
        given = torch.tensor(np.moveaxis(error, -1, 1).copy(), device=device, requires_grad=True)
        back = functools.partial(_channels_last, error.ndim)
        theirs = speed_parts.Theirs(module, (given,), (given,), back)
    results = speed_parts.compare(args, f"Frequency loss: {images} images of {side}², fp32", [ours], theirs)
    if args.step and pathlib.Path(args.step).exists():
        step = json.loads(pathlib.Path(args.step).read_text())
        of_step = next(c for c in step["results"]["contenders"] if c["name"] == speed.OURS and c["seconds"])
        alone = speed.median(results[1]["seconds"]) / images
        share = alone / (speed.median(of_step["seconds"]) / step["settings"]["batch"])
        print(f"share of the training step, per image: {share:.2%}")


def _channels_last(axes: int, x: np.ndarray) -> np.ndarray:
    return np.moveaxis(x, 1, -1) if x.ndim == axes else x


if __name__ == "__main__":
    main()
