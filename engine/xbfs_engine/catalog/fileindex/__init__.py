"""The file index of restore points: which files a point's volumes hold, kept apart from the point and rebuildable.

``segment`` and ``root`` are the bytes, ``indexes`` finds and reads them, ``search``, ``history`` and ``compare`` answer
questions. Building one from a guest is ``ingest.fileindex``'s.
"""
