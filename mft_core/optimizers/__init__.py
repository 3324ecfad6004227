"""What moves weights, adapters and mask scores alike: the choice of optimizer, and AdamW in 8 bits."""
