"""Building the file index of a restore point from its guest: ``build.index_point`` is the way in."""
