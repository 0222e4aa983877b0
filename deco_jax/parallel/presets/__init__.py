"""Mesh presets, a file each: `mesh.preset` names one of them."""
