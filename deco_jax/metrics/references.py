"""What are generated images compared with? Statistics of real ones: files of the ADM suite, and of `deco stats`."""

import dataclasses
import hashlib
import io
import json
import zipfile
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from deco_jax import storage
from deco_jax.encoders.features import FeatureNetwork
from deco_jax.errors import UsageError
from deco_jax.storage import AnyPath

Gaussian = tuple[np.ndarray, np.ndarray]  # mean (D,), covariance (D, D); float64


@dataclasses.dataclass(frozen=True)
class Reference:
    """Statistics of real images, as one feature network sees them."""

    network: str
    pool: Gaussian
    spatial: Gaussian | None = None  # Inception's, for sFID
    vectors: np.ndarray | None = None  # (K, D) fp32, for precision, recall and KID
    digest: str | None = None  # of the network's weights; None = the file does not say
    count: int | None = None  # of the images; None likewise
    image_size: tuple[int, int] | None = None  # height, width; None likewise
    source: str = ""  # what the images are
    has_images: bool = False  # the file holds images, of which vectors can be made
    images_crc32: int = 0  # of these

    @property
    def hash(self) -> str:
        """Of all that metrics are computed with: 16 hexadecimal digits."""
        digest = hashlib.sha256()
        for array in (*self.pool, *(self.spatial or ())):
            digest.update(np.ascontiguousarray(array, np.float64))
        if self.vectors is not None:
            digest.update(np.ascontiguousarray(self.vectors, np.float32))
        elif self.has_images:
            digest.update(f"images {self.images_crc32:08x}".encode())
        return digest.hexdigest()[:16]


def read_reference(name: str, network: FeatureNetwork) -> Reference:
    """The statistics for a feature network, of a file of the ADM suite (mu, sigma, mu_s, sigma_s, arr_0) or of ours.

    Args:
      name: NAME.npz, or the folder that `deco stats` wrote; on this machine or in a bucket.
      network: whose features are compared.

    Raises:
      UsageError: there is none, it is damaged, or of another network or of other weights.
    """
    path = storage.to_path(name)
    with storage.reading(path):
        if storage.retried(f"looking for {path}", path.is_dir):
            path = path / "reference.npz"
        if not storage.retried(f"looking for {path}", path.exists):
            raise UsageError(
                f"{path} does not exist; `deco stats` makes such a file, docs/evaluate.md says where others are."
            )
        local = storage.local_copy(path)
    try:
        if not zipfile.is_zipfile(local):
            raise UsageError(f"{path} is no reference: it is no .npz, or a truncated one.")
        with np.load(local, allow_pickle=False) as file:
            return _read(file, f"{path}", network)
    except UsageError:
        raise
    except (zipfile.BadZipFile, zlib.error, ValueError, KeyError, EOFError, OSError) as error:
        raise UsageError(f"{path} is no reference, or is damaged ({type(error).__name__}: {error}).") from error


def _read(file: Any, path: str, network: FeatureNetwork) -> Reference:
    meta = json.loads(str(file["meta"])) if "meta" in file else {}
    if not isinstance(meta, dict) or not isinstance(meta.get("networks", {}), dict):
        raise UsageError(f"{path} is of another program: its array meta is not what `deco stats` writes.")
    start = f"{network.name}/" if f"{network.name}/mu" in file else ""
    if not start and (network.name != "inception" or "mu" not in file):
        networks = sorted(meta.get("networks", {})) or (["inception"] if "mu" in file else [])
        holds = f"statistics of {', '.join(networks)}" if networks else f"the arrays {', '.join(file.files[:8])}"
        raise UsageError(f"{path} has no statistics of {network.name}; it holds {holds}.")
    digest = meta.get("networks", {}).get(network.name)
    if digest not in (None, network.digest):
        raise UsageError(
            f"{path} has statistics of {network.name} with the weights {digest}; those here are {network.digest}."
        )
    spatial = None
    if "spatial" in network.sizes and f"{start}mu_s" in file:
        spatial = _gaussian(file, path, start, "_s", network.sizes["spatial"])
    vectors = None
    if f"{network.name}/pool" in file:
        vectors = _checked(file, path, f"{network.name}/pool", (None, network.sizes["pool"]))
    shape = _shape(file, "arr_0") if "arr_0" in file else None
    size = meta.get("image_size") or (shape[1:3] if shape is not None and len(shape) == 4 else None)
    return Reference(
        network=network.name,
        pool=_gaussian(file, path, start, "", network.sizes["pool"]),
        spatial=spatial,
        vectors=vectors,
        digest=digest,
        count=meta.get("images"),
        image_size=None if size is None else (int(size[0]), int(size[1])),
        source=meta.get("source", path),
        has_images=shape is not None,
        images_crc32=0 if shape is None else file.zip.getinfo("arr_0.npy").CRC,
    )


def _shape(file: Any, name: str) -> tuple[int, ...]:
    """Of an array of an .npz, which may be larger than the memory."""
    with file.zip.open(f"{name}.npy") as member:
        version = np.lib.format.read_magic(member)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        return read(member)[0]


def _gaussian(file: Any, path: str, start: str, end: str, size: int) -> Gaussian:
    mean = _checked(file, path, f"{start}mu{end}", (size,)).astype(np.float64)
    covariance = _checked(file, path, f"{start}sigma{end}", (size, size)).astype(np.float64)
    scale = np.abs(covariance).max()
    if np.abs(covariance - covariance.T).max() > 1e-5 * scale or (np.diag(covariance) < -1e-5 * scale).any():
        raise UsageError(f"{path}: {start}sigma{end} is no covariance; it is not symmetric, or has negative variances.")
    return mean, covariance


def _checked(file: Any, path: str, name: str, shape: Sequence[int | None]) -> np.ndarray:
    """An array of numbers that are finite, of that shape; None fits any length."""
    if name not in file:
        raise UsageError(f"{path} lacks the array {name}.")
    array = file[name]
    wanted = ", ".join("any" if side is None else str(side) for side in shape)
    if len(array.shape) != len(shape) or any(w not in (None, s) for w, s in zip(shape, array.shape, strict=True)):
        raise UsageError(f"{path}: {name} has the shape {array.shape}; the network's features need ({wanted}).")
    if array.dtype.kind != "f" or not np.isfinite(array).all():
        raise UsageError(f"{path}: {name} must hold finite floating-point numbers; it is {array.dtype}.")
    return array


def write_reference(path: AnyPath, references: Sequence[Reference]) -> None:
    """Writes statistics of the same images, one for each network; Inception's under the ADM suite's names."""
    arrays: dict[str, Any] = {}
    for reference in references:
        own = dict(zip(("mu", "sigma"), reference.pool, strict=True))
        if reference.spatial is not None:
            own |= dict(zip(("mu_s", "sigma_s"), reference.spatial, strict=True))
        start = "" if reference.network == "inception" else f"{reference.network}/"
        arrays |= {f"{start}{name}": value for name, value in own.items()}
        arrays[f"{reference.network}/pool"] = reference.vectors
    first = references[0]
    meta = {
        "networks": {reference.network: reference.digest for reference in references},
        "images": first.count,
        "image_size": first.image_size,
        "source": first.source,
    }
    content = io.BytesIO()
    np.savez(content, **arrays, meta=np.array(json.dumps(meta)))
    storage.write_bytes(path, content.getvalue())
