"""One file per tab: its components and events."""
