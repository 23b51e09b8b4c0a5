"""One file per tab: its components and its events."""
