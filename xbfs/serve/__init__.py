"""Programs that export files of the live mount to hypervisors: nbdkit and nfs-ganesha, run as children."""
