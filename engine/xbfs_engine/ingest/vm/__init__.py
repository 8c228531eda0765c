"""The cycle that makes a restore point of a VM on a pool: snapshot, changed blocks, read, commit, let go."""
