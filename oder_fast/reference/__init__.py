"""The definition of every operator, in plain PyTorch: any device, any float dtype, differentiable."""
