"""DeCo in PyTorch (arXiv 2511.19365): one file that needs only torch, to be copied into any project.

    model = DeCo.from_safetensors("xl.safetensors", device="cuda")
    images = model.sample([207, 360], image_size=256, steps=100, guidance=3.0)  # (2, 3, 256, 256) in [-1, 1]

The velocity is v = image − noise at x_t = t·image + (1 − t)·noise: t = 0 is noise, t = 1 data. Parameters are named
as in the published checkpoints, whose `ema_denoiser.*` load once that prefix is cut off. Letters: B batch, N tokens,
D width, h heads, e = D/h, p patch size, P = p² pixels of a patch, d decoder width, T text tokens of C channels.

A new network has PyTorch's default initialisation, not DeCo's; to train one from scratch use deco_jax.
"""

import itertools
import json
import math
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path

try:
    import torch
    import torch.nn.functional as F
    from torch import Tensor, nn
except ImportError as error:
    raise ImportError("the PyTorch model needs torch: pip install torch") from error

EPSILON = 1e-6  # of every norm
ORDERS = {"euler": 1, "adams1": 1, "adams2": 2, "adams3": 3, "adams4": 4}  # of the solvers: slopes that a step looks at


class DeCo(nn.Module):
    """DeCo, conditioned on a class if `num_classes` is given, or on a text if the three `text_*` are.

    A text is the last hidden state of its encoder, padded to T tokens; the padding is not masked.
    """

    def __init__(
        self,
        patch_size: int,  # p, pixels along a patch's side
        width: int,  # D, channels of a token
        depth: int,  # DiT blocks
        heads: int,  # of attention
        decoder_width: int,  # d, channels of a pixel
        decoder_depth: int,  # residual blocks of the pixel decoder
        num_classes: int | None = None,  # labels run to num_classes − 1; num_classes itself is the null class
        text_features: int | None = None,  # C
        text_tokens: int | None = None,  # T
        text_depth: int | None = None,  # blocks on the text alone
    ):
        super().__init__()
        if (num_classes is None) == (text_tokens is None):
            raise ValueError("DeCo needs either num_classes or text_features, text_tokens and text_depth.")
        self.patch_size, self.head_dim, self.num_classes = patch_size, width // heads, num_classes
        self.text_shape = None if num_classes is not None else (text_tokens, text_features)
        text = self.text_shape is not None
        # The dicts only make the parameters' names those of the published checkpoints.
        self.x_embedder = nn.ModuleDict({"embedder": nn.Sequential(nn.Linear(3 + 64, decoder_width))})
        self.s_embedder = nn.ModuleDict({"proj": nn.Linear(3 * patch_size**2, width)})
        self.t_embedder = nn.ModuleDict({"mlp": mlp_of_two(256, width)})
        if text:
            self.y_embedder = nn.ModuleDict({"proj": nn.Linear(text_features, width), "norm": RMSNorm(width)})
            self.y_pos_embedding = nn.Parameter(torch.randn(1, text_tokens, width))
            self.text_refine_blocks = nn.ModuleList(Block(width, heads, fused=True) for _ in range(text_depth))
        else:
            self.y_embedder = nn.ModuleDict({"embedding_table": nn.Embedding(num_classes + 1, width)})
        self.blocks = nn.ModuleList(Block(width, heads, fused=text, text=text) for _ in range(depth))
        self.dec_net = PixelDecoder(width, patch_size, decoder_width, decoder_depth)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.s_embedder["proj"].weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return self.s_embedder["proj"].weight.dtype

    @classmethod
    def from_safetensors(
        cls, path: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
    ) -> "DeCo":
        """Opens what `deco convert … .safetensors` wrote, on `device`; with `dtype`, weights are converted to it.

        The constructor's arguments are the metadata's "architecture" (JSON) or, without that, read off the shapes.
        """
        from safetensors import safe_open

        with safe_open(path, framework="pt", device=str(device)) as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no mapping)
        architecture = json.loads(metadata["architecture"]) if "architecture" in metadata else None
        return cls.from_state_dict(tensors, architecture).to(dtype=dtype)

    @classmethod
    def from_state_dict(cls, tensors: Mapping[str, Tensor], architecture: Mapping[str, int] | None = None) -> "DeCo":
        """The network whose parameters these tensors are, taken without a copy; any other tensors raise an error."""
        sizes = dict(infer_architecture(tensors) if architecture is None else architecture)
        kind = sizes.pop("kind", "deco")
        if kind not in ("deco", "deco_text"):
            raise ValueError(f"these tensors are of a {kind} network; this file knows deco and deco_text.")
        with torch.device("meta"):
            model = cls(**sizes)
        model.load_state_dict(tensors, strict=True, assign=True)
        return model

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, dtype: torch.dtype | None = None, torch_dtype: torch.dtype | None = None
    ) -> "DeCo":
        """Opens an exported folder's model.safetensors; diffusers calls it with a folder inside that one."""
        folder = Path(folder)
        root = folder if (folder / "model.safetensors").exists() else folder.parent
        return cls.from_safetensors(root / "model.safetensors", dtype=dtype or torch_dtype)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Predicts the velocity.

        Args:
          x: noised RGB images (B, 3, H, W); H and W are multiples of p.
          t: times (B,), 0 = noise, 1 = data.
          y: labels (B,), integers up to num_classes, the null class; or texts (B, T, C).

        Returns:
          v̂ (B, 3, H, W), fp32.
        """
        p, (height, width) = self.patch_size, x.shape[-2:]
        if height % p or width % p:
            raise ValueError(f"images of {height}×{width} pixels do not divide into patches of {p}×{p}.")
        rows, columns = height // p, width // p
        patches = F.pixel_unshuffle(x.to(self.dtype), p).flatten(2).transpose(1, 2)  # (B, N, 3P), channel first
        s = self.s_embedder["proj"](patches)
        tau = self.t_embedder["mlp"](time_features(t).to(self.dtype))
        if self.text_shape is None:
            c, text = F.silu(tau + self.y_embedder["embedding_table"](y)), None
            angles = rotary_angles(rows, columns, self.head_dim, 16, 16, x.device)
            places = wave_features(p, x.device)
        else:
            c, text = F.silu(tau), self.y_embedder["norm"](self.y_embedder["proj"](y.to(self.dtype)))
            text = text + self.y_pos_embedding
            for block in self.text_refine_blocks:
                text = block(text, c)
            angles = rotary_angles(rows, columns, self.head_dim, rows, columns, x.device)
            places = torch.cos(rotary_angles(p, p, 128, p, p, x.device))
        for block in self.blocks:
            s = block(s, c, angles, text)
        s = F.silu(tau[:, None] + s)

        # The query is Linear([r, g, b, 64 features of the place]); the places' part is the same in every patch.
        query = self.x_embedder["embedder"][0]
        pixels = patches.unflatten(-1, (3, p * p)).transpose(2, 3)  # (B, N, P, 3)
        q = F.linear(pixels, query.weight[:, :3]) + F.linear(places.to(self.dtype), query.weight[:, 3:], query.bias)
        v = self.dec_net(q, s).float()  # (B, N, P, 3)
        return F.pixel_shuffle(v.permute(0, 3, 2, 1).reshape(len(x), 3 * p * p, rows, columns), p)

    @torch.no_grad()
    def sample(
        self,
        y: Tensor | Sequence[int],
        null: Tensor | None = None,
        *,
        image_size: int | tuple[int, int] | None = None,
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
        steps: int = 50,
        guidance: float = 1.0,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        shift: float = 1.0,
        solver: str = "euler",
    ) -> Tensor:
        """Generates one image per condition, with classifier-free guidance.

        Args:
          y: labels (B,) or texts (B, T, C).
          null: the empty or negative text, (B, T, C) or (T, C); for classes, the null class without being named.
          image_size: side, or (height, width), in pixels.
          noise: (B, 3, H, W), to start from; replaces image_size and generator.
          generator: of the noise, drawn on the generator's device.
          steps: of the solver.
          guidance: v = v_null + guidance·(v_y − v_null); 1 is none, and half the work.
          guidance_interval: guidance acts on steps that start at t with low < t ≤ high, so never on the first.
          shift: time shift; above 1 spends more steps near noise.
          solver: "euler", or Adams–Bashforth's of order 1 to 4: "adams1" …, for which guidance acts at low < t < high.

        Returns:
          (B, 3, H, W), fp32, data range [-1, 1], not clipped.
        """
        if steps < 1:
            raise ValueError(f"steps={steps} must be at least 1.")
        if solver not in ORDERS:
            raise ValueError(f"solver={solver!r} is not known; allowed: {', '.join(ORDERS)}.")
        y = self._checked(torch.as_tensor(y, device=self.device))
        if null is None and self.text_shape is None:
            null = torch.tensor(self.num_classes)
        if null is None and guidance != 1:
            raise ValueError("guidance by text needs null=…, the encoder's output for the empty or negative prompt.")
        y_and_null = None if guidance == 1 else torch.cat([y, null.to(y).expand_as(y)])
        if noise is None:
            if image_size is None:
                raise ValueError("sample needs image_size=… or noise=….")
            size = (image_size, image_size) if isinstance(image_size, int) else image_size
            drawn_on = self.device if generator is None else generator.device
            noise = torch.randn(len(y), 3, *size, generator=generator, device=drawn_on)
        x = noise.to(self.device, torch.float32)
        times = torch.arange(steps + 1, dtype=torch.float64) / steps
        times = times / (times + (1 - times) * shift)
        starts = torch.linspace(0, 1 - 1 / steps, steps, dtype=torch.float32)  # its last bit decides at a bound
        starts = starts / (starts + (1 - starts) * shift)
        low, high = torch.tensor(guidance_interval, dtype=torch.float32)
        slopes: deque[Tensor] = deque(maxlen=ORDERS[solver])  # the newest first
        for k, (start, end) in enumerate(itertools.pairwise(times)):
            t = torch.full((len(x),), float(start), device=self.device)
            guided = low < starts[k] <= high and (solver == "euler" or starts[k] < high)
            if y_and_null is not None and guided:
                v, v_null = self(x.repeat(2, 1, 1, 1), t.repeat(2), y_and_null).chunk(2)
                v = v_null + guidance * (v - v_null)
            else:
                v = self(x, t, y)
            slopes.appendleft(v)
            weights = adams_weights(times[max(k + 1 - ORDERS[solver], 0) : k + 1].flip(0), start, end)
            x = x + sum(weight * slope for weight, slope in zip(weights.tolist(), slopes, strict=True))
        return x

    def _checked(self, y: Tensor) -> Tensor:
        """The condition, if this network takes it."""
        if self.text_shape is not None:
            if y.shape[1:] != self.text_shape:
                raise ValueError(f"texts must have shape (B, *{self.text_shape}); got {tuple(y.shape)}.")
        elif y.ndim != 1 or y.is_floating_point() or ((y < 0) | (y > self.num_classes)).any():
            raise ValueError(f"labels must be (B,) integers up to {self.num_classes}, which is none; got {y.tolist()}.")
        return y


def infer_architecture(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """The constructor's arguments, read off the names and shapes of a network's parameters."""

    def size(name: str, axis: int = 0) -> int:
        if name not in tensors:
            raise ValueError(f"these {len(tensors)} tensors are not the parameters of a DeCo: {name} is missing.")
        return tensors[name].shape[axis]

    def count(prefix: str) -> int:
        return len({name.removeprefix(prefix).split(".")[0] for name in tensors if name.startswith(prefix)})

    width = size("s_embedder.proj.weight")
    architecture = {
        "patch_size": math.isqrt(size("s_embedder.proj.weight", 1) // 3),
        "width": width,
        "depth": count("blocks."),
        "heads": width // size("blocks.0.attn.q_norm.weight"),
        "decoder_width": size("dec_net.input_proj.weight"),
        "decoder_depth": count("dec_net.res_blocks."),
    }
    if "y_embedder.embedding_table.weight" in tensors:
        return architecture | {"num_classes": size("y_embedder.embedding_table.weight") - 1}
    return architecture | {
        "text_features": size("y_embedder.proj.weight", 1),
        "text_tokens": size("y_pos_embedding", 1),
        "text_depth": count("text_refine_blocks."),
    }


class RMSNorm(nn.Module):
    """x / √mean(x²) · weight over the last axis, in fp32; the result has the input's dtype."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """(…, width) → (…, width)."""
        h = x.float()
        return (h * torch.rsqrt(h.square().mean(-1, keepdim=True) + EPSILON) * self.weight).to(x.dtype)


