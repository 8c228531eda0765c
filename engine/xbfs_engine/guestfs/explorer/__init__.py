"""Readers of ext2/3/4, NTFS, FAT, exFAT and btrfs: fs_explorer's parsers behind our seam. Nothing else imports them.

Of fs_explorer only its pure Python runs: the compiled helper in its wheel is never loaded.
"""
