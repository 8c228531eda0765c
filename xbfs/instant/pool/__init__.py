"""Instant recovery on a XenServer / XCP-ng pool: an NFS SR of a session, the VM on it, its way onto another SR."""
