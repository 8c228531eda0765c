"""A simulated XenServer pool: XAPI, its HTTP handlers, storage with changed block tracking, and the NBD server.

A stand-in for tests and the demo, run as a process (``python -m tools.xensim``); README.md says how faithful it is.
Modules import each other relatively.
"""
