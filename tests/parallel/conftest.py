"""What tests of several layouts share."""

import pytest

from deco_jax.parallel import mesh as meshes


@pytest.fixture(scope="module")
def split_everything():
    """Also parameters of a tiny network."""
    small, meshes.SMALL = meshes.SMALL, 0
    yield
    meshes.SMALL = small
