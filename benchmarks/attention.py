"""How fast is a block's attention alone, by each implementation that can run here and by PyTorch's?

python benchmarks/attention.py                             XL's at 256² on a GPU (256 tokens, 16 heads of 72, bf16)
python benchmarks/attention.py --size xl512 --batch 16     1,024 tokens

From the raw projection of queries, keys and values to the heads' outputs: RMSNorm of queries and keys, the rotary
embedding, softmax and both products; backward to the projection and the norms' weights. On PyTorch's side the same by
deco_jax/export/torch_model.py, whose attention is F.scaled_dot_product_attention.
"""

import argparse
import functools

import jax
import jax.numpy as jnp
import numpy as np
import speed
import speed_parts

from deco_jax.models.layers import rotary_angles
from deco_jax.ops import attention as operation

try:
    import torch
    import torch.nn.functional as F

    from deco_jax.export.torch_model import RMSNorm, rotate, split_heads
except ImportError:
    torch = None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    speed_parts.add_arguments(parser)
    args = speed.parse(parser)
    config = speed.configuration(args.size, args.batch, args.dtype)
    model, rows = config.model, config.data.image_size // config.model.patch_size
    heads, head_dim, tokens = model.heads, model.width // model.heads, rows * rows
    rng = np.random.default_rng(0)
    qkv = rng.standard_normal((args.batch, tokens, 3, heads, head_dim), np.float32)
    scales = tuple(1 + 0.1 * rng.standard_normal(head_dim, np.float32) for _ in range(2))
    angles = rotary_angles(rows, rows, head_dim)
    arguments = jnp.asarray(qkv, model.dtype), tuple(map(jnp.asarray, scales))

    def ours(name: str) -> speed_parts.Ours:
        return speed_parts.Ours(name, functools.partial(_ours, jnp.asarray(angles), name), arguments)

    theirs = None
    if torch is not None and not args.no_torch:
        theirs = _theirs(qkv, scales, angles, model.dtype)
    title = f"Attention: {args.batch} × {tokens} tokens, {heads} heads of {head_dim}, {model.dtype}"
    flops = 4.0 * args.batch * tokens**2 * model.width
    speed_parts.compare(args, title, speed_parts.each_implementation(operation.TABLE, ours), theirs, flops)


def _ours(angles: jax.Array, name: str, qkv: jax.Array, scales: tuple[jax.Array, jax.Array]) -> jax.Array:
    return operation.attention(qkv, scales, angles, None, name)


def _theirs(
    qkv: np.ndarray, scales: tuple[np.ndarray, np.ndarray], angles: np.ndarray, dtype: str
) -> "speed_parts.Theirs":
    device = "cuda" if jax.default_backend() == "gpu" else "cpu"
    heads, head_dim = qkv.shape[-2:]
    norms = [RMSNorm(head_dim).to(device) for _ in scales]
    for norm, scale in zip(norms, scales, strict=True):
        norm.weight.data.copy_(torch.tensor(scale))
    turned = torch.tensor(angles, device=device)

    def function(x: "torch.Tensor") -> "torch.Tensor":
        q, k, v = split_heads(x, 3, heads)
        q, k = rotate(norms[0](q), turned), rotate(norms[1](k), turned)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)

    given = torch.tensor(qkv.reshape(*qkv.shape[:2], -1)).to(device, getattr(torch, dtype)).requires_grad_()
    return speed_parts.Theirs(function, (given,), (given, *(norm.weight for norm in norms)))


if __name__ == "__main__":
    main()
