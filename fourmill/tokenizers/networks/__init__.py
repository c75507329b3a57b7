"""Networks of tokenizers: encoder, quantizer and decoder, with ml-4m's names of weights."""
