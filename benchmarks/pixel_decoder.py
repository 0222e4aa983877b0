"""How fast is the pixel decoder alone, by each implementation that can run here and by PyTorch's?

python benchmarks/pixel_decoder.py                         XL's at 256² on a GPU: 32 channels, 3 blocks, bf16, batch 64
python benchmarks/pixel_decoder.py --size l --batch 16

From the noised pixels and the transformer's tokens to the velocity; backward to the tokens and all parameters, with the
run's `model.remat`. PyTorch's is the decoder of deco_jax/export/torch_model.py, bf16 by autocast.
"""

import argparse
import contextlib
import math

import jax
import jax.numpy as jnp
import numpy as np
import speed
import speed_parts

from deco_jax.config import build_model
from deco_jax.models.pixel_decoder import PixelDecoder
from deco_jax.ops import decoder as operation

try:
    import torch
    import torch.nn.functional as F

    from deco_jax.export.torch_model import DeCo, wave_features
    from deco_jax.models.build import parameter_shapes
    from deco_jax.pretrained import names
    from deco_jax.weights.translate import to_torch
except ImportError:
    torch = None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    speed_parts.add_arguments(parser)
    parser.add_argument("--set", action="append", default=[], metavar="PART.FIELD=VALUE", help="a setting of ours")
    args = speed.parse(parser)
    changes = [*args.set, "model.depth=1", "loss.alignment_weight=0.0"]  # the rest of the network is not needed
    config = speed.configuration(args.size, args.batch, args.dtype, changes)
    model, side = config.model, config.data.image_size
    patches, pixels = (side // model.patch_size) ** 2, model.patch_size**2
    params = speed.random_params(parameter_shapes(build_model(model)), 0)
    rng = np.random.default_rng(1)
    tokens = rng.standard_normal((args.batch, patches, model.width), np.float32)
    colours = rng.standard_normal((args.batch, patches, pixels, 3), np.float32)
    arguments = jnp.asarray(tokens, model.dtype), jax.tree.map(jnp.asarray, params["decoder"])
    noised = jnp.asarray(colours)

    def ours(name: str) -> speed_parts.Ours:
        sizes = model.decoder_width, model.decoder_depth, model.patch_size, 1, "adaln"
        module = PixelDecoder(*sizes, jnp.dtype(model.dtype), model.remat, implementation=name)
        return speed_parts.Ours(name, lambda s, p: module.apply({"params": p}, noised, s), arguments)

    theirs = None if torch is None or args.no_torch else _theirs(params, tokens, colours, model.dtype)
    d = model.decoder_width
    per_pixel = model.width * d + 2 * 3 * d + d * d + model.decoder_depth * 5 * d * d
    title = f"Pixel decoder: {args.batch} images of {side}², {d} channels, {model.decoder_depth} blocks, {model.dtype}"
    flops = 2.0 * math.prod((args.batch, patches, pixels, per_pixel))
    speed_parts.compare(args, title, speed_parts.each_implementation(operation.TABLE, ours), theirs, flops)


def _theirs(params: dict, tokens: np.ndarray, colours: np.ndarray, dtype: str) -> "speed_parts.Theirs":
    device = "cuda" if jax.default_backend() == "gpu" else "cpu"
    tensors = {name: torch.tensor(value) for name, value in to_torch(names.DECO, params).items()}
    network = DeCo.from_state_dict(tensors).to(device)
    query, decoder = network.x_embedder["embedder"][0], network.dec_net
    pixels = torch.tensor(colours, device=device)
    bf16 = dtype == "bfloat16"

    def function(s: "torch.Tensor") -> "torch.Tensor":
        """As DeCo.forward has it."""
        with torch.autocast(device, torch.bfloat16) if bf16 else contextlib.nullcontext():
            places = wave_features(network.patch_size, s.device)
            q = F.linear(pixels, query.weight[:, :3]) + F.linear(places, query.weight[:, 3:], query.bias)
            return decoder(q, s).float()

    given = torch.tensor(tokens).to(device, getattr(torch, dtype)).requires_grad_()
    return speed_parts.Theirs(function, (given,), (given, *query.parameters(), *decoder.parameters()))


if __name__ == "__main__":
    main()
