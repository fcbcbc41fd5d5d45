"""Corpora: preparation, tokenizers, and the loader of batches."""
