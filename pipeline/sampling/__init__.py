"""Images from a trained model."""
