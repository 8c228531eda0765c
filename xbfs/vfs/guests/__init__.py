"""Guests' own files in the tree: ``files/`` and ``root/`` of each restore point.

What is known of volumes and files comes from a ``Guest`` (xbfs_engine.guestfs.guest), whose parsers run elsewhere.
"""
