"""``python -m g3dswap``."""

from g3dswap.cli import main

if __name__ == "__main__":
    main(prog_name="g3dswap")
