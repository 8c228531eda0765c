"""Check and verify a repository."""
