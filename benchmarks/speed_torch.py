"""Training the project's own PyTorch DeCo with the losses of our step: what a careful user of PyTorch writes.

Products in bf16 by autocast over fp32 parameters, fused AdamW, foreach EMA, the teacher's weights in bf16. Letters as
in deco_jax/export/torch_model.py; S is an image's side.
"""

import contextlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from ml_collections import ConfigDict
from torch import Tensor, nn

from deco_jax.diffusion.frequency import dct_matrix, frequency_weights
from deco_jax.encoders.dinov2.model import IMAGENET_MEAN, IMAGENET_STD
from deco_jax.export.torch_model import DeCo
from deco_jax.pretrained import names
from deco_jax.weights.translate import to_torch

# Names of the teacher below → our paths (see deco_jax/weights/translate.py).
TEACHER = {
    "cls_token": "class_token",
    "pos_embed": "positions",
    "patch_embed.weight": "patch_embedding/kernel",
    "patch_embed.bias": "patch_embedding/bias",
    "blocks.{i}.norm1.weight": "blocks/attention_norm/scale",
    "blocks.{i}.norm1.bias": "blocks/attention_norm/bias",
    "blocks.{i}.qkv.weight": "blocks/attention/qkv/kernel",
    "blocks.{i}.qkv.bias": "blocks/attention/qkv/bias",
    "blocks.{i}.proj.weight": "blocks/attention/out/kernel",
    "blocks.{i}.proj.bias": "blocks/attention/out/bias",
    "blocks.{i}.scale1": "blocks/attention_scale",
    "blocks.{i}.norm2.weight": "blocks/mlp_norm/scale",
    "blocks.{i}.norm2.bias": "blocks/mlp_norm/bias",
    "blocks.{i}.mlp.0.weight": "blocks/mlp/in/kernel",
    "blocks.{i}.mlp.0.bias": "blocks/mlp/in/bias",
    "blocks.{i}.mlp.2.weight": "blocks/mlp/down/kernel",
    "blocks.{i}.mlp.2.bias": "blocks/mlp/down/bias",
    "blocks.{i}.scale2": "blocks/mlp_scale",
    "norm.weight": "norm/scale",
    "norm.bias": "norm/bias",
}
YCBCR = [[0.299, 0.587, 0.114], [-0.168736, -0.331264, 0.5], [0.5, -0.418688, -0.081312]]


