"""Restores files of a guest with all that is known of them, into a directory or as a tar stream.

`Source` says what is wanted, `restore_files` reads it from a `Guest` and gives it to a `Target`. Guests are hostile:
what they say is bounded, and nothing they say leads a target out of its directory.
"""
