"""`python -m deco_jax` is the same as `deco`."""

from deco_jax.cli import main

if __name__ == "__main__":
    main()
