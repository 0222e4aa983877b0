"""What is carried from one format of weights to another?"""

import dataclasses
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from deco_jax.pretrained.infer import ARCHITECTURES
from deco_jax.weights import translate


@dataclasses.dataclass
class Bundle:
    """A network's weights as our parameters in numpy, and what is known of them. None: missing, or not asked for."""

    config: ConfigDict  # of the run; defaults where the source does not say
    ema: Any = None
    online: Any = None
    projector: Any = None
    moments: tuple[int, Any, Any] | None = None  # updates done, first and second moments of {"network", "projector"}
    step: int = 0
    origin: str = ""  # path of the source
    fingerprint: str | None = None  # of the data, if the source is a run of ours
    frozen: dict[str, str] = dataclasses.field(default_factory=dict)  # hashes of frozen networks, if the source says
    decisive: tuple[str, ...] = ()  # fields that training on must not change, if it is not a run of ours

    @property
    def table(self) -> dict[str, str]:
        """Names of the network's parameters."""
        return ARCHITECTURES[self.config.model.kind][0]

    def tensors(self, which: str) -> dict[str, np.ndarray]:
        """The "ema" or "online" weights under PyTorch's names, in the order of PyTorch's modules."""
        return translate.to_torch(self.table, self.ema if which == "ema" else self.online)

    @property
    def parameters(self) -> int:
        """How many the network has."""
        return sum(x.size for x in jax.tree.leaves(self.online if self.ema is None else self.ema))

    def __str__(self) -> str:
        model = self.config.model
        more = "" if self.moments is None else f", optimiser state after {self.moments[0]} updates"
        more += "" if self.projector is None else ", projector"
        return f"{model.kind} {model.width}×{model.depth}, {self.parameters:,} parameters, step {self.step}{more}"
