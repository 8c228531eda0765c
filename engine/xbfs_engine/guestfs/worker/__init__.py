"""Readers of guest filesystems in sandboxed processes of their own, so that a hostile disk meets no keys and no others.

``client`` is the way in. A *zygote* has all readers imported and forks a *worker* for each restore point in use. The
worker gets two sockets: requests come over one, and blocks of the disks over the other. Decided in docs/adr/0005.
"""