class Attention(nn.Module):
    """Attention with RMS-normed queries and keys: of tokens, rotated if there are angles, and of text beside them."""

    def __init__(self, width: int, heads: int, text: bool = False):
        super().__init__()
        self.heads = heads
        if text:
            self.qkv_x, self.kv_y = (nn.Linear(width, parts * width, bias=False) for parts in (3, 2))
        else:
            self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_norm, self.k_norm = RMSNorm(width // heads), RMSNorm(width // heads)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, angles: Tensor | None = None, text: Tensor | None = None) -> Tensor:
        """Tokens (B, N, D), angles (N, e/2) and text (B, T, D) → (B, N, D)."""
        q, k, v = split_heads((self.qkv if text is None else self.qkv_x)(x), 3, self.heads)
        q, k = self.q_norm(q), self.k_norm(k)
        if angles is not None:
            q, k = rotate(q, angles), rotate(k, angles)
        if text is not None:
            text_k, text_v = split_heads(self.kv_y(text), 2, self.heads)
            k, v = torch.cat([k, self.k_norm(text_k)], 2), torch.cat([v, text_v], 2)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class SwiGLU(nn.Module):
    """w2(SiLU(w1 x)·(w3 x)) with ⅔·4D hidden channels; fused, w3(SiLU(a)·b) with [a, b] = w12 x and 4D of them."""

    def __init__(self, width: int, fused: bool):
        super().__init__()
        self.fused, hidden = fused, 4 * width if fused else int(2 * 4 * width / 3)
        if fused:
            self.w12, self.w3 = nn.Linear(width, 2 * hidden, bias=False), nn.Linear(hidden, width, bias=False)
        else:
            self.w1, self.w3 = nn.Linear(width, hidden, bias=False), nn.Linear(width, hidden, bias=False)
            self.w2 = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) → (B, N, D)."""
        if self.fused:
            a, b = self.w12(x).chunk(2, -1)
            return self.w3(F.silu(a) * b)
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Block(nn.Module):
    """s ← s + gate·attn(RMS(s)(1 + scale) + shift); s ← s + gate·mlp(RMS(s)(1 + scale) + shift)."""

    def __init__(self, width: int, heads: int, fused: bool, text: bool = False):
        super().__init__()
        self.norm1, self.attn = RMSNorm(width), Attention(width, heads, text)
        self.norm2, self.mlp = RMSNorm(width), SwiGLU(width, fused)
        self.adaLN_modulation = nn.Sequential(nn.Linear(width, 6 * width))

    def forward(self, s: Tensor, c: Tensor, *context: Tensor) -> Tensor:
        """Tokens (B, N, D), modulated by c (B, D) → (B, N, D); the context (angles, text) goes to the attention."""
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.adaLN_modulation(c)[:, None].chunk(6, -1)
        s = s + gate_a * self.attn(self.norm1(s) * (1 + scale_a) + shift_a, *context)
        return s + gate_m * self.mlp(self.norm2(s) * (1 + scale_m) + shift_m)


class ResidualBlock(nn.Module):
    """q ← q + gate·mlp(LN(q)(1 + scale) + shift), modulated pixel by pixel."""

    def __init__(self, width: int):
        super().__init__()
        self.in_ln, self.mlp = nn.LayerNorm(width, EPSILON), mlp_of_two(width, width)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 3 * width))

    def forward(self, q: Tensor, condition: Tensor) -> Tensor:
        """Both (B, N, P, d) → (B, N, P, d)."""
        shift, scale, gate = self.adaLN_modulation(condition).chunk(3, -1)
        return q + gate * self.mlp(self.in_ln(q).to(q.dtype) * (1 + scale) + shift)


class PixelDecoder(nn.Module):
    """The velocity of every pixel from its query and its patch's token, without attention."""

    def __init__(self, width: int, patch_size: int, decoder_width: int, depth: int):
        super().__init__()
        self.cond_embed = nn.Linear(width, patch_size**2 * decoder_width)
        self.input_proj = nn.Linear(decoder_width, decoder_width)
        self.res_blocks = nn.ModuleList(ResidualBlock(decoder_width) for _ in range(depth))
        self.final_layer = nn.ModuleDict({"linear": nn.Linear(decoder_width, 3)})

    def forward(self, q: Tensor, s: Tensor) -> Tensor:
        """Queries (B, N, P, d) and tokens (B, N, D) → (B, N, P, 3)."""
        q, condition = self.input_proj(q), self.cond_embed(s).view(q.shape)
        for block in self.res_blocks:
            q = block(q, condition)
        return self.final_layer["linear"](F.layer_norm(q, q.shape[-1:], eps=EPSILON))


