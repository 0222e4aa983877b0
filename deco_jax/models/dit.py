"""The Diffusion Transformer on patches: attention, SwiGLU, AdaLN, and the scanned blocks (docs/model.md, 2.5)."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from deco_jax.models.layers import Linear, modulate, rms_norm
from deco_jax.ops.attention import attention

REMAT_POLICIES = {
    "none": None,  # keep every activation
    "full": jax.checkpoint_policies.nothing_saveable,  # keep each block's input only
    # Keep the outputs of the linear layers and of attention.
    "dots": jax.checkpoint_policies.save_only_these_names("product", "attention"),
}


def rematerialised(block: type[nn.Module], remat: str, prevent_cse: bool = True) -> type[nn.Module]:
    """The block, of which the backward pass recomputes what `remat`, a key of REMAT_POLICIES, does not keep."""
    return block if remat == "none" else nn.remat(block, prevent_cse=prevent_cse, policy=REMAT_POLICIES[remat])


class _Scale(nn.Module):
    """The weight of an RMSNorm over a head's channels, which the attention applies."""

    @nn.compact
    def __call__(self, head_dim: int) -> Array:
        """(e,), fp32."""
        ones = nn.with_logical_partitioning(nn.initializers.ones, ("head_dim",))
        return self.param("scale", ones, (head_dim,), jnp.float32)


class Attention(nn.Module):
    """Self-attention, scale 1/√e; keys and values may come from text as well."""

    heads: int
    dtype: jnp.dtype
    implementation: str | None  # see ops/attention.py; None = auto
    use_bias: bool = False  # of queries, keys and values
    use_norm: bool = True  # RMSNorm of queries and keys

    @nn.compact
    def __call__(self, x_BxNxD: Array, angles_NxK: Array | None = None, text_BxLxD: Array | None = None) -> Array:
        """Tokens (B, N, D), their rotary angles (N, D/h/2), and text to look at as well (B, L, D) → (B, N, D)."""
        width = x_BxNxD.shape[-1]
        heads = self.heads, width // self.heads
        axes = ("width", None, "heads", "head_dim")
        qkv = Linear((3, *heads), axes, use_bias=self.use_bias, dtype=self.dtype, name="qkv")(x_BxNxD)
        text_kv, norms = None, None
        if text_BxLxD is not None:
            text_kv = Linear((2, *heads), axes, use_bias=False, dtype=self.dtype, name="text_kv")(text_BxLxD)
        if self.use_norm:
            norms = _Scale(name="query_norm")(heads[1]), _Scale(name="key_norm")(heads[1])
        out_BxNxHxE = attention(qkv, norms, angles_NxK, text_kv, self.implementation or "auto")
        out_BxNxD = out_BxNxHxE.reshape(x_BxNxD.shape)
        return Linear(width, ("heads_out", "width"), dtype=self.dtype, name="out")(out_BxNxD)


class SwiGLU(nn.Module):
    """down(SiLU(gate x) · (up x)), no biases."""

    hidden: int
    dtype: jnp.dtype
    fused: bool = False  # gate and up are one matrix

    @nn.compact
    def __call__(self, x_BxNxD: Array) -> Array:
        """(B, N, D) → (B, N, D)."""
        if self.fused:
            features, axes = (2, self.hidden), ("width", None, "mlp")
            both = Linear(features, axes, use_bias=False, dtype=self.dtype, name="in")(x_BxNxD)
            gate, up = both[:, :, 0], both[:, :, 1]
        else:
            gate = Linear(self.hidden, ("width", "mlp"), use_bias=False, dtype=self.dtype, name="gate")(x_BxNxD)
            up = Linear(self.hidden, ("width", "mlp"), use_bias=False, dtype=self.dtype, name="up")(x_BxNxD)
        down = Linear(x_BxNxD.shape[-1], ("mlp", "width"), use_bias=False, dtype=self.dtype, name="down")
        return down(nn.silu(gate) * up)


class Block(nn.Module):
    """s ← s + gate·Attention(modulated RMS(s)); s ← s + gate·SwiGLU(modulated RMS(s))."""

    heads: int
    dtype: jnp.dtype
    attention: str | None
    wide: bool  # SwiGLU of 4D hidden channels from one matrix; else of two thirds of that, from two

    @nn.compact
    def __call__(
        self,
        s_BxNxD: Array,
        c_BxD: Array | None,
        angles_NxK: Array | None,
        text_BxLxD: Array | None,
        modulation_Bx6D: Array | None = None,
    ) -> Array:
        """Tokens, conditions, rotary angles and text → tokens; with its modulation given, without the conditions."""
        width = s_BxNxD.shape[-1]
        if modulation_Bx6D is None:
            modulation = _modulation(width, self.dtype, name="modulation")(c_BxD)
        else:
            modulation = modulation_Bx6D.reshape(-1, 6, width)
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = jnp.moveaxis(modulation[:, :, None, :], 1, 0)
        h = modulate(rms_norm("width", self.dtype, "attention_norm")(s_BxNxD), shift_a, scale_a)
        attention = Attention(self.heads, self.dtype, self.attention, name="attention")
        s_BxNxD = s_BxNxD + gate_a * attention(h, angles_NxK, text_BxLxD)
        h = modulate(rms_norm("width", self.dtype, "mlp_norm")(s_BxNxD), shift_m, scale_m)
        hidden = 4 * width if self.wide else int(2 * 4 * width / 3)
        s_BxNxD = s_BxNxD + gate_m * SwiGLU(hidden, self.dtype, fused=self.wide, name="mlp")(h)
        return nn.with_logical_constraint(s_BxNxD, ("batch", "tokens", "activation_width"))


