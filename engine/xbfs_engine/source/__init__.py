"""Where disks are read from: local images, CBT bitmaps."""
