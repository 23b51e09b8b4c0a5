"""A run on disk: its folder, atomic writing of folders, provenance, plots."""
