"""XBFS shows restore points to people and hypervisors: views, names, the FUSE mount and the command line."""

__version__ = "0.1.0"
