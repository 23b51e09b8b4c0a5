"""The page: `python app.py [RUN_DIR ...]`, which is `dft-lora app`; and the entry of a Hugging Face Space."""

import sys

from dft_lora.cli import main

if __name__ == "__main__":
    main(["app", *sys.argv[1:]])
