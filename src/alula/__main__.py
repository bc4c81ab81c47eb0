"""``python -m alula``, which launchers such as torchrun and accelerate start, is the command ``alula``."""

from alula.cli.app import main

main()
