"""Fine-tuning of the encoder as a vision network: classification and dense heads on RGB pixels."""
