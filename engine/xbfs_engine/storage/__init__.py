"""Named write-once blobs: the Storage protocol and its backends."""
