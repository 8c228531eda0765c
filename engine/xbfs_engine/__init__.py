"""The XBFS engine: turns changed blocks of virtual disks into restore points and back.

Knows nothing of FUSE or of the command line. Layers, high to low: ingest | restore | maintain, catalog | source,
store, storage | codec | formats, core.
"""
