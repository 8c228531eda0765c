"""Sealed bytes: wire encoding, compression, authenticated encryption, keys. Pure: no I/O, no clock."""
