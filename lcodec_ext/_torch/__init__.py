"""What every part that uses PyTorch shares: batches, samples, losses, predictions, modes."""
