"""Open the page: `python app.py [RUN_DIR ...]` is the same as `dft-lora app`. A Space starts here."""

import sys

from dft_lora.cli import main

if __name__ == "__main__":
    main(["app", *sys.argv[1:]])
