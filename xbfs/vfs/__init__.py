"""How restore points look as a tree: names, inodes, handles, read-ahead."""
