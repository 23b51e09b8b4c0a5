"""The embedded base: its weights, its tokenizer, and the script that made them (`build.py`)."""

from pathlib import Path

TINY_DIR = Path(__file__).parent