class _Layer(nn.Module):
    """One step of the scan: a block, and a copy of its output where the caller asked for it."""

    block: type[nn.Module]
    heads: int
    dtype: jnp.dtype
    attention: str | None
    wide: bool
    hidden_layer: int | None

    @nn.compact
    def __call__(self, carry, layer, c_BxD, angles_NxK, text_BxLxD):
        (s, hidden), (number, modulation_Bx6D) = carry, layer
        block = self.block(self.heads, self.dtype, self.attention, self.wide, name="block")
        s = block(s, c_BxD, angles_NxK, text_BxLxD, modulation_Bx6D)
        if self.hidden_layer is not None:
            hidden = jnp.where(number == self.hidden_layer, s, hidden)
        return (s, hidden), None


class Transformer(nn.Module):
    """`depth` blocks, scanned over parameters stacked along a leading `layers` axis."""

    depth: int
    heads: int
    dtype: jnp.dtype
    attention: str | None
    remat: str  # a key of REMAT_POLICIES
    scan: bool  # False unrolls the loop in the compiled program; the parameters are the same
    wide: bool = False  # see Block

    @nn.compact
    def __call__(
        self,
        s_BxNxD: Array,
        c_BxD: Array | None,
        angles_NxK: Array | None,
        text_BxLxD: Array | None = None,
        hidden_layer: int | None = None,
        modulation_BxLx6D: Array | None = None,
    ) -> tuple[Array, Array | None]:
        """Returns the tokens after the last block and, if asked, those after block `hidden_layer` (1 is the first).

        With `modulation_BxLx6D`, of one row for all or one each (see `modulations`), the conditions c are not needed.
        """
        block = rematerialised(Block, self.remat, prevent_cse=not self.scan)
        fields = block, self.heads, self.dtype, self.attention, self.wide, hidden_layer
        layers = nn.scan(
            _Layer,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(0, nn.broadcast, nn.broadcast, nn.broadcast),
            length=self.depth,
            unroll=1 if self.scan else self.depth,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )(*fields, name="layers")
        # The second carry enters linearly and outside the remat: the backward pass needs no copy of it per layer.
        hidden = None if hidden_layer is None else jnp.zeros_like(s_BxNxD)
        modulation_LxBx6D = None if modulation_BxLx6D is None else modulation_BxLx6D.swapaxes(0, 1)
        each, rest = (jnp.arange(1, self.depth + 1), modulation_LxBx6D), (c_BxD, angles_NxK, text_BxLxD)
        if not self.has_variable("params", "layer_0"):
            (s_BxNxD, hidden), _ = layers((s_BxNxD, hidden), each, *rest)
            return s_BxNxD, hidden
        for i in range(self.depth):  # see `unstacked`
            layer = _Layer(*fields, name=f"layer_{i}")
            (s_BxNxD, hidden), _ = layer((s_BxNxD, hidden), jax.tree.map(lambda x, i=i: x[i], each), *rest)
        return s_BxNxD, hidden

    def modulations(self, c: Array) -> Array:
        """What modulates every block, of many conditions at once: (…, D) → (…, L, 6D)."""
        layer, kernels = _modulation(c.shape[-1], self.dtype, parent=None), self.variables["params"]["layers"]["block"]
        m_Lx6xD = jax.lax.map(lambda linear: layer.apply({"params": linear}, c), kernels["modulation"])
        return jnp.moveaxis(m_Lx6xD.reshape(*m_Lx6xD.shape[:-2], -1), 0, -2)


def unstacked(params: Mapping[str, Any]) -> dict[str, Any]:
    """A network's parameters with a tree for each block, `layer_0` …, where they were stacked; a network takes both.

    An unrolled network that is called in a loop would cut each block's matrices out of the stacks at every turn.
    """

    def part(tree: Mapping[str, Any]) -> Mapping[str, Any]:
        if "layers" not in tree:
            return tree
        depth = len(jax.tree.leaves(tree["layers"])[0])
        return {f"layer_{i}": jax.tree.map(lambda x, i=i: x[i], tree["layers"]) for i in range(depth)}

    return {name: part(tree) for name, tree in params.items()}


def _modulation(width: int, dtype: jnp.dtype, **named: Any) -> Linear:
    """From a condition to a block's shift, scale and gate of attention, and those of the SwiGLU: (…, D) → (…, 6, D)."""
    return Linear((6, width), ("width", None, "modulation"), dtype=dtype, **named)
