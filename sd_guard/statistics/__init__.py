"""What is measured on a latent while it is being sampled, one file per family."""