class DINOv2Block(nn.Module):
    """s ← s + λ₁·Attention(LN(s)); s ← s + λ₂·MLP(LN(s))."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width, 1e-6), nn.LayerNorm(width, 1e-6)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.scale1, self.scale2 = nn.Parameter(torch.ones(width)), nn.Parameter(torch.ones(width))

    def forward(self, s: Tensor) -> Tensor:
        """(B, N, D) → (B, N, D)."""
        q, k, v = self.qkv(self.norm1(s)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        s = s + self.scale1 * self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return s + self.scale2 * self.mlp(self.norm2(s))


class DINOv2(nn.Module):
    """The teacher (deco_jax/encoders/dinov2/model.py, without registers), for images of one size."""

    def __init__(self, module: Any, tensors: Mapping[str, np.ndarray], side: int, dtype: torch.dtype):
        super().__init__()
        width, self.rows, self.patch = module.width, side // module.image_patch, module.patch_size
        self.blocks = nn.ModuleList(DINOv2Block(width, module.heads) for _ in range(module.depth))
        self.patch_embed = nn.Conv2d(3, width, self.patch, self.patch)
        self.norm = nn.LayerNorm(width, 1e-6)
        values = {name: torch.tensor(np.asarray(value, np.float32)) for name, value in tensors.items()}
        first, table = values.pop("cls_token"), values.pop("pos_embed")
        filters = values["patch_embed.weight"].unflatten(1, (self.patch, self.patch, 3))
        values["patch_embed.weight"] = filters.permute(0, 3, 1, 2).contiguous()
        self.load_state_dict(values)
        grid = table[:, 1:].unflatten(1, (module.table_side,) * 2).permute(0, 3, 1, 2)
        scale = (self.rows + module.position_offset) / module.table_side
        if self.rows != module.table_side:
            grid = F.interpolate(grid, scale_factor=(scale, scale), mode="bicubic")
        # Positions are the same in every step, so they are made once.
        self.register_buffer("positions", grid.flatten(2).transpose(1, 2).contiguous())
        self.register_buffer("first", first + table[:, :1])
        self.to(dtype).requires_grad_(False)
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(3, 1, 1))
        self.register_buffer("deviation", torch.tensor(IMAGENET_STD).view(3, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        """RGB (B, 3, S, S) in [-1, 1] → features of the patches (B, N, D), fp32."""
        normal = ((images + 1) / 2 - self.mean) / self.deviation
        x = F.interpolate(normal, size=(self.rows * self.patch,) * 2, mode="bicubic")
        s = self.patch_embed(x.to(self.first.dtype)).flatten(2).transpose(1, 2) + self.positions
        s = torch.cat([self.first.expand(len(s), -1, -1), s], 1)
        for block in self.blocks:
            s = block(s)
        return self.norm(s[:, 1:]).float()


class FrequencyLoss(nn.Module):
    """Mean of weight·DCT(YCbCr(error))² over 8×8 blocks; the transform of a block as one 64×64 product."""

    def __init__(self, weights_3x8x8: np.ndarray):
        super().__init__()
        dct = np.kron(dct_matrix(), dct_matrix())
        self.register_buffer("dct", torch.tensor(dct, dtype=torch.float32))  # (frequency, pixel), row-major
        self.register_buffer("ycbcr", torch.tensor(YCBCR))
        self.register_buffer("weights", torch.tensor(weights_3x8x8, dtype=torch.float32).view(3, 1, 64))

    def forward(self, error: Tensor) -> Tensor:
        """(B, 3, S, S) fp32 → a scalar."""
        colours = torch.einsum("yc,bchw->byhw", self.ycbcr, error)
        blocks = colours.unflatten(3, (-1, 8)).unflatten(2, (-1, 8)).transpose(3, 4).reshape(*error.shape[:2], -1, 64)
        return (self.weights * (blocks @ self.dct.T).square()).mean()


class Training:
    """One network in training; `compiled` and eager steps share its parameters.

    Args:
      config: of the run.
      params: ours at the start, numpy; "network" and perhaps "projector".
      teacher: (our module, its parameters as numpy) or None.
      device: "cuda" or "cpu".
    """

    def __init__(self, config: ConfigDict, params: Any, teacher: tuple[Any, Any] | None, device: str):
        self.config, self.device = config, device
        self.dtype = getattr(torch, config.model.dtype)
        tensors = to_torch(names.DECO, params["network"])
        self.network = DeCo.from_state_dict({name: torch.tensor(value) for name, value in tensors.items()}).to(device)
        self.projector = self.teacher = None
        modules: list[nn.Module] = [self.network]
        if teacher is not None:
            width, features = config.model.width, config.loss.alignment_features
            layers = nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, features)
            self.projector = nn.Sequential(*layers)
            theirs = to_torch(names.PROJECTOR, params["projector"])
            values = {name.removeprefix("proj.0."): torch.tensor(value) for name, value in theirs.items()}
            self.projector.load_state_dict(values)
            modules.append(self.projector.to(device))
            self.teacher = DINOv2(teacher[0], to_torch(TEACHER, teacher[1]), config.data.image_size, self.dtype)
            self.teacher.to(device)
            # A hook, since the exported network has no use for tokens on the way.
            self.network.blocks[config.loss.alignment_layer - 1].register_forward_hook(self._keep)
        weights = frequency_weights(
            config.loss.frequency_quality, config.loss.frequency_mode, config.loss.frequency_gamma
        )
        self.frequency = FrequencyLoss(weights).to(device)
        o = config.optimizer
        self.parameters = [p for module in modules for p in module.parameters()]
        self.optimizer = torch.optim.AdamW(
            self.parameters, o.lr, (o.beta1, o.beta2), o.eps, weight_decay=o.weight_decay, fused=True
        )
        self.averaged = list(self.network.parameters())
        self.ema = [p.detach().clone() for p in self.averaged]

    def _keep(self, module: nn.Module, inputs: Any, tokens: Tensor) -> None:
        self.tokens = tokens

    def loss(self, images: Tensor, y: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """Of images (B, 3, S, S) uint8, labels already dropped where they are to be, times (B,) and noise as images."""
        clean = images.float() / 127.5 - 1
        times = t[:, None, None, None]
        x, v = times * clean + (1 - times) * noise, clean - noise
        features = projected = None
        if self.teacher is not None:
            with torch.no_grad():
                features = self.teacher(clean)
        with self._autocast():
            v_hat = self.network(x, t, y)
            if self.teacher is not None:
                projected = self.projector(self.tokens)
        return self.losses(v_hat, v, projected, features)

    def losses(self, v_hat: Tensor, v: Tensor, projected: Tensor | None, features: Tensor | None) -> Tensor:
        """Flow matching's, the frequency loss and REPA, in fp32."""
        error, weights = v_hat - v, self.config.loss
        loss = error.square().mean() + weights.frequency_weight * self.frequency(error)
        if projected is not None:
            cosine = F.cosine_similarity(projected.float(), features, dim=-1)
            loss = loss + weights.alignment_weight * (1 - cosine).mean()
        return loss

    def _autocast(self) -> contextlib.AbstractContextManager:
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device, self.dtype)

    def draws(self, y: Tensor, shape: torch.Size) -> tuple[Tensor, Tensor, Tensor]:
        """(labels with some dropped, times, noise)."""
        t = torch.sigmoid(torch.randn(len(y), device=self.device))
        dropped = torch.rand(len(y), device=self.device) < self.config.flow.null_probability
        return torch.where(dropped, self.config.model.num_classes, y), t, torch.randn(shape, device=self.device)

    def step(self, loss: Any, images: Tensor, y: Tensor) -> Tensor:
        """A whole training step with `loss`, the method above or what was compiled of it."""
        value = loss(images, *self.draws(y, images.shape))
        value.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        decay = self.config.ema.decay
        torch._foreach_lerp_(self.ema, [p.detach() for p in self.averaged], 1 - decay)
        return value


class Compiled:
    """`training.loss` by torch.compile: whole, or by blocks, which are compiled once for all, much sooner done.

    By blocks, `on` puts what was compiled in the place of the modules' own methods, and `off` takes it away.
    """

    def __init__(self, training: Training, by_blocks: bool):
        self.training, self.loss = training, training.loss
        self.parts: list[tuple[Any, str, Any]] = []  # (object, its method's name, what replaces that)
        if not by_blocks:
            self.loss = torch.compile(training.loss, dynamic=False)
            return
        teacher = [] if training.teacher is None else list(training.teacher.blocks)
        for module in (*training.network.blocks, training.network.dec_net, *teacher):
            self.parts.append((module, "forward", torch.compile(module.forward, dynamic=False)))
        self.parts.append((training, "losses", torch.compile(training.losses, dynamic=False)))

    def on(self) -> None:
        """From now on the training is by what was compiled."""
        for owner, name, replacement in self.parts:
            setattr(owner, name, replacement)

    def off(self) -> None:
        """From now on it is eager."""
        for owner, name, _ in self.parts:
            owner.__dict__.pop(name, None)
