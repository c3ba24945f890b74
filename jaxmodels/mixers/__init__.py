"""Sequence mixers, one per file; `registry.MIXERS` names them."""
