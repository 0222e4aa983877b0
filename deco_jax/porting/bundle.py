"""What is carried from one format of weights to another?"""

import dataclasses
from typing import Any

import jax
from ml_collections import ConfigDict

from deco_jax.pretrained.infer import ARCHITECTURES


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
    data: dict[str, Any] = dataclasses.field(default_factory=dict)  # what a checkpoint of ours knows of its images
    assumed: tuple[str, ...] = ()  # what the source does not say, see `Pretrained`
    decisive: tuple[str, ...] = ()  # fields that training on must not change, if it is not a run of ours

    @property
    def table(self) -> dict[str, str]:
        """Names of the network's parameters."""
        return ARCHITECTURES[self.config.model.kind][0]

    @property
    def weights(self) -> str:
        """ "ema", or "online" if that is all there is."""
        return "online" if self.ema is None else "ema"

    @property
    def parameters(self) -> int:
        """How many the network has."""
        return sum(x.size for x in jax.tree.leaves(getattr(self, self.weights)))

    def __str__(self) -> str:
        model = self.config.model
        more = "" if self.moments is None else f", optimiser state after {self.moments[0]} updates"
        more += "" if self.projector is None else ", projector"
        size = f"{model.kind} {model.width}×{model.depth}, {self.parameters:,} parameters"
        return f"{size}, trained in {model.dtype}, step {self.step}{more}"
