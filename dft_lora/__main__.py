"""`python -m dft_lora`: the command line, as `accelerate launch -m` needs it."""

from .cli import main

main()
