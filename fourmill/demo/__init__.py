"""The offline demonstration: small checkpoints trained on `fourmill.scenes`, and the run that uses them all."""
