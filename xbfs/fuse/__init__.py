"""The FUSE adapter: translates kernel requests to xbfs.vfs and maps errors, nothing else."""
