"""A run as files: the folder, folders written whole or not at all, where a number came from."""
