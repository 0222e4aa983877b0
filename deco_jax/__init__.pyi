from deco_jax.config import build_model as build_model
from deco_jax.encoders.text import load_text_encoder as load_text_encoder
from deco_jax.pretrained.load import load_pretrained as load_pretrained
from deco_jax.sampling.sample import sample as sample
from deco_jax.version import __version__ as __version__
