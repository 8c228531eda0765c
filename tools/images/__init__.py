"""Makes guest disks for tests, the demo and benchmarks; standard library only, so that it runs before tools/setup.

``disk`` knows raw files and change bitmaps, ``ext4`` a filesystem without mounting it, ``guest`` what a small guest
holds and does in a day, ``debian`` a whole Debian guest, ``synthetic`` scattered data without a filesystem.
"""
