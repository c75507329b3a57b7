"""What tokens keep: `run` compares with labels and truth, `decode` writes one sample out; `sources` is the table."""
