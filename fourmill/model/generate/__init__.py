"""Any-to-any generation with a trained 4M: `generate` follows a plan of `Target`s.

plan.py        what to generate and how; defaults
generate.py    grids in passes, texts token by token, guidance, chaining
contexts.py    what the encoder is shown; its outputs, kept while they hold
cache.py       text decoding with kept keys and values
sampling.py    top-k, top-p, temperature, draws
schedules.py   cells decided and temperature at each step
names.py       `depth` for `tok_depth@224`
tokenizers.py  the tokenizers that belong to a checkpoint
command/       `fourmill generate`: files in, pictures and tokens out
"""
