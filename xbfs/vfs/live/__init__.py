"""The live filesystem: sessions as directories of real files, in which stubs stand for overlay disks (ADR 0008)."""
