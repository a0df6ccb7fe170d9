"""Runs the command line: `python -m smet_compile`."""

from smet_compile.pretrain.cli import main

if __name__ == "__main__":
    main()
