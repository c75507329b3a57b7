"""Fourmill: pseudo-label, tokenize and train 4M on image-text corpora. Importing it loads neither torch nor Ray."""

__version__ = "0.1.0"
