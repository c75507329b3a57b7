"""Corpus readers, store, shards, manifest, geometry, plan, runner: everything between a corpus and its tokens."""
