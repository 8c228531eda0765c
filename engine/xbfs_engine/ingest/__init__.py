"""From a source's extents to a committed restore point."""
