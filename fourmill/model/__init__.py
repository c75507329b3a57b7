"""4M: masking, network, loader, training and prediction."""
