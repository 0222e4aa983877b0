"""How close are we to the recorded PyTorch system? Prints the table of docs/numbers.md and writes agreement.json.

python benchmarks/agreement.py [OUTPUT.json]
"""

import json
import pathlib
import sys
import unittest.mock

ROOT = pathlib.Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import jax
import jax.numpy as jnp
import numpy as np

import deco_jax
from deco_jax.diffusion.frequency import block_dct, frequency_loss, frequency_weights, rgb_to_ycbcr
from deco_jax.encoders.dinov2.model import prepare_image
from deco_jax.encoders.dinov2.weights import from_tensors
from deco_jax.pretrained import names
from deco_jax.pretrained.infer import ARCHITECTURES
from deco_jax.sampling import solvers
from deco_jax.sampling.guidance import guided_slope
from deco_jax.sampling.solvers import SOLVERS, integrate
from deco_jax.weights import translate
from tests.helpers import Golden, recorded_sampler, relative_error


def network(case: str) -> dict[str, float]:
    g = Golden(case)
    model, params, labels = g.model(), g.params(), g["y"].astype(np.int32)
    layer = g.config["align_layer"]
    v, tokens = model.apply({"params": params}, g.image("x"), g["t"], labels, hidden_layer=layer)

    def loss(params, x):
        return jnp.mean((model.apply({"params": params}, x, g["t"], labels) - g.image("target")) ** 2)

    by_params, by_x = jax.grad(loss, (0, 1))(params, g.image("x"))
    theirs, ours = g.group("grad:"), translate.to_torch(ARCHITECTURES[g.kind][0], by_params)
    return {
        f"{case}: output": relative_error(v, g.image("out")),
        f"{case}: tokens after block {layer}": relative_error(tokens, g[f"hidden_after_block{layer}"]),
        f"{case}: gradient of x": relative_error(by_x, g.image("grad_x")),
        f"{case}: gradients of {len(theirs)} parameters": max(relative_error(ours[n], theirs[n]) for n in theirs),
    }


def teacher() -> dict[str, float]:
    g = Golden("dinov2")
    module, params = from_tensors(g.group("param:"), heads=2)
    features = module.clone(dtype=jnp.float32).apply({"params": params}, g.image("image"))
    return {
        "dinov2: resized image": relative_error(prepare_image(g.image("image")), g.image("resized")),
        "dinov2: features": relative_error(features, g["features"]),
    }


def frequency() -> dict[str, float]:
    g, errors = Golden("frequency_loss"), {}
    errors["frequency: 40 weight tables"] = max(
        relative_error(frequency_weights(int(q[1:]), mode, float(gamma[1:])), table)
        for (mode, q, gamma), table in ((key.split(":"), table) for key, table in g.group("weights:").items())
    )
    transforms, losses = [], []
    for case in ("a", "pad"):
        pred, target = g.image(f"{case}:pred"), g.image(f"{case}:target")
        transforms.append(
            relative_error(jnp.moveaxis(block_dct(rgb_to_ycbcr(pred)), -1, 1), g[f"{case}:dct_pred"]),
        )
        for quality, value in g.group(f"{case}:freq_loss:q").items():
            losses.append(
                relative_error(frequency_loss(pred - target, frequency_weights(int(quality), "inv_gamma", 1.0)), value)
            )
    return errors | {"frequency: block DCT": max(transforms), "frequency: losses": max(losses)}


RECORDED_SOLVERS = {
    "Euler": ("euler", ("euler_50", "euler_100_cfg3.2_interval", "euler_20_shift3", "euler_10_laststep")),
    "stochastic Euler": ("euler_sde", ("sde_euler_15",)),
    "Heun": ("heun", ("heun_10",)),
    "Heun, exact": ("heun_exact", ("heun_exact_10",)),
    "Adams 2": ("adams2", ("adam_lm_25_o2_shift3",)),
    "Adams 3 (recorded with coefficients in fp32)": ("adams3", ("adam_lm_12_o3",)),
    "Adams 4 (recorded with coefficients in fp32)": ("adams4", ("adam_lm_12_o4_interval",)),
}


def trajectory(case: str, solver: str) -> float:
    """Of all states of a recorded run."""
    g = Golden("samplers")
    s = recorded_sampler(json.loads(str(g[f"{case}:config"])), solver)
    slope = guided_slope(
        lambda x, t, y: jnp.sin(3 * x + y[:, None, None, None]) - x * t[:, None, None, None],
        jnp.array([1, 2]),
        jnp.array([5, 5]),
        s.guidance,
        s.guided_steps,
    )
    noise = jnp.asarray(g[f"{case}:noise"])
    if solver == "euler_sde":
        draws = jnp.pad(g[f"{case}:step_noise"], [(0, 1)] + [(0, 0)] * 4)  # the last step draws none
        with unittest.mock.patch.object(solvers, "step_noise", lambda keys, number, shape: draws[number]):
            _, states, _ = integrate(SOLVERS[solver], slope, noise, s.times, s.guided_steps, trajectory=1)
    else:
        _, states, _ = integrate(SOLVERS[solver], slope, noise, s.times, s.guided_steps, trajectory=1)
    return relative_error(states, g[f"{case}:trajectory"])


def sampling() -> dict[str, float]:
    errors = {
        f"samplers: whole trajectories of {label}": max(trajectory(case, solver) for case in cases)
        for label, (solver, cases) in RECORDED_SOLVERS.items()
    }
    s, c2i = Golden("sample_deco_c2i"), Golden("deco_c2i")
    images = deco_jax.sample(
        c2i.model(),
        c2i.params(),
        s["condition"],
        noise=s.image("noise"),
        steps=s.config["num_steps"],
        guidance=s.config["guidance"],
        guidance_interval=(s.config["guidance_interval_min"], s.config["guidance_interval_max"]),
    )
    return errors | {"samplers: deco_c2i, 12 guided steps": relative_error(images, s.image("samples"))}


def training() -> dict[str, float]:
    g = Golden("train_trajectory")
    state, history = g.replay()
    terms = ("loss_flow", "loss_frequency", "loss_alignment", "loss")
    losses = np.array([[metrics[term] for term in terms] for metrics in history])
    groups = {
        "weights": ("denoiser", names.DECO, state.params["network"]),
        "EMA": ("ema_denoiser", names.DECO, state.ema),
        "projector": ("diffusion_trainer", names.PROJECTOR, state.params["projector"]),
    }
    errors = {"training: 4 losses of 10 steps": max(map(relative_error, losses.ravel(), g["losses"].ravel()))}
    for label, (group, table, params) in groups.items():
        ours, theirs = translate.to_torch(table, params), g.group(f"final:{group}.")
        errors[f"training: {label} after 10 steps"] = max(relative_error(ours[n], theirs[n]) for n in theirs)
    return errors


def main() -> None:
    errors = {}
    for case in ("deco_c2i", "deco_c2i_wide", "baseline_dit", "pixnerd"):
        errors |= network(case)
    errors |= teacher() | frequency() | sampling() | training()
    print("| recorded | largest relative error |\n|---|---|")
    for name, error in errors.items():
        print(f"| {name} | {error:.1e} |")
    if len(sys.argv) > 1:
        pathlib.Path(sys.argv[1]).write_text(json.dumps(errors, indent=2))


if __name__ == "__main__":
    main()
