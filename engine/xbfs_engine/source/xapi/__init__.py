"""XenServer and XCP-ng pools: sessions, trust, transfers, what is on a pool and what we leave there.

The only package that knows XAPI. Nothing is imported here: take what you need from its modules.
"""
