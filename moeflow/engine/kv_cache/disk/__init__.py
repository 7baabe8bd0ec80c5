"""Disk: kept keys and values in files, saved by hand or written before they leave, and read back.

Knows runs, trees, room and files. Knows nothing of sequences or of who waits. `engine/` imports it.
"""
