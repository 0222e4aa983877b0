"""What lies beside the weights of an exported folder so that diffusers can sample from it."""

import json
from importlib import resources

PIPELINE_FILES = {"pipeline.py": "pipeline.py", "transformer/torch_model.py": "torch_model.py"}  # ours by place there


def diffusers_files(image_size: int, text_encoder: str = "", text_encoder_dtype: str = "bfloat16") -> dict[str, str]:
    """The files by their path in the folder; `model.safetensors` in the folder itself completes them.

    Neither torch nor diffusers is needed to write them.

    Args:
      image_size: side of the images the network was trained on, which the pipeline generates unless told otherwise.
      text_encoder: that it listened to, a name or a folder; "" = it is told a class.
      text_encoder_dtype: of the encoder.
    """
    index = {
        "_class_name": ["pipeline", "DeCoPipeline"],
        "_diffusers_version": "0.30.0",
        "image_size": image_size,
        "transformer": ["torch_model", "DeCo"],
    }
    if text_encoder:
        index |= {"text_encoder_name": text_encoder, "text_encoder_dtype": text_encoder_dtype}
    here = resources.files("deco_jax.export")
    files = {place: (here / name).read_text(encoding="utf-8") for place, name in PIPELINE_FILES.items()}
    return files | {"model_index.json": json.dumps(index, indent=2) + "\n"}
