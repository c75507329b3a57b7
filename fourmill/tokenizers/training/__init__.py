"""Training a tokenizer: `run` is the job, `fitting` its loop, `objective` what it minimises."""
