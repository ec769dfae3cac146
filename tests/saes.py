"""Small sparse autoencoders with random weights, for all tests."""

import torch

from lens_neurons.topk_sae import TopKSAE


def make_sae(seed: int = 0, d_in: int = 6, latents: int = 10, k: int = 3, **changes) -> TopKSAE:
    """Return a top-k autoencoder of layer 1 whose weights and biases are all random."""
    draw = torch.Generator().manual_seed(seed)
    shapes = {"w_enc": (latents, d_in), "b_enc": (latents,), "w_dec": (latents, d_in), "b_dec": (d_in,)}
    weights = {name: torch.randn(shape, generator=draw) for name, shape in shapes.items()}
    return TopKSAE(**weights, k=k, **{"layer": 1, **changes})
