"""What may reading one file's pickles cost? Steps, keys that are hashed, and bytes of tensors, all counted here."""

from typing import Any

from deco_jax.errors import UsageError
from deco_jax.weights.tensors import Storage, Tensor, make_tensor, short

MAX_STEPS = 500_000  # opcodes and copied items, of one file; a tensor takes about 35
MAX_OTHER_KEYS = 5_000  # dict keys that are not text: their hashes can be made to collide
MAX_KEY = 4096  # characters
MAX_UNFOLDED = 4  # bytes of all tensors together, as a multiple of the file's …
MAX_UNFOLDED_EXTRA = 256 * 2**20  # … and these, for small files with expanded tensors


class Budget:
    """What is left of the budget of one file of so many bytes.

    Tensors can overlap and repeat, so a small file could otherwise describe any amount of memory: what counts is the
    bytes that they have together once their strides are unfolded.
    """

    def __init__(self, file_size: int):
        self._unfolded = MAX_UNFOLDED * file_size + MAX_UNFOLDED_EXTRA
        self._steps, self._other_keys = MAX_STEPS, MAX_OTHER_KEYS

    def spend(self, steps: int) -> None:
        """Takes from the steps that keep reading finite."""
        self._steps -= steps
        if self._steps < 0:
            raise UsageError(f"the pickle inside takes more than {MAX_STEPS} steps, the limit; is this a weight file?")

    def key(self, value: Any) -> Any:
        """`value`, once it may be hashed: tuples of tuples, colliding numbers, long equal texts can take for ever."""
        if type(value) in (str, bytes):
            if len(value) > MAX_KEY:
                raise UsageError(f"the key {short(value)} has {len(value)} characters; at most {MAX_KEY} are read.")
            return value
        if not isinstance(value, int | float | None):
            raise UsageError(f"a key is {short(value)}; only text and numbers can be keys.")
        self._other_keys -= 1
        if self._other_keys < 0:
            raise UsageError(f"more than {MAX_OTHER_KEYS} keys are not text, the limit; is this a weight file?")
        return value

    def tensor(self, storage: Any, dtype: Any, shape: Any, strides: Any, offset: Any) -> Tensor:
        """A tensor inside `storage`."""
        if not isinstance(storage, Storage):
            raise UsageError(f"a tensor's storage is {short(storage)}: the file is damaged.")
        tensor = make_tensor(storage, dtype, shape, strides, offset)
        self._unfolded -= tensor.nbytes
        if self._unfolded < 0:
            raise UsageError(
                "its tensors repeat their storages' bytes until they are far larger than the file (the last one has "
                f"shape {short(tensor.shape)}); call .contiguous() on expanded tensors, and save shared ones once."
            )
        return tensor
