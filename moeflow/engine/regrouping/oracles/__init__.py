"""Exact and rival answers to regrouping: they prove the published figures.

Know routes as bit sets. Know nothing of the engine. Only scripts and tests import them.
"""
