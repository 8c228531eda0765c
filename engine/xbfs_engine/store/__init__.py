"""The repository: packs, index, verified reads of chunks."""
