"""Readers of guest filesystems. Pure: they see only a BlockSource. Images are hostile, so they run in workers."""
