"""Samples from an exported folder with diffusers; this file lies in that folder and needs nothing of deco_jax.

    pipe = DiffusionPipeline.from_pretrained(folder, custom_pipeline=folder, trust_remote_code=True).to("cuda")
    images = pipe(class_labels=[207, 360], guidance_scale=3.0, num_inference_steps=50).images

The network is `transformer/torch_model.py`, its weights are `model.safetensors`.
"""

from collections.abc import Sequence

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from torch import Tensor


class DeCoPipeline(DiffusionPipeline):
    """DeCo with Euler steps and classifier-free guidance in an interval of time."""

    def __init__(self, transformer: torch.nn.Module, image_size: int = 256):
        super().__init__()
        self.register_modules(transformer=transformer)
        self.register_to_config(image_size=image_size)  # the side an image has if a call does not say

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | Sequence[int] | None = None,
        *,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float = 3.0,
        guidance_interval: tuple[float, float] = (0.1, 1.0),
        shift: float = 1.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple:
        """Generates one image per label, or one per prompt.

        Args:
          class_labels: of a class-conditional network.
          prompt_embeds: for a text-conditional one, the text encoder's last hidden state (B, T, C).
          negative_prompt_embeds: the same of the empty or the negative prompt, needed with guidance.
          height, width: in pixels; the folder's image size unless given.
          num_inference_steps: of the solver.
          guidance_scale: weight of classifier-free guidance; 1 is none.
          guidance_interval: guidance acts at times low < t ≤ high; 0 is noise, 1 is data.
          shift: time shift; above 1 spends more steps near noise.
          generator: of the noise; a list has one for each image.
          latents: the noise itself, (B, 3, H, W).
          output_type: "pil", "np" (B, H, W, 3) in [0, 1], or "pt" (B, 3, H, W) in [0, 1].
          return_dict: False returns a tuple of the images alone.
        """
        if output_type not in ("pil", "np", "pt"):
            raise ValueError(f"output_type={output_type!r} is not known; allowed: pil, np, pt.")
        if (class_labels is None) == (prompt_embeds is None):
            raise ValueError("give either class_labels or prompt_embeds.")
        condition = [class_labels] if isinstance(class_labels, int) else class_labels
        condition = prompt_embeds if condition is None else condition
        if latents is None:
            shape = (len(condition), 3, height or self.config.image_size, width or self.config.image_size)
            latents = randn_tensor(shape, generator, self._execution_device, torch.float32)
        images = self.transformer.sample(
            condition,
            negative_prompt_embeds,
            noise=latents,
            steps=num_inference_steps,
            guidance=guidance_scale,
            guidance_interval=guidance_interval,
            shift=shift,
        )
        images = ((images + 1) / 2).clamp(0, 1)
        if output_type != "pt":
            images = images.permute(0, 2, 3, 1).cpu().numpy()
        if output_type == "pil":
            images = [Image.fromarray(image) for image in (images * 255).round().astype("uint8")]
        return ImagePipelineOutput(images=images) if return_dict else (images,)
