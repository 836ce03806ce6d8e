"""Digits, photos, scenes and emoji that come with packages, small models of them, and what trained those.

No module outside this room imports it: its parts are found by their names, as anyone else's are.
"""
