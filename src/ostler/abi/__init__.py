"""Layouts and numbers shared with the kernel. Nothing here opens, maps or calls anything."""