def mlp_of_two(inputs: int, width: int) -> nn.Sequential:
    """Linear–SiLU–Linear."""
    return nn.Sequential(nn.Linear(inputs, width), nn.SiLU(), nn.Linear(width, width))


def time_features(t: Tensor) -> Tensor:
    """Cosines and sines of the times (B,) at 128 frequencies 10^(−k/128): (B, 256), fp32."""
    angles = t.float()[:, None] * torch.exp(-math.log(10) * torch.arange(128, device=t.device) / 128)
    return torch.cat([torch.cos(angles), torch.sin(angles)], -1)


def wave_features(patch_size: int, device: torch.device) -> Tensor:
    """64 features of a pixel's place (a, b) ∈ [0, 1]² in its patch, a to the right, b down: (P, 64), fp32.

    Feature 8m + n is cos(π a ω_m)·cos(π b ω_n) / (1 + ω_m ω_n), ω = 0, 8/7, … 8.
    """
    omega = torch.linspace(0, 8, 8, device=device)
    waves = torch.cos(math.pi * torch.linspace(0, 1, patch_size, device=device)[:, None] * omega)
    return (waves[None, :, :, None] * waves[:, None, None, :] / (1 + omega[:, None] * omega)).reshape(-1, 64)


def rotary_angles(rows: int, columns: int, head_dim: int, x_max: float, y_max: float, device: torch.device) -> Tensor:
    """Angles of the 2-D rotary embedding: (rows·columns, head_dim/2), fp32.

    x runs from 0 to x_max along a row, y from 0 to y_max along a column. Even slots turn with x, odd ones with y.
    """
    theta = 10000.0 ** (torch.arange(head_dim // 4, device=device) * (-4.0 / head_dim))
    x = torch.linspace(0, x_max, columns, device=device).expand(rows, columns)
    y = torch.linspace(0, y_max, rows, device=device)[:, None].expand(rows, columns)
    return (torch.stack([x, y], -1).reshape(-1, 1, 2) * theta[:, None]).flatten(1)


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Turns each adjacent pair of channels (2k, 2k + 1) of (B, h, N, e) by angle k, in fp32; same dtype back."""
    a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = torch.cos(angles), torch.sin(angles)
    return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2).to(x.dtype)


def split_heads(x: Tensor, parts: int, heads: int) -> tuple[Tensor, ...]:
    """(B, N, parts·h·e) → `parts` tensors (B, h, N, e)."""
    return x.unflatten(-1, (parts, heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)


def adams_weights(times: Tensor, start: Tensor, end: Tensor) -> Tensor:
    """What a step multiplies the slopes at these times (K,) with: integrals of their Lagrange polynomials, fp64 (K,).

    Gauss's rule of two points is exact for their degrees, which are at most 3. Of one slope it is end − start.
    """
    points = (start + end) / 2 + torch.tensor([-0.5, 0.5], dtype=torch.float64) * (end - start) / math.sqrt(3)
    others = [torch.cat([times[:k], times[k + 1 :]])[:, None] for k in range(len(times))]
    values = [((points - other) / (time - other)).prod(0).mean() for time, other in zip(times, others, strict=True)]
    return torch.stack(values) * (end - start)


def to_uint8(images: Tensor) -> Tensor:
    """Images (B, 3, H, W) in [-1, 1] to bytes (B, H, W, 3) on the CPU; `.numpy()` of one is what PIL reads."""
    return ((images.float() + 1) * 127.5 + 0.5).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu()
