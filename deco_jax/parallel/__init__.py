"""How a run is laid out over devices and hosts."""
