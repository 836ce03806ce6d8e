"""Digits and photos that come with packages, small models of them, and what trained those."""
